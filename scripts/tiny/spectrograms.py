"""Pictures of sound."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torchaudio
from matplotlib import pyplot

WINDOW, HOP = 1024, 240  # 43 ms every 10 ms at 24 kHz
DYNAMIC_RANGE_DB = 70.0


def draw_spectrograms(path: Path, clips: dict[str, torch.Tensor], sample_rate_hz: int, *, title: str) -> None:
    """One spectrogram a row, on one scale of time, frequency and level.

    Args:
        path: PNG to write.
        clips: name -> samples (S,).
    """
    magnitude = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)
    levels = {name: 20 * magnitude(samples_S).clamp(min=1e-5).log10() for name, samples_S in clips.items()}
    top_db = max(float(level.max()) for level in levels.values())
    longest = max(len(samples_S) for samples_S in clips.values()) / sample_rate_hz
    figure, axes = pyplot.subplots(len(clips), 1, figsize=(9, 1.7 * len(clips)), sharex=True, squeeze=False)
    for axis, (name, level_FT) in zip(axes[:, 0], levels.items(), strict=True):
        extent = (0, len(clips[name]) / sample_rate_hz, 0, sample_rate_hz / 2000)
        axis.imshow(
            level_FT,
            origin="lower",
            aspect="auto",
            extent=extent,
            vmin=top_db - DYNAMIC_RANGE_DB,
            vmax=top_db,
            cmap="magma",
        )
        axis.set_xlim(0, longest)
        axis.set_ylabel("kHz")
        axis.set_title(name, fontsize=9, loc="left", pad=3)
    axes[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
