"""Turn a training checkpoint into an ordinary Hugging Face model that stock `transformers` loads.

uv run python scripts/convert_dcp_to_hf.py --checkpoint outputs/tiny/checkpoint --output_dir models/tiny
"""

import argparse
from pathlib import Path

import torch
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama_mimi.checkpoint import find_step, load_model_state
from llama_mimi.codec import DTYPES
from llama_mimi.errors import run_cli
from llama_mimi.hf import model_args, save_folder
from llama_mimi.hub import load_pretrained
from llama_mimi.run_record import find_run_record

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: audio-to-audio
tags: [speech-language-model, mimi]
---

# {name}

A speech language model: a plain Llama decoder over flattened Mimi codec tokens (arXiv 2509.14882).

| | |
|---|---|
| parameters | {parameters:,} |
| codec | `{codec}` |
| quantizer levels | {num_quantizers} |
| vocabulary | {vocab_size:,} |
| converted from | `{step}` |
| precision | {dtype} |

A clip is `<|begin_of_text|><audio><c_0>...<c_{last_level}>...</audio>`, frame by frame. Load it with
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`; continue speech with `inference.py` of
Llama-Mimi.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder (newest step) or one step")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the Hugging Face model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the saved weights")
    flags = parser.parse_args()

    step, incomplete = find_step(flags.checkpoint)
    for path in incomplete:
        print(f"note: '{path}' is incomplete (its saving was cut off); reading the older '{step}'")
    record = find_run_record(flags.checkpoint)
    config = load_pretrained(LlamaConfig, str(record), what="run record")
    tokenizer = load_pretrained(AutoTokenizer, str(record), what="tokenizer")

    args = model_args(config)
    state = Llama3StateDictAdapter(args, None).to_hf(load_model_state(step, args))
    dtype = DTYPES[flags.dtype]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # assign: the meta parameters become the loaded ones; a tied lm_head is the embedding and not in the state
    missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) == tied and not unexpected, (missing, unexpected)

    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_k=30,
    )
    model.config.dtype = dtype
    save_folder(flags.output_dir, model, tokenizer)
    card = MODEL_CARD.format(
        name=flags.output_dir.name,
        parameters=model.num_parameters(),
        codec=config.codec,
        num_quantizers=config.num_quantizers,
        last_level=config.num_quantizers - 1,
        vocab_size=config.vocab_size,
        step=step,
        dtype=flags.dtype,
    )
    (flags.output_dir / "README.md").write_text(card)
    print(f"{step} -> {flags.output_dir} ({model.num_parameters():,} parameters, {flags.dtype})")


if __name__ == "__main__":
    run_cli(main)
