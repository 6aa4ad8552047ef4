"""Key-value cache for contexts of different lengths. A step adds one position to all contexts.

The cache of `transformers` needs far more function calls per step. For a small model on a CPU, these calls take half of
the generation time.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

GRAPH_DEVICES = ("cuda",)  # on these devices, a step is one CUDA graph instead of hundreds of kernel launches


def product(weight_ND: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """Multiply a small batch of vectors (B, D) by a weight matrix (N, D); return the products (B, N)."""
    if rows_BD.device.type == "cpu":  # MKL is 1.3 to 5 times faster with the matrix on the left (2 to 64 rows)
        return torch.mm(weight_ND, rows_BD.T).T
    return F.linear(rows_BD, weight_ND)


class BatchedKVCache:
    """Key-value cache of one Transformer for B contexts of different lengths. A step adds one position to each context.

    ``hidden_BD`` is the Transformer's state at the last position of each context. ``backbone`` is a `LlamaModel`, or
    one of the two Transformers of CSM. The constructor allocates ``capacity`` positions.
    """

    def __init__(self, backbone: PreTrainedModel, num_rows: int, capacity: int) -> None:
        config, like = backbone.config, {"dtype": backbone.dtype, "device": backbone.device}
        assert not (config.attention_bias or config.mlp_bias), "biases are not supported"
        self._backbone, self._capacity = backbone, capacity
        self.hidden_BD = torch.zeros(num_rows, config.hidden_size, **like)
        shape = (num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self._keys = [torch.zeros(shape, **like) for _ in backbone.layers]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        # A CUDA graph reads these two tensors, so they are changed in place. Unused rows do not grow.
        self._lengths_B = torch.zeros(num_rows, dtype=torch.long, device=backbone.device)
        self._growth_B = torch.ones_like(self._lengths_B)
        self._rows_B = torch.arange(num_rows, device=backbone.device)
        self._places_S = torch.arange(capacity, device=backbone.device)
        self._forward, self._is_graph = self._grow, backbone.device.type in GRAPH_DEVICES
        if self._is_graph:
            for tensor in (*self._keys, *self._values, self._lengths_B):
                torch._dynamo.mark_static_address(tensor)
            self._forward = torch.compile(self._grow, mode="reduce-overhead", fullgraph=True)

    def prefill(self, row: int, inputs_LD: torch.Tensor) -> None:
        """Replace the context of a row by L new positions; ``inputs_LD`` contains the embeddings of these positions."""
        length = len(inputs_LD)
        assert 0 < length <= self._capacity
        cache = DynamicCache(config=self._backbone.config)
        output = self._backbone(inputs_embeds=inputs_LD[None], past_key_values=cache, use_cache=True)
        for keys, values, layer in zip(self._keys, self._values, cache.layers, strict=True):
            keys[row, :, :length], values[row, :, :length] = layer.keys[0], layer.values[0]
        self.hidden_BD[row] = output.last_hidden_state[0, -1]
        self._lengths_B[row], self._growth_B[row] = length, 1

    def reset(self, row: int) -> None:
        """Mark a row as unused until the next `prefill`."""
        self._lengths_B[row] = self._growth_B[row] = 0

    def restart(self) -> None:
        """Empty all contexts; every row stays in use."""
        self._lengths_B.zero_()

    def step(self, inputs_BD: torch.Tensor) -> None:
        """Append one position to every context; ``inputs_BD`` contains the embeddings."""
        # A CUDA graph has fixed shapes, so it attends to all positions and masks the unused ones.
        visible = self._capacity if self._is_graph else int(self._lengths_B.max()) + 1
        assert visible <= self._capacity
        hidden_BD = self._forward(inputs_BD, visible)
        self.hidden_BD = hidden_BD.clone() if self._is_graph else hidden_BD  # the next step overwrites a graph's output
        self._lengths_B.add_(self._growth_B)

    def _grow(self, hidden_BD: torch.Tensor, visible: int) -> torch.Tensor:
        B, lengths_B1 = len(hidden_BD), self._lengths_B[:, None]
        is_seen_B11S = (self._places_S[:visible] <= lengths_B1)[:, None, None]
        cos_B1d, sin_B1d = self._backbone.rotary_emb(hidden_BD[:, None], position_ids=lengths_B1)
        place = (self._rows_B, slice(None), self._lengths_B)
        for layer, keys, values in zip(self._backbone.layers, self._keys, self._values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normed_BD = _norm(layer.input_layernorm, hidden_BD)
            query_BHd, key_BHd, value_BHd = (
                product(linear.weight, normed_BD).view(B, -1, attention.head_dim)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys[place] = _rotated(key_BHd, cos_B1d, sin_B1d)
            values[place] = value_BHd
            # The queries that share a key head are computed as one small matrix product.
            query_BGHd = _rotated(query_BHd, cos_B1d, sin_B1d).view(B, keys.shape[1], -1, attention.head_dim)
            seen = keys[:, :, :visible], values[:, :, :visible]
            attended_BGHd = F.scaled_dot_product_attention(query_BGHd, *seen, attn_mask=is_seen_B11S)
            hidden_BD = hidden_BD + product(attention.o_proj.weight, attended_BGHd.reshape(B, -1))
            normed_BD = _norm(layer.post_attention_layernorm, hidden_BD)
            gate_BF = mlp.act_fn(product(mlp.gate_proj.weight, normed_BD))
            hidden_BD = hidden_BD + product(mlp.down_proj.weight, gate_BF * product(mlp.up_proj.weight, normed_BD))
        return _norm(self._backbone.norm, hidden_BD)


def _norm(norm: torch.nn.Module, hidden_BD: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(heads_BHd: torch.Tensor, cos_B1d: torch.Tensor, sin_B1d: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to the two halves of each head, as `transformers` does."""
    first, second = heads_BHd.chunk(2, dim=-1)
    return heads_BHd * cos_B1d + torch.cat([-second, first], dim=-1) * sin_B1d
