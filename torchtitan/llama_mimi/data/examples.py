"""Token ids of a clip, a text or several utterances for a training task, divided into units for packing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llama_mimi.common.choices import Task
from llama_mimi.corpora.clips import CodedClip
from llama_mimi.corpora.utterances import Utterances
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, NO_TOKEN, SpeechTokenizer
from llama_mimi.tokens.vocabulary import text_ids

Encoded = CodedClip | Utterances


@dataclass(frozen=True)
class Example:
    """Ids and labels (N, W) for one task. A sequence consists of the prefix and of consecutive units."""

    prefix_NW: np.ndarray  # BOS and, if audio follows, the text of the task "tts" and ``<audio>``; not predicted
    ids_NW: np.ndarray
    labels_NW: np.ndarray  # `IGNORE_INDEX` for tokens that the task does not predict
    ends_U: np.ndarray  # end of each unit in ids_NW
    is_whole: bool = False  # all units belong to one sequence
    breaks: tuple[int, ...] = ()  # units that begin a new sequence


class ExampleBuilder:
    """Builder of examples. The docstring of `llama_mimi.tokens.tokenizer` shows the sequence of each task.

    A unit is a frame ("audio", "tts"), a token ("text"), two utterances ("interleaved") or the whole clip ("asr").
    ``</audio>`` and EOS belong to the last unit.
    """

    def __init__(self, tokenizer: SpeechTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids_QK = tokenizer.vocabulary.admissible_ids(torch.device("cpu")).numpy()[:, :-1]  # token of each code
        self._bos_1W = self._rows([tokenizer.text_tokenizer.bos_token_id])
        self._start_1W = self._rows([tokenizer.vocabulary.audio_start_id])

    def build(self, task: Task, clip: Encoded, *, starts_with_text: bool = False) -> Example:
        """Build an example. ``starts_with_text``: the first of several utterances is a text (task "interleaved")."""
        if isinstance(clip, Utterances):
            return self._interleave(clip, starts_with_text)
        text_NW = self._rows([]) if task == "audio" else self._text(clip.text or "")
        if task == "text":
            ids_NW = np.concatenate([text_NW, self._eos()]) if (clip.text or "").strip() else text_NW[:0]
            return Example(self._bos_1W, ids_NW, _labels(ids_NW), np.arange(1, len(ids_NW) + 1))
        audio_NW, num_frames = self._audio(clip), len(clip.codes_TQ)
        if task == "asr":
            ids_NW = np.concatenate([audio_NW, text_NW, self._eos()])
            labels_NW = _labels(ids_NW)
            labels_NW[: len(audio_NW)] = IGNORE_INDEX
            prefix_NW = np.concatenate([self._bos_1W, self._start_1W])
            return Example(prefix_NW, ids_NW, labels_NW, np.array([len(ids_NW)]), is_whole=True)
        ends_U = np.arange(1, num_frames + 1) * self._tokenizer.positions_per_frame
        ends_U[-1] = len(audio_NW)
        prefix_NW = np.concatenate([self._bos_1W, text_NW, self._start_1W])
        return Example(prefix_NW, audio_NW, _labels(audio_NW), ends_U, is_whole=task == "tts")

    def _interleave(self, utterances: Utterances, starts_with_text: bool) -> Example:
        newline_NW = self._text("\n")
        ids: list[np.ndarray] = []
        ends: list[int] = []
        breaks: list[int] = []
        for run in utterances.runs:
            breaks.append(len(ends))
            for number, clip in enumerate(run):
                is_text = starts_with_text == (number % 2 == 0)
                ids += [self._text(clip.text or "")] if is_text else [self._start_1W, self._audio(clip)]
                ids.append(newline_NW)
                if number % 2 or number == len(run) - 1:
                    ends.append(sum(map(len, ids)))
        ids_NW = np.concatenate(ids)
        return Example(self._bos_1W, ids_NW, _labels(ids_NW), np.array(ends), breaks=tuple(breaks))

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        rows_NW = np.full((len(ids), self._tokenizer.ids_per_position), NO_TOKEN)
        rows_NW[:, 0] = ids
        return rows_NW

    def _eos(self) -> np.ndarray:
        return self._rows([self._tokenizer.text_tokenizer.eos_token_id])

    def _text(self, text: str) -> np.ndarray:
        return self._rows(text_ids(self._tokenizer.text_tokenizer, text))

    def _audio(self, clip: CodedClip) -> np.ndarray:
        """Return the rows of the codes and, if the clip is not cut, of ``</audio>``."""
        width = self._tokenizer.ids_per_position
        frames_NW = self._ids_QK[np.arange(len(self._ids_QK)), clip.codes_TQ].reshape(-1, width)
        end_NW = np.full((int(not clip.is_cut), width), self._tokenizer.vocabulary.audio_end_id)
        return np.concatenate([frames_NW, end_NW])


def _labels(ids_NW: np.ndarray) -> np.ndarray:
    return np.where(ids_NW == NO_TOKEN, IGNORE_INDEX, ids_NW)
