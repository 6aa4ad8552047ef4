"""Cross-entropy over units, in total and per quantizer level."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama_mimi.sequences import IGNORE_INDEX
from llama_mimi.units import UnitVocabulary


class LevelMeter:
    """Sums of loss and counts of targets since the last `take`, per level; ``</audio>`` has a row of its own."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, rows: torch.Tensor, num_rows: int) -> None:
        """Add ``losses`` (N,) to ``rows`` (N,) in ``[0, num_rows]``; the last row is thrown away."""
        sums = torch.zeros(2, num_rows + 1, device=losses.device, dtype=torch.float64)
        sums[0].index_add_(0, rows, losses.double())
        sums[1].index_add_(0, rows, torch.ones_like(losses, dtype=torch.float64))
        sums = sums[:, :num_rows]
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
        compile_fn: compiles the cross-entropy, or leaves it.
    """

    def __init__(
        self, vocabulary: UnitVocabulary, meter: LevelMeter, compile_fn: Callable[[Callable], Callable] | None = None
    ) -> None:
        self._vocabulary, self._meter = vocabulary, meter
        self._cross_entropy = compile_fn(_cross_entropy) if compile_fn else _cross_entropy

    def __call__(self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        losses_N = self._cross_entropy(logits_BLV, labels_BL)
        if isinstance(losses_N, DTensor):  # loss parallel: replicated after the reduction over the vocabulary
            losses_N = losses_N.to_local()
        labels_N, Q = labels_BL.flatten(), self._vocabulary.num_quantizers
        rows_N = torch.where(self._vocabulary.is_unit(labels_N), self._vocabulary.level(labels_N), Q)
        # Ignored positions get a row that is thrown away: picking the others out would make the GPU wait for the host.
        rows_N = rows_N.masked_fill(labels_N == IGNORE_INDEX, Q + 1)
        self._meter.add(losses_N.detach(), rows_N, Q + 1)
        return losses_N.sum()


def _cross_entropy(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Losses (B * L,) in float32; 0 where the label is ignored."""
    return F.cross_entropy(
        logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
