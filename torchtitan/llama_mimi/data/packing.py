"""Batches of token ids: one clip in each row (``pad``), or clips end to end (``pack``)."""

import numpy as np
import torch

from llama_mimi.tokens.tokenizer import IGNORE_INDEX, NO_TOKEN, Batch, SpeechTokenizer


class BatchPacker:
    """Write clips into the rows of a batch, one after the other.

    In a packed row positions restart at every clip, which also tells attention where a clip begins. A clip that does
    not fit is cut after a whole frame, without ``</audio>`` as the speech goes on; the rest begins the next row with
    its own ``BOS <audio>``. With a text (task "tts") the rest would lack it, so such a clip moves to the next row as a
    whole and is cut only if it is longer than a row.

    Args:
        is_packed: several clips in each row; otherwise one.
        has_positions: batches contain positions. Rows of one clip need them only if training rows are packed.
    """

    def __init__(
        self, tokenizer: SpeechTokenizer, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self._tokenizer, self.batch_size, self._seq_len = tokenizer, batch_size, seq_len
        self._is_packed, self._has_positions = is_packed, has_positions
        self.num_cut = 0  # clips so far that were cut at seq_len
        self._ids_QK = tokenizer.vocabulary.admissible_ids(torch.device("cpu")).numpy()[:, :-1]  # of all codes
        self._clear()

    def _clear(self) -> None:
        B, L, W = self.batch_size, self._seq_len, self._tokenizer.ids_per_position
        self._inputs_BLW = np.full((B, L, W), NO_TOKEN)
        self._inputs_BLW[..., 0] = 0
        self._labels_BLW = np.full((B, L, W), IGNORE_INDEX)
        self._positions_BL = np.tile(np.arange(L), (B, 1))
        self._row = self._used = 0  # the row to write to, and the number of its positions that are used
        self.num_frames = 0  # in the batch, without those that were cut off

    @property
    def is_empty(self) -> bool:
        return not self._row and not self._used

    @property
    def is_full(self) -> bool:
        return self._row == self.batch_size

    def no_room(self, text: str) -> str | None:
        """Return why a row has no room for a frame after this text, or None if it has."""
        length = len(self._tokenizer.prefix_ids(text))
        if length + self._tokenizer.positions_per_frame <= self._seq_len + 1:
            return None
        return f"its text, {length} tokens with BOS and <audio>, leaves no room for audio in a row of {self._seq_len}"

    def add(
        self, codes_TQ: np.ndarray, *, is_cut: bool, text: str | None = None, is_deep_T: np.ndarray | None = None
    ) -> int:
        """Write as many frames of a clip as the current row has room for.

        Args:
            is_cut: the speech goes on after the last frame.
            is_deep_T: (T + 1,) frames, and end, that train the depth decoder of the hierarchical model; None for all.

        Returns:
            Number of frames written, possibly 0; the others belong in the next row, or in the next batch if this one is
            full. A clip that must stay in one row (rows of one clip, or a text) is cut there and counts as written.
        """
        P, L, vocabulary = self._tokenizer.positions_per_frame, self._seq_len, self._tokenizer.vocabulary
        prefix, num_frames, room = self._tokenizer.prefix_ids(text), len(codes_TQ), L - self._used
        # A sequence takes a position for each token but the last, which is predicted and not read.
        if len(prefix) + num_frames * P - is_cut > room:
            if self._is_packed and text is None:
                # One frame stays for the next row, as </audio> must follow a frame.
                num_frames = min((room + 1 - len(prefix)) // P, num_frames - 1)
            elif self._used:
                num_frames = 0
            if num_frames <= 0:
                self._row, self._used = self._row + 1, 0
                return 0
        first, last = len(prefix), len(prefix) + num_frames * P
        has_end = not is_cut and num_frames == len(codes_TQ)
        ids_NW = np.full((last + has_end, self._tokenizer.ids_per_position), vocabulary.audio_end_id)
        ids_NW[:first, 0], ids_NW[:first, 1:] = prefix, NO_TOKEN
        levels_Q = np.arange(len(self._ids_QK))
        ids_NW[first:last] = self._ids_QK[levels_Q, codes_TQ[:num_frames]].reshape(last - first, -1)

        row, start, end = self._row, self._used, self._used + min(len(ids_NW) - 1, room)
        self._inputs_BLW[row, start:end] = ids_NW[: end - start]
        if is_deep_T is not None:
            frames_NW = ids_NW[first:]
            frames_NW[~is_deep_T[: len(frames_NW)], 1:] = IGNORE_INDEX
        # Text and <audio> are given, so the first target is the first audio token.
        self._labels_BLW[row, start + first - 1 : end] = ids_NW[first : end - start + 1]
        self._positions_BL[row, end:] = np.arange(L - end)  # the next clip, or padding, begins at 0
        self.num_frames += min(num_frames, max(0, room + 1 - first) // P)
        self.num_cut += len(ids_NW) - 1 > room
        self._used = end
        if not self._is_packed or end == L:
            self._row, self._used = row + 1, 0
        return num_frames

    def pop(self) -> Batch:
        """Return the batch, filled up with padding, and begin another."""
        inputs, labels = self._tokenizer.batch(torch.from_numpy(self._inputs_BLW), torch.from_numpy(self._labels_BLW))
        if self._has_positions:
            inputs["positions"] = torch.from_numpy(self._positions_BL)
        self._clear()
        return inputs, labels
