"""Splitting long recordings at pauses."""

import torch

HOP_SECONDS = 0.02
PAUSE_SECONDS = 0.2  # most pauses between phrases are longer, most closures within words shorter
MIN_SHARE = 0.5  # of the longest clip: no cut is made before


def split_at_pauses(samples_S: torch.Tensor, sample_rate_hz: int, max_seconds: float) -> list[int]:
    """Return the ends, in samples, of clips of a mono recording that are no longer than ``max_seconds``.

    Each cut is in the middle of the quietest `PAUSE_SECONDS` in the second half of the longest clip; of equally quiet
    ones it is the last.
    """
    hop, longest = max(round(HOP_SECONDS * sample_rate_hz), 1), int(max_seconds * sample_rate_hz)
    ends, start = [], 0
    while len(samples_S) - start > longest:
        first = start + int(MIN_SHARE * longest)
        window_S = samples_S[first : start + longest]
        energy_N = window_S[: len(window_S) // hop * hop].double().view(-1, hop).square().sum(dim=1)
        width = min(max(round(PAUSE_SECONDS / HOP_SECONDS), 1), len(energy_N))
        of_pause_N = energy_N.unfold(0, width, 1).sum(dim=1)
        quietest = len(of_pause_N) - 1 - int(of_pause_N.flip(0).argmin())
        start = first + (quietest * hop + width * hop // 2)
        ends.append(start)
    return [*ends, len(samples_S)]
