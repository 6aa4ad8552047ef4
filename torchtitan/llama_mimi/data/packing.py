"""Batches of token ids: one example per sequence (``pad``) or several examples (``pack``)."""

import numpy as np
import torch

from llama_mimi.data.examples import Example
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, NO_TOKEN, Batch, SpeechTokenizer


class BatchPacker:
    """Packer that writes examples into the sequences of a batch.

    In a packed sequence, the positions of each example begin at 0, and attention uses them to separate examples. An
    example is written to the first sequence with room. If only some of its units fit, the other units follow in
    another sequence, after the prefix. A batch is full when the next example does not fit into any of its sequences.
    If ``is_packed`` is False, a sequence has one example. Validation needs positions if training sequences are packed.
    """

    def __init__(
        self, tokenizer: SpeechTokenizer, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self.tokenizer, self.batch_size, self._seq_len = tokenizer, batch_size, seq_len
        self._is_packed, self._has_positions = is_packed, has_positions
        self.num_cut = 0  # number of examples that were cut at seq_len
        self._clear()

    def _clear(self) -> None:
        B, L, W = self.batch_size, self._seq_len, self.tokenizer.ids_per_position
        self._inputs_BLW = np.full((B, L, W), NO_TOKEN)
        self._inputs_BLW[..., 0] = 0
        self._labels_BLW = np.full((B, L, W), IGNORE_INDEX)
        self._tasks_BL = np.zeros((B, L), dtype=np.int64)
        self._positions_BL = np.tile(np.arange(L), (B, 1))
        self._used_B = [0] * B  # number of used positions of each sequence
        self.num_frames = 0  # number of frames in the batch

    @property
    def num_used(self) -> int:
        """Number of used positions of the batch."""
        return sum(self._used_B)

    @property
    def is_full(self) -> bool:
        return min(self._used_B) == self._seq_len

    def no_room(self, example: Example) -> str | None:
        """Return the reason why a unit does not fit into an empty sequence, or None if all units fit.

        If an example must stay in one sequence, only its first unit must fit, because `add` cuts the example.
        """
        units_U = np.diff(example.ends_U[: 1 if example.is_whole else None], prepend=0)
        # The last token of a sequence needs no position: it is predicted, but not read.
        length = len(example.prefix_NW) + int(units_U.max(initial=0)) - 1
        if length <= self._seq_len:
            return None
        return f"{length:,} tokens must stay in one sequence; raise training.seq_len ({self._seq_len:,})"

    def add(self, example: Example, start: int = 0, task: int = 0) -> int:
        """Write the units from ``start`` on to the first sequence with room; return the first unit that is not written.

        If ``start`` is returned, call `pop` first. An example that must stay in one sequence, but is longer than a
        sequence, is cut after the last token that fits. In unpacked batches, other examples are also cut. ``task``: see
        `SpeechTokenizer.batch`.
        """
        prefix_NW, ends_U = example.prefix_NW, example.ends_U
        first = int(ends_U[start - 1]) if start else 0
        stop = next((unit for unit in example.breaks if unit > start), len(ends_U))
        for row, used in enumerate(self._used_B):
            room = self._seq_len - used + 1 - len(prefix_NW)  # number of tokens after the prefix
            last = min(stop, int(np.searchsorted(ends_U, first + room, side="right")))
            end = int(ends_U[last - 1]) if last else 0
            if last < stop and (example.is_whole or not self._is_packed):
                if used or room <= 0:
                    continue
                last, end, self.num_cut = stop, first + room, self.num_cut + 1
            if last <= start:
                continue
            self._write(row, prefix_NW, example.ids_NW[first:end], example.labels_NW[first:end], task)
            return last
        return start

    def _write(self, row: int, prefix_NW: np.ndarray, ids_NW: np.ndarray, labels_NW: np.ndarray, task: int) -> None:
        ids_NW, labels_start = np.concatenate([prefix_NW, ids_NW]), self._used_B[row] + len(prefix_NW) - 1
        start, end = self._used_B[row], self._used_B[row] + len(ids_NW) - 1
        self._inputs_BLW[row, start:end] = ids_NW[:-1]
        self._labels_BLW[row, labels_start:end] = labels_NW
        self._tasks_BL[row, start:end] = task
        self._positions_BL[row, end:] = np.arange(self._seq_len - end)  # the positions of the next example begin at 0
        is_audio_N = self.tokenizer.vocabulary.is_audio(torch.from_numpy(ids_NW[:, 0]))
        self.num_frames += int(is_audio_N.sum()) // self.tokenizer.positions_per_frame
        self._used_B[row] = end if self._is_packed else self._seq_len

    def pop(self) -> Batch:
        """Return the batch, padded to full size, and begin a new batch."""
        arrays = self._inputs_BLW, self._labels_BLW, self._tasks_BL
        inputs, labels = self.tokenizer.batch(*map(torch.from_numpy, arrays))
        if self._has_positions:
            inputs["positions"] = torch.from_numpy(self._positions_BL)
        self._clear()
        return inputs, labels
