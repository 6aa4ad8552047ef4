"""Key-value cache for contexts of different lengths. A step adds one position to all contexts.

The cache of `transformers` needs far more function calls per step. For a small model on a CPU, these calls take half of
the generation time.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from llama_mimi.common.attention import explicit_attention
from llama_mimi.common.batching import bucket_by_length

GRAPH_DEVICES = ("cuda",)  # on these devices, a step is one CUDA graph instead of hundreds of kernel launches
SHORTEST_GRAPH = 256  # number of positions that the smallest graph attends to; the next graphs attend to 512, 1024, ...
PREFILL_POSITIONS = 16_384  # maximum number of positions that are prefilled at once, with padding
PREFILL_RATIOS = {"cpu": 1.1}  # longest to shortest context that are prefilled at once; padding takes time on a CPU


def product(weight_ND: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """Multiply a small batch of vectors (B, D) by a weight matrix (N, D); return the products (B, N)."""
    if rows_BD.device.type == "cpu":  # MKL is 1.3 to 5 times faster with the matrix on the left (2 to 64 rows)
        return torch.mm(weight_ND, rows_BD.T).T
    return F.linear(rows_BD, weight_ND)


def quantize_layers(backbone: PreTrainedModel) -> None:
    """Add int8 weights to the linear layers, for steps on a CPU. `BatchedKVCache.prefill` uses the float weights."""
    for linear in backbone.layers.modules():
        if isinstance(linear, nn.Linear):
            weight_ND = linear.weight.detach().float()
            scale_N1 = (weight_ND.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127).to(linear.weight.dtype)
            linear.int8 = (weight_ND / scale_N1).round().clamp(-127, 127).to(torch.int8), scale_N1[:, 0].contiguous()


def _linear(linear: nn.Module, rows_BD: torch.Tensor) -> torch.Tensor:
    if hasattr(linear, "int8"):
        return torch._weight_int8pack_mm(rows_BD, *linear.int8)
    return product(linear.weight, rows_BD)


class BatchedKVCache:
    """Key-value cache of one Transformer for B contexts of different lengths. A step adds one position to each context.

    ``hidden_BD`` is the Transformer's state at the last position of each context. ``backbone`` is a `LlamaModel`, or
    one of the two Transformers of CSM. The constructor allocates ``capacity`` positions.
    """

    def __init__(self, backbone: PreTrainedModel, num_rows: int, capacity: int, is_int8: bool = False) -> None:
        config, like = backbone.config, {"dtype": backbone.dtype, "device": backbone.device}
        assert not (config.attention_bias or config.mlp_bias), "biases are not supported"
        self._backbone, self._capacity = backbone, capacity
        if is_int8 and not hasattr(backbone.layers[0].mlp.down_proj, "int8"):
            quantize_layers(backbone)
        # A CUDA graph reads and writes these tensors, so they are changed in place. Unused rows do not grow.
        self.hidden_BD, self._inputs_BD = torch.zeros(2, num_rows, config.hidden_size, **like)
        shape = (num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self._keys = [torch.zeros(shape, **like) for _ in backbone.layers]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._lengths_B = torch.zeros(num_rows, dtype=torch.long, device=backbone.device)
        self._growth_B = torch.ones_like(self._lengths_B)
        self._rows_B = torch.arange(num_rows, device=backbone.device)
        self._lengths = dict.fromkeys(range(num_rows), 0)  # lengths of the used rows, without waiting for the device
        self._layer: Callable[..., torch.Tensor] = _layer_step
        self._graphs: dict[int, Callable[[], None]] = {}  # by number of visible positions
        if backbone.device.type in GRAPH_DEVICES:
            # One compilation serves all layers of the same shape. Other shapes are compiled separately.
            self._layer = torch.compile(partial(_layer_step, is_explicit=True), fullgraph=True, dynamic=False)
            visible = min(SHORTEST_GRAPH, capacity)
            with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
                while visible not in self._graphs:
                    self._graphs[visible] = record_graph(partial(self._advance, visible), backbone.device)
                    visible = min(2 * visible, capacity)

    def prefill(self, inputs: Mapping[int, torch.Tensor]) -> None:
        """Replace the contexts of some rows; ``inputs`` contains the embeddings (L, D) of each new context."""
        rows, ratio = list(inputs), PREFILL_RATIOS.get(self._lengths_B.device.type, math.inf)
        for batch in bucket_by_length([len(inputs[row]) for row in rows], PREFILL_POSITIONS, ratio):
            lengths = {rows[index]: len(inputs[rows[index]]) for index in batch}
            longest, cache = max(lengths.values()), DynamicCache(config=self._backbone.config)
            assert 0 < min(lengths.values()) and longest <= self._capacity
            # Right padding has no effect.
            padded_NLD = nn.utils.rnn.pad_sequence([inputs[row] for row in lengths], batch_first=True)
            output = self._backbone(inputs_embeds=padded_NLD, past_key_values=cache, use_cache=True)
            rows_N, lengths_N = torch.tensor([[*lengths], [*lengths.values()]], device=padded_NLD.device)
            for keys, values, layer in zip(self._keys, self._values, cache.layers, strict=True):
                keys[rows_N, :, :longest], values[rows_N, :, :longest] = layer.keys, layer.values
            places_N = torch.arange(len(lengths), device=padded_NLD.device)
            self.hidden_BD[rows_N] = output.last_hidden_state[places_N, lengths_N - 1]
            self._lengths_B[rows_N], self._growth_B[rows_N] = lengths_N, 1
            self._lengths |= lengths

    def reset(self, row: int) -> None:
        """Mark a row as unused until the next `prefill`."""
        self._lengths_B[row] = self._growth_B[row] = 0
        self._lengths.pop(row, None)

    def restart(self) -> None:
        """Empty all contexts; every row stays in use."""
        self._lengths_B.zero_()
        self._lengths = dict.fromkeys(self._lengths, 0)

    def step(self, inputs_BD: torch.Tensor) -> None:
        """Append one position to every context; ``inputs_BD`` contains the embeddings."""
        self._lengths = {row: length + 1 for row, length in self._lengths.items()}
        visible = max(self._lengths.values(), default=1)
        assert visible <= self._capacity
        self._inputs_BD.copy_(inputs_BD)
        if self._graphs:
            self._graphs[min(size for size in self._graphs if size >= visible)]()
        else:
            self._advance(visible)
        self._lengths_B.add_(self._growth_B)

    def _advance(self, visible: int) -> None:
        """Compute ``hidden_BD`` of the next position. Attend to the first ``visible`` positions of the cache."""
        lengths_B1, hidden_BD = self._lengths_B[:, None], self._inputs_BD
        is_seen_B11S = (torch.arange(visible, device=hidden_BD.device) <= lengths_B1)[:, None, None]
        place = (self._rows_B, slice(None), self._lengths_B)
        rotation = self._backbone.rotary_emb(hidden_BD[:, None], position_ids=lengths_B1)
        for layer, keys, values in zip(self._backbone.layers, self._keys, self._values, strict=True):
            hidden_BD = self._layer(layer, hidden_BD, keys, values, place, is_seen_B11S, rotation)
        self.hidden_BD.copy_(_norm(self._backbone.norm, hidden_BD))


def record_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the kernels of a function as one CUDA graph; return a function that runs the graph, in any thread."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, choose kernels and allocate their memory before the recording
                function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    return graph.replay


def _layer_step(
    layer: nn.Module,
    hidden_BD: torch.Tensor,
    keys_BGCd: torch.Tensor,
    values_BGCd: torch.Tensor,
    place: tuple[torch.Tensor, slice, torch.Tensor],
    is_seen_B11S: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    *,
    is_explicit: bool = False,
) -> torch.Tensor:
    """Return the states (B, D) after a layer. Write the keys and values of the layer into its cache of C positions."""
    attention, mlp, (B, visible) = layer.self_attn, layer.mlp, (len(hidden_BD), is_seen_B11S.shape[-1])
    normed_BD = _norm(layer.input_layernorm, hidden_BD)
    query_BHd, key_BHd, value_BHd = (
        _linear(linear, normed_BD).view(B, -1, attention.head_dim)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys_BGCd[place] = _rotated(key_BHd, *rotation)
    values_BGCd[place] = value_BHd
    # The queries that share a key head are computed as one small matrix product.
    query_BGHd = _rotated(query_BHd, *rotation).view(B, keys_BGCd.shape[1], -1, attention.head_dim)
    seen = keys_BGCd[:, :, :visible], values_BGCd[:, :, :visible]
    if is_explicit:  # on a GPU, the kernels of SDPA use few cores if a head has one query
        attended_BGHd = explicit_attention(query_BGHd, *seen, is_seen_B11S)
    else:
        attended_BGHd = F.scaled_dot_product_attention(query_BGHd, *seen, attn_mask=is_seen_B11S)
    hidden_BD = hidden_BD + _linear(attention.o_proj, attended_BGHd.reshape(B, -1))
    normed_BD = _norm(layer.post_attention_layernorm, hidden_BD)
    gate_BF = mlp.act_fn(_linear(mlp.gate_proj, normed_BD))
    return hidden_BD + _linear(mlp.down_proj, gate_BF * _linear(mlp.up_proj, normed_BD))


def _norm(norm: torch.nn.Module, hidden_BD: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden_BD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(heads_BHd: torch.Tensor, cos_B1d: torch.Tensor, sin_B1d: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to the two halves of each head, as `transformers` does."""
    first, second = heads_BHd.chunk(2, dim=-1)
    return heads_BHd * cos_B1d + torch.cat([-second, first], dim=-1) * sin_B1d
