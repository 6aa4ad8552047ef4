"""Classify speakers and words by MFCCs and logistic regression, to measure how much of them a codec keeps.

Shapes: S samples, F spectral windows, B mel bands, C cepstral coefficients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torchaudio
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from llama_mimi.audio.reading import read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import find_files

WINDOW, HOP, BANDS, COEFFICIENTS = 1024, 240, 40, 20  # 43 ms windows every 10 ms at 24 kHz
DYNAMIC_RANGE_DB = 50.0  # below the loudest band of a clip; fainter sound is recording noise
LOUD_RANGE_DB = 30.0  # below the loudest window; the other windows are pauses
ENERGY_FRACTION = 0.99  # of the mean magnitude spectrum; bands above it are left out
COLUMNS = ["audio", "speaker", "text"]


class LabelledClip(NamedTuple):
    samples_S: torch.Tensor
    speaker: str
    text: str


def read_clips(corpus: str, sample_rate_hz: int) -> list[LabelledClip]:
    """Read the clips of a folder, Parquet path or glob with the columns audio, speaker and text."""
    clips = []
    for file in find_files(corpus, (".parquet",)):
        for index, row in enumerate(pq.read_table(file, columns=COLUMNS).to_pylist()):
            source = row["audio"]["bytes"] or row["audio"]["path"]
            waveform = read_audio(source, sample_rate_hz, name=f"row {index} of {file}", min_samples=WINDOW)
            clips.append(LabelledClip(waveform.samples_S, row["speaker"], row["text"]))
    return clips


class SpeechClassifier:
    """Logistic regression on mean MFCCs of original recordings; each of ``num_parts`` equal parts has its own means.

    Deviations over time are left out: they identify originals as well, and reconstructions far worse
    (scripts/benchmarks/LEDGER.md).
    """

    def __init__(
        self, clips: Sequence[LabelledClip], labels: Sequence[str], sample_rate_hz: int, *, num_parts: int = 1
    ) -> None:
        if len(set(labels)) < 2:
            raise UserError(f"the {len(clips)} clips have one label or none; name a corpus with two or more")
        self.num_parts = num_parts
        # Recordings at a low rate have empty upper bands, whose coefficients would describe the codec's noise.
        spectrum = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)
        mean_F = torch.stack([spectrum(clip.samples_S).mean(dim=1) for clip in clips]).mean(dim=0)
        num_used = int((mean_F.cumsum(0) / mean_F.sum() < ENERGY_FRACTION).sum()) + 1
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate_hz, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS, f_max=num_used * sample_rate_hz / WINDOW
        )
        self.dct_BC = torchaudio.functional.create_dct(COEFFICIENTS, BANDS, norm="ortho")
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        self.model.fit(self._features([clip.samples_S for clip in clips]), labels)

    def accuracy(self, clips: Sequence[torch.Tensor], labels: Sequence[str]) -> float:
        """Return the fraction of clips (S,) that get their own label."""
        return float(self.model.score(self._features(clips), labels))

    def _features(self, clips: Sequence[torch.Tensor]) -> np.ndarray:
        """Return mean coefficients (parts * C,) of the loud windows of every part of each clip."""
        rows = []
        for samples_S in clips:
            level_BF = 10 * self.mel(samples_S / samples_S.abs().max().clamp(min=1e-6)).clamp(min=1e-10).log10()
            level_BF = level_BF.clamp(min=level_BF.max() - DYNAMIC_RANGE_DB)
            loudness_F = level_BF.max(dim=0).values
            loud_BF = level_BF[:, loudness_F > loudness_F.max() - LOUD_RANGE_DB]
            parts = [part_BF for part_BF in loud_BF.tensor_split(self.num_parts, dim=1) if part_BF.shape[1]]
            parts += parts[-1:] * (self.num_parts - len(parts))
            rows.append(torch.cat([part_BF.mean(dim=1) @ self.dct_BC for part_BF in parts]).numpy())
        return np.stack(rows)
