"""Find silences in a waveform by their energy, and split long recordings at pauses."""

import torch

from llama_mimi.audio.reading import Waveform

HOP_SECONDS = 0.02
BELOW_LOUDEST_DB = 45.0  # silence is at least this far below the loudest hop of the clip; speech spans 40 dB
PAUSE_SECONDS = 0.2  # most pauses between phrases are longer, and most stop closures within words are shorter


def silences(waveform: Waveform, min_seconds: float) -> list[tuple[float, float]]:
    """Return the start and the length, in seconds, of each silence that lasts at least ``min_seconds``."""
    energy_N = _squares(waveform.samples_S, waveform.sample_rate_hz).mean(dim=1)
    if not len(energy_N):
        return []
    is_quiet_N = energy_N <= energy_N.max() * 10 ** (-BELOW_LOUDEST_DB / 10)
    edges = torch.diff(is_quiet_N.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
    hops = zip(edges[::2], edges[1::2], strict=True)
    spans = [(start * HOP_SECONDS, (end - start) * HOP_SECONDS) for start, end in hops]
    return [(round(start, 2), round(length, 2)) for start, length in spans if length >= min_seconds - 1e-9]


def split_at_pauses(samples_S: torch.Tensor, sample_rate_hz: int, max_seconds: float) -> list[int]:
    """Split a mono recording (S,) into clips of up to ``max_seconds``. Return the end of each clip, in samples.

    Each cut is in the middle of an interval of `PAUSE_SECONDS`: the quietest interval in the second half of the longest
    possible clip. If several intervals are equally quiet, the last interval is used.
    """
    hop, longest = max(round(HOP_SECONDS * sample_rate_hz), 1), int(max_seconds * sample_rate_hz)
    ends, start = [], 0
    while len(samples_S) - start > longest:
        first = start + longest // 2
        energy_N = _squares(samples_S[first : start + longest], sample_rate_hz).sum(dim=1)
        width = min(round(PAUSE_SECONDS / HOP_SECONDS), len(energy_N))
        of_pause_N = energy_N.unfold(0, width, 1).sum(dim=1)
        quietest = len(of_pause_N) - 1 - int(of_pause_N.flip(0).argmin())
        start = first + quietest * hop + width * hop // 2
        ends.append(start)
    return [*ends, len(samples_S)]


def _squares(samples_S: torch.Tensor, sample_rate_hz: int) -> torch.Tensor:
    """Return the squared samples of all whole hops; shape (number of hops, samples per hop)."""
    hop = max(round(HOP_SECONDS * sample_rate_hz), 1)
    return samples_S[: len(samples_S) // hop * hop].double().view(-1, hop).square()
