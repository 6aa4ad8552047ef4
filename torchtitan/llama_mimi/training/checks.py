"""Checks before a run: a table of rules for settings, then checks of files and of earlier runs."""

import copy
import json
import math
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig

from llama_mimi.audio.mimi import codec_hash, has_sliding_window, is_trained, local_codec
from llama_mimi.checkpoint.architectures import (
    ASSETS_FOLDER,
    check_initial_weights,
    describe,
    load_config,
    speech_config,
    state_dict_adapter,
)
from llama_mimi.checkpoint.dcp import complete_steps, is_distributed, read_index, set_aside_incomplete, set_aside_later
from llama_mimi.checkpoint.huggingface import NETWORK_KEYS, hf_config
from llama_mimi.checkpoint.lora import ADAPTER_CONFIG, adapter_config
from llama_mimi.common.choices import DEFAULT_CODEC, LORA_TARGETS, Task
from llama_mimi.common.distributed import broadcast_from_rank0
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked, read_json, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.code_shards import is_store
from llama_mimi.corpora.formats import check_corpus
from llama_mimi.data.build import chosen_split, dataset_names, open_streams
from llama_mimi.job_config import checkpoint_folder
from llama_mimi.model.llama import FLAVORS, SHAPE
from llama_mimi.model.lora import LORA_WEIGHTS
from llama_mimi.tokens.tokenizer import build_speech_tokenizer
from llama_mimi.tokens.vocabulary import has_text
from llama_mimi.training.loss import level_fractions, level_weights

FLOAT8, LORA = "quantize.linear.float8", "lora"  # names of the model converters
# Entries that must be equal in the configs of the flavor, a Hugging Face folder and an earlier run (dump_folder).
MODEL_KEYS = ("model_type", *NETWORK_KEYS, "tie_word_embeddings")
RECORD_KEYS = (
    *(*MODEL_KEYS, "num_quantizers", "codec", "codec_sliding_window", "vocab_size"),
    *("text_vocab_size", "text_head"),  # of hierarchical models
)
# On a network file system, another node may see a change a minute later (option acdirmax of NFS).
SECONDS_FOR_NODES_TO_AGREE = 90
_locks = ExitStack()  # locks that rank 0 keeps until the process ends

_FLATTENED_ONLY = "remove this setting: model.architecture 'hierarchical' supports only FSDP and HSDP"
_FLAVORS = (
    f"choose one of: {', '.join(FLAVORS)}; or set width x layers, such as '768x12' or (with a depth decoder) "
    "'768x12+384x3', where the first width is a multiple of 256 and the second width is a multiple of 16"
)
_TASKS = f"choose one or more of: {', '.join(get_args(Task))}"
_TARGETS = f"choose one or more of: {', '.join(LORA_TARGETS)}"
_LORA_START = "set checkpoint.initial_load_in_hf to true: LoRA needs an existing model"
_SEED = "set false: a seed checkpoint contains random weights, which a run would use instead of the model folder"
_KEY_HEADS = "set a divisor of {key_heads}, the number of key heads"
_STOP_FREQ = "set a multiple of checkpoint.interval ({checkpoint.interval}), because validation.patience is set"
_STOP_KEEP = "set 0, or more than validation.patience * validation.freq / checkpoint.interval"
_STOP_HF = "set false: a run that validation.patience stops does not save a model in this format"
_TORCHAO = "install the package torchao with `uv sync --inexact --extra float8`"
# Each rule: settings (separated by spaces), a condition on the value and the config, and the second half of the error.
# `check_settings` adds entries to the config, such as `divisor`.
RULES: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("model.name", lambda v, c: v == "llama_mimi", "set 'llama_mimi', and choose the size with model.flavor"),
    ("model.flavor", lambda v, c: v in FLAVORS, _FLAVORS),
    (
        "training.steps training.local_batch_size data.max_audio_seconds data.shuffle_window codec.num_quantizers "
        "validation.local_batch_size validation.freq metrics.log_freq checkpoint.interval",
        lambda v, c: 0 < v < math.inf,
        "set a positive, finite number",
    ),
    ("data.validation_clips", lambda v, c: v == -1 or v > 0, "set a positive number, or -1 for all clips"),
    ("data.max_skip_fraction", lambda v, c: 0 <= v <= 1, "set a fraction from 0 to 1"),
    ("training.max_norm", lambda v, c: v > 0, "set a positive number, or inf for no clipping"),
    ("optimizer.name", lambda v, c: v in ("Adam", "AdamW"), "choose 'Adam' or 'AdamW'"),
    (
        "optimizer.lr optimizer.eps optimizer.weight_decay lr_scheduler.warmup_steps lr_scheduler.decay_ratio "
        "lr_scheduler.min_lr_factor debug.seed loss.text_weight validation.patience",
        lambda v, c: v is None or 0 <= v < math.inf,
        "set a finite number of at least 0",
    ),
    ("lr_scheduler.total_steps", lambda v, c: v is None or v >= c.training.steps, "set at least {training.steps}"),
    ("optimizer.early_step_in_backward", lambda v, c: not v, "set false: gradients are checked before a step"),
    ("data.tasks", lambda v, c: v and len(set(v)) == len(v) and {*v} <= {*get_args(Task)}, _TASKS),
    ("data.tasks", lambda v, c: v == ["audio"] or c.model.vocabulary != "audio", "set model.vocabulary to 'llama'"),
    ("data.task_weights", lambda v, c: len(v) in (0, len(c.data.tasks)), "set one number for each task"),
    ("data.task_weights", lambda v, c: all(0 < w < math.inf for w in v), "set positive, finite numbers"),
    ("data.text_dataset", lambda v, c: v or "text" not in c.data.tasks, "set a corpus: data.tasks contains 'text'"),
    ("data.weights", lambda v, c: len(v) in (0, len(dataset_names(c.training))), "set one number for each corpus"),
    ("data.weights", lambda v, c: all(0 < w < math.inf for w in v), "set positive, finite numbers"),
    ("validation.steps", lambda v, c: v == -1, "set -1, and limit the clips with data.validation_clips"),
    ("training.seq_len validation.seq_len", lambda v, c: v >= c.min_length, "set at least {min_length} to fit a frame"),
    ("training.seq_len validation.seq_len", lambda v, c: v % c.divisor == 0, "set a multiple of {divisor}"),
    ("validation.seq_len", lambda v, c: v <= c.training.seq_len, "set at most {training.seq_len} (training.seq_len)"),
    ("training.global_batch_size", lambda v, c: v < 0 or (v and v % c.pass_size == 0), "set a multiple of {pass_size}"),
    ("checkpoint.initial_load_in_hf", lambda v, c: not v or c.checkpoint.enable, "set checkpoint.enable to true"),
    ("checkpoint.create_seed_checkpoint", lambda v, c: not (v and c.checkpoint.initial_load_in_hf), _SEED),
    ("checkpoint.initial_load_path", lambda v, c: not v or c.checkpoint.enable, "set checkpoint.enable to true"),
    ("checkpoint.folder", lambda v, c: not re.search(r"^\.{0,2}$|/", v), "choose a folder inside job.dump_folder"),
    # TorchTitan ignores initial weights if the checkpoint folder exists, and these two folders are created earlier.
    ("checkpoint.folder", lambda v, c: v not in (c.metrics.save_tb_folder, ASSETS_FOLDER), "choose another folder"),
    ("checkpoint.keep_latest_k", lambda v, c: v != 1, "set at least 2, or 0 to keep all checkpoints"),
    # At an early stop, the step with the lowest loss must still be saved.
    ("validation.freq", lambda v, c: not c.steps_of_patience or v % c.checkpoint.interval == 0, _STOP_FREQ),
    ("checkpoint.keep_latest_k", lambda v, c: v == 0 or v * c.checkpoint.interval > c.steps_of_patience, _STOP_KEEP),
    ("checkpoint.last_save_in_hf", lambda v, c: not (v and c.steps_of_patience), _STOP_HF),
    ("optimizer.beta1 optimizer.beta2", lambda v, c: 0 <= v < 1, "set a number of at least 0 and below 1"),
    ("model.depth_train_fraction", lambda v, c: 0 < v <= 1, "set 1, or a smaller positive fraction"),
    ("model.depth_train_fraction", lambda v, c: v == 1 or not c.is_flattened, "set 1 for architecture 'flattened'"),
    ("codec.num_quantizers", lambda v, c: v >= 2 or c.is_flattened, "set at least 2 for architecture 'hierarchical'"),
    ("model.converters checkpoint.last_save_in_hf", lambda v, c: not v or c.is_flattened, _FLATTENED_ONLY),
    ("parallelism.tensor_parallel_degree", lambda v, c: v == 1 or c.is_flattened, _FLATTENED_ONLY),
    ("parallelism.tensor_parallel_degree", lambda v, c: c.key_heads % v == 0, _KEY_HEADS),
    ("parallelism.context_parallel_degree", lambda v, c: v == 1 or c.is_flattened, _FLATTENED_ONLY),
    ("model.converters", lambda v, c: v in ([], [FLOAT8], [LORA]), f"set ['{FLOAT8}'] or ['{LORA}']"),
    ("model.converters", lambda v, c: v != [FLOAT8] or find_spec("torchao"), _TORCHAO),
    ("model.converters", lambda v, c: v != [LORA] or c.dims.tp == 1, "LoRA supports only FSDP, HSDP and one GPU"),
    ("model.converters", lambda v, c: v != [LORA] or c.checkpoint.initial_load_in_hf, _LORA_START),
    ("checkpoint.last_save_in_hf", lambda v, c: not v or c.model.converters != [LORA], "use convert_dcp_to_hf.py"),
    ("lora.rank lora.alpha", lambda v, c: 0 < v < math.inf, "set a positive, finite number"),
    ("lora.dropout", lambda v, c: 0 <= v < 1, "set a number of at least 0 and below 1"),
    ("lora.targets", lambda v, c: v and len(set(v)) == len(v) and {*v} <= {*LORA_TARGETS}, _TARGETS),
    ("parallelism.pipeline_parallel_degree", lambda v, c: v == 1, "set 1: pipeline parallelism is not supported"),
    ("parallelism.data_parallel_replicate_degree", lambda v, c: v == 1 or c.dims.dp_shard > 1, "use FSDP or HSDP"),
    ("parallelism.disable_loss_parallel", lambda v, c: not v, "set false: the loss needs loss parallelism"),
    ("parallelism.context_parallel_degree", lambda v, c: v < 2 or c.data.packing == "pad", "set data.packing to 'pad'"),
]


def prepare_run(job_config: Any) -> None:
    """On rank 0, check a run, lock its folder, save its config and move old checkpoints; raise errors on all ranks."""
    checkpoint, settings = checkpoint_folder(job_config), job_config.checkpoint

    def steps() -> list[int] | None:
        return sorted(complete_steps(checkpoint)) if settings.enable and checkpoint.is_dir() else None

    def prepare() -> list[int] | None:
        check_settings(job_config, dist.get_world_size() if dist.is_initialized() else 1)
        check_files(job_config)
        job, resolved = job_config.job, json.dumps(job_config.to_dict(), indent=2)
        _locks.enter_context(locked(Path(job.dump_folder, LOCK), "job.dump_folder"))
        if job.print_config:
            logger.info(f"Running with configs: {resolved}")
        if job.save_config_file:
            write_atomically(job.dump_folder, job.save_config_file, resolved.encode())
        if settings.enable and settings.load_step != -1:
            set_aside_later(checkpoint, settings.load_step)
        if settings.enable and (settings.initial_load_in_hf or settings.initial_load_path):
            set_aside_incomplete(checkpoint)
        return steps()

    of_first = broadcast_from_rank0(prepare)
    # Each node searches for saved steps. On a node that finds none, TorchTitan would start from random weights.
    for _ in range(SECONDS_FOR_NODES_TO_AGREE):
        if steps() == of_first:
            return
        time.sleep(1)
    found = f"the saved steps in '{checkpoint}' are {steps()} on this node, but {of_first} on the first node"
    raise UserError(f"{found}; choose a job.dump_folder that all nodes share")


def check_settings(job_config: Any, world_size: int) -> None:
    """Raise a `UserError` for the first setting that breaks a rule."""
    names = "data_parallel_replicate data_parallel_shard context_parallel tensor_parallel pipeline_parallel"
    degrees = [getattr(job_config.parallelism, f"{name}_degree") for name in names.split()]
    try:
        dims = ParallelDims(*degrees, ep=1, etp=1, world_size=world_size)
    except AssertionError as error:
        problem = f"the degrees in [parallelism] do not fit {world_size} ranks ({str(error) or 'too few ranks'})"
        remedy = f"set degrees whose product is {world_size}, or change torchrun's --nproc_per_node"
        raise UserError(f"{problem}; {remedy}") from error
    can_stop = job_config.validation.enable and job_config.checkpoint.enable
    config = SimpleNamespace(
        **vars(job_config),
        steps_of_patience=can_stop * job_config.validation.patience * job_config.validation.freq,
        dims=dims,
        is_flattened=job_config.model.architecture == "flattened",
        key_heads=FLAVORS[flavor].n_kv_heads if (flavor := job_config.model.flavor) in FLAVORS else 0,
        min_length=job_config.codec.num_quantizers + 2,
        divisor=dims.seq_len_divisor if dims.cp > 1 else dims.tp,
        pass_size=job_config.training.local_batch_size * dims.dp_replicate * dims.dp_shard,
    )
    for keys, is_valid, demand in RULES:
        for key in keys.split():
            value = reduce(getattr, key.split("."), config)
            is_used = config.validation.enable or not key.startswith("validation.")
            if is_used and not is_valid(value, config):
                raise UserError(f"{key} is {value!r}; {demand.format(**vars(config))}")
    level_weights(job_config.loss.level_weights, level_fractions(job_config))


def check_files(job_config: Any) -> None:
    """Raise a `UserError` if a corpus, the model folder, an earlier run or the machine does not fit the settings."""
    if job_config.parallelism.context_parallel_degree > 1 and not torch.cuda.is_available():
        raise UserError("parallelism.context_parallel_degree is more than 1 on a CPU; set it to 1, or use GPUs")
    for section in ("training", *["validation"] * job_config.validation.enable):
        values = getattr(job_config, section)
        names, split = dataset_names(values), chosen_split(job_config, values)
        if len(names) != 1 and not (names and all(map(is_store, names))):
            remedy = "set one corpus, or several corpora tokenised by scripts/tokenize_corpus.py"
            raise UserError(f"{section}.dataset is '{values.dataset}'; {remedy}")
        labels = [*job_config.data.tasks, *(Path(name).name for name in names)]
        if section == "validation" and len(names) > 1 and len({*labels}) < len(labels):
            remedy = "rename folders until their names differ from each other and from data.tasks"
            raise UserError(f"{section}.dataset is '{values.dataset}'; {remedy}")
        for name in names:
            if not is_store(name):
                check_corpus(name, values.dataset_path, split)
            elif values.dataset_path is not None or split is not None:
                settings = f"{section}.dataset_path and data.{'split' if section == 'training' else 'validation_split'}"
                raise UserError(f"'{name}' is a tokenised corpus without splits; remove {settings}")
        if all(map(is_store, names)):
            open_streams(job_config, values)
    _check_model(job_config)
    if job_config.checkpoint.enable:
        _check_resume(job_config)


def _check_model(job_config: Any) -> None:
    """Raise a `UserError` if the model folder, or an earlier run in job.dump_folder, does not fit the settings."""
    model, codec, settings = job_config.model, job_config.codec, job_config.checkpoint
    flags = f"--codec {codec.name} --num_quantizers {codec.num_quantizers} --vocabulary {model.vocabulary}"
    prepare = f"`scripts/prepare_base_model.py {flags}`"
    assets, folder = f"model.hf_assets_path '{model.hf_assets_path}'", Path(model.hf_assets_path)
    if not folder.is_dir():
        download = "download a Llama-Mimi with `uv run hf download`"
        raise UserError(f"{assets} is not a folder; create the folder with {prepare}, or {download}")
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{assets} contains only a LoRA adapter; choose the parent folder, with the merged model")
    tokenizer = build_speech_tokenizer(job_config)
    if model.vocabulary == "llama" and not has_text(tokenizer.text_tokenizer):
        remedy = f"set model.vocabulary to 'audio', or create a folder with {prepare}"
        raise UserError(f"{assets} lacks text tokens; {remedy}")

    def entries(config: PreTrainedConfig, keys: tuple[str, ...]) -> dict[str, Any]:
        found = {key: getattr(config, key, None) for key in keys}
        depth = getattr(config, "depth_decoder_config", None)
        return found | ({"depth_decoder_config": entries(depth, NETWORK_KEYS)} if depth else {})

    args = copy.copy(FLAVORS[model.flavor])
    llama = hf_config(args)
    args.update_from_config(job_config)
    own = speech_config(args, tokenizer, codec.name, codec.sliding_window)
    # For a shape such as "768x8" with random weights, training reads only the tokenizer in the folder.
    if settings.initial_load_in_hf or not SHAPE.fullmatch(model.flavor):
        base, _ = load_config(model.hf_assets_path, "model")
        # The backbone of a hierarchical model can also start from a Llama.
        wanted = entries(own if base.model_type == own.model_type else llama, MODEL_KEYS)
        to_fit = "model.architecture, model.flavor, model.vocabulary, data.tasks and codec.sliding_window"
        remedy = f"set {to_fit} to fit the folder, or create another folder with {prepare}"
        require_same(entries(base, MODEL_KEYS), wanted, assets, remedy)
    if settings.initial_load_in_hf:
        wanted = {"vocab_size": tokenizer.vocabulary.size}
        found = {"vocab_size": getattr(base, "text_vocab_size", base.vocab_size)}
        if args.predicts_text and base.model_type == "csm":
            wanted["text_head"], found["text_head"] = own.text_head, getattr(base, "text_head", None)
        if is_trained(base):
            wanted["codec.sliding_window"] = codec.sliding_window
            found["codec.sliding_window"] = has_sliding_window(base)
            _check_codec(codec.name, base, model.hf_assets_path)
        require_same(found, wanted, assets, remedy)
        source = settings.initial_load_path or model.hf_assets_path
        check_initial_weights(source, state_dict_adapter(args, model.hf_assets_path))
        if not complete_steps(checkpoint_folder(job_config)):
            logger.info(f"initial weights: '{source}', {describe(base)}")
    record = Path(job_config.job.dump_folder, ASSETS_FOLDER)
    if checkpoint_folder(job_config).is_dir() and record.is_dir():
        earlier, _ = load_config(str(record), "run record")
        run = f"the run in job.dump_folder '{record.parent}'"
        remedy = "set the old value, or choose another job.dump_folder"
        require_same(entries(earlier, RECORD_KEYS), entries(own, RECORD_KEYS), run, remedy)
        saved, lora = (  # the base model may have been moved
            {"model.converters": [LORA] * bool(some), **some, "base_model_name_or_path": None}
            for some in (read_json(str(record), ADAPTER_CONFIG) or {}, adapter_config(job_config, args))
        )
        require_same(saved, lora, run, remedy)


def _check_codec(name: str, model: PreTrainedConfig, folder: str) -> None:
    """Raise a `UserError` if the weights of the codec ``name`` differ from the codec with which a model was trained."""
    original = getattr(model, "codec", DEFAULT_CODEC)
    original, hashes = local_codec(original, folder) or original, set()
    with suppress(UserError):  # weights that are not on this machine cannot be compared
        hashes = {codec_hash(codec, local_files_only=True) for codec in (original, name)}
    if len(hashes) == 2:
        problem = f"codec.name is '{name}', but '{folder}' was trained with '{original}', which has other weights"
        raise UserError(f"{problem}; set codec.name to '{original}', and tokenise the corpora with this codec")


def _check_resume(job_config: Any) -> None:
    """Raise a `UserError` if a run cannot resume; log changed settings. The dataloader checks the data position."""
    settings, folder = job_config.checkpoint, checkpoint_folder(job_config)
    steps = complete_steps(folder)
    number = max(steps, default=-1) if settings.load_step == -1 else settings.load_step
    if number == -1:
        if (path := settings.initial_load_path) and not settings.initial_load_in_hf:
            if any(name.endswith(LORA_WEIGHTS) for name in read_index(Path(path)).state_dict_metadata):
                remedy = "convert it with scripts/convert_dcp_to_hf.py, and load the new folder with initial_load_in_hf"
                raise UserError(f"checkpoint.initial_load_path '{path}' contains LoRA weights; {remedy}")
        return
    if number not in steps:
        problem = f"checkpoint.load_step is {number}, but the complete steps in '{folder}' are {sorted(steps)}"
        raise UserError(f"{problem}; set one of these steps, or -1 for the last step")
    # Step 0 is a seed checkpoint. TorchTitan loads only its weights and needs no position.
    needs_position = number > 0 and "dataloader" not in settings.exclude_from_loading
    entries = read_index(steps[number]).state_dict_metadata if is_distributed(steps[number]) else None
    if entries is None or (needs_position and "dataloader.position" not in entries):
        problem = f"'{steps[number]}' contains weights but not the position in the data, so the run cannot resume"
        remedy = "set checkpoint.initial_load_path to this step (for safetensors, also set initial_load_in_hf)"
        raise UserError(f"{problem}; start a new run, and {remedy}")
    earlier = now = job_config.to_dict()
    with suppress(UserError):  # a damaged file is replaced
        earlier = read_json(job_config.job.dump_folder, str(job_config.job.save_config_file)) or now
    changes = [
        f"{section}.{key} {before} -> {value}"
        for section in ("optimizer", "lr_scheduler", "training")
        for key, value in now[section].items()
        if (before := (earlier.get(section) or {}).get(key)) != value
    ]
    if changes and number:
        logger.warning(f"settings changed since the last start: {', '.join(changes)}")
    if number >= job_config.training.steps:
        logger.warning(f"the run has already reached step {number}; set a higher --training.steps to continue")
