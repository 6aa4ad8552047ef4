"""The hierarchical architecture, as in CSM: a Llama over frames, and a small depth decoder over the levels of a frame.

At each position, the backbone reads one text token or one frame (the sum of the embeddings of Q audio tokens). The
backbone predicts level 0 of the next frame, or the end of the speech. The depth decoder predicts levels 1 to Q - 1
from the backbone's hidden state and the codes of lower levels. CsmForConditionalGeneration of transformers computes
the same logits. The end of speech is a frame with code K at every level, as CSM expects. If a training task predicts
text, the output matrix of the backbone covers the whole vocabulary, as in a flattened model. N: number of frames that
train the depth decoder.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_compile
from torchtitan.models.llama3.model.model import TransformerBlock, precompute_freqs_cis

from llama_mimi.common.attention import explicit_attention
from llama_mimi.model.cross_entropy import (
    LazyLogits,
    PendingOutput,
    Targets,
    meter_rows,
    pending_logits,
    vocabulary_targets,
)
from llama_mimi.model.llama import LlamaMimi, LlamaMimiArgs, forward_flops, num_weights
from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.tokens.vocabulary import AudioVocabulary

# Type of device to multiple: the number of frames in the depth decoder is padded, because it differs in each step. The
# allocator of a GPU reuses the memory of equal shapes. The loss does not read the padding.
FRAME_MULTIPLES = {"cuda": 256}


@dataclass
class HierarchicalOutput:
    """Hidden states and output matrices of all levels; see `LazyLogits`."""

    level_0: LazyLogits  # of the backbone, at all positions
    depth_N: torch.Tensor  # positions in the flattened batch (B * L) that train the depth decoder; never empty
    levels: list[LazyLogits]  # of the depth decoder: levels 1 to Q - 1, with hidden states (1, N and padding, D)

    def heads(self, labels_BLQ: torch.Tensor, vocabulary: AudioVocabulary) -> list[tuple[LazyLogits, Targets]]:
        """See `LazyLogits.heads`."""
        labels_NQ, Q = labels_BLQ.flatten(0, 1), vocabulary.num_quantizers
        frames_NQ = labels_NQ[self.depth_N]
        is_target_N, is_deep_N = labels_NQ[:, 0] != IGNORE_INDEX, frames_NQ[:, 1] != IGNORE_INDEX
        places = [is_target_N.nonzero()[:, 0], is_deep_N.nonzero()[:, 0]]  # levels 1 to Q - 1 share positions
        ids_QC = vocabulary.admissible_ids(labels_NQ.device)
        admissible_QC = torch.where(ids_QC < 0, -1, vocabulary.entries(ids_QC))
        heads = []
        for level, logits in enumerate([self.level_0, *self.levels]):
            if len(logits.weight_VD) == vocabulary.size:  # the backbone of a model that predicts text
                heads.append((logits, vocabulary_targets(labels_NQ[:, 0], vocabulary)))
                continue
            positions_N = places[level > 0]
            labels_N = (frames_NQ if level else labels_NQ)[positions_N, level]
            tasks_N, entries_N = labels_N // vocabulary.size, vocabulary.entries(labels_N % vocabulary.size)
            is_end_N = entries_N == vocabulary.codebook_size
            rows_N = meter_rows(tasks_N, torch.where(is_end_N, Q, level), Q)
            # The end counts as one target. Losses of its levels above 0 train the decoder, but are not recorded.
            rows_N = rows_N * ~is_end_N if level else rows_N
            levels_N = torch.full_like(rows_N, level)
            heads.append((logits, Targets(positions_N, entries_N, levels_N, rows_N, admissible_QC)))
        return heads


pytree.register_dataclass(HierarchicalOutput)


class FrameAttention(ScaledDotProductAttentionWrapper):
    """Causal attention over the Q levels of each frame, computed by `frame_attention` on GPUs.

    On GPUs, cuDNN would build a plan for each number of frames N, and flash attention would pad Q to 128. On CPUs
    PyTorch's kernel is faster than matrix products (scripts/benchmarks/LEDGER.md).
    """

    def forward(self, q_NHQD: torch.Tensor, k_NGQD: torch.Tensor, v_NGQD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if q_NHQD.is_cuda:
            return frame_attention(q_NHQD, k_NGQD, v_NGQD)
        return super().forward(q_NHQD, k_NGQD, v_NGQD, **kwargs)


def frame_attention(q_NHQD: torch.Tensor, k_NGQD: torch.Tensor, v_NGQD: torch.Tensor) -> torch.Tensor:
    """Compute causal attention (N, H, Q, D) with matrix products and a softmax. H query heads share G key heads."""
    N, H, Q, D = q_NHQD.shape
    G = k_NGQD.shape[1]
    # R: all queries of a key head. They are rows of one matrix, so that keys and values are not repeated.
    q_NGRD = q_NHQD.reshape(N, G, H // G * Q, D)
    is_seen_RQ = torch.ones(Q, Q, dtype=torch.bool, device=q_NHQD.device).tril().repeat(H // G, 1)
    return explicit_attention(q_NGRD, k_NGQD, v_NGQD, is_seen_RQ).view(N, H, Q, D)


class DepthDecoder(nn.Module):
    """Small Llama over the levels of a frame. ``args.depth`` sets its size. Each level has an output matrix."""

    def __init__(self, args: LlamaMimiArgs) -> None:
        super().__init__()
        assert args.depth is not None
        self.args = depth = args.depth
        self.num_levels, self.num_entries = args.num_quantizers - 1, args.codebook_size + 1
        self.projection = nn.Linear(args.dim, depth.dim, bias=False)
        self.freqs_cis: torch.Tensor
        self.register_buffer("freqs_cis", self._freqs_cis(), persistent=False)
        self.layers = nn.ModuleDict({str(index): TransformerBlock(index, depth) for index in range(depth.n_layers)})
        for layer in self.layers.values():
            layer.attention.inner_attention = FrameAttention()
        self.norm = nn.RMSNorm(depth.dim, eps=depth.norm_eps)
        # Rows are sorted by level.
        self.heads = nn.Linear(depth.dim, self.num_levels * self.num_entries, bias=False)

    def init_weights(self, buffer_device: torch.device | None) -> None:
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._freqs_cis()
        for layer in self.layers.values():
            cast(TransformerBlock, layer).init_weights()
        self.norm.reset_parameters()
        for linear in (self.projection, self.heads):
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, hidden_ND: torch.Tensor, codes_NqD: torch.Tensor) -> list[LazyLogits]:
        """Predict levels 1 to Q - 1 from hidden states (N, D) and embeddings (N, Q - 1, D) of levels 0 to Q - 2."""
        states_NQD = self.projection(torch.cat([hidden_ND[:, None], codes_NqD], dim=1))
        torch._dynamo.maybe_mark_dynamic(states_NQD, 0)  # one compilation for all numbers of frames
        for layer in self.layers.values():
            states_NQD = layer(states_NQD, self.freqs_cis, None)
        states_NQD = self.norm(states_NQD)
        matrices = enumerate(self.heads.weight.split(self.num_entries), start=1)
        return [pending_logits(states_NQD[None, :, level], matrix_VD) for level, matrix_VD in matrices]

    def _freqs_cis(self) -> torch.Tensor:
        args, num_positions = self.args, self.num_levels + 1
        return precompute_freqs_cis(args.dim // args.n_heads, num_positions, args.rope_theta, args.rope_scaling_args)


class HierarchicalLlamaMimi(LlamaMimi):
    """Llama over frames, and `DepthDecoder` over levels. Text and audio tokens share one embedding table."""

    def __init__(self, model_args: LlamaMimiArgs) -> None:
        super().__init__(model_args)
        if not model_args.predicts_text:
            self.is_tied = False
            self.output = PendingOutput(model_args.dim, model_args.codebook_size + 1, bias=False)
        self.depth = DepthDecoder(model_args)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)  # as for tied embeddings
        self.depth.init_weights(buffer_device)

    def flops_per_target(self, seq_len: int) -> int:
        """Return the training FLOPs per target: FLOPs per frame, divided by the mean number of targets per frame."""
        args, depth, Q = self.model_args, self.depth, self.model_args.num_quantizers
        backbone = forward_flops(num_weights(self.layers, self.norm, self.output_layer), args, seq_len)
        level = forward_flops(num_weights(depth.layers, depth.norm, depth.projection), depth.args, Q)
        frame = backbone + args.depth_train_fraction * (Q * level + 2 * num_weights(depth.heads))
        return round(3 * frame / args.targets_per_frame)

    def decoding_flops(self, num_frames: int) -> int:
        """See `LlamaMimi.decoding_flops`. The depth decoder's cache is empty before each frame."""
        args, depth, Q = self.model_args, self.depth, self.model_args.num_quantizers
        backbone = forward_flops(num_weights(self.layers, self.norm), args, num_frames + 1)
        level = num_weights(depth.layers, depth.norm, depth.projection)
        levels = sum(forward_flops(level, depth.args, num_keys) for num_keys in range(1, Q + 1))
        return backbone + levels + 2 * (args.dim * (args.codebook_size + 1) + num_weights(depth.heads))

    def deep_frames(self, targets_NQ: torch.Tensor) -> torch.Tensor:
        """Return the positions that train the depth decoder, but at least one position: every rank needs gradients."""
        depth_N = (targets_NQ[:, 1:] != IGNORE_INDEX).any(dim=1).nonzero()[:, 0]
        return depth_N if len(depth_N) else depth_N.new_zeros(1)

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, attention_masks: Any = None, positions: Any = None, *, targets: torch.Tensor
    ) -> HierarchicalOutput:
        """Return the lazy logits for ids (B, L, Q). Negative ids are skipped when embeddings are summed.

        The depth decoder reads ``targets``, the ids (B, L, Q) of the next frames.
        """
        B, L, Q = tokens.shape
        targets_NQ = targets.flatten(0, 1)
        depth_N = self.deep_frames(targets_NQ)
        padded_N = F.pad(depth_N, (0, -len(depth_N) % FRAME_MULTIPLES.get(tokens.device.type, 1)))
        codes_Nq = targets_NQ[padded_N, :-1]
        # One call, because each call gathers a sharded table.
        embeddings_ND = self.tok_embeddings(torch.cat([tokens.flatten(), codes_Nq.flatten()]).clamp(min=0))
        frames_ND, codes_ND = embeddings_ND.split([tokens.numel(), codes_Nq.numel()])
        h_BLD = (frames_ND.view(B, L, Q, -1) * (tokens >= 0)[..., None]).sum(dim=2)
        for layer in self.layers.values():
            h_BLD = layer(h_BLD, self.freqs_cis, attention_masks, positions)
        assert self.norm is not None
        h_BLD = self.norm(h_BLD)
        levels = self.depth(h_BLD.flatten(0, 1)[padded_N], codes_ND.view(len(padded_N), Q - 1, -1))
        level_0 = pending_logits(h_BLD, self.tok_embeddings.weight) if self.output is None else self.output(h_BLD)
        return HierarchicalOutput(level_0, depth_N, levels)


def prepare_depth_decoder(depth: DepthDecoder, job_config: Any) -> None:
    """Apply activation checkpointing and compilation to the depth decoder; FSDP shards it with the root module."""
    compilation, checkpointing = job_config.compile, job_config.activation_checkpoint
    is_compiled = compilation.enable and "model" in compilation.components
    if checkpointing.mode != "none":
        options: Any = {"op_sac_save_list": _op_sac_save_list, "base_folder": job_config.job.dump_folder}
        apply_ac(depth, checkpointing, model_compile_enabled=is_compiled, **options)
    if is_compiled:
        # Blocks of both networks share compiled code. It is compiled again for validation and for other shapes.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        apply_compile(depth, compilation)
