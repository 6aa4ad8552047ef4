"""Cross-entropy, computed from hidden states in chunks. For 32 x 1,024 positions, Llama 3's logits take 18 GB.

Logits are computed only at positions with a target. The gradient of each chunk is computed in the forward pass.
N: number of targets. V: number of vocabulary entries on this rank. D: width of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils import _pytree as pytree

from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.tokens.vocabulary import AudioVocabulary

# Size of the float32 logits of a chunk, in bytes: 1,920 rows for Llama 3 with 4 levels. Small chunks are slow, because
# each chunk adds a gradient as large as the output matrix.
CHUNK_BYTES = 2**30
# Multiples for tensor cores. Without padding, rows of 136,450 bfloat16 logits are aligned to 4 bytes instead of 16.
CHUNK_MULTIPLE = 128
VOCABULARY_MULTIPLE = 64


@dataclass
class LazyLogits:
    """Hidden states and output matrix; the loss computes the logits in chunks."""

    hidden_BLD: torch.Tensor  # a replicated DTensor under tensor parallelism
    weight_VD: torch.Tensor  # a DTensor sharded by rows under tensor parallelism

    def heads(self, labels_BL: torch.Tensor, vocabulary: AudioVocabulary) -> list[tuple["LazyLogits", "Targets"]]:
        """Return the lazy logits and the targets of each output matrix. Labels: see `SpeechTokenizer.batch`."""
        return [(self, vocabulary_targets(labels_BL, vocabulary))]

    @property
    def placements(self) -> tuple[Shard]:
        """Placement of the logits for TorchTitan's tensor parallelism: sharded by vocabulary."""
        return (Shard(-1),)

    def compute(self) -> torch.Tensor:
        """Return all logits (B, L, V)."""
        return F.linear(self.hidden_BLD, self.weight_VD)


pytree.register_dataclass(LazyLogits)  # FSDP searches the output of a model for tensors


@dataclass(frozen=True)
class Targets:
    """Targets of one output matrix. An entry is the index of a row in this matrix."""

    positions_N: torch.Tensor  # in the flattened batch
    entries_N: torch.Tensor
    levels_N: torch.Tensor  # quantizer level; 0 for the end of the speech; Q for text (all ids except audio tokens)
    rows_N: torch.Tensor  # row in `LevelMeter`; 0 to record nothing, else the result of `meter_rows`
    admissible_QC: torch.Tensor  # valid entries of each level (and of text), filled with -1 to the same length


def meter_rows(tasks_N: torch.Tensor, kinds_N: torch.Tensor, num_quantizers: int) -> torch.Tensor:
    """Return the row of a target in `LevelMeter`. ``kinds_N``: the level, Q for ``</audio>``, or Q + 1 for text."""
    return 1 + tasks_N * (num_quantizers + 2) + kinds_N


def vocabulary_targets(labels_BL: torch.Tensor, vocabulary: AudioVocabulary) -> Targets:
    """Return the targets of an output matrix that covers the whole vocabulary. Labels: see `SpeechTokenizer.batch`."""
    labels_N, Q = labels_BL.flatten(), vocabulary.num_quantizers
    positions_N = (labels_N != IGNORE_INDEX).nonzero()[:, 0]
    tasks_N, ids_N = labels_N[positions_N] // vocabulary.size, labels_N[positions_N] % vocabulary.size
    is_audio_N, is_end_N = vocabulary.is_audio(ids_N), ids_N == vocabulary.audio_end_id
    levels_N = torch.where(is_audio_N, vocabulary.level(ids_N), torch.where(is_end_N, 0, Q))
    rows_N = meter_rows(tasks_N, torch.where(is_audio_N, levels_N, Q + ~is_end_N), Q)
    ids_QC = vocabulary.admissible_ids(ids_N.device)
    # Bits per second are computed for audio only, so any valid entries will do for text.
    return Targets(positions_N, ids_N, levels_N, rows_N, torch.cat([ids_QC, ids_QC[:1]]))


class PendingOutput(nn.Linear):
    """Output layer that returns `LazyLogits`."""

    def forward(self, hidden_BLD: torch.Tensor) -> LazyLogits:
        return pending_logits(hidden_BLD, output_matrix(self))


def output_matrix(layer: nn.Module) -> torch.Tensor:
    """Return the weight (V, D) of an output layer, plus the update of its last rows that `LoRAConverter` may add."""
    weight_VD = layer.weight
    if (rows_RD := getattr(layer, "audio_rows", None)) is None:
        return weight_VD
    num_frozen = len(weight_VD) - len(rows_RD)
    return torch.cat([weight_VD[:num_frozen], weight_VD[num_frozen:] + rows_RD])


def pending_logits(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor) -> LazyLogits:
    """Return the hidden states and the output matrix as `LazyLogits`, the output of a model."""
    # FSDP adds a hook to each tensor of the output at every step. Hooks on the parameter itself would accumulate.
    return LazyLogits(hidden_BLD, weight_VD.view_as(weight_VD))


def cross_entropy(
    logits: LazyLogits, targets: Targets, weights_N: torch.Tensor, chunk_step: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy at the positions of the targets. ``chunk_step``: compiled `chunk_losses`.

    Return the sum of the losses, weighted by ``weights_N``, with a gradient; the unweighted losses (N,) in float32; and
    the losses (N,) if the softmax is computed over the admissible entries only.
    """
    hidden_BLD, weight_VD, first_row, group = _local(logits)
    # All ranks need the same chunk size, because each chunk runs collectives. Shards can differ by one row.
    largest_shard = -(-len(logits.weight_VD) // (group.size() if group is not None else 1))
    chunk_size = max(CHUNK_MULTIPLE, CHUNK_BYTES // (4 * largest_shard) // CHUNK_MULTIPLE * CHUNK_MULTIPLE)
    if torch.is_autocast_enabled(hidden_BLD.device.type):  # without FSDP the weights are float32
        dtype = torch.get_autocast_dtype(hidden_BLD.device.type)
        hidden_BLD, weight_VD = hidden_BLD.to(dtype), weight_VD.to(dtype)
    with_gradient = torch.is_grad_enabled() and (hidden_BLD.requires_grad or weight_VD.requires_grad)
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, targets.positions_N)
    step = chunk_step if chunk_step is not None and group is None else chunk_losses
    with torch.no_grad():
        losses_N = torch.zeros(len(hidden_ND), device=hidden_ND.device)
        admissible_N = torch.zeros_like(losses_N)
        targets_N, admissible_QC = targets.entries_N - first_row, targets.admissible_QC - first_row
        num_entries, padded_VD = len(weight_VD), weight_VD
        if missing := -num_entries % VOCABULARY_MULTIPLE:
            padded_VD = F.pad(weight_VD, (0, 0, 0, missing))
        if with_gradient:
            grad_ND = torch.empty_like(hidden_ND)
            # Long sums are inaccurate in bfloat16. A frozen matrix has no gradient.
            grad_VD = torch.zeros_like(padded_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, start + chunk_size)
            rows = hidden_ND[chunk], targets_N[chunk], weights_N[chunk], admissible_QC[targets.levels_N[chunk]]
            for tensor in rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one compilation for all sizes of the last chunk
            losses_N[chunk], admissible_N[chunk], grad_NV = step(*rows, padded_VD, num_entries, group, with_gradient)
            if grad_NV is not None:
                torch.mm(grad_NV, padded_VD, out=grad_ND[chunk])
                if grad_VD is not None and padded_VD.dtype == torch.float32:
                    grad_VD.addmm_(grad_NV.T, hidden_ND[chunk])
                elif grad_VD is not None:
                    grad_VD += grad_NV.T @ hidden_ND[chunk]
            del grad_NV  # free it before the next chunk
        loss_sum = (losses_N * weights_N).sum()
    if with_gradient:
        own_VD = None if grad_VD is None else grad_VD[:num_entries]
        loss_sum = _WithGradients.apply(loss_sum, hidden_ND, weight_VD, grad_ND, own_VD)
    return loss_sum, losses_N, admissible_N


def chunk_losses(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    admissible_NC: torch.Tensor,
    weight_VD: torch.Tensor,
    num_entries: int,
    group: dist.ProcessGroup | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return losses (N,) over all entries, losses (N,) over valid entries, and the gradient (N, V) of the weighted sum.

    The gradient is (softmax - one_hot(target)) * weight, or None if ``with_gradient`` is False.

    Args:
        targets_N: entry of each target; out of range if the entry is on another rank.
        admissible_NC: indices of the valid entries; padding and entries on another rank have an index out of range.
        weight_VD: output matrix. Rows from ``num_entries`` on are padding; their logits are -inf.
        group: ranks that share the vocabulary; None without tensor parallelism.
    """
    scores_NV = F.linear(hidden_ND, weight_VD).float()
    scores_NV[:, num_entries:] = -torch.inf
    largest_N = _reduced(scores_NV.amax(dim=1), dist.ReduceOp.MAX, group)
    is_here_N = ((targets_N >= 0) & (targets_N < num_entries)).float()
    row_N1 = targets_N.clamp(0, num_entries - 1)[:, None]
    scores_NV.sub_(largest_N[:, None])
    target_N = _reduced(scores_NV.gather(1, row_N1)[:, 0] * is_here_N, dist.ReduceOp.SUM, group)
    # Subtract the maximum of the admissible entries. With the maximum of all entries, the exponentials could be zero.
    some_NC = scores_NV.gather(1, admissible_NC.clamp(0, num_entries - 1))
    some_NC.masked_fill_((admissible_NC < 0) | (admissible_NC >= num_entries), -torch.inf)
    largest_some_N = _reduced(some_NC.amax(dim=1), dist.ReduceOp.MAX, group)
    some_N = _reduced(some_NC.sub_(largest_some_N[:, None]).exp_().sum(dim=1), dist.ReduceOp.SUM, group)
    admissible_N = some_N.log() + largest_some_N - target_N
    scores_NV.exp_()
    sum_N = _reduced(scores_NV.sum(dim=1), dist.ReduceOp.SUM, group)
    losses_N = sum_N.log() - target_N
    if not with_gradient:
        return losses_N, admissible_N, None
    scores_NV.div_((sum_N / weights_N)[:, None]).scatter_add_(1, row_N1, -(is_here_N * weights_N)[:, None])
    return losses_N, admissible_N, scores_NV.to(weight_VD.dtype)


class _WithGradients(torch.autograd.Function):
    """Autograd function that returns gradients which the forward pass has already computed."""

    @staticmethod
    def forward(
        ctx: Any, loss_sum: Any, hidden_ND: Any, weight_VD: Any, *gradients: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight_VD.dtype
        return loss_sum.view_as(loss_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        grad_VD = None if grad_VD is None else grad_VD.mul_(grad_sum).to(ctx.weight_dtype)
        return None, grad_ND * grad_sum, grad_VD, None, None


def _local(logits: LazyLogits) -> tuple[torch.Tensor, torch.Tensor, int, dist.ProcessGroup | None]:
    """Return hidden states, this rank's rows of the output matrix, the first row's index, and the process group."""
    hidden_BLD, weight_VD = logits.hidden_BLD, logits.weight_VD
    if not isinstance(weight_VD, DTensor):
        return hidden_BLD, weight_VD, 0, None
    assert isinstance(hidden_BLD, DTensor) and hidden_BLD.placements[0].is_replicate()
    mesh = weight_VD.device_mesh
    _, first_row = Shard.local_shard_size_and_offset(len(weight_VD), mesh.size(), mesh.get_local_rank())
    # On each rank, the gradient of the hidden states is a partial sum over the rank's rows.
    return hidden_BLD.to_local(grad_placements=[Partial()]), weight_VD.to_local(), first_row, mesh.get_group()


def _reduced(values_N: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(values_N, op=op, group=group)
    return values_N
