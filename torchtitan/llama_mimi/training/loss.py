"""Cross-entropy over units, weighted by level in total, and as it is per quantizer level."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.tools.utils import device_type

from llama_mimi.common.errors import UserError
from llama_mimi.model.cross_entropy import PendingLogits, Targets, chunk_losses, cross_entropy, unit_targets
from llama_mimi.model.hierarchical import PendingFrames
from llama_mimi.tokens.sequences import IGNORE_INDEX
from llama_mimi.tokens.units import UnitVocabulary


class LevelMeter:
    """Sums of losses and counts of targets since the last `take`, per level; ``</audio>`` has a row of its own."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._step_sums: torch.Tensor | None = None

    def add(
        self, losses_N: torch.Tensor, admissible_N: torch.Tensor | float, rows_N: torch.Tensor, num_rows: int
    ) -> None:
        """Add losses (N,), each to its row (N,); what is in row ``num_rows`` is not recorded.

        Args:
            losses_N: under the softmax over all entries.
            admissible_N: under the softmax over the admissible entries; NaN where they are unknown.
        """
        sums = torch.zeros(3, num_rows + 1, device=losses_N.device, dtype=torch.float64)
        for row, values_N in zip(sums, (losses_N, 1.0, admissible_N), strict=True):
            row.index_add_(0, rows_N, values_N + torch.zeros_like(losses_N, dtype=torch.float64))
        of_step = sums[:2].sum(dim=1)
        self._step_sums = of_step if self._step_sums is None else self._step_sums + of_step
        sums = sums[:, :num_rows]
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> torch.Tensor | None:
        """Return this rank's sums (3, Q + 1) of losses, targets and losses over admissible entries, and start again.

        None if nothing was added.
        """
        sums, self._sums = self._sums, None
        return sums

    def take_step(self) -> torch.Tensor:
        """Return this rank's sum of losses and number of targets (2,) since the last call, over all levels."""
        sums, self._step_sums = self._step_sums, None
        return torch.zeros(2, device=device_type, dtype=torch.float64) if sums is None else sums


def reduce_sums(sums: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Add up a meter's sums over the ranks of ``mesh``."""
    if mesh is not None:
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=mesh.get_group())
    return sums


def level_weights(recipe: str, shares: Sequence[float]) -> list[float]:
    """Weights of the losses of each level, such that the mean weight of the targets of a frame is one.

    So the learning rate keeps its meaning, whatever the recipe.

    Args:
        recipe: "uniform"; "semantic:R", level 0 R times as much as each other level (lambda in arXiv 2509.14882);
            "geometric:R", from level 0 to the last one down to one R-th in equal ratios; or Q numbers with commas.
        shares: of the frames in which each level has a target, Q of them. A level with few counts as if it had all.

    Raises:
        UserError: no such recipe, or numbers that are not Q or not positive.
    """
    Q = len(shares)
    name, _, number = recipe.partition(":")
    try:
        if recipe == "uniform":
            weights = [1.0] * Q
        elif name == "semantic":
            weights = [float(number), *[1.0] * (Q - 1)]
        elif name == "geometric":
            weights = [float(number) ** (1 - level / max(Q - 1, 1)) for level in range(Q)]
        else:
            weights = [float(part) for part in recipe.split(",")]
    except ValueError:
        weights = []
    if len(weights) != Q or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"loss.level_weights is '{recipe}'; it is uniform, semantic:100, geometric:100, or {Q} positive numbers "
            "divided by commas, one for each level"
        )
    weights = [weight / share for weight, share in zip(weights, shares, strict=True)]
    mean = sum(weight * share for weight, share in zip(weights, shares, strict=True)) / sum(shares)
    return [weight / mean for weight in weights]


class UnitLoss:
    """TorchTitan's loss seam: the weighted sum of cross-entropies over targets, recorded per level on the way.

    Args:
        vocabulary: tells the level of a label.
        meter: where the levels are recorded, without weights.
        weights: of the Q levels; the end of the speech stands in the place of a level 0.
        compile_fn: compiles what is done with a chunk of logits, or leaves it.
    """

    def __init__(
        self,
        vocabulary: UnitVocabulary,
        meter: LevelMeter,
        weights: Sequence[float],
        compile_fn: Callable[[Callable], Callable] | None = None,
    ) -> None:
        self._vocabulary, self._meter = vocabulary, meter
        self._weights_Q = torch.tensor(weights)
        self._chunk_step = compile_fn(chunk_losses) if compile_fn else None
        # 1 / number of targets: TorchTitan 0.2.2 does not divide a pipeline's gradients; see train.SpeechTrainer.
        self.pipeline_scale: torch.Tensor | None = None

    def __call__(self, logits: PendingLogits | PendingFrames | torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the batch.

        Args:
            logits: of the batch; a pipeline's last stage has them as they are (B, L, V), for a few rows at a time.
            labels: the targets (B, L), or (B, L, Q) of the hierarchical arm.
        """
        if isinstance(logits, torch.Tensor):
            return self._of_pipeline(logits, labels)
        sums = []
        for head in logits.heads(labels, self._vocabulary):
            loss_sum, losses_N, admissible_N = cross_entropy(
                head.logits, head.targets, self._weights(head.targets), self._chunk_step
            )
            self._meter.add(losses_N, admissible_N, head.targets.rows_N, self._vocabulary.num_quantizers + 1)
            sums.append(loss_sum)
        return torch.stack(sums).sum()

    def _of_pipeline(self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        if self.pipeline_scale is None:
            raise UserError(
                "pipeline parallelism needs `-m llama_mimi.train`, as TorchTitan's own entry point does not divide its "
                "gradients by the number of targets"
            )
        losses_L = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        if isinstance(losses_L, DTensor):  # loss parallel: replicated after the reduction over the vocabulary
            losses_L = losses_L.to_local()
        targets = unit_targets(labels_BL, self._vocabulary)
        losses_N = losses_L[targets.positions_N]
        self._meter.add(losses_N.detach(), math.nan, targets.rows_N, self._vocabulary.num_quantizers + 1)
        return (losses_N * self._weights(targets)).sum() * self.pipeline_scale

    def _weights(self, targets: Targets) -> torch.Tensor:
        self._weights_Q = self._weights_Q.to(targets.levels_N.device)
        return self._weights_Q[targets.levels_N]
