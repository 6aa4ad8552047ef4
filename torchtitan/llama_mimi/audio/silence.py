"""Silences in a waveform, by their energy."""

import torch

from llama_mimi.audio.reading import Waveform

HOP_SECONDS = 0.02
BELOW_LOUDEST_DB = 45.0  # speech itself spans about 40 dB


def silences(waveform: Waveform, min_seconds: float) -> list[tuple[float, float]]:
    """Return start and length, in seconds, of the silences of ``min_seconds`` or more.

    A hop of 20 ms is silent if it is 45 dB quieter than the loudest of the clip.
    """
    hop = max(round(HOP_SECONDS * waveform.sample_rate_hz), 1)
    whole_S = waveform.samples_S[: len(waveform.samples_S) // hop * hop]
    energy_N = whole_S.double().view(-1, hop).square().mean(dim=1)
    if not len(energy_N):
        return []
    is_quiet_N = energy_N <= energy_N.max() * 10 ** (-BELOW_LOUDEST_DB / 10)
    edges = torch.diff(is_quiet_N.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
    spans = zip(edges[::2], edges[1::2], strict=True)
    in_seconds = [(start * HOP_SECONDS, (end - start) * HOP_SECONDS) for start, end in spans]
    return [(round(start, 2), round(length, 2)) for start, length in in_seconds if length >= min_seconds - 1e-9]
