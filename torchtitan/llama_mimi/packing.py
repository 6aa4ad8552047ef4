"""Clips -> rows of a batch, one clip a row (``pad``) or clips end to end (``pack``).

In a packed row positions restart with every clip, which is also how attention knows where one begins. A clip that
does not fit is cut after a whole frame, without ``</audio>`` as the speech goes on; the rest begins the next row with
its own ``BOS <audio>``. With text in front (task "tts") the rest would lack it, so such a clip moves to the next row
as a whole and is cut only where a row of its own is too short.
"""

import torch

from llama_mimi.sequences import IGNORE_INDEX, SequenceBuilder

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class BatchPacker:
    """Fills batches clip by clip.

    Args:
        sequences: turns codes into ids.
        batch_size, seq_len: B and L.
        is_packed: several clips a row; otherwise one.
        has_positions: batches say where clips begin, for attention within a clip. Rows of one clip need it only
            beside packed ones.
    """

    def __init__(
        self, sequences: SequenceBuilder, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self._sequences = sequences
        self._batch_size, self._seq_len = batch_size, seq_len
        self._is_packed, self._has_positions = is_packed, has_positions
        self.num_cut = self.num_split = 0  # clips so far that lost their end, or go on in the next row
        self._arange_L = torch.arange(seq_len)
        self._begin()

    @property
    def is_empty(self) -> bool:
        return self._row == 0 and self._used == 0

    @property
    def is_full(self) -> bool:
        return self._row == self._batch_size

    def add(self, codes_TQ: torch.Tensor, *, is_cut: bool, text: str | None = None) -> int:
        """Put a clip behind the last one.

        Returns:
            How many of its T frames the batch took. Fewer than T mean that the batch is full; the others belong in
            the next one. A clip that can be in no row as a whole (rows of one clip, or text in front) is cut at
            ``seq_len`` and counts as taken.
        """
        can_be_cut = self._is_packed and text is None
        taken = 0
        while taken < len(codes_TQ) and self._row < self._batch_size:
            rest_TQ = codes_TQ[taken:]
            if can_be_cut:
                num_frames = self._frames_that_fit(len(rest_TQ), is_cut)
                ids_L = self._sequences.sequence(rest_TQ[:num_frames], is_cut=is_cut or num_frames < len(rest_TQ))
            else:
                num_frames = len(rest_TQ)
                ids_L = self._sequences.sequence(rest_TQ, is_cut=is_cut, text=text)
                if self._used and len(ids_L) - 1 > self._seq_len - self._used:
                    num_frames = 0
            if num_frames == 0:
                self._next_row()
                continue
            self.num_split += can_be_cut and num_frames < len(rest_TQ)
            self._place(ids_L)
            taken += num_frames
        return taken

    def take(self) -> Batch:
        """The batch, filled up with padding, and begin another."""
        inputs = {"input": self._inputs_BL}
        if self._has_positions:
            inputs["positions"] = self._positions_BL
        labels_BL = self._next_BL.masked_fill_(~self._sequences.is_target(self._next_BL), IGNORE_INDEX)
        self._begin()
        return inputs, labels_BL

    def _begin(self) -> None:
        B, L = self._batch_size, self._seq_len
        self._inputs_BL = torch.zeros(B, L, dtype=torch.long)
        self._next_BL = torch.full((B, L), IGNORE_INDEX)
        self._positions_BL = self._arange_L.repeat(B, 1)
        self._row, self._used = 0, 0

    def _next_row(self) -> None:
        self._row, self._used = self._row + 1, 0

    def _frames_that_fit(self, num_frames: int, is_cut: bool) -> int:
        """Frames of a clip of ``num_frames`` that go into the rest of the row."""
        space, Q = self._seq_len - self._used, self._sequences.vocabulary.num_quantizers
        # The last token of a sequence is predicted, not read: BOS, <audio> and the units, or all units but the last.
        if num_frames * Q + (1 if is_cut else 2) <= space:
            return num_frames
        # A last frame is kept back for the next row, as </audio> is learned behind one.
        return max(0, min((space - 1) // Q, num_frames - 1))

    def _place(self, ids_L: torch.Tensor) -> None:
        start, space = self._used, self._seq_len - self._used
        end = start + min(len(ids_L) - 1, space)
        self.num_cut += len(ids_L) - 1 > space
        self._inputs_BL[self._row, start:end] = ids_L[: end - start]
        self._next_BL[self._row, start:end] = ids_L[1 : end - start + 1]
        self._positions_BL[self._row, start:end] = self._arange_L[: end - start]
        # What is left of the row, padding or not, begins another sequence.
        self._positions_BL[self._row, end:] = self._arange_L[: self._seq_len - end]
        self._used = end
        if not self._is_packed or end == self._seq_len:
            self._next_row()
