"""One position more for each of many contexts: a Llama's step over keys and values of different lengths.

`transformers` computes the same with far more calls a layer, which on CPUs and small models is half of a token's time
(scripts/benchmarks/bench_generation.py). Its own forward pass reads prompts; this file is for what comes after.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel


def product(weight_ND: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """A matrix times few rows (B, D), to (B, N).

    On CPUs MKL is 1.3 to 5 times faster with the matrix on the left than `torch.nn.functional.linear` is with 2 to 64
    rows, and as fast with one (AVX2, 768 x 768 to 8,192 x 2,048).
    """
    if rows_BD.device.type == "cpu":
        return torch.mm(weight_ND, rows_BD.T).T
    return F.linear(rows_BD, weight_ND)


class RowCache:
    """B contexts of one Transformer, each of its own length, that grow by one position at a time.

    Memory is that of B rows of ``capacity`` positions, however long it is used.

    Args:
        body: `LlamaModel`, or a Transformer of such layers as CSM's two are.
        num_rows: B.
        capacity: positions of each row.
        as_graph: a step is compiled, and one CUDA graph on a GPU, to which this saves the launches of some hundred
            kernels; None does so on GPUs.
    """

    def __init__(self, body: PreTrainedModel, num_rows: int, capacity: int, as_graph: bool | None = None) -> None:
        config = body.config
        assert not (config.attention_bias or config.mlp_bias), "no Llama has them"
        self._body, self._capacity = body, capacity
        self._num_groups = config.num_key_value_heads
        shape = (num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self._keys = [torch.zeros(shape, dtype=body.dtype, device=body.device) for _ in body.layers]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._lengths, self._is_read = [0] * num_rows, [True] * num_rows
        # The same on the device, changed in place: a CUDA graph reads it where it lies.
        self._lengths_B = torch.zeros(num_rows, dtype=torch.long, device=body.device)
        self._growth_B = torch.ones_like(self._lengths_B)  # 0 for rows that nobody reads
        self._rows_B = torch.arange(num_rows, device=body.device)
        self._places_S = torch.arange(capacity, device=body.device)
        self._is_graph = body.device.type == "cuda" if as_graph is None else as_graph
        if self._is_graph:
            for tensor in (*self._keys, *self._values, self._lengths_B):
                torch._dynamo.mark_static_address(tensor)
        self._forward = (
            torch.compile(self._grow, mode="reduce-overhead", fullgraph=True) if self._is_graph else self._grow
        )

    def fill(self, row: int, inputs_LD: torch.Tensor) -> torch.Tensor:
        """Give a row another context (L, D), embedded; returns the body's state at its last position (D,)."""
        assert 0 < len(inputs_LD) <= self._capacity
        filled = DynamicCache(config=self._body.config)
        output = self._body(inputs_embeds=inputs_LD[None], past_key_values=filled, use_cache=True)
        for keys, values, layer in zip(self._keys, self._values, filled.layers, strict=True):
            keys[row, :, : len(inputs_LD)] = layer.keys[0]
            values[row, :, : len(inputs_LD)] = layer.values[0]
        self._lengths[row] = self._lengths_B[row] = len(inputs_LD)
        self._growth_B[row] = self._is_read[row] = True
        return output.last_hidden_state[0, -1]

    def clear(self, row: int) -> None:
        """Nobody reads this row until it is filled again."""
        self._lengths[row] = self._lengths_B[row] = 0
        self._growth_B[row] = self._is_read[row] = False

    def restart(self) -> None:
        """All rows begin anew."""
        self._lengths = [0] * len(self._lengths)
        self._lengths_B.zero_()

    def step(self, inputs_BD: torch.Tensor) -> torch.Tensor:
        """Let every row grow by an embedded position (B, D); returns the body's states there (B, D)."""
        assert max(self._lengths) < self._capacity
        # A graph has one shape, and so looks at all positions under a mask.
        visible = self._capacity if self._is_graph else max(self._lengths) + 1
        hidden_BD = self._forward(inputs_BD, visible)
        self._lengths = [length + is_read for length, is_read in zip(self._lengths, self._is_read, strict=True)]
        self._lengths_B.add_(self._growth_B)
        return hidden_BD.clone() if self._is_graph else hidden_BD  # a graph writes its next result in the same place

    def _grow(self, hidden_BD: torch.Tensor, visible: int) -> torch.Tensor:
        B, lengths_B1 = len(hidden_BD), self._lengths_B[:, None]
        is_seen_B11S = (self._places_S[:visible] <= lengths_B1)[:, None, None]
        cos_B1d, sin_B1d = self._body.rotary_emb(hidden_BD[:, None], position_ids=lengths_B1)
        place = (self._rows_B, slice(None), self._lengths_B)
        for layer, keys, values in zip(self._body.layers, self._keys, self._values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normed_BD = _norm(layer.input_layernorm, hidden_BD)
            query_BHd, key_BHd, value_BHd = (
                product(linear.weight, normed_BD).view(B, -1, attention.head_dim)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[place] = _rotated(key_BHd, cos_B1d, sin_B1d)
            values[place] = value_BHd
            # Queries that share keys are the rows of one small product.
            query_BGHd = _rotated(query_BHd, cos_B1d, sin_B1d).view(B, self._num_groups, -1, attention.head_dim)
            attended = F.scaled_dot_product_attention(
                query_BGHd, keys[:, :, :visible], values[:, :, :visible], attn_mask=is_seen_B11S
            )
            hidden_BD = hidden_BD + product(attention.o_proj.weight, attended.reshape(B, -1))
            normed_BD = _norm(layer.post_attention_layernorm, hidden_BD)
            gate_BF = mlp.act_fn(product(mlp.gate_proj.weight, normed_BD))
            hidden_BD = hidden_BD + product(mlp.down_proj.weight, gate_BF * product(mlp.up_proj.weight, normed_BD))
        return _norm(self._body.norm, hidden_BD)


def _norm(norm: torch.nn.Module, hidden_BD: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(heads_BHd: torch.Tensor, cos_B1d: torch.Tensor, sin_B1d: torch.Tensor) -> torch.Tensor:
    """RoPE in the layout of `transformers`, which rotates the two halves of a head."""
    first, second = heads_BHd.chunk(2, dim=-1)
    return heads_BHd * cos_B1d + torch.cat([-second, first], dim=-1) * sin_B1d
