"""Keys and values of contexts that lie side by side and are of different lengths."""

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache


class _Lengths:
    """What the layers of a cache share.

    Args:
        num_rows: B.
        capacity: positions of each row.
        device: of the model.
        as_graph: see `RowCache`.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device, as_graph: bool) -> None:
        self.num_rows, self.capacity, self.as_graph = num_rows, capacity, as_graph
        self.of_rows = [0] * num_rows
        # The same on the device, changed in place: a CUDA graph reads it where it lies.
        self.on_device_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.rows_B = torch.arange(num_rows, device=device)

    @property
    def visible(self) -> int:
        """Positions that attention looks at: all in a graph, which has one shape, else those that are taken."""
        return self.capacity if self.as_graph else max(self.of_rows) + 1


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, S, D)."""

    is_compileable = True
    is_sliding = False

    def __init__(self, lengths: _Lengths) -> None:
        super().__init__()
        self._lengths = lengths

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (self._lengths.num_rows, key_states.shape[1], self._lengths.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def fill(self, row: int, keys_1HLD: torch.Tensor, values_1HLD: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys_1HLD, values_1HLD)
        self.keys[row, :, : keys_1HLD.shape[2]] = keys_1HLD[0]
        self.values[row, :, : values_1HLD.shape[2]] = values_1HLD[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one position (B, H, 1, D) behind each row's last, and return those that attention looks at."""
        place = (self._lengths.rows_B, slice(None), self._lengths.on_device_B)
        self.keys[place], self.values[place] = key_states[:, :, 0], value_states[:, :, 0]
        visible = self._lengths.visible
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._lengths.visible, 0

    def get_seq_length(self) -> int:
        return self._lengths.visible - 1

    def get_max_length(self) -> int:
        return self._lengths.capacity


class RowCache:
    """B contexts of one Transformer, each of its own length, that grow by one position at a time.

    Memory is that of B rows of ``capacity`` positions from the first `fill` on, however long it is used.

    Args:
        body: a causal Transformer of `transformers`.
        num_rows: B.
        capacity: positions of each row.
        as_graph: a step is compiled, and one CUDA graph on a GPU, to which this saves the launches of some hundred
            kernels; None does so on GPUs.
    """

    def __init__(self, body: PreTrainedModel, num_rows: int, capacity: int, as_graph: bool | None = None) -> None:
        self._body = body
        if as_graph is None:
            as_graph = body.device.type == "cuda"
        self._lengths = _Lengths(num_rows, capacity, body.device, as_graph)
        self._cache = Cache(layers=[_RowLayer(self._lengths) for _ in range(body.config.num_hidden_layers)])
        self._places_S = torch.arange(capacity, device=body.device)
        self._forward = torch.compile(self._grow, mode="reduce-overhead") if as_graph else self._grow

    def fill(self, row: int, inputs_LD: torch.Tensor) -> torch.Tensor:
        """Give a row another context (L, D), embedded; returns the body's state at its last position (D,)."""
        assert 0 < len(inputs_LD) <= self._lengths.capacity
        filled = DynamicCache(config=self._body.config)
        output = self._body(inputs_embeds=inputs_LD[None], past_key_values=filled, use_cache=True)
        for layer, other in zip(self._cache.layers, filled.layers, strict=True):
            layer.fill(row, other.keys, other.values)
        self._lengths.of_rows[row] = self._lengths.on_device_B[row] = len(inputs_LD)
        return output.last_hidden_state[0, -1]

    def step(self, inputs_BD: torch.Tensor) -> torch.Tensor:
        """Let every row grow by an embedded position (B, D); returns the body's states there (B, D)."""
        lengths = self._lengths
        positions_B1 = lengths.on_device_B[:, None]
        is_seen_B11S = (self._places_S[: lengths.visible] <= positions_B1)[:, None, None]
        hidden_BD = self._forward(inputs_BD[:, None], positions_B1, is_seen_B11S)
        last = lengths.capacity - 1  # where rows stay that nobody reads any more
        lengths.of_rows = [min(length + 1, last) for length in lengths.of_rows]
        lengths.on_device_B.add_(1).clamp_(max=last)
        return hidden_BD

    def clear(self, row: int) -> None:
        """Nobody reads this row until it is filled again."""
        self._lengths.of_rows[row] = 0
        self._lengths.on_device_B[row] = 0

    def _grow(self, inputs_B1D: torch.Tensor, positions_B1: torch.Tensor, is_seen_B11S: torch.Tensor) -> torch.Tensor:
        return self._body(
            inputs_embeds=inputs_B1D,
            attention_mask=is_seen_B11S,
            position_ids=positions_B1,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
