"""Clips -> rows of a batch, one clip a row (``pad``) or clips end to end (``pack``).

In a packed row positions restart with every clip, which is also how attention knows where one begins. A clip that
does not fit is cut after a whole frame, without ``</audio>`` as the speech goes on; the rest begins the next row with
its own ``BOS <audio>``. With text in front (task "tts") the rest would lack it, so such a clip moves to the next row
as a whole and is cut only where a row of its own is too short.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llama_mimi.tokens.tokenizer import IGNORE_INDEX, NO_TOKEN, Batch, SpeechTokenizer


@dataclass(frozen=True)
class Piece:
    """Frames of a clip in a row: ``head`` from ``start`` on, then their tokens, then ``</audio>`` if it has an end."""

    row: int
    start: int
    head: list[int]
    codes_TQ: np.ndarray
    has_end: bool
    is_deep_T: np.ndarray | None  # frames, and end, that train the hierarchical model's depth decoder; None for all


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
        self, tokenizer: SpeechTokenizer, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self._tokenizer = tokenizer
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

    def no_room(self, text: str) -> str | None:
        """Return why a row has no room for a frame behind this text, or None if it has."""
        length = len(self._tokenizer.prefix_ids(text))
        if length + self._tokenizer.positions_per_frame <= self._seq_len + 1:
            return None
        return f"its text, {length} tokens with BOS and <audio>, leaves no room for audio in a row of {self._seq_len}"

    def add(
        self, codes_TQ: np.ndarray, *, is_cut: bool, text: str | None = None, is_deep_T: np.ndarray | None = None
    ) -> int:
        """Put a clip behind the last one.

        Args:
            codes_TQ, is_cut, text: as of a clip.
            is_deep_T: as `Piece`; the last, T + 1st, is of the end.

        Returns:
            How many of its T frames the batch took. Fewer than T mean that the batch is full; the others belong in
            the next one. A clip that can be in no row as a whole (rows of one clip, or text in front) is cut at
            ``seq_len`` and counts as taken.
        """
        head = self._tokenizer.prefix_ids(text)
        can_be_cut = self._is_packed and text is None
        P = self._tokenizer.positions_per_frame
        taken, T = 0, len(codes_TQ)
        while taken < T and self._row < self._batch_size:
            num_frames = T - taken
            if self._length(head, num_frames, is_cut) > self._seq_len - self._used:
                if can_be_cut:
                    # Keep a frame for the next row: </audio> must follow one.
                    num_frames = min((self._seq_len - self._used + 1 - len(head)) // P, num_frames - 1)
                if num_frames <= 0 or (self._used and not can_be_cut):
                    self._next_row()
                    continue
            goes_on = taken + num_frames < T
            self.num_split += goes_on
            frames, end = slice(taken, taken + num_frames), taken + num_frames + 1
            piece = Piece(
                self._row,
                self._used,
                head,
                codes_TQ[frames],
                has_end=not (is_cut or goes_on),
                is_deep_T=None if is_deep_T is None else is_deep_T[taken:end],
            )
            self._place(piece, self._length(head, num_frames, is_cut or goes_on))
            taken += num_frames
        return taken

    def take(self) -> Batch:
        """The batch, filled up with padding, and begin another."""
        B, L, W = self._batch_size, self._seq_len, self._tokenizer.ids_per_position
        vocabulary = self._tokenizer.vocabulary
        inputs_BLW = np.zeros((B, L, W), dtype=np.int64)
        inputs_BLW[..., 1:] = NO_TOKEN
        labels_BLW = np.full((B, L, W), IGNORE_INDEX)
        arange_L = np.arange(L)
        positions_BL = np.tile(arange_L, (B, 1))
        if self._pieces:
            codes_NQ = np.concatenate([piece.codes_TQ for piece in self._pieces]).astype(np.int64)
            audio_NW = vocabulary.ids_from_codes(torch.from_numpy(codes_NQ)).numpy().reshape(-1, W)
        end_1W = np.full((1, W), vocabulary.audio_end_id)
        used = 0
        for piece in self._pieces:
            audio_nW = audio_NW[used : used + piece.codes_TQ.size // W]
            used += len(audio_nW)
            head_nW = np.full((len(piece.head), W), NO_TOKEN)
            head_nW[:, 0] = piece.head
            ids_nW = np.concatenate([head_nW, audio_nW, end_1W[: piece.has_end]])
            start, end = piece.start, min(piece.start + len(ids_nW) - 1, L)
            inputs_BLW[piece.row, start:end] = ids_nW[: end - start]
            if piece.is_deep_T is not None:
                frames_nW = ids_nW[len(piece.head) :]
                frames_nW[~piece.is_deep_T[: len(frames_nW)], 1:] = IGNORE_INDEX
            first_target = len(piece.head) - 1  # text and <audio> are given
            labels_BLW[piece.row, start + first_target : end] = ids_nW[1:][first_target : end - start]
            positions_BL[piece.row, start:end] = arange_L[: end - start]
            # What is left of the row, padding or not, begins another sequence.
            positions_BL[piece.row, end:] = arange_L[: L - end]
        self._begin()
        inputs, labels = self._tokenizer.batch(torch.from_numpy(inputs_BLW), torch.from_numpy(labels_BLW))
        if self._has_positions:
            inputs["positions"] = torch.from_numpy(positions_BL)
        return inputs, labels

    def _begin(self) -> None:
        self._pieces: list[Piece] = []
        self._row, self._used = 0, 0
        self.num_frames = 0  # in the batch so far, without what is cut off

    def _next_row(self) -> None:
        self._row, self._used = self._row + 1, 0

    def _length(self, head: list[int], num_frames: int, is_cut: bool) -> int:
        """Places that a sequence takes: one for each token but the last, which is predicted and not read."""
        return len(head) + num_frames * self._tokenizer.positions_per_frame - is_cut

    def _place(self, piece: Piece, length: int) -> None:
        self._pieces.append(piece)
        room = max(0, self._seq_len + 1 - piece.start - len(piece.head)) // self._tokenizer.positions_per_frame
        self.num_frames += min(len(piece.codes_TQ), room)
        self._used += length
        self.num_cut += self._used > self._seq_len
        if not self._is_packed or self._used >= self._seq_len:
            self._next_row()
