"""TorchTitan's metrics and validator, with additional losses per level, useful tokens and seconds of audio."""

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type
from tqdm import tqdm

from llama_mimi.common.distributed import broadcast_from_rank0, gather
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically
from llama_mimi.data.build import build_dataloader, dataset_names
from llama_mimi.data.dataloader import DataMeter
from llama_mimi.data.packing import Batch
from llama_mimi.training.loss import LevelMeter, level_fractions
from llama_mimi.training.optimizer import StepGuard

# Dense bfloat16 FLOP/s of GPUs from data sheets. A key is a part of the GPU's name; the first match is used.
# TorchTitan's `get_peak_flops` returns the A100's value for unknown GPUs, and the H100's value for the H800.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}
# Name of a group of metrics in the log. For validation, the name begins with "validation_".
BITS = "admissible_bits_per_audio_second"
VALIDATIONS = "validation.json"  # in the dump folder: loss and `BITS` by validated step and corpus


def peak_flops(card: str) -> float | None:
    """Return the peak FLOP/s of a GPU, or None for an unknown GPU or a partition of a GPU (MIG)."""
    if "MIG" in card:
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", card)), None)


class SpeechMetrics(MetricsProcessor):
    """Metrics of a run. Only targets of the loss count as tokens; in TorchTitan, every position counts."""

    time_last_log: float

    def __init__(self, *args: Any, guard: StepGuard, validation: LevelMeter, data: DataMeter, frame_rate_hz: float):
        super().__init__(*args)
        self._guard, self._validation_meter, self._data_meter = guard, validation, data
        self._frame_rate_hz, self._num_steps = frame_rate_hz, 0  # steps since the last log line

    def should_log(self, step: int) -> bool:
        self._num_steps += 1
        self._guard.check(self.job_config, step, self.model_parts)
        return super().should_log(step)

    def log(self, step: int, avg_loss: float, max_loss: float, grad_norm: float, extra_metrics: Any = None) -> None:
        seconds = time.perf_counter() - self.time_last_log
        sums = self._sum(self._guard.meter.pop(), "loss")
        if not sums[1].any():  # the next log line includes these steps
            return
        # The mean over all targets since the last log line. TorchTitan logs the loss of the last step only.
        loss, by_level, levels = self._losses(sums, level_fractions(self.job_config))
        tokens_per_s = float(sums[1].sum()) / seconds
        audio_per_s = self._audio_seconds(sums) / seconds
        meter = self._data_meter
        seen = torch.tensor([meter.num_clips, meter.num_frames], device=device_type)
        num_clips, num_frames = self._sum(seen, "batch").tolist()
        step_seconds, hours = seconds / self._num_steps, num_frames / self._frame_rate_hz / 3600
        # The loader's time includes the codec's time.
        data, codec = (100 * part / seconds for part in (sum(self.data_loading_times), meter.codec_seconds))
        memory_gib = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        metrics: dict[str, Any] = {
            "loss_metrics/global_avg_loss": loss,
            **by_level,
            "grad_norm": grad_norm,
            "throughput/useful_tokens_per_s": tokens_per_s,
            "throughput/audio_seconds_per_s": audio_per_s,
            "time_metrics/end_to_end(s)": step_seconds,
            "time_metrics/data_loading(%)": data,
            "time_metrics/codec(%)": codec,
            "data/clips_seen": num_clips,
            "data/hours_seen": hours,
            "memory/max_reserved(GiB)": memory_gib,
            # TorchTitan's n_tokens_seen includes padding.
            **{key: value for key, value in (extra_metrics or {}).items() if key != "n_tokens_seen"},
        }
        mfu = ""
        if peak := peak_flops(self.device_memory_monitor.device_name):
            flops = self.num_flops_per_token * tokens_per_s / self.parallel_dims.world_size
            metrics["throughput/mfu(%)"] = 100 * flops / peak
            mfu = f"  mfu: {100 * flops / peak:.1f}%"
        self.logger.log(metrics, step)
        num_steps = self.job_config.training.steps
        logger.info(
            f"step: {step}/{num_steps}  loss: {loss:.5f}  {levels}  grad_norm: {grad_norm:.3f}  "
            f"tokens/s: {tokens_per_s:,.0f}  audio-s/s: {audio_per_s:,.1f}{mfu}  "
            f"seen: {num_clips:,} clips, {hours:,.2f} h  data: {data:.1f}% (codec {codec:.1f}%)  "
            f"memory: {memory_gib:.2f}GiB  left: {timedelta(seconds=math.ceil(step_seconds * (num_steps - step)))}"
        )
        self._num_steps = self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        meter.codec_seconds = 0.0
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def log_validation(self, step: int, start: float, further: str = "") -> dict[str, Any]:
        """Log a validation that began at time ``start``, and exclude its duration from the training time.

        Return the loss and the `BITS`. ``further``: folder name of a second or further corpus, for the metrics' names.
        """
        sums = self._validation_meter.pop()  # a scalar if no rank had a batch
        if not sums.ndim or not self._sum(sums, "loss").any():  # summed in place
            name = further or self.job_config.validation.dataset
            raise UserError(f"validation.dataset '{name}' does not contain a usable clip; set another corpus")
        self.time_last_log += time.perf_counter() - start  # reading the sums waits for the device
        loss, by_level, levels = self._losses(sums, [1.0] * self.job_config.codec.num_quantizers)
        bits = {key.removeprefix(f"{BITS}/"): value for key, value in by_level.items() if key.startswith(BITS)}
        metrics = {"metrics/loss": loss} | {key.removeprefix("loss_"): value for key, value in by_level.items()}
        infix, label = (f"/{further}/", f"{further}  ") if further else ("/", "")
        self.logger.log({f"validation_{key.replace('/', infix, 1)}": value for key, value in metrics.items()}, step)
        audio_seconds = self._audio_seconds(sums)
        logger.info(f"validate step: {step}  {label}loss: {loss:.5f}  {levels}  ({audio_seconds:,.0f} s of audio)")
        return {"loss": loss, BITS: bits}

    def _audio_seconds(self, sums: torch.Tensor) -> float:
        """Return the length of the audio that the tasks predict."""
        return float(self._by_task(sums)[1, :, 0].sum()) / self._frame_rate_hz

    def _by_task(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the result of `LevelMeter.pop` as a tensor (3, S, Q + 2)."""
        return sums.unflatten(1, (len(self.job_config.data.tasks), -1))

    def _sum(self, values: torch.Tensor, mesh_name: str) -> torch.Tensor:
        """Return the sum of ``values`` over the ranks of a mesh; ``values`` is overwritten."""
        if (mesh := self.parallel_dims.get_optional_mesh(mesh_name)) is not None:
            dist.all_reduce(values, group=mesh.get_group())
        return values

    def _losses(self, sums: torch.Tensor, fractions: Sequence[float]) -> tuple[float, dict[str, float], str]:
        """Return the mean loss over all targets, metrics of each task and level with targets, and text for the log.

        In the mean, the sums of a level are divided by the level's fraction of frames with a target. Bits per second
        use the softmax over the admissible entries of a position, as in generation. The losses of text are in nats per
        token. The metrics of the second and further tasks have the task in their name.
        """
        weights = torch.tensor([*(1 / part for part in fractions), 1.0, 1.0], dtype=torch.float64, device=sums.device)
        by_task, tasks = self._by_task(sums), self.job_config.data.tasks
        loss = float((weights * by_task[0]).sum() / (weights * by_task[1]).sum())
        names = [*(f"level_{level}" for level in range(len(fractions))), "audio_end", "text"]
        metrics: dict[str, float] = {}
        texts = []
        for number, task in enumerate(tasks):
            rows = dict(zip(names, by_task[:, number].T.tolist(), strict=True))
            means = {name: total / count for name, (total, count, _) in rows.items() if count}
            shown = {name: f"{means[name]:.3f}" if name in means else "-" for name in names[:-2]}
            levels = list(shown.values()) if "level_0" in means else []
            levels += [f"text {mean:.3f}" for name, mean in means.items() if name == "text"]
            texts.append(f"{'levels' if len(tasks) == 1 else task}: {' '.join(levels) or '-'}")
            nats = {name: rows[name][2] / rows[name][1] for name in names[:-2] if name in means}
            if len(nats) == len(fractions):
                nats["all"] = sum(nats.values())
            nats_to_bits, own = self._frame_rate_hz / math.log(2), f"{task}/" if number else ""
            metrics |= {f"loss_metrics/{own}{name}": mean for name, mean in means.items()}
            metrics |= {f"{BITS}/{own}{name}": nats_to_bits * value for name, value in nats.items()}
        return loss, metrics, "  ".join(texts)


class SpeechValidator(Validator):
    """Validation of each corpus, and early stopping.

    A loss is the mean over all targets, not over batches. The batches stay in memory.
    """

    best_step = 0  # multiple of validation.freq with the lowest loss on the first corpus; 0: not validated yet

    def __init__(self, *, job_config: Any, dp_world_size: int, dp_rank: int, tokenizer: Any, **parts: Any) -> None:
        # Validator.__init__ would open a text corpus.
        ranks = dp_world_size, dp_rank
        self.__dict__.update(parts, job_config=job_config, tokenizer=tokenizer)
        self._loaders = {
            Path(name).name: build_dataloader(*ranks, tokenizer, job_config, is_validation=True, corpus=name)
            for name in dataset_names(job_config.validation)
        }
        self._batches: dict[str, list[Batch]] = {}

    def begin(self, trainer: Any) -> None:
        """Read the validations up to the step that the trainer has loaded; stop at this step if the run stopped there.

        If the run was killed between saving and validating this step, validate the step now.
        """
        step, folder = trainer.step, self.job_config.job.dump_folder
        saved = broadcast_from_rank0(lambda: read_json(folder, VALIDATIONS)) or {}
        self._validations = {int(number): found for number, found in saved.items() if int(number) <= step}
        is_missing = step > 0 and self.should_validate(step) and step not in self._validations
        if is_missing and self.job_config.validation.patience:
            self.validate(trainer.model_parts, step)
        else:
            self._check_patience(step)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        (model,) = model_parts
        model.eval()
        found: dict[str, Any] = {}
        for corpus in self._loaders:
            start = time.perf_counter()
            for input_dict, labels in self._padded_batches(corpus):
                labels = labels.to(device_type)
                input_dict = {key: value.to(device_type) for key, value in input_dict.items()}
                inputs, labels, extra, kwargs = self.post_dataloading_process(input_dict, labels, model_parts)
                with self.validation_context(), self.maybe_enable_amp:
                    self.loss_fn(model(inputs, **extra, **kwargs), labels)  # adds to the validation meter
            found[corpus] = self.metrics_processor.log_validation(step, start, corpus if found else "")
        model.train()
        self._validations[step] = gather(found)[0]  # all ranks must decide on the same numbers
        content = json.dumps(self._validations, indent=1).encode()
        broadcast_from_rank0(lambda: write_atomically(self.job_config.job.dump_folder, VALIDATIONS, content))
        self._check_patience(step)

    def _check_patience(self, step: int) -> None:
        """Stop training at this step if the loss has not become lower in ``validation.patience`` validations."""
        settings, corpus = self.job_config.validation, next(iter(self._loaders))
        # Step 1 is validated, too, but not always saved.
        counted = {number: found for number, found in self._validations.items() if number % settings.freq == 0}
        losses = {number: found[corpus]["loss"] for number, found in counted.items() if corpus in found}
        self.best_step = min(losses, key=losses.__getitem__, default=0)
        if 0 < settings.patience <= sum(number > self.best_step for number in losses):
            self.job_config.training.steps = step  # ends TorchTitan's loop
            reason = f"the loss on {corpus} has not become lower since step {self.best_step}"
            logger.info(f"training stops at step {step}: {reason}; set a higher validation.patience to continue")

    def _padded_batches(self, corpus: str) -> Iterator[Batch]:
        """Yield this rank's batches, then empty batches until all ranks are done: a sharded model needs all ranks."""
        loader = self._loaders[corpus]
        bar: dict[str, Any] = {"unit": "batch", "delay": 10, "mininterval": 10, "disable": dist.get_rank() > 0}
        if corpus not in self._batches:
            self._batches[corpus] = list(tqdm(loader, "reading validation clips", **bar))
        batches = self._batches[corpus]
        num_batches = torch.tensor(len(batches), device=device_type)
        dist.all_reduce(num_batches, op=dist.ReduceOp.MAX)
        yield from tqdm(batches, "validation", **bar)
        for _ in range(int(num_batches) - len(batches)):
            yield loader.packer.pop()
