"""Train spec "llama_mimi" for TorchTitan. ``custom_import`` in ``[experimental]`` registers the train spec."""

import sys
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.architectures import save_run_record, speech_config, state_dict_adapter
from llama_mimi.checkpoint.lora import adapter_config
from llama_mimi.common.command_line import report_errors
from llama_mimi.common.distributed import end_with_torchrun, report_error_once
from llama_mimi.data.build import build_dataloader
from llama_mimi.data.dataloader import DataMeter
from llama_mimi.model.architectures import build_model, parallelize
from llama_mimi.model.cross_entropy import chunk_losses
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer, build_speech_tokenizer
from llama_mimi.training.checkpoints import use_checksums
from llama_mimi.training.checks import prepare_run
from llama_mimi.training.loss import LevelMeter, SpeechLoss, level_fractions, level_weights
from llama_mimi.training.metrics import SpeechMetrics, SpeechValidator
from llama_mimi.training.optimizer import SpeechSchedulers, StepGuard, build_speech_optimizers

# TorchTitan builds metrics, losses and loader independently; they share these meters.
_guard, _validation_meter, _data_meter = StepGuard(), LevelMeter(), DataMeter()
JobConfig.maybe_log = lambda job_config: None  # `prepare_run` saves the config after the checks


def build_tokenizer(job_config: Any) -> SpeechTokenizer:
    """Check and prepare a run, and return its tokenizer. TorchTitan calls this function before all other builders."""
    end_with_torchrun()  # TorchTitan's own entry point needs this line and the next
    sys.excepthook = report_uncaught
    prepare_run(job_config)
    use_checksums(job_config.checkpoint.verify)
    keep_output_matrix(job_config)
    return build_speech_tokenizer(job_config)


def keep_output_matrix(job_config: Any) -> None:
    """Exclude the output matrix from the conversion to float8, because the loss reads the unconverted matrix."""
    job_config.quantize.linear.float8.filter_fqns.append("output")


def report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an uncaught error in the same format as `llama_mimi.train`."""
    try:
        with report_errors(), report_error_once():
            raise error
    except kind:
        sys.__excepthook__(kind, error, trace)


def build_loss(
    job_config: Any, meter: LevelMeter = _guard.meter, weights: list[float] | None = None, **kwargs: Any
) -> SpeechLoss:
    """Build the training loss. For validation, pass another meter and other weights."""
    if weights is None:
        levels = level_weights(job_config.loss.level_weights, level_fractions(job_config))
        weights = [*levels, job_config.loss.text_weight]
    settings = job_config.compile
    is_compiled = settings.enable and "loss" in settings.components
    chunk_step = torch.compile(chunk_losses, backend=settings.backend) if is_compiled else None
    vocabulary = build_speech_tokenizer(job_config).vocabulary
    return SpeechLoss(vocabulary, meter, weights, len(job_config.data.tasks), chunk_step)


def build_validator(job_config: Any, **kwargs: Any) -> SpeechValidator:
    loss_fn = build_loss(job_config, _validation_meter, [1.0] * (job_config.codec.num_quantizers + 1))
    return SpeechValidator(job_config=job_config, **kwargs | {"loss_fn": loss_fn})


def build_metrics(job_config: Any, parallel_dims: ParallelDims, model_args: LlamaMimiArgs) -> SpeechMetrics:
    """Build the metrics of a run, and save the model configuration and the tokenizer of the run."""
    codec = job_config.codec
    tokenizer = build_speech_tokenizer(job_config)
    codec_config = load_codec_config(codec.name, codec.num_quantizers)
    frame_rate_hz = codec_config.sampling_rate / codec_config.frame_size
    row_seconds = job_config.training.seq_len // tokenizer.positions_per_frame / frame_rate_hz
    seconds = min(job_config.data.max_audio_seconds, row_seconds)
    training = {"tasks": job_config.data.tasks, "max_audio_seconds": seconds}
    config = speech_config(model_args, tokenizer, codec.name, codec.sliding_window, **training)
    save_run_record(job_config.job.dump_folder, config, tokenizer, adapter_config(job_config, model_args))
    meters: dict[str, Any] = {"guard": _guard, "validation": _validation_meter, "data": _data_meter}
    return SpeechMetrics(job_config, parallel_dims, **meters, frame_rate_hz=frame_rate_hz)


register_train_spec(
    "llama_mimi",
    TrainSpec(
        model_cls=build_model,
        model_args=FLAVORS,
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=partial(build_speech_optimizers, guard=_guard),
        build_lr_schedulers_fn=SpeechSchedulers,
        build_dataloader_fn=partial(build_dataloader, meter=_data_meter),
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
        state_dict_adapter=state_dict_adapter,
    ),
)
