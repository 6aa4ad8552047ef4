"""Cross-entropy over units, in total and per quantizer level."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama_mimi.common.errors import UserError
from llama_mimi.model.cross_entropy import PendingLogits, chunk_losses, cross_entropy
from llama_mimi.tokens.sequences import IGNORE_INDEX
from llama_mimi.tokens.units import UnitVocabulary


class LevelMeter:
    """Sums of loss and counts of targets since the last `take`, per level; ``</audio>`` has a row of its own."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, losses_N: torch.Tensor, rows_N: torch.Tensor, num_rows: int) -> None:
        """Add losses (N,), each to its row (N,) in ``[0, num_rows)``."""
        sums = torch.zeros(2, num_rows, device=losses_N.device, dtype=torch.float64)
        sums[0].index_add_(0, rows_N, losses_N.double())
        sums[1].index_add_(0, rows_N, torch.ones_like(losses_N, dtype=torch.float64))
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> torch.Tensor | None:
        """This rank's sums (2, Q + 1), loss then count, and start anew; None if nothing was added."""
        sums, self._sums = self._sums, None
        return sums


def reduce_sums(sums: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Add up a meter's sums over the ranks of ``mesh``."""
    if mesh is not None:
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=mesh.get_group())
    return sums


class UnitLoss:
    """TorchTitan's loss seam: the sum of cross-entropies over targets, recorded per level on the way.

    Args:
        vocabulary: tells the level of a label.
        meter: where the levels are recorded.
        compile_fn: compiles what is done with a chunk of logits, or leaves it.
    """

    def __init__(
        self, vocabulary: UnitVocabulary, meter: LevelMeter, compile_fn: Callable[[Callable], Callable] | None = None
    ) -> None:
        self._vocabulary, self._meter = vocabulary, meter
        self._chunk_step = compile_fn(chunk_losses) if compile_fn else None
        # 1 / number of targets: TorchTitan 0.2.2 does not divide a pipeline's gradients; see train.SpeechTrainer.
        self.pipeline_scale: torch.Tensor | None = None

    def __call__(self, logits: PendingLogits | torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """The sum over the batch.

        Args:
            logits: of the batch; a pipeline's last stage has them as they are (B, L, V), for a few rows at a time.
            labels_BL: the targets.
        """
        labels_L, Q = labels_BL.flatten(), self._vocabulary.num_quantizers
        positions_N = (labels_L != IGNORE_INDEX).nonzero()[:, 0]
        targets_N = labels_L[positions_N]
        if isinstance(logits, PendingLogits):
            loss_sum, losses_N = cross_entropy(logits, positions_N, targets_N, self._chunk_step)
        else:
            losses_L = F.cross_entropy(
                logits.flatten(0, 1).float(), labels_L, reduction="none", ignore_index=IGNORE_INDEX
            )
            if isinstance(losses_L, DTensor):  # loss parallel: replicated after the reduction over the vocabulary
                losses_L = losses_L.to_local()
            if self.pipeline_scale is None:
                raise UserError(
                    "pipeline parallelism needs `-m llama_mimi.train`, as TorchTitan's own entry point does not divide "
                    "its gradients by the number of targets"
                )
            loss_sum, losses_N = losses_L.sum() * self.pipeline_scale, losses_L.detach()[positions_N]
        rows_N = torch.where(self._vocabulary.is_unit(targets_N), self._vocabulary.level(targets_N), Q)
        self._meter.add(losses_N, rows_N, Q + 1)
        return loss_sum
