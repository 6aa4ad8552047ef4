"""Clips -> rows of a batch, one clip a row (``pad``) or clips end to end (``pack``).

In a packed row positions restart with every clip, which is also how attention knows where one begins. A clip that
does not fit is cut after a whole frame, without ``</audio>`` as the speech goes on; the rest begins the next row with
its own ``BOS <audio>``. With text in front (task "tts") the rest would lack it, so such a clip moves to the next row
as a whole and is cut only where a row of its own is too short.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llama_mimi.tokens.sequences import IGNORE_INDEX, SequenceBuilder

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Frames of a clip in a row: ``head`` from ``start`` on, then their units, then ``</audio>`` if it has an end."""

    row: int
    start: int
    head: list[int]
    codes_TQ: np.ndarray
    has_end: bool


class BatchPacker:
    """Fills batches clip by clip. Places are given out at once, tokens are made for a whole batch.

    Args:
        sequences: says what a sequence is.
        batch_size, seq_len: B and L.
        is_packed: several clips a row; otherwise one.
        has_positions: batches carry positions that restart at every clip, for attention within a clip. Rows of one
            clip need them only where training rows are packed.
    """

    def __init__(
        self, sequences: SequenceBuilder, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self._sequences = sequences
        self._batch_size, self._seq_len = batch_size, seq_len
        self._is_packed, self._has_positions = is_packed, has_positions
        self.num_cut = self.num_split = 0  # clips so far that were cut, or that go on in the next row
        self._begin()

    @property
    def is_empty(self) -> bool:
        return not self._pieces

    @property
    def is_full(self) -> bool:
        return self._row == self._batch_size

    def add(self, codes_TQ: np.ndarray, *, is_cut: bool, text: str | None = None) -> int:
        """Put a clip behind the last one.

        Returns:
            How many of its T frames the batch took. Fewer than T mean that the batch is full; the others belong in
            the next one. A clip that can be in no row as a whole (rows of one clip, or text in front) is cut at
            ``seq_len`` and counts as taken.
        """
        head = self._sequences.head(text)
        can_be_cut = self._is_packed and text is None
        Q = self._sequences.vocabulary.num_quantizers
        taken, T = 0, len(codes_TQ)
        while taken < T and self._row < self._batch_size:
            num_frames = T - taken
            if self._length(head, num_frames, is_cut) > self._seq_len - self._used:
                if can_be_cut:
                    # Keep a frame for the next row: </audio> must follow one.
                    num_frames = min((self._seq_len - self._used + 1 - len(head)) // Q, num_frames - 1)
                if num_frames <= 0 or (self._used and not can_be_cut):
                    self._next_row()
                    continue
            goes_on = taken + num_frames < T
            self.num_split += goes_on
            piece = Piece(
                self._row, self._used, head, codes_TQ[taken : taken + num_frames], has_end=not (is_cut or goes_on)
            )
            self._place(piece, self._length(head, num_frames, is_cut or goes_on))
            taken += num_frames
        return taken

    def take(self) -> Batch:
        """The batch, filled up with padding, and begin another."""
        B, L, vocabulary = self._batch_size, self._seq_len, self._sequences.vocabulary
        inputs_BL = np.zeros((B, L), dtype=np.int64)
        labels_BL = np.full((B, L), IGNORE_INDEX)
        arange_L = np.arange(L)
        positions_BL = np.tile(arange_L, (B, 1))
        if self._pieces:
            codes_NQ = np.concatenate([piece.codes_TQ for piece in self._pieces]).astype(np.int64)
            units_N = vocabulary.ids_from_codes(torch.from_numpy(codes_NQ)).numpy()
        end_N = np.array([vocabulary.audio_end_id])
        used = 0
        for piece in self._pieces:
            units = units_N[used : used + piece.codes_TQ.size]
            used += len(units)
            ids = np.concatenate([piece.head, units, end_N[: piece.has_end]])
            start, end = piece.start, min(piece.start + len(ids) - 1, L)
            inputs_BL[piece.row, start:end] = ids[: end - start]
            first_target = len(piece.head) - 1  # text and <audio> are given
            labels_BL[piece.row, start + first_target : end] = ids[1:][first_target : end - start]
            positions_BL[piece.row, start:end] = arange_L[: end - start]
            # What is left of the row, padding or not, begins another sequence.
            positions_BL[piece.row, end:] = arange_L[: L - end]
        self._begin()
        inputs = {"input": torch.from_numpy(inputs_BL)}
        if self._has_positions:
            inputs["positions"] = torch.from_numpy(positions_BL)
        return inputs, torch.from_numpy(labels_BL)

    def _begin(self) -> None:
        self._pieces: list[Piece] = []
        self._row, self._used = 0, 0
        self.num_frames = 0  # in the batch so far, without what is cut off

    def _next_row(self) -> None:
        self._row, self._used = self._row + 1, 0

    def _length(self, head: list[int], num_frames: int, is_cut: bool) -> int:
        """Places that a sequence takes: one for each token but the last, which is predicted and not read."""
        return len(head) + num_frames * self._sequences.vocabulary.num_quantizers - is_cut

    def _place(self, piece: Piece, length: int) -> None:
        self._pieces.append(piece)
        Q = self._sequences.vocabulary.num_quantizers
        room = max(0, self._seq_len + 1 - piece.start - len(piece.head)) // Q
        self.num_frames += min(len(piece.codes_TQ), room)
        self._used += length
        self.num_cut += self._used > self._seq_len
        if not self._is_packed or self._used >= self._seq_len:
            self._next_row()
