"""Attention as matrix products, for shapes that PyTorch's GPU kernels do not compute well."""

import torch


def explicit_attention(
    query_BGRd: torch.Tensor, keys_BGSd: torch.Tensor, values_BGSd: torch.Tensor, is_seen: torch.Tensor
) -> torch.Tensor:
    """Return the outputs (B, G, R, d) of R queries per key head. The mask ``is_seen`` broadcasts to (B, G, R, S)."""
    scores_BGRS = query_BGRd @ keys_BGSd.mT * query_BGRd.shape[-1] ** -0.5
    weights_BGRS = scores_BGRS.masked_fill(~is_seen, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights_BGRS.to(values_BGSd.dtype) @ values_BGSd
