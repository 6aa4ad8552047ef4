"""Measure how well a codec reconstructs held-out speech at 1, 2, 4 and 8 levels.

uv run python scripts/tiny/score_codec.py --codec assets/tiny/mimi --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --words_corpus "assets/tiny/words/train-*.parquet" \\
    --words_validation_corpus "assets/tiny/words/validation-*.parquet"

Speaker and word classifiers are trained on recordings of the training corpora. The classifiers are then applied to
reconstructions of the held-out clips.

Shapes: S samples, T frames, Q quantizers, F spectral windows, B mel bands, C cepstral coefficients.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torchaudio
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_codec import DEPTHS, LabelledClip, MelMagnitude, new_codec, read_clips

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.statistics import wilson_interval
from llama_mimi.report.document import pyplot

WORD_PARTS = 5  # parts of a word; each part has its own mean, because the order of sounds matters
DYNAMIC_RANGE_DB = 70.0  # range of the spectrograms
WINDOW, HOP, BANDS, COEFFICIENTS = 1024, 240, 40, 20  # MFCC settings: 43 ms windows every 10 ms at 24 kHz
MEL_RANGE_DB = 50.0  # limit below the loudest band of a clip; fainter sound is recording noise
LOUD_RANGE_DB = 30.0  # limit below the loudest window; fainter windows are pauses
ENERGY_FRACTION = 0.99  # fraction of the mean magnitude spectrum; higher bands are not used


class SpeechClassifier:
    """Logistic regression on MFCCs that are averaged over each of ``num_parts`` equal parts of a recording.

    Standard deviations over time are not used, because they make the accuracy on reconstructions far lower and do not
    change the accuracy on recordings (scripts/benchmarks/LEDGER.md).
    """

    def __init__(
        self, clips: Sequence[LabelledClip], labels: Sequence[str], sample_rate_hz: int, *, num_parts: int = 1
    ) -> None:
        self.num_parts = num_parts
        # The upper bands of low-rate recordings are empty; their coefficients would describe noise of the codec.
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
        """Return the fraction of clips (S,) that are classified correctly."""
        return float(self.model.score(self._features(clips), labels))

    def _features(self, clips: Sequence[torch.Tensor]) -> np.ndarray:
        """Return features (N, parts * C): for each part of a clip, the mean coefficients of the loud windows."""
        rows = []
        for samples_S in clips:
            level_BF = 10 * self.mel(samples_S / samples_S.abs().max().clamp(min=1e-6)).clamp(min=1e-10).log10()
            level_BF = level_BF.clamp(min=level_BF.max() - MEL_RANGE_DB)
            loudness_F = level_BF.max(dim=0).values
            loud_BF = level_BF[:, loudness_F > loudness_F.max() - LOUD_RANGE_DB]
            parts = [part_BF for part_BF in loud_BF.tensor_split(self.num_parts, dim=1) if part_BF.shape[1]]
            parts += parts[-1:] * (self.num_parts - len(parts))
            rows.append(torch.cat([part_BF.mean(dim=1) @ self.dct_BC for part_BF in parts]).numpy())
        return np.stack(rows)


def decode_at(codec: MimiCodec, codes: Sequence[torch.Tensor], depth: int, clips: Sequence[LabelledClip]) -> list:
    """Decode clips from their first ``depth`` levels, and cut the decoded clips to the original lengths."""
    pairs = zip(codes, clips, strict=True)
    return [codec.decode(codes_TQ[:, :depth])[: len(clip.samples_S)] for codes_TQ, clip in pairs]


def draw_spectrograms(path: Path, clips: dict[str, torch.Tensor], sample_rate_hz: int, title: str) -> None:
    """Write a PNG with one spectrogram per clip (S,). All spectrograms share the time, frequency and level scales."""
    figure, axes = pyplot().subplots(len(clips), 1, figsize=(9, 1.7 * len(clips)), sharex=True, layout="constrained")
    images = []
    for axis, (name, samples_S) in zip(axes, clips.items(), strict=True):
        *_, image = axis.specgram(samples_S, NFFT=1024, noverlap=784, Fs=sample_rate_hz, cmap="magma")
        images.append(image)
        axis.set_ylabel("Hz")
        axis.set_title(name, fontsize=9, loc="left", pad=3)
    top_db = max(image.get_array().max() for image in images)
    for image in images:
        image.set_clim(top_db - DYNAMIC_RANGE_DB, top_db)
    axes[-1].set_xlabel("seconds")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def score_codec(
    codec: str,
    corpus: str,
    validation_corpus: str,
    words_corpus: str | None = None,
    words_validation_corpus: str | None = None,
    output_file: Path = Path("results/codec.json"),
    picture: Path | None = None,
) -> None:
    """Score a codec, write the scores, and print a table.

    Args:
        codec: hub id or folder of the codec
        corpus: training corpus with the columns audio, speaker and text
        validation_corpus: held-out clips
        words_corpus: training corpus of isolated words; default: --corpus
        words_validation_corpus: held-out isolated words; default: --validation_corpus
        picture: PNG file to write, with spectrograms of the first held-out clip
    """
    mimi = MimiCodec(codec, DEPTHS[-1])
    rate_hz, mel = mimi.sample_rate_hz, MelMagnitude(mimi.sample_rate_hz)
    train, held_out, train_words, words = (
        read_clips(name, rate_hz)
        for name in (corpus, validation_corpus, words_corpus or corpus, words_validation_corpus or validation_corpus)
    )
    by_speaker = SpeechClassifier(train, [clip.speaker for clip in train], rate_hz)
    by_word = SpeechClassifier(train_words, [clip.text for clip in train_words], rate_hz, num_parts=WORD_PARTS)

    def score(clips: list[torch.Tensor], word_clips: list[torch.Tensor]) -> dict[str, float]:
        both = [mel.distances(clip_S, original.samples_S) for clip_S, original in zip(clips, held_out, strict=True)]
        return {
            "log_mel_distance": mean(float(log_distance) for log_distance, _ in both),
            "spectral_convergence": mean(float(convergence) for _, convergence in both),
            "speaker": by_speaker.accuracy(clips, [clip.speaker for clip in held_out]),
            "word": by_word.accuracy(word_clips, [clip.text for clip in words]),
        }

    rows = {"original": score([clip.samples_S for clip in held_out], [clip.samples_S for clip in words])}
    pictures = {"original": held_out[0].samples_S}
    codes, word_codes = (mimi.encode_many([clip.samples_S for clip in clips]) for clips in (held_out, words))
    for depth in DEPTHS:
        name = f"{depth} level{'s' * (depth > 1)}"
        decoded = decode_at(mimi, codes, depth, held_out)
        rows[name] = score(decoded, decode_at(mimi, word_codes, depth, words))
        pictures[name] = decoded[0]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        new_codec(mimi.model.config).save_pretrained(folder)
        untrained = MimiCodec(folder, mimi.num_quantizers)
        random = []
        for clips in (held_out, words):
            random_codes = untrained.encode_many([clip.samples_S for clip in clips])
            random.append(decode_at(untrained, random_codes, DEPTHS[-1], clips))
        rows["untrained, 8 levels"] = score(*random)
    if picture:
        draw_spectrograms(picture, pictures, rate_hz, title=held_out[0].text)
    perplexities = [math.exp(entropy(torch.bincount(codes_N).numpy())) for codes_N in torch.cat(codes).T]
    numbers = {"train_clips": train, "held_out_clips": held_out, "train_words": train_words, "held_out_words": words}
    counts = {name: len(clips) for name, clips in numbers.items()}
    report = {"codec": codec, "rows": rows, "perplexity": perplexities, "counts": counts, "versions": versions()}
    write_atomically(str(output_file.parent), output_file.name, (json.dumps(report, indent=1) + "\n").encode())
    print("| | log-mel distance | spectral convergence | speaker | word |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['log_mel_distance']:.3f}", f"{row['spectral_convergence']:.3f}"]
        for kind, count in (("speaker", len(held_out)), ("word", len(words))):
            low, high = wilson_interval(row[kind], count)
            cells.append(f"{100 * row[kind]:.1f} % ({100 * low:.0f} to {100 * high:.0f})")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nPerplexity by level ({mimi.codebook_size} codes): {', '.join(f'{value:.0f}' for value in perplexities)}.")
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + ".")


if __name__ == "__main__":
    run_command(score_codec, __doc__)
