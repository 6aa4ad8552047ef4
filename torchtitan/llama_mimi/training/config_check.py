"""Checks that refuse, before any work is done, a run that cannot succeed."""

import copy
import importlib.util
import math
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger
from transformers import LlamaConfig

from llama_mimi.audio.mimi import attention_of, load_codec_config, whole_frames
from llama_mimi.checkpoint.architectures import load_config
from llama_mimi.checkpoint.dcp import complete_steps, has_loader_position, is_distributed, set_aside_incomplete
from llama_mimi.checkpoint.huggingface import NETWORK_KEYS, hf_config
from llama_mimi.checkpoint.run_record import ASSETS_FOLDER, speech_config
from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import from_first
from llama_mimi.data.build import chosen_split, dataset_names
from llama_mimi.data.code_store import CodeCorpus, is_store
from llama_mimi.data.corpus_files import check_corpus
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.sequences import load_sequences
from llama_mimi.tokens.units import has_text
from llama_mimi.training.loss import level_weights

# Other nodes may see a change on a network file system a minute later (acdirmax of NFS).
SECONDS_FOR_NODES_TO_AGREE = 90
FLOAT8 = "quantize.linear.float8"  # TorchTitan's name of the converter
# What must agree between a flavour, a Hugging Face folder and an earlier run in the same dump_folder.
SHAPE_KEYS = (*NETWORK_KEYS, "tie_word_embeddings")


def check_settings(job_config: Any, world_size: int) -> None:
    """Refuse values and combinations of them that cannot run, wherever it is.

    Raises:
        UserError: one sentence for the first thing that is wrong.
    """
    _check_values(job_config)
    _check_architecture(job_config)
    _check_parallelism(job_config, world_size)


def check_files(job_config: Any) -> None:
    """Refuse what cannot run on this machine: device, corpora, model folder, earlier runs.

    Raises:
        UserError: one sentence for the first thing that is wrong.
    """
    _check_device(job_config)
    _check_data(job_config)
    _check_model(job_config)
    _check_resume(job_config)


def prepare_run(job_config: Any) -> None:
    """Check and prepare a run, whichever entry point starts it. Rank 0 does it, and the others wait.

    Settings and files are checked, and a checkpoint folder that nothing can be loaded from is moved out of the way.

    Raises:
        UserError: on every rank what is wrong; on a node that sees other steps than the first one does, that.
    """
    checkpoint, settings = _checkpoint_folder(job_config), job_config.checkpoint

    def steps() -> list[int] | None:
        return sorted(complete_steps(checkpoint)) if checkpoint.is_dir() else None

    def prepare() -> list[int] | None:
        check_settings(job_config, dist.get_world_size() if dist.is_initialized() else 1)
        check_files(job_config)
        has_initial_weights = settings.initial_load_in_hf or settings.initial_load_path
        if settings.enable and has_initial_weights and (aside := set_aside_incomplete(checkpoint)):
            logger.warning(f"no step in '{checkpoint}' is complete, so it was moved to '{aside}'")
        return steps()

    of_first = from_first(prepare)
    # TorchTitan would go on with random weights where the folder is there without a step, and each node looks itself.
    deadline = time.monotonic() + SECONDS_FOR_NODES_TO_AGREE
    while settings.enable and steps() != of_first:
        if time.monotonic() > deadline:
            raise UserError(
                f"the steps in '{checkpoint}' are {steps()} on {socket.gethostname()}, but {of_first} on the first "
                "node; let all nodes see the same job.dump_folder"
            )
        time.sleep(1)


def _checkpoint_folder(job_config: Any) -> Path:
    return Path(job_config.job.dump_folder) / job_config.checkpoint.folder


def _check_values(job_config: Any) -> None:
    training, data, codec = job_config.training, job_config.data, job_config.codec
    validation, checkpoint, parallelism = job_config.validation, job_config.checkpoint, job_config.parallelism
    if job_config.model.flavor not in FLAVORS:
        raise UserError(f"model.flavor is '{job_config.model.flavor}'; choose one of: {', '.join(FLAVORS)}")
    for key, value in {
        "training.steps": training.steps,
        "training.local_batch_size": training.local_batch_size,
        "data.max_audio_seconds": data.max_audio_seconds,
        "data.shuffle_block": data.shuffle_block,
        "codec.num_quantizers": codec.num_quantizers,
        "validation.local_batch_size": validation.local_batch_size,
        "validation.freq": validation.freq,
        "metrics.log_freq": job_config.metrics.log_freq,
        "comm.init_timeout_seconds": job_config.comm.init_timeout_seconds,
        "comm.train_timeout_seconds": job_config.comm.train_timeout_seconds,
        "checkpoint.interval": checkpoint.interval,
        "parallelism.tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "parallelism.context_parallel_degree": parallelism.context_parallel_degree,
        "parallelism.pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        "parallelism.data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
    }.items():
        if value <= 0:
            raise UserError(f"{key} is {value}; it must be positive")
    if not math.isfinite(data.max_audio_seconds):
        raise UserError(f"data.max_audio_seconds is {data.max_audio_seconds}; it is a number of seconds")
    if (job_config.debug.seed or 0) < 0:
        raise UserError(f"debug.seed is {job_config.debug.seed}; it is 0 or more")
    for section, workers in (("training", training.dataloader), ("validation", validation.dataloader)):
        needs_workers = workers.prefetch_factor is not None or workers.persistent_workers
        if workers.num_workers < 0 or (needs_workers and not workers.num_workers):
            raise UserError(
                f"{section}.dataloader.num_workers is {workers.num_workers}; it is 0 or more, and prefetch_factor and "
                "persistent_workers need at least 1"
            )
    if data.task == "tts" and job_config.model.vocabulary == "audio":
        raise UserError(
            "data.task is 'tts', but model.vocabulary 'audio' holds no text; set model.vocabulary to 'llama', or "
            "data.task to 'a2a'"
        )
    if validation.steps != -1:
        raise UserError(
            f"validation.steps is {validation.steps}, which counts the batches of each rank, so that other numbers of "
            "ranks would see other clips; leave it out, and set data.validation_clips for fewer than all"
        )
    if data.validation_clips != -1 and data.validation_clips <= 0:
        raise UserError(f"data.validation_clips is {data.validation_clips}; it is positive, or -1 for all")
    if not 0 <= data.max_bad_share <= 1:
        raise UserError(f"data.max_bad_share is {data.max_bad_share}; it is a share between 0 and 1")
    for section, seq_len in (("training", training.seq_len), ("validation", job_config.validation.seq_len)):
        if seq_len < codec.num_quantizers + 2:
            raise UserError(
                f"{section}.seq_len is {seq_len}, too short for one frame of {codec.num_quantizers} levels; "
                "20 s of audio take 250 * num_quantizers + 3 tokens"
            )
    if training.global_batch_size == 0 or parallelism.data_parallel_shard_degree == 0:
        raise UserError(
            "training.global_batch_size and parallelism.data_parallel_shard_degree are positive or -1, not 0"
        )
    if validation.enable and validation.seq_len > training.seq_len:
        raise UserError(
            f"validation.seq_len is {validation.seq_len}, more than training.seq_len {training.seq_len}, which the "
            "model's positions are made for; lower it"
        )
    if Path(job_config.job.dump_folder).is_file():
        raise UserError(f"job.dump_folder '{job_config.job.dump_folder}' is a file; name a folder")
    for key in ("initial_load_in_hf", "initial_load_path"):
        if getattr(checkpoint, key) and not checkpoint.enable:
            raise UserError(f"checkpoint.{key} needs checkpoint.enable; set both, or neither for random weights")
    taken = (job_config.metrics.save_tb_folder, job_config.comm.save_traces_folder, ASSETS_FOLDER, "", ".", "..")
    if checkpoint.folder in taken or "/" in checkpoint.folder:
        raise UserError(
            f"checkpoint.folder is '{checkpoint.folder}'; it is the name of a folder of its own in job.dump_folder"
        )
    if job_config.model.converters:
        _check_converters(job_config)
    if checkpoint.enable and checkpoint.keep_latest_k == 1:
        raise UserError("checkpoint.keep_latest_k is 1; keep at least 2, as the last may be half written, or 0 for all")


def _check_architecture(job_config: Any) -> None:
    model, parallelism = job_config.model, job_config.parallelism
    Q = job_config.codec.num_quantizers
    level_weights(job_config.loss.level_weights, [1.0] * Q)
    if not 0 < model.depth_share <= 1:
        raise UserError(f"model.depth_share is {model.depth_share}; it is a share above 0, up to 1 for all frames")
    if model.architecture == "flattened":
        if model.depth_share != 1:
            raise UserError(
                f"model.depth_share is {model.depth_share}, but model.architecture 'flattened' has no depth"
            )
        return
    if Q < 2:
        raise UserError(f"codec.num_quantizers is {Q}, but model.architecture 'hierarchical' needs at least 2 levels")
    refused = {
        "parallelism.tensor_parallel_degree": parallelism.tensor_parallel_degree > 1,
        "parallelism.context_parallel_degree": parallelism.context_parallel_degree > 1,
        "parallelism.pipeline_parallel_degree": parallelism.pipeline_parallel_degree > 1,
        "model.converters": bool(model.converters),
        "checkpoint.last_save_in_hf": job_config.checkpoint.last_save_in_hf,
    }
    for key, is_set in refused.items():
        if is_set:
            raise UserError(
                f"{key} is set, which model.architecture 'hierarchical' does not have; leave it out: it runs with FSDP "
                "and HSDP, and scripts/convert_dcp_to_hf.py converts it"
            )


def _check_converters(job_config: Any) -> None:
    converters = job_config.model.converters
    if converters != [FLOAT8]:
        raise UserError(f"model.converters is {converters}; the one converter for this model is '{FLOAT8}'")
    is_tied = FLAVORS[job_config.model.flavor].enable_weight_tying
    if not is_tied and "output" not in job_config.quantize.linear.float8.filter_fqns:
        raise UserError(
            f"model.converters has {FLOAT8}, which would take the output matrix, too, but the loss needs it as it is; "
            "set --quantize.linear.float8.filter_fqns output"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"model.converters has {FLOAT8}, which needs the package torchao; install it with `uv sync --extra float8`"
        )


def _check_parallelism(job_config: Any, world_size: int) -> None:
    parallelism, training = job_config.parallelism, job_config.training
    tp, cp, pp = (getattr(parallelism, f"{kind}_parallel_degree") for kind in ("tensor", "context", "pipeline"))
    if pp > 1:
        _check_pipeline(job_config)
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if shards == -1:
        shards = world_size // (replicas * tp * cp * pp)
    if replicas * shards * tp * cp * pp != world_size:
        raise UserError(
            f"{world_size} processes do not split into replicate {replicas} x shard {shards} x tensor {tp} x context "
            f"{cp} x pipeline {pp}; change the parallelism degrees or torchrun's --nproc_per_node"
        )
    if replicas > 1 and shards == 1:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree is {replicas} without sharding (DDP), whose gradients are "
            "divided once more by the ranks; leave it at 1 for FSDP, or set data_parallel_shard_degree > 1 for HSDP"
        )
    if tp > 1 and parallelism.disable_loss_parallel:
        raise UserError("parallelism.disable_loss_parallel is not supported; leave it out")
    sections = {"training": training} | ({"validation": job_config.validation} if job_config.validation.enable else {})
    for section, seq_len in ((name, values.seq_len) for name, values in sections.items()):
        if seq_len % (tp * (2 * cp if cp > 1 else 1)) == 0:
            continue
        raise UserError(
            f"{section}.seq_len is {seq_len}, not a multiple of tensor_parallel_degree {tp} "
            f"(x 2 x context_parallel_degree {cp}); change seq_len"
        )
    per_pass = training.local_batch_size * replicas * shards
    if training.global_batch_size > 0 and training.global_batch_size % per_pass:
        raise UserError(
            f"training.global_batch_size is {training.global_batch_size}, not a multiple of local_batch_size "
            f"{training.local_batch_size} x {replicas * shards} data-parallel ranks; change local_batch_size, or "
            f"make it a multiple of {per_pass}"
        )
    if job_config.data.packing == "pack" and cp > 1:
        raise UserError(
            f"parallelism.context_parallel_degree is {cp}, but packed rows cannot be split over ranks; set it to 1, or "
            "data.packing to 'pad'"
        )


def _check_pipeline(job_config: Any) -> None:
    degree = job_config.parallelism.pipeline_parallel_degree
    if FLAVORS[job_config.model.flavor].enable_weight_tying:
        raise UserError(
            f"parallelism.pipeline_parallel_degree is {degree}, but the embeddings of '{job_config.model.flavor}' are "
            "tied, and the first and the last stage of a pipeline cannot share a matrix; use FSDP or tensor parallelism"
        )
    if job_config.data.packing == "pack":
        raise UserError(
            f"parallelism.pipeline_parallel_degree is {degree}, but packed rows cannot be split into microbatches; set "
            "it to 1, or data.packing to 'pad'"
        )
    if job_config.validation.enable:
        raise UserError(
            f"parallelism.pipeline_parallel_degree is {degree}, but validation does not run in a pipeline; set "
            "--validation.no-enable"
        )


def _check_device(job_config: Any) -> None:
    cp = job_config.parallelism.context_parallel_degree
    if cp > 1 and not torch.cuda.is_available():
        raise UserError(f"parallelism.context_parallel_degree is {cp}, but it needs GPUs; set it to 1")


def _check_data(job_config: Any) -> None:
    data, codec = job_config.data, job_config.codec
    sections = {"training": job_config.training}
    if job_config.validation.enable:
        sections["validation"] = job_config.validation
    for section, values in sections.items():
        names = dataset_names(values)
        split = chosen_split(job_config, values)
        if len(names) != 1:
            if section == "validation" or not names:
                raise UserError(f"{section}.dataset is '{values.dataset}'; name one corpus")
            for name in names:
                if not is_store(name):
                    raise UserError(
                        f"training.dataset mixes '{name}' with others, but it is no tokenised corpus; tokenise it with "
                        "scripts/tokenize_corpus.py and name the folder"
                    )
        for name in names:
            if is_store(name):
                for key, value in (("dataset_path", values.dataset_path), ("split", split)):
                    if value is not None:
                        raise UserError(
                            f"the {key} of {section} is '{value}', but '{name}' is a tokenised corpus; leave it out"
                        )
                CodeCorpus(name, codec.name, codec.num_quantizers, codec.attention, with_text=data.task == "tts")
            else:
                check_corpus(name, values.dataset_path, split)
    names = dataset_names(job_config.training)
    if data.weights and (len(data.weights) != len(names) or not all(0 < w < math.inf for w in data.weights)):
        raise UserError(
            f"data.weights is {data.weights}; it takes one positive number for each of the {len(names)} corpora in "
            "training.dataset"
        )


def _check_model(job_config: Any) -> None:
    model, codec = job_config.model, job_config.codec
    if not Path(model.hf_assets_path).is_dir():
        raise UserError(
            f"model.hf_assets_path is '{model.hf_assets_path}', which is no folder; make it once with "
            f"`python scripts/prepare_base_model.py --base_model HUB_ID_OR_FOLDER --codec {codec.name} "
            f"--num_quantizers {codec.num_quantizers} --vocabulary {model.vocabulary} "
            f"--output_dir {model.hf_assets_path}`"
        )
    whole_frames(job_config.data.max_audio_seconds, load_codec_config(codec.name, codec.num_quantizers))
    sequences = load_sequences(model.hf_assets_path, codec.name, codec.num_quantizers, model.vocabulary)
    if model.vocabulary == "llama" and not has_text(sequences.tokenizer):
        raise UserError(
            f"model.vocabulary is 'llama', but the tokenizer in '{model.hf_assets_path}' holds no text; set it to "
            "'audio', or name a folder prepared by scripts/prepare_base_model.py with --vocabulary llama"
        )
    args = copy.copy(FLAVORS[model.flavor])
    base, kind = load_config(model.hf_assets_path, "model")
    if kind.model_type != "llama":
        raise UserError(
            f"model.hf_assets_path '{model.hf_assets_path}' is a '{kind.model_type}'; name a prepared Llama, or "
            "go on from a run by a step of it as checkpoint.initial_load_path"
        )
    problem = f"model.flavor '{model.flavor}' is not the model in '{model.hf_assets_path}'"
    _require_same(hf_config(args), base, SHAPE_KEYS, problem)
    # What prepare_base_model writes names its codec, but was trained on no codes.
    is_trained = hasattr(base, "codec_attention") or (hasattr(base, "num_quantizers") and not hasattr(base, "codec"))
    if job_config.checkpoint.initial_load_in_hf and is_trained and attention_of(base) != codec.attention:
        raise UserError(
            f"'{model.hf_assets_path}' was trained on codes of the codec's attention '{attention_of(base)}', but "
            f"codec.attention is '{codec.attention}'; set it to '{attention_of(base)}'"
        )
    if job_config.checkpoint.initial_load_in_hf:
        if not list(Path(model.hf_assets_path).glob("*.safetensors")):
            raise UserError(
                f"'{model.hf_assets_path}' holds no *.safetensors weights; prepare it without --random_weights, or "
                "start from random weights with --checkpoint.no-initial_load_in_hf"
            )
        if base.vocab_size != sequences.vocabulary.size:
            raise UserError(
                f"'{model.hf_assets_path}' has {base.vocab_size} vocabulary entries, not the "
                f"{sequences.vocabulary.size} of model.vocabulary '{model.vocabulary}' and {codec.num_quantizers} "
                "quantizers; prepare it by scripts/prepare_base_model.py with "
                f"--vocabulary {model.vocabulary} and name the result as model.hf_assets_path"
            )
    folder = Path(job_config.job.dump_folder)
    if (folder / job_config.checkpoint.folder).is_dir() and (folder / ASSETS_FOLDER).is_dir():
        args.update_from_config(job_config)
        wanted = speech_config(args, sequences, codec.name, codec.attention)
        earlier, kind = load_config(str(folder / ASSETS_FOLDER), "run record")
        problem = f"job.dump_folder '{folder}' holds the run of another model"
        _require_same(wanted, earlier, ("model_type",), f"{problem}.architecture")
        _require_same(wanted, earlier, (*SHAPE_KEYS, "num_quantizers", "codec", "codec_attention"), problem)
        _require_same(wanted, earlier, (kind.entries_key,), f"{problem}.vocabulary or tokenizer")


def _check_resume(job_config: Any) -> None:
    """Refuse a step that cannot be resumed. The loader itself checks that a saved position fits the data."""
    settings, folder = job_config.checkpoint, _checkpoint_folder(job_config)
    if not settings.enable:
        return
    if settings.initial_load_path and not Path(settings.initial_load_path).is_dir():
        raise UserError(f"checkpoint.initial_load_path '{settings.initial_load_path}' is no folder; name a step")
    steps = complete_steps(folder)
    if settings.load_step != -1 and settings.load_step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(
            f"checkpoint.load_step is {settings.load_step}, but the complete steps in '{folder}' are: {there}"
        )
    if not steps:
        return
    number = max(steps) if settings.load_step == -1 else settings.load_step
    step = steps[number]
    instead = "start another job.dump_folder with it as checkpoint.initial_load_path"
    if not is_distributed(step):
        raise UserError(
            f"'{step}' holds weights only, in Hugging Face's format, and cannot be resumed; {instead} and with "
            "checkpoint.initial_load_in_hf"
        )
    # From step 0, a seed checkpoint, TorchTitan loads the weights alone, so that no position is needed.
    if number and "dataloader" not in settings.exclude_from_loading and not has_loader_position(step):
        raise UserError(f"'{step}' holds weights only, no position in the data, and cannot be resumed; {instead}")


def _require_same(wanted: LlamaConfig, found: LlamaConfig, keys: tuple[str, ...], problem: str) -> None:
    for key in keys:
        a, b = getattr(wanted, key, None), getattr(found, key, None)
        if a != b:
            raise UserError(f"{problem}: {key} is {b!r} there and {a!r} in this config; change one of them")
