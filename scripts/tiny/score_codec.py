"""Measure how much of held-out speech a codec keeps at 1, 2, 4 and 8 levels.

uv run python scripts/tiny/score_codec.py --codec assets/tiny/mimi --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --words_corpus "assets/tiny/words/train-*.parquet" \\
    --words_validation_corpus "assets/tiny/words/validation-*.parquet"

Classifiers are trained on original recordings of the first corpora and classify reconstructions of the second ones.

Shapes: S samples, T frames, Q quantizers, K codebook size.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from speech_classifier import LabelledClip, SpeechClassifier, read_clips
from tiny_codec import DEPTHS, MelMagnitude, new_codec

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.statistics import wilson_interval
from llama_mimi.report.document import pyplot

WORD_PARTS = 5  # parts of a word with means of their own, because the order of sounds makes the word
DYNAMIC_RANGE_DB = 70.0  # of the spectrograms


def decode_at(codec: MimiCodec, codes: Sequence[torch.Tensor], depth: int, clips: Sequence[LabelledClip]) -> list:
    """Return clips as decoded from the first levels, cut to their own lengths."""
    pairs = zip(codes, clips, strict=True)
    return [codec.decode(codes_TQ[:, :depth])[: len(clip.samples_S)] for codes_TQ, clip in pairs]


def encode_each(codec: MimiCodec, clips: Sequence[LabelledClip]) -> list[torch.Tensor]:
    return [codec.encode([clip.samples_S])[0] for clip in clips]


def perplexities(codes_TQ: torch.Tensor, codebook_size: int) -> list[float]:
    """Return the perplexity of the codes of each level: the number of codes that an even use would have."""
    counts_QK = torch.stack([torch.bincount(codes_T, minlength=codebook_size) for codes_T in codes_TQ.T])
    return torch.exp(torch.special.entr((counts_QK / len(codes_TQ)).double()).sum(dim=1)).tolist()


def draw_spectrograms(path: Path, clips: dict[str, torch.Tensor], sample_rate_hz: int, title: str) -> None:
    """Write a PNG with one spectrogram per clip (S,), on one scale of time, frequency and level."""
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
    """Score a codec, write the figures, and print their table.

    Args:
        codec: hub id or folder
        corpus: Parquet path or glob with columns audio, speaker, text
        validation_corpus: held-out clips
        words_corpus: isolated words; default: --corpus
        words_validation_corpus: held-out isolated words; default: --validation_corpus
        picture: PNG of the first held-out clip's spectrograms
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
    codes, word_codes = encode_each(mimi, held_out), encode_each(mimi, words)
    for depth in DEPTHS:
        name = f"{depth} level{'s' * (depth > 1)}"
        decoded = decode_at(mimi, codes, depth, held_out)
        rows[name] = score(decoded, decode_at(mimi, word_codes, depth, words))
        pictures[name] = decoded[0]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        new_codec(mimi.model.config).save_pretrained(folder)
        untrained = MimiCodec(folder, mimi.num_quantizers)
        random = [decode_at(untrained, encode_each(untrained, clips), DEPTHS[-1], clips) for clips in (held_out, words)]
        rows["untrained, 8 levels"] = score(*random)
    if picture:
        draw_spectrograms(picture, pictures, rate_hz, title=held_out[0].text)
    used = perplexities(torch.cat(codes), mimi.codebook_size)
    numbers = {"train_clips": train, "held_out_clips": held_out, "train_words": train_words, "held_out_words": words}
    counts = {name: len(clips) for name, clips in numbers.items()}
    report = {"codec": codec, "rows": rows, "perplexity": used, "counts": counts, "versions": versions()}
    write_atomically(str(output_file.parent), output_file.name, (json.dumps(report, indent=1) + "\n").encode())
    print("| | log-mel distance | spectral convergence | speaker | word |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row['log_mel_distance']:.3f}", f"{row['spectral_convergence']:.3f}"]
        for kind, count in (("speaker", len(held_out)), ("word", len(words))):
            low, high = wilson_interval(row[kind], count)
            cells.append(f"{100 * row[kind]:.1f} % ({100 * low:.0f} to {100 * high:.0f})")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nPerplexity per level, of {mimi.codebook_size}: {', '.join(f'{value:.0f}' for value in used)}.")
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + ".")


if __name__ == "__main__":
    run_command(score_codec, __doc__)
