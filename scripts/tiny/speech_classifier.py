"""Who speaks, and which word: MFCC statistics and logistic regression, to judge what a codec or a model keeps.

Shapes: S samples, F spectral windows, B mel bands, C cepstral coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
from llama_mimi.data.corpus_files import PARQUET_ENDINGS

WINDOW, HOP, BANDS, COEFFICIENTS = 1024, 240, 40, 20  # 43 ms windows every 10 ms at 24 kHz
DYNAMIC_RANGE_DB = 50.0  # below the loudest band of a clip; what is fainter is recording noise, not a voice
LOUD_RANGE_DB = 30.0  # below the loudest window; the others are pauses
ENERGY_SHARE = 0.99  # so much of the mean magnitude spectrum; the rest above is no band of this material
SILENCE_SECONDS = 0.03  # digital silence at least this long separates isolated words


@dataclass(frozen=True)
class LabelledClip:
    """A clip and what is said about it."""

    samples_S: torch.Tensor
    speaker: str
    text: str


def read_clips(corpus: str, sample_rate_hz: int) -> list[LabelledClip]:
    """Clips of a folder, Parquet path or glob with columns audio, speaker and text.

    Raises:
        UserError: no such file or column, a row without a label, or audio that cannot be used.
    """
    files = find_files(corpus, PARQUET_ENDINGS)
    if not files:
        raise UserError(f"no Parquet file matches '{corpus}'; name a folder, a path or a glob")
    clips = []
    for file in files:
        missing = {"audio", "speaker", "text"} - set(pq.read_schema(file).names)
        if missing:
            raise UserError(f"'{file}' has no column {', '.join(sorted(missing))}; name a corpus with speaker and text")
        for index, row in enumerate(pq.read_table(file, columns=["audio", "speaker", "text"]).to_pylist()):
            name = f"row {index} of {file}"
            audio = row["audio"] or {}
            source = audio.get("bytes") if audio.get("bytes") is not None else audio.get("path")
            if source is None or not row["speaker"] or not row["text"]:
                raise UserError(f"{name} lacks its audio, speaker or text; remove the row")
            waveform = read_audio(source, sample_rate_hz, name=name, min_samples=WINDOW)
            clips.append(LabelledClip(waveform.samples_S, row["speaker"], row["text"]))
    return clips


def isolated_words(clips: Sequence[LabelledClip], sample_rate_hz: int) -> tuple[list[LabelledClip], int]:
    """One clip a word, and the number of clips that could not be cut.

    A clip of one word is that word. Others are cut at digital silence, if that leaves as many parts as words.
    """
    words: list[LabelledClip] = []
    uncut = 0
    for clip in clips:
        names = clip.text.split()
        parts = [clip.samples_S] if len(names) == 1 else _sounding_parts(clip.samples_S, sample_rate_hz)
        if len(parts) != len(names):
            uncut += 1
            continue
        words += [LabelledClip(part_S, clip.speaker, name) for part_S, name in zip(parts, names, strict=True)]
    return words, uncut


def _sounding_parts(samples_S: torch.Tensor, sample_rate_hz: int) -> list[torch.Tensor]:
    loud = np.flatnonzero(samples_S.abs().numpy() > 1e-6)
    if not len(loud):
        return []
    gaps = np.flatnonzero(np.diff(loud) > SILENCE_SECONDS * sample_rate_hz)
    starts, ends = np.append(0, gaps + 1), np.append(gaps, len(loud) - 1)
    return [samples_S[loud[start] : loud[end] + 1] for start, end in zip(starts, ends, strict=True)]


def upper_band_edge(clips: Sequence[LabelledClip], sample_rate_hz: int) -> float:
    """Frequency in Hz under which `ENERGY_SHARE` of the mean magnitude spectrum lies.

    Material recorded at a low rate has nothing above; coefficients of that nothing would be what a codec adds to it.
    """
    spectrum = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)
    mean_F = torch.stack([spectrum(clip.samples_S).mean(dim=1) for clip in clips]).mean(dim=0)
    share_F = mean_F.cumsum(0) / mean_F.sum()
    return float((share_F < ENERGY_SHARE).sum() + 1) * sample_rate_hz / WINDOW


class SpeechClassifier:
    """Logistic regression on mean MFCCs.

    Deviations over time are left out: they name originals as well, and reconstructions far worse
    (scripts/benchmarks/LEDGER.md).

    Args:
        clips: original recordings, to fit to.
        labels: what to tell apart, one a clip.
        num_parts: equal parts of a clip whose means are kept apart.

    Raises:
        UserError: fewer than two labels.
    """

    def __init__(
        self, clips: Sequence[LabelledClip], labels: Sequence[str], sample_rate_hz: int, *, num_parts: int = 1
    ) -> None:
        if len(set(labels)) < 2:
            raise UserError(
                f"a classifier needs at least two speakers and two words to tell apart, but {len(clips)} clips have "
                f"{len(set(labels))}: {', '.join(sorted(set(labels))) or 'none'}; name a corpus with more of them"
            )
        self.num_parts = num_parts
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate_hz,
            n_fft=WINDOW,
            hop_length=HOP,
            n_mels=BANDS,
            f_max=upper_band_edge(clips, sample_rate_hz),
        )
        self.dct_BC = torchaudio.functional.create_dct(COEFFICIENTS, BANDS, norm="ortho")
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        self.model.fit(self._features([clip.samples_S for clip in clips]), labels)

    def names(self, clips: Sequence[torch.Tensor]) -> list[str]:
        """The likeliest label of each clip (S,)."""
        return self.model.predict(self._features(clips)).tolist()

    def _features(self, clips: Sequence[torch.Tensor]) -> np.ndarray:
        """Mean coefficients (parts * C,) of the loud windows of every part of each clip."""
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
