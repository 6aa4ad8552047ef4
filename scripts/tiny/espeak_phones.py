"""Speech from espeak-ng's library, with the time of every phone. The program `espeak-ng` does not print times."""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
from tiny_text import Speaker

# Constants of espeak-ng's speak_lib.h.
SYNCHRONOUS, PHONEME_EVENTS_IN_IPA = 2, 3
RATE, PITCH = 1, 3
LIST_TERMINATED, PHONEME = 0, 7
POS_CHARACTER, CHARS_UTF8 = 1, 1


class Phone(NamedTuple):
    """A phone of a sentence. The symbol of a pause is empty."""

    symbol: str  # IPA
    word: int  # position of the word's first letter in the sentence; counted from 1
    start_s: float  # in seconds


class _Event(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("type", "id", "text_position", "length", "audio_ms", "sample")]
    _fields_ += [("user_data", ctypes.c_void_p), ("string", ctypes.c_char * 8)]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL("libespeak-ng.so.1")
    return library, library.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS_IN_IPA)


def speak_phones(sentence: str, speaker: Speaker) -> tuple[np.ndarray, int, list[Phone]]:
    """Return float32 samples in [-1, 1], the sample rate in Hz, and the phones of a sentence.

    The samples also depend on the sentences that the process spoke before. The same sequence gives the same samples.
    """
    library, rate_hz = _library()
    chunks: list[np.ndarray] = []
    phones: list[Phone] = []

    def receive(samples, count, events) -> int:
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        index = 0
        while (event := events[index]).type != LIST_TERMINATED:
            if event.type == PHONEME:
                phones.append(Phone(event.string.decode(), event.text_position, event.sample / rate_hz))
            index += 1
        return 0

    callback = _Callback(receive)  # must exist until the end of the synthesis
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(speaker.voice.encode())
    library.espeak_SetParameter(RATE, speaker.speed, 0)
    library.espeak_SetParameter(PITCH, speaker.pitch, 0)
    text = sentence.encode()
    library.espeak_Synth(text, len(text) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    return np.concatenate(chunks), rate_hz, phones
