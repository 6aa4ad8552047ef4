"""Batches of token ids: one clip per sequence (``pad``) or several clips (``pack``)."""

import numpy as np
import torch

from llama_mimi.tokens.tokenizer import IGNORE_INDEX, NO_TOKEN, Batch, SpeechTokenizer


class BatchPacker:
    """Packer that writes clips into the sequences of a batch.

    In a packed sequence, the positions of each clip begin at 0, and attention uses them to separate clips. If a clip
    does not fit, it is cut after a whole frame, without ``</audio>``, and continues in the next sequence after
    ``BOS <audio>``. But a clip with a text (task "tts") is moved to the next sequence as a whole, and is cut only if it
    is longer than a sequence.

    Args:
        is_packed: if True, write several clips to a sequence, else one clip.
        has_positions: add positions to the batches. Validation needs positions if training sequences are packed.
    """

    def __init__(
        self, tokenizer: SpeechTokenizer, batch_size: int, seq_len: int, *, is_packed: bool, has_positions: bool
    ) -> None:
        assert has_positions or not is_packed
        self._tokenizer, self.batch_size, self._seq_len = tokenizer, batch_size, seq_len
        self._is_packed, self._has_positions = is_packed, has_positions
        self.num_cut = 0  # number of clips that were cut at seq_len
        self._ids_QK = tokenizer.vocabulary.admissible_ids(torch.device("cpu")).numpy()[:, :-1]  # token of each code
        self._clear()

    def _clear(self) -> None:
        B, L, W = self.batch_size, self._seq_len, self._tokenizer.ids_per_position
        self._inputs_BLW = np.full((B, L, W), NO_TOKEN)
        self._inputs_BLW[..., 0] = 0
        self._labels_BLW = np.full((B, L, W), IGNORE_INDEX)
        self._positions_BL = np.tile(np.arange(L), (B, 1))
        self._row = self._used = 0  # current sequence, and number of its used positions
        self.num_frames = 0  # number of frames in the batch

    @property
    def is_empty(self) -> bool:
        return not self._row and not self._used

    @property
    def is_full(self) -> bool:
        return self._row == self.batch_size

    def no_room(self, text: str) -> str | None:
        """Return the reason why a sequence is too short for this text and one frame, or None if it is not too short."""
        length = len(self._tokenizer.prefix_ids(text))
        if length + self._tokenizer.positions_per_frame <= self._seq_len + 1:
            return None
        return f"text, BOS and <audio> take {length} tokens, so audio does not fit into a sequence of {self._seq_len}"

    def add(
        self, codes_TQ: np.ndarray, *, is_cut: bool, text: str | None = None, is_deep_T: np.ndarray | None = None
    ) -> int:
        """Write as many frames of a clip as fit into the current sequence.

        Args:
            is_cut: True if the speech continues after the last frame.
            is_deep_T: mask (T + 1,) of the T frames and the end of the clip; True where the depth decoder is trained.

        Returns:
            Number of finished frames, possibly 0. Pass the remaining frames to the next call; if the batch is full,
            call `pop` first. If a clip must stay in one sequence (unpacked, or with a text), frames that do not fit are
            dropped, and count as finished.
        """
        P, L, vocabulary = self._tokenizer.positions_per_frame, self._seq_len, self._tokenizer.vocabulary
        prefix, num_frames, room = self._tokenizer.prefix_ids(text), len(codes_TQ), L - self._used
        # The last token of a clip needs no position: it is predicted, but not read.
        if len(prefix) + num_frames * P - is_cut > room:
            if self._is_packed and text is None:
                # Keep at least one frame for the next sequence, because </audio> must follow a frame.
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
        # Text and <audio> are inputs only, so the first target is the first audio token.
        self._labels_BLW[row, start + first - 1 : end] = ids_NW[first : end - start + 1]
        self._positions_BL[row, end:] = np.arange(L - end)  # positions of the next clip, or of padding, begin at 0
        self.num_frames += min(num_frames, max(0, room + 1 - first) // P)
        self.num_cut += len(ids_NW) - 1 > room
        self._used = end
        if not self._is_packed or end == L:
            self._row, self._used = row + 1, 0
        return num_frames

    def pop(self) -> Batch:
        """Return the batch, padded to full size, and begin a new batch."""
        inputs, labels = self._tokenizer.batch(torch.from_numpy(self._inputs_BLW), torch.from_numpy(self._labels_BLW))
        if self._has_positions:
            inputs["positions"] = torch.from_numpy(self._positions_BL)
        self._clear()
        return inputs, labels
