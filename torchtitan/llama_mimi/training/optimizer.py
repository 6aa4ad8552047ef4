"""TorchTitan's optimizer and schedule. A resumed run uses the current config. A run stops if weights become NaN."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import require_same
from llama_mimi.job_config import checkpoint_folder
from llama_mimi.training.loss import LevelMeter


def build_speech_optimizers(*args: Any, guard: "StepGuard", **kwargs: Any) -> OptimizersContainer:
    """Build TorchTitan's optimizers. ``guard`` checks each step. Resuming restores the moments, not the settings."""
    optimizers = build_optimizers(*args, **kwargs)
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    optimizers.register_step_pre_hook(guard.before_step)
    return optimizers


def _with_own_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the saved state with the settings of this run; raise a `UserError` if optimizer.name differs."""
    own, saved = optimizer.param_groups[0], optimizer.param_groups[0] | state["param_groups"][0]
    before, now = ({"optimizer.name": "AdamW" if g["decoupled_weight_decay"] else "Adam"} for g in (saved, own))
    remedy = "set the old value, or reset the moments with --checkpoint.exclude_from_loading optimizer"
    require_same(before, now, "the checkpoint", remedy)
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [own | {"params": saved["params"]} for own, saved in groups]}


class SpeechSchedulers(LRSchedulersContainer):
    """TorchTitan's schedulers. Resuming restores the number of steps, but not the learning rate.

    After each step, the random generators get a seed that depends only on the step and the rank. A resumed run thus has
    the same dropout as an uninterrupted run.
    """

    def __init__(self, *args: Any) -> None:
        self.schedulers = build_lr_schedulers(*args).schedulers

    def step(self) -> None:
        super().step()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(self.schedulers[0].last_epoch * world_size + rank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = {key: state_dict[key] - 1 for key in ("last_epoch", "_step_count")}
        for scheduler in self.schedulers:
            scheduler.load_state_dict(state_dict | counts | {"base_lrs": scheduler.base_lrs})
        self.step()  # advances to the saved step with the learning rate of the current config


class StepGuard:
    """Guard that ends a run before TorchTitan saves a step with non-finite loss, gradients or weights.

    A step without targets does not change weights, and the run continues. `SpeechMetrics.should_log` calls `check`.
    """

    def __init__(self) -> None:
        self.meter = LevelMeter()  # of the training loss
        self._problem, self._is_empty = "", False

    def before_step(self, optimizers: OptimizersContainer, args: Any, kwargs: Any) -> None:
        """Set gradients to None if a step must not change weights; optimizers skip weights without gradients."""
        parameters = [p for group in optimizers.param_groups for p in group["params"]]
        norm = _norm(p.grad for p in parameters if p.grad is not None)
        loss_sum, num_targets, norms = _over_ranks(torch.cat([self.meter.pop_step(), norm]))
        self._is_empty = num_targets == 0
        if not self._is_empty and not math.isfinite(loss_sum + norms):
            gradients = "" if math.isfinite(norms) else " and the gradients are not finite"
            self._problem = f"the training loss is {loss_sum / num_targets:g}{gradients}"
        if self._is_empty or self._problem:
            optimizers.zero_grad()

    def check(self, job_config: Any, step: int, model_parts: list[nn.Module]) -> None:
        """Raise a `UserError` if the loss, the gradients or, before a checkpoint, the weights are not finite."""
        if self._is_empty:
            logger.info(f"step {step} does not contain targets, so the weights do not change")
        if not self._problem and (step % job_config.checkpoint.interval == 0 or step in (1, job_config.training.steps)):
            (norms,) = _over_ranks(_norm(p for part in model_parts for p in part.parameters()))
            self._problem = "" if math.isfinite(norms) else f"the norm of the new weights is {norms}"
        if not self._problem:
            return
        steps = complete_steps(checkpoint_folder(job_config))
        last = f"the last good checkpoint is '{steps[max(steps)]}'" if steps else "a good checkpoint does not exist"
        raise UserError(
            f"at step {step}, {self._problem}, so the run stops without saving; {last}; reduce optimizer.lr or "
            "training.max_norm, then restart the run, or resume an earlier step with --checkpoint.load_step"
        )


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the norm (1,) of the local shards of tensors."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return torch.nn.utils.get_total_norm([part.detach() for part in parts]).to(device_type, torch.float64).reshape(1)


def _over_ranks(sums: torch.Tensor) -> list[float]:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()
