"""Prepare a Hugging Face Llama for training, and convert a training checkpoint to a Hugging Face model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama_mimi.audio.mimi import DEFAULT_CODEC, DTYPES, Precision, load_codec_config, local_codec
from llama_mimi.checkpoint.architectures import load_config
from llama_mimi.checkpoint.dcp import find_step, load_model_state
from llama_mimi.checkpoint.huggingface import save_folder
from llama_mimi.checkpoint.run_record import find_run_record
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.hub import load_pretrained
from llama_mimi.tokens.units import SPECIAL_ROLES, VocabularyKind, audio_tokenizer, extend_tokenizer, has_text

MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: audio-to-audio
tags: [speech-language-model, mimi]
---

# {name}

A speech language model: {description}.

| | |
|---|---|
| parameters | {parameters:,} |
| codec | `{codec}` |
| quantizer levels | {num_quantizers} |
| vocabulary | {vocab_size:,} |
| converted from | `{step}` |
| precision | {dtype} |

{usage}
"""

JOB_CONFIG = "job_config.json"  # of a run, in its folder
TRAINING_CONFIG = "training_config.json"  # of a converted model
# Sections without effect on the model.
NOT_OF_THE_MODEL = ("job", "checkpoint", "metrics", "comm", "profiling", "memory_estimation", "fault_tolerance")


def convert_checkpoint(checkpoint: Path, output_dir: Path, dtype: Precision = "float32", verify: bool = True) -> None:
    """Turn a training checkpoint into an ordinary Hugging Face model.

    Args:
        checkpoint: checkpoint folder (newest step) or one step
        output_dir: folder of the Hugging Face model
        dtype: precision of the saved weights
        verify: compare the checksums of the checkpoint

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another run.
    """
    step, incomplete = find_step(checkpoint)
    for path in incomplete:
        print(f"note: '{path}' is incomplete (its saving was cut off); reading the older '{step}'")
    record = find_run_record(checkpoint)
    config, kind = load_config(str(record), "run record")
    codec = local_codec(config.codec, record) or config.codec
    near = local_codec(config.codec, output_dir)
    if Path(codec).is_dir() and not (near and Path(near).samefile(codec)):
        config.codec = str(Path(codec).resolve())  # the name does not lead to the codec from the new folder
    tokenizer = load_pretrained(AutoTokenizer, str(record), what="tokenizer")

    args = kind.args(config)
    state = kind.state(load_model_state(step, args, verify), args)
    torch_dtype = DTYPES[dtype]
    with torch.device("meta"):
        model = kind.stock_class(config)
    # assign: the meta parameters become the loaded ones
    state |= kind.extra_state(config, codec)
    model.load_state_dict({k: v.to(torch_dtype) for k, v in state.items()}, assign=True)
    model.tie_weights()

    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 30}
    special_ids = {f"{role}_token_id": getattr(config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**special_ids, **sampling)
    for part in kind.sampled:
        getattr(model, part).generation_config = GenerationConfig(**sampling)
    model.config.dtype = torch_dtype
    save_folder(output_dir, model, tokenizer)
    shape = {"num_quantizers": config.num_quantizers, "codebook_size": args.codebook_size}
    card = MODEL_CARD.format(
        name=output_dir.name,
        parameters=model.num_parameters(),
        codec=config.codec,
        num_quantizers=config.num_quantizers,
        vocab_size=getattr(config, kind.entries_key),
        description=kind.description,
        usage=kind.usage.format(last_level=config.num_quantizers - 1, **shape),
        step=step,
        dtype=dtype,
    )
    if training := read_json(str(record.parent), JOB_CONFIG):
        own = {section: values for section, values in training.items() if section not in NOT_OF_THE_MODEL}
        write_atomically(str(output_dir), TRAINING_CONFIG, (json.dumps(own, indent=1) + "\n").encode())
    (output_dir / "README.md").write_text(card)
    print(f"{step} -> {output_dir} ({model.num_parameters():,} parameters, {dtype})")


def prepare_base_model(
    base_model: str,
    output_dir: Path,
    codec: str = DEFAULT_CODEC,
    num_quantizers: int = 4,
    vocabulary: VocabularyKind = "llama",
    dtype: Precision = "float32",
    seed: int = 0,
    random_weights: bool = False,
) -> None:
    """Extend a Hugging Face Llama by the audio tokens of a codec: tokenizer, embeddings, configuration.

    Args:
        base_model: Hugging Face Llama: hub id or folder
        output_dir: new folder, for model.hf_assets_path
        codec: Mimi codec: hub id or folder
        num_quantizers: quantizer levels a frame
        vocabulary: llama keeps the text tokens, audio drops them
        dtype: precision of the saved weights
        seed: seed of the new embedding rows
        random_weights: write tokenizer and config only

    Raises:
        UserError: the base model is missing, has other entries than tokens, or no text where that is wanted.
    """
    codebook_size = load_codec_config(codec, num_quantizers).codebook_size
    config = load_pretrained(LlamaConfig, base_model, what="base model")
    tokenizer = load_pretrained(AutoTokenizer, base_model, what="tokenizer")
    if config.vocab_size != len(tokenizer):
        raise UserError(
            f"'{base_model}' has {config.vocab_size} embedding rows but {len(tokenizer)} tokens; use the unmodified "
            "base model"
        )
    if vocabulary == "llama" and not has_text(tokenizer):
        raise UserError(
            f"--vocabulary is llama, but the tokenizer of '{base_model}' has no text; use the unmodified base model, "
            "or --vocabulary audio"
        )
    whole, units = extend_tokenizer(tokenizer, codebook_size, num_quantizers)
    num_drawn, kept, special_ids = units.size, whole, {}
    if vocabulary == "audio":
        kept, units = extend_tokenizer(audio_tokenizer(whole), codebook_size, num_quantizers)
        special_ids = {f"{role}_id": getattr(kept, f"{role}_id") for role in SPECIAL_ROLES}

    extra = {"num_quantizers": num_quantizers, "codec": codec, **special_ids}
    if random_weights:
        config.update({"vocab_size": units.size, **extra})
        save_folder(output_dir, config, kept)
    else:
        model = load_pretrained(LlamaForCausalLM, base_model, what="base model", dtype=DTYPES[dtype])
        torch.manual_seed(seed)
        # new rows are drawn around the mean of the old ones, with their covariance
        model.resize_token_embeddings(num_drawn, mean_resizing=True)
        if kept is not whole:
            keep_rows(model, whole.convert_tokens_to_ids(kept.convert_ids_to_tokens(range(units.size))))
        model.config.update(extra)
        model.generation_config.update(**special_ids)
        save_folder(output_dir, model, kept)
    print(f"{base_model} + {units.size - units.base:,} units -> {output_dir} ({units.size:,} vocabulary entries)")


@torch.no_grad()
def keep_rows(model: LlamaForCausalLM, ids: list[int]) -> None:
    """Make ``ids``, in this order, the whole vocabulary of a model."""
    matrices = model.get_input_embeddings(), model.get_output_embeddings()
    rows = [matrix.weight[ids] for matrix in matrices]  # of both first, as they may be one
    for matrix, kept in zip(matrices, rows, strict=True):
        matrix.weight[: len(ids)] = kept
    model.resize_token_embeddings(len(ids))
