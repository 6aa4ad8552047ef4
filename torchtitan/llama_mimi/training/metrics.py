"""TorchTitan's metrics: useful tokens, losses per level, audio-seconds per second and time left."""

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from llama_mimi.data.dataloader import DataMeter
from llama_mimi.training.loss import LevelMeter, reduce_sums
from llama_mimi.training.optimizer import StepGuard

# Dense bfloat16 FLOP/s of GPUs from NVIDIA's and AMD's data sheets, by a part of the name; the first match counts.
# TorchTitan's `get_peak_flops` takes unknown GPUs for an A100, and an H800 for an H100.
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
# Group of metrics; "validation_" precedes those of validation.
BITS = "admissible_bits_per_audio_second"


@dataclass
class Meters:
    """Sums that losses and the training dataloader record for the metrics."""

    train: LevelMeter = field(default_factory=LevelMeter)
    validation: LevelMeter = field(default_factory=LevelMeter)
    data: DataMeter = field(default_factory=DataMeter)


class SpeechMetrics(MetricsProcessor):
    """Metrics of a speech run. TorchTitan counts every position as a token; here only targets of the loss are tokens.

    Args:
        meters: filled by the losses and the dataloader.
        level_shares: fraction of the frames in which each of the Q levels has targets.
    """

    time_last_log: float

    def __init__(
        self,
        job_config: Any,
        parallel_dims: ParallelDims,
        meters: Meters,
        guard: StepGuard,
        level_shares: Sequence[float],
        frame_rate_hz: float,
    ) -> None:
        if job_config.metrics.enable_wandb:
            os.environ.setdefault("WANDB_PROJECT", "llama_mimi")
        super().__init__(job_config, parallel_dims)
        self._meters, self._guard = meters, guard
        self._level_shares, self._frame_rate_hz = level_shares, frame_rate_hz
        self._peak_flops = peak_flops(self.device_memory_monitor.device_name)
        self._last_step = -1

    def should_log(self, step: int) -> bool:
        if self._last_step == -1:  # the first step of this process, which is not 1 in a resumed run
            self._last_step = step - 1
        self._guard.check(self.job_config, step, self.model_parts)
        return super().should_log(step)

    def log(
        self, step: int, global_avg_loss: float, global_max_loss: float, grad_norm: float, extra_metrics: Any = None
    ) -> None:
        seconds = time.perf_counter() - self.time_last_log
        sums = self._reduced(self._meters.train)
        if not sums[1].any():  # the next line is of these steps, too
            return
        # Over all targets since the last line, as the levels are; TorchTitan's own is that of the last step alone.
        loss, by_level, levels = self._losses(sums, self._level_shares)
        tokens_per_s = float(sums[1].sum()) / seconds
        audio_per_s = float(sums[1, 0]) / self._frame_rate_hz / seconds
        steps, num_steps = step - self._last_step, self.job_config.training.steps
        memory_gib = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        # The share of the codec is a part of the loader's share.
        data = 100 * sum(self.data_loading_times) / seconds
        codec = 100 * self._meters.data.codec_seconds / seconds
        seen = torch.tensor([self._meters.data.num_clips, self._meters.data.num_frames], device=device_type)
        num_clips, num_frames = reduce_sums(seen, self.parallel_dims.get_optional_mesh("batch")).tolist()
        hours = num_frames / self._frame_rate_hz / 3600
        metrics: dict[str, Any] = {
            "loss_metrics/global_avg_loss": loss,
            **by_level,
            "grad_norm": grad_norm,
            "throughput/useful_tokens_per_s": tokens_per_s,
            "throughput/audio_seconds_per_s": audio_per_s,
            "time_metrics/end_to_end(s)": seconds / steps,
            "time_metrics/data_loading(%)": data,
            "time_metrics/codec(%)": codec,
            "data/clips_seen": num_clips,
            "data/hours_seen": hours,
            "memory/max_reserved(GiB)": memory_gib,
            # TorchTitan's own count of tokens seen includes padding
            **{key: value for key, value in (extra_metrics or {}).items() if key != "n_tokens_seen"},
        }
        mfu = ""
        if self._peak_flops is not None:
            flops = self.num_flops_per_token * tokens_per_s / self.parallel_dims.world_size
            metrics["throughput/mfu(%)"] = 100 * flops / self._peak_flops
            mfu = f"  mfu: {metrics['throughput/mfu(%)']:.1f}%"
        self.logger.log(metrics, step)
        left = timedelta(seconds=math.ceil(seconds / steps * (num_steps - step)))
        logger.info(
            f"step: {step}/{num_steps}  loss: {loss:.5f}  levels: {levels}  grad_norm: {grad_norm:.3f}  "
            f"tokens/s: {tokens_per_s:,.0f}  audio-s/s: {audio_per_s:,.1f}{mfu}  "
            f"seen: {num_clips:,} clips, {hours:,.2f} h  data: {data:.1f}% (codec {codec:.1f}%)  "
            f"memory: {memory_gib:.2f}GiB  left: {left}"
        )
        self._last_step = step
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self._meters.data.codec_seconds = 0.0
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def log_validation(self, step: int, seconds: float) -> None:
        """Log the validation that just took ``seconds``, which do not count as training time."""
        self.time_last_log += seconds
        sums = self._reduced(self._meters.validation)
        loss, by_level, levels = self._losses(sums, [1.0] * len(self._level_shares))
        by_level = {f"validation_{key.removeprefix('loss_')}": value for key, value in by_level.items()}
        self.logger.log({"validation_metrics/loss": loss, **by_level}, step)
        audio_seconds = sums[1, 0] / self._frame_rate_hz
        logger.info(f"validate step: {step}  loss: {loss:.5f}  levels: {levels}  ({audio_seconds:,.0f} s of audio)")

    def _reduced(self, meter: LevelMeter) -> torch.Tensor:
        return reduce_sums(meter.take(), self.parallel_dims.get_optional_mesh("loss"))

    def _losses(self, sums: torch.Tensor, level_shares: Sequence[float]) -> tuple[float, dict[str, float], str]:
        """Return the mean loss over codes and ends, the metrics of the levels that had targets, and their log text.

        In the mean loss a level is divided by its fraction of frames with a target. Bits are the cost of a second of
        audio: each code is predicted among the admissible entries of its position, as in generation. The loss also
        includes the cost of excluding other entries, of which a flattened vocabulary has more.
        """
        weights = torch.tensor([*(1 / share for share in level_shares), 1.0], dtype=torch.float64, device=sums.device)
        loss = float((weights * sums[0]).sum() / (weights * sums[1]).sum())
        names = [*(f"level_{level}" for level in range(len(level_shares))), "audio_end"]
        rows = dict(zip(names, sums.T.tolist(), strict=False))
        metrics = {f"loss_metrics/{name}": total / count for name, (total, count, _) in rows.items() if count}
        levels = " ".join(f"{total / count:.3f}" if count else "-" for total, count, _ in list(rows.values())[:-1])
        nats = {name: total / count for name, (_, count, total) in rows.items() if count and name != "audio_end"}
        if len(nats) == len(level_shares):
            nats["all"] = sum(nats.values())
        nats_to_bits = self._frame_rate_hz / math.log(2)
        metrics |= {f"{BITS}/{name}": nats_to_bits * value for name, value in nats.items()}
        return loss, metrics, levels


def peak_flops(card: str) -> float | None:
    """Return the FLOP/s of a GPU by `PEAK_FLOPS`; None for unknown GPUs, and for parts of a GPU (MIG)."""
    if "MIG" in card:
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", card)), None)
