"""Preparation of a Hugging Face Llama for training, and conversion of a checkpoint to a Hugging Face model."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from llama_mimi.audio.mimi import DTYPES, is_trained, load_codec_config, local_codec
from llama_mimi.checkpoint.architectures import find_run_record, load_config
from llama_mimi.checkpoint.csm import codec_state
from llama_mimi.checkpoint.dcp import find_step, load_model_state
from llama_mimi.checkpoint.huggingface import save_folder
from llama_mimi.checkpoint.lora import ADAPTER_CONFIG, merge_lora, save_adapter
from llama_mimi.common.choices import DEFAULT_CODEC, TEXT_TARGETS, Precision, VocabularyKind
from llama_mimi.common.command_line import print_next
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.common.hub import load_pretrained
from llama_mimi.generation.hierarchical import CsmWithTextHead
from llama_mimi.model.lora import LORA_WEIGHTS
from llama_mimi.tokens.vocabulary import SPECIAL_ROLES, audio_tokenizer, extend_tokenizer

MODEL_CARD = Path(__file__).parent / "templates" / "model_card.md.jinja"
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 30}
JOB_CONFIG, TRAINING_CONFIG = "job_config.json", "training_config.json"  # in dump_folder, and in a converted folder
# Sections that have no effect on the model.
NOT_OF_THE_MODEL = ("job", "checkpoint", "metrics", "comm", "profiling", "memory_estimation", "fault_tolerance")


def convert_checkpoint(checkpoint: Path, output_dir: Path, dtype: Precision = "float32", verify: bool = True) -> None:
    """Convert a training checkpoint to a standard Hugging Face model; see scripts/convert_dcp_to_hf.py."""
    step = find_step(checkpoint)
    record = find_run_record(checkpoint)
    config, kind = load_config(str(record), "run record")
    codec = local_codec(config.codec, record) or config.codec
    near = local_codec(config.codec, output_dir)
    if Path(codec).is_dir() and not (near and Path(near).samefile(codec)):
        config.codec = str(Path(codec).resolve())  # the relative path is not valid in the new folder

    args = kind.args(config)
    weights = load_model_state(step, args, verify)
    shutil.rmtree(output_dir / "adapter", ignore_errors=True)  # of an earlier conversion into this folder
    if any(name.endswith(LORA_WEIGHTS) for name in weights):
        lora = json.loads((record / ADAPTER_CONFIG).read_text())
        weights, adapter = merge_lora(weights, args, lora)
        adapter = {name: weight.to(DTYPES[dtype]) for name, weight in adapter.items()}
        save_adapter(output_dir / "adapter", adapter, lora)
        print(f"{step} -> {output_dir / 'adapter'} (LoRA adapter in the format of PEFT)")
    state = kind.state(weights, args)
    if hasattr(config, "codec_config"):
        state |= codec_state(config, codec)
    has_own_head = getattr(config, "text_head", None) == "separate"
    with torch.device("meta"):
        model = (CsmWithTextHead if has_own_head else kind.stock_class)(config)
    model.load_state_dict({name: weight.to(DTYPES[dtype]) for name, weight in state.items()}, assign=True)
    model.tie_weights()
    model.config.dtype = DTYPES[dtype]
    special_ids = {f"{role}_token_id": getattr(config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    tokenizer = load_pretrained(AutoTokenizer, str(record), what="tokenizer")
    if {*TEXT_TARGETS} & {*getattr(config, "tasks", ())} and args.architecture == "flattened":
        special_ids["eos_token_id"] = [config.eos_token_id, tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(**special_ids, **SAMPLING)
    if hasattr(model, "depth_decoder"):
        model.depth_decoder.generation_config = GenerationConfig(**SAMPLING)
    save_folder(output_dir, model, tokenizer)

    num_parameters = model.num_parameters()
    facts = {"config": config, "args": args, "num_parameters": num_parameters, "step": step, "dtype": dtype}
    card = jinja2.Template(MODEL_CARD.read_text(), trim_blocks=True).render(name=output_dir.name, **facts)
    (output_dir / "README.md").write_text(card)
    if training := read_json(str(record.parent), JOB_CONFIG):
        own = {section: values for section, values in training.items() if section not in NOT_OF_THE_MODEL}
        write_atomically(str(output_dir), TRAINING_CONFIG, (json.dumps(own, indent=1) + "\n").encode())
    print(f"{step} -> {output_dir} ({num_parameters:,} parameters, {dtype})")
    print_next("python inference.py", model_name=output_dir, prompt="assets/tiny/prompt.wav")


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
    """Add the audio tokens of a codec to a Hugging Face Llama; see scripts/prepare_base_model.py."""
    codebook_size = load_codec_config(codec, num_quantizers).codebook_size
    config, _ = load_config(base_model, "base model")
    if is_trained(config):
        remedy = "set model.hf_assets_path to this folder, and checkpoint.initial_load_in_hf to true, in a config"
        raise UserError(f"'{base_model}' is a Llama-Mimi, which already has audio tokens; {remedy}")
    tokenizer = load_pretrained(AutoTokenizer, base_model, what="tokenizer")
    if config.vocab_size != len(tokenizer):
        found = f"'{base_model}' has {config.vocab_size} embeddings, but its tokenizer has {len(tokenizer)} tokens"
        raise UserError(f"{found}; use an unmodified base model")
    whole, extended = extend_tokenizer(tokenizer, codebook_size, num_quantizers)
    num_drawn, kept, special_ids = extended.size, whole, {}
    if vocabulary == "audio":
        kept, extended = extend_tokenizer(audio_tokenizer(whole), codebook_size, num_quantizers)
        special_ids = {f"{role}_id": getattr(kept, f"{role}_id") for role in SPECIAL_ROLES}
    extra = {"num_quantizers": num_quantizers, "codec": codec, **special_ids}
    if random_weights:
        model = config
        config.update({"vocab_size": extended.size, **extra})
    else:
        model = load_pretrained(LlamaForCausalLM, base_model, what="base model", dtype=DTYPES[dtype])
        torch.manual_seed(seed)
        notes = logging.getLogger("transformers.modeling_utils")
        notes.disabled = True  # transformers prints a paragraph about the new rows
        # New rows are drawn from a normal distribution with the mean and covariance of the old rows.
        model.resize_token_embeddings(num_drawn, mean_resizing=True)
        notes.disabled = False
        if kept is not whole:
            ids = whole.convert_tokens_to_ids(kept.convert_ids_to_tokens(range(extended.size)))
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:  # one if tied
                weight.data[: len(ids)] = weight.data[ids]
            model.resize_token_embeddings(len(ids))
        model.config.update(extra)
        model.generation_config.update(**special_ids)
    save_folder(output_dir, model, kept)
    audio = f"{extended.size - extended.base:,} audio tokens"
    print(f"{base_model} + {audio} -> {output_dir} ({extended.size:,} vocabulary entries)")
    print(f"next: set model.hf_assets_path = {json.dumps(str(output_dir))} in a config")
