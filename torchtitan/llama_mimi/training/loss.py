"""Cross-entropy over audio and text tokens, weighted by level. The logged loss of each level is unweighted."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.model.cross_entropy import LazyLogits, cross_entropy
from llama_mimi.model.hierarchical import HierarchicalOutput
from llama_mimi.tokens.vocabulary import AudioVocabulary


class LevelMeter:
    """Sum of losses and number of targets, for each task: of each level, of ``</audio>`` and of text."""

    def __init__(self) -> None:
        self._sums = self._step_sums = torch.zeros(())

    def add(self, losses_N: torch.Tensor, admissible_N: torch.Tensor, rows_N: torch.Tensor, num_rows: int) -> None:
        """Add N losses to the sums with the indices ``rows_N``. ``admissible_N`` are losses over admissible entries.

        `pop` ignores losses with the index 0; `pop_step` includes them.
        """
        sums = torch.zeros(3, num_rows + 1, device=losses_N.device, dtype=torch.float64)
        for row, values_N in zip(sums, (losses_N, torch.ones_like(losses_N), admissible_N), strict=True):
            row.index_add_(0, rows_N, values_N.double())
        self._step_sums = self._step_sums + sums[:2].sum(dim=1)
        self._sums = self._sums + sums[:, 1:]

    def pop(self) -> torch.Tensor:
        """Return this rank's sums since the last call: losses, targets, losses over admissible entries.

        The sums (3, S * (Q + 2)) are sorted by task (S tasks), then by level; the end and text follow the levels.
        """
        sums, self._sums = self._sums, torch.zeros(())
        return sums

    def pop_step(self) -> torch.Tensor:
        """Return this rank's sum of losses and number of targets since the last call, as a tensor (2,)."""
        sums, self._step_sums = self._step_sums, torch.zeros(())
        return sums


def level_fractions(job_config: Any) -> list[float]:
    """Return, for each of the Q levels, the fraction of frames that have a target."""
    return [1.0, *[job_config.model.depth_train_fraction] * (job_config.codec.num_quantizers - 1)]


def level_weights(recipe: str, fractions: Sequence[float]) -> list[float]:
    """Return the loss weight of each level; raise a `UserError` for an invalid recipe.

    The mean weight of all targets is one, so the learning rate needs no change. The number R in 'semantic:R' is lambda
    in arXiv 2509.14882. The total weight of a level does not depend on the level's fraction of frames with a target.
    """
    Q = len(fractions)
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
        remedy = f"set 'uniform', 'semantic:100', 'geometric:100', or {Q} positive numbers separated by commas"
        raise UserError(f"loss.level_weights is '{recipe}'; {remedy}")
    mean = sum(weights) / sum(fractions)
    return [weight / fraction / mean for weight, fraction in zip(weights, fractions, strict=True)]


class SpeechLoss:
    """Sum of the cross-entropies of all targets, with a weight for each level and for text."""

    def __init__(
        self,
        vocabulary: AudioVocabulary,
        meter: LevelMeter,
        weights: Sequence[float],
        num_tasks: int = 1,
        chunk_step: Any = None,
    ) -> None:
        self._vocabulary, self._meter, self._chunk_step = vocabulary, meter, chunk_step
        self._num_rows = num_tasks * (vocabulary.num_quantizers + 2)
        self._weights_Q = torch.tensor(weights)

    def __call__(self, logits: LazyLogits | HierarchicalOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the weighted loss. ``labels`` is (B, L), or (B, L, Q) for the hierarchical architecture."""
        sums = []
        self._weights_Q = self._weights_Q.to(labels.device)
        for head, targets in logits.heads(labels, self._vocabulary):
            weights_N = self._weights_Q[targets.levels_N]
            loss_sum, losses_N, admissible_N = cross_entropy(head, targets, weights_N, self._chunk_step)
            self._meter.add(losses_N, admissible_N, targets.rows_N, self._num_rows)
            sums.append(loss_sum)
        return torch.stack(sums).sum()
