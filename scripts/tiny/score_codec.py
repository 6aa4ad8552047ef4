"""How much of held-out speech a codec keeps at 1, 2, 4 and 8 levels, as one table.

uv run python scripts/tiny/score_codec.py --codec assets/tiny/mimi --corpus "assets/tiny/corpus/train-*.parquet" \\
    --validation_corpus "assets/tiny/corpus/validation-*.parquet" --words_corpus "assets/tiny/words/train-*.parquet" \\
    --words_validation_corpus "assets/tiny/words/validation-*.parquet"

Classifiers are fitted to original recordings of the first corpora and name what they hear in reconstructions of the
second ones. Without --words_corpus, words are cut out of the corpus itself where digital silence separates them.

Shapes: S samples, T frames, Q quantizers, K codebook size.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from spectrograms import draw_spectrograms
from speech_classifier import LabelledClip, SpeechClassifier, isolated_words, read_clips
from tiny_codec import DEPTHS, MelMagnitude, new_codec

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.statistics import wilson_interval

WORD_PARTS = 5  # a word is judged by the means of as many equal parts, because order makes the word


def reconstructions(
    codec: MimiCodec, clips: Sequence[LabelledClip], depths: Sequence[int]
) -> tuple[dict[int, list[torch.Tensor]], torch.Tensor]:
    """Every clip as decoded from each depth, cut to its own length, and codes_TQ of all clips together."""
    codes = [codes_TQ for clip in clips for codes_TQ in codec.encode([clip.samples_S])]
    decoded = {
        depth: [
            codec.decode(codes_TQ[:, :depth])[: len(clip.samples_S)]
            for clip, codes_TQ in zip(clips, codes, strict=True)
        ]
        for depth in depths
    }
    return decoded, torch.cat(codes)


def perplexities(codes_TQ: torch.Tensor, codebook_size: int) -> list[float]:
    """How many codes an even use would have, for each level."""
    shares_QK = torch.stack([torch.bincount(codes_T, minlength=codebook_size) for codes_T in codes_TQ.T]) / len(
        codes_TQ
    )
    return torch.exp(torch.special.entr(shares_QK.double()).sum(dim=1)).tolist()


def share_named(classifier: SpeechClassifier, clips: Sequence[torch.Tensor], labels: Sequence[str]) -> float:
    """Share of clips that the classifier gives their own label."""
    return sum(name == label for name, label in zip(classifier.names(clips), labels, strict=True)) / len(labels)


def score(codec: MimiCodec, corpora: Sequence[str], words_corpora: Sequence[str], picture: Path | None) -> dict:
    """Every figure of the table. Corpora are one to fit to and a held-out one; those of words may be missing."""
    rate = codec.sample_rate_hz
    train, held_out = (read_clips(corpus, rate) for corpus in corpora)
    with_words = [read_clips(corpus, rate) for corpus in words_corpora] or [train, held_out]
    (words, uncut), (spoken, uncut_held_out) = (isolated_words(clips, rate) for clips in with_words)
    if not words or not spoken:
        raise UserError(
            f"{len(words)} isolated words to fit to and {len(spoken)} held out were found ({uncut + uncut_held_out} "
            f"clips could not be cut); name corpora of words with --words_corpus and --words_validation_corpus"
        )
    by_speaker = SpeechClassifier(train, [clip.speaker for clip in train], rate)
    by_word = SpeechClassifier(words, [clip.text for clip in words], rate, num_parts=WORD_PARTS)
    mel = MelMagnitude(rate)
    speakers, texts = [clip.speaker for clip in held_out], [clip.text for clip in spoken]

    def row(clips: list[torch.Tensor], word_clips: list[torch.Tensor]) -> dict[str, float]:
        both = [mel.distances(clip_S, original.samples_S) for clip_S, original in zip(clips, held_out, strict=True)]
        return {
            "log_mel_distance": mean(float(log_distance) for log_distance, _ in both),
            "spectral_convergence": mean(float(convergence) for _, convergence in both),
            "speaker": share_named(by_speaker, clips, speakers),
            "word": share_named(by_word, word_clips, texts),
        }

    rows = {"original": row([clip.samples_S for clip in held_out], [clip.samples_S for clip in spoken])}
    decoded, codes_TQ = reconstructions(codec, held_out, DEPTHS)
    decoded_words, _ = reconstructions(codec, spoken, DEPTHS)
    for depth in DEPTHS:
        rows[f"{depth} level{'s' * (depth > 1)}"] = row(decoded[depth], decoded_words[depth])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        new_codec(codec.model.config).save_pretrained(folder)
        untrained = MimiCodec(folder, codec.num_quantizers)
        untrained_clips, untrained_words = (
            reconstructions(untrained, clips, DEPTHS[-1:])[0][DEPTHS[-1]] for clips in (held_out, spoken)
        )
    rows["untrained, 8 levels"] = row(untrained_clips, untrained_words)
    if picture:
        clip = held_out[0]
        shown = {"original": clip.samples_S} | {f"{d} level{'s' * (d > 1)}": decoded[d][0] for d in reversed(DEPTHS)}
        draw_spectrograms(picture, shown, rate, title=clip.text)
    return {
        "codec": codec.name,
        "rows": rows,
        "perplexity": perplexities(codes_TQ, codec.codebook_size),
        "codebook_size": codec.codebook_size,
        "counts": {
            "train_clips": len(train),
            "held_out_clips": len(held_out),
            "speakers": len(set(speakers)),
            "train_words": len(words),
            "held_out_words": len(spoken),
            "words": len(set(texts)),
            "clips_not_cut_into_words": uncut + uncut_held_out,
        },
        "versions": versions(),
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    counts = report["counts"]
    lines = ["| | log-mel distance | spectral convergence | speaker | word |", "|---|---|---|---|---|"]
    for name, row in report["rows"].items():
        cells = [f"{row['log_mel_distance']:.3f}", f"{row['spectral_convergence']:.3f}"]
        for kind, count in (("speaker", counts["held_out_clips"]), ("word", counts["held_out_words"])):
            low, high = wilson_interval(row[kind], count)
            cells.append(f"{100 * row[kind]:.1f} % ({100 * low:.0f} to {100 * high:.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    used = ", ".join(f"{value:.0f}" for value in report["perplexity"])
    lines += ["", f"Perplexity per level, of {report['codebook_size']}: {used}."]
    lines.append(", ".join(f"{name} {value}" for name, value in counts.items()) + ".")
    return "\n".join(lines)


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
        validation_corpus: the same, of held-out clips
        words_corpus: the same, of isolated words; by default cut out of --corpus
        words_validation_corpus: the same, of held-out words
        picture: PNG of the first held-out clip's spectrograms
    """
    words_corpora = [words for words in (words_corpus, words_validation_corpus) if words is not None]
    if len(words_corpora) == 1:
        raise UserError("--words_corpus and --words_validation_corpus go together; give both or neither")
    report = score(MimiCodec(codec, DEPTHS[-1]), [corpus, validation_corpus], words_corpora, picture)
    write_atomically(str(output_file.parent), output_file.name, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))


if __name__ == "__main__":
    run_command(score_codec, __doc__)
