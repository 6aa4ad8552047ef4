"""Settings that cannot run, wherever it is: values, architecture, parallelism."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from llama_mimi.checkpoint.run_record import ASSETS_FOLDER
from llama_mimi.common.errors import UserError
from llama_mimi.model.llama import FLAVORS
from llama_mimi.training.loss import level_weights

FLOAT8 = "quantize.linear.float8"  # TorchTitan's name of the converter


def check_settings(job_config: Any, world_size: int) -> None:
    """Refuse values and combinations of them that cannot run, wherever it is.

    Raises:
        UserError: one sentence for the first thing that is wrong.
    """
    _check_values(job_config)
    _check_architecture(job_config)
    _check_parallelism(job_config, world_size)


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
    if not training.max_norm > 0:  # also refuses NaN
        raise UserError(f"training.max_norm is {training.max_norm}; set a positive number, or inf for no clipping")
    optimizer, schedule = job_config.optimizer, job_config.lr_scheduler
    for key, number, limit in (
        ("optimizer.lr", optimizer.lr, math.inf),
        ("optimizer.beta1", optimizer.beta1, 1),
        ("optimizer.beta2", optimizer.beta2, 1),
        ("optimizer.eps", optimizer.eps, math.inf),
        ("optimizer.weight_decay", optimizer.weight_decay, math.inf),
        ("lr_scheduler.warmup_steps", schedule.warmup_steps, math.inf),
        ("lr_scheduler.decay_ratio", schedule.decay_ratio or 0, math.inf),
        ("lr_scheduler.min_lr_factor", schedule.min_lr_factor, math.inf),
    ):
        if not 0 <= number < limit:
            raise UserError(f"{key} is {number}; set a finite number of at least 0" + " and below 1" * (limit == 1))
    if schedule.total_steps is not None and schedule.total_steps < training.steps:
        raise UserError(
            f"lr_scheduler.total_steps is {schedule.total_steps}, fewer than training.steps {training.steps}, so that "
            "the learning rate would become negative; set at least as many"
        )
    if optimizer.early_step_in_backward:
        raise UserError(
            "optimizer.early_step_in_backward is set, which changes weights before their gradients are checked; leave "
            "it out"
        )
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
        raise UserError(
            f"parallelism.pipeline_parallel_degree is {pp}, which is not supported; set it to 1, and use FSDP, HSDP or "
            "tensor parallelism"
        )
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
