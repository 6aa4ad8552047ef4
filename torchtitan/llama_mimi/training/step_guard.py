"""Checks of every training step, so that no checkpoint has NaN or infinite weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.common.errors import UserError
from llama_mimi.training.checks import checkpoint_folder
from llama_mimi.training.loss import LevelMeter


class StepGuard:
    """Stops a run at a step whose loss, gradients or weights are not finite, before that step is saved.

    A step without targets changes nothing, and the run continues. TorchTitan calls `before_step` as a hook of its
    optimizer. `SpeechMetrics.should_log` calls `check`, because TorchTitan saves after it. Each step waits once for a
    reduction of three numbers over all ranks. The cost on a GPU was not measured.

    Args:
        meter: meter of the training loss.
    """

    def __init__(self, meter: LevelMeter) -> None:
        self._meter = meter
        self._problem: str | None = None
        self._is_empty, self._num_empty = False, 0

    def before_step(self, optimizers: OptimizersContainer, args: Any, kwargs: Any) -> None:
        """Drop the gradients of a step that must change nothing: no optimizer of TorchTitan moves a weight without."""
        parameters = [p for group in optimizers.param_groups for p in group["params"]]
        norm = _norm(p.grad for p in parameters if p.grad is not None)
        loss_sum, num_targets, norms = _over_ranks(torch.cat([self._meter.take_step(), norm]))
        self._is_empty = num_targets == 0
        if self._is_empty:
            optimizers.zero_grad()
        elif not math.isfinite(loss_sum + norms):
            self._problem = f"the training loss is {loss_sum / num_targets:g}"
            if not math.isfinite(norms):
                self._problem += " and the gradients are not finite"
            optimizers.zero_grad()

    def check(self, job_config: Any, step: int, model_parts: list[nn.Module]) -> None:
        """Report what `before_step` found, and check the weights where a checkpoint is due.

        Raises:
            UserError: the step is not finite.
        """
        if self._is_empty:
            self._num_empty += 1
            if not dist.is_initialized() or dist.get_rank() == 0:
                logger.warning(f"step {step} has no targets and changes no weights ({self._num_empty} such steps)")
        problem = self._problem
        if problem is None and (step % job_config.checkpoint.interval == 0 or step in (1, job_config.training.steps)):
            (norms,) = _over_ranks(_norm(p for part in model_parts for p in part.parameters()))
            problem = None if math.isfinite(norms) else f"the norm of the new weights is {norms}"
        if problem is None:
            return
        steps = complete_steps(checkpoint_folder(job_config))
        last = f"the last good checkpoint is '{steps[max(steps)]}'" if steps else "there is no good checkpoint"
        raise UserError(
            f"at step {step} {problem}, so the run stops and saves nothing; {last}; lower optimizer.lr or "
            "training.max_norm and start again, from an earlier step with --checkpoint.load_step"
        )


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Norm (1,) of this rank's parts of tensors."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return torch.nn.utils.get_total_norm([part.detach() for part in parts]).to(device_type, torch.float64).reshape(1)


def _over_ranks(sums: torch.Tensor) -> list[float]:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()
