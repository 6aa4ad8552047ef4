"""How well a recogniser and a speaker encoder hear held-out speech, and what a codec leaves of it, as one table.

    uv run python scripts/tiny/score_listeners.py --corpus "assets/tiny/corpus/validation-*.parquet" \\
        --recogniser assets/tiny/recogniser --speaker_encoder assets/tiny/speaker_encoder --codec assets/tiny/mimi

The word error rate is of whole clips. The equal error rate is of the question that eval/generation.py asks: whether the
first part of one recording and the rest of another are by one speaker, for every two clips.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from speech_classifier import LabelledClip, read_clips
from tiny_codec import DEPTHS
from torchaudio.functional import edit_distance
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import Waveform, write_wav
from llama_mimi.common.command_line import run_command
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.statistics import bootstrap_interval
from llama_mimi.judging import metrics
from llama_mimi.judging.systems import Clip

CPU = torch.device("cpu")


def equal_error_rate(same_N: np.ndarray, different_N: np.ndarray) -> float:
    """The rate at which as many pairs of one speaker are refused as pairs of two are accepted."""
    thresholds = np.sort(np.concatenate([same_N, different_N]))
    refused = np.searchsorted(np.sort(same_N), thresholds) / len(same_N)
    accepted = 1 - np.searchsorted(np.sort(different_N), thresholds) / len(different_N)
    nearest = np.abs(refused - accepted).argmin()
    return float((refused[nearest] + accepted[nearest]) / 2)


def score_listeners(
    corpus: str,
    recogniser: str,
    speaker_encoder: str,
    codec: str,
    prompt_seconds: float = 1.6,
    output_file: Path = Path("results/listeners.json"),
) -> None:
    """Score both, write the figures, and print their table.

    Args:
        corpus: Parquet path or glob with columns audio, speaker, text, of held-out clips
        recogniser: hub id or folder
        speaker_encoder: hub id or folder
        codec: hub id or folder of the codec
        prompt_seconds: where clips are parted for the speaker encoder
    """
    mimi = MimiCodec(codec, DEPTHS[-1])
    clips = read_clips(corpus, mimi.sample_rate_hz)
    codes = mimi.encode_many([clip.samples_S for clip in clips])
    versions_of = {"original": [clip.samples_S for clip in clips]}
    for depth in DEPTHS:
        name = f"{depth} level{'s' * (depth > 1)}"
        versions_of[name] = [
            mimi.decode(codes_TQ[:, :depth])[: len(clip.samples_S)] for codes_TQ, clip in zip(codes, clips, strict=True)
        ]
    asr, embed = metrics.transcripts(recogniser, None, CPU, 8), metrics.speaker_encoder(speaker_encoder, CPU)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts_ND = None
        for name, waveforms in tqdm(versions_of.items(), unit="row"):
            files = write_clips(Path(folder) / name, waveforms, mimi.sample_rate_hz)
            texts = [value["text"] for value in asr.compute([(Clip(file),) for file in files])]
            if prompts_ND is None:  # prompts are recordings, whatever comes after them
                prompts_ND = torch.stack([embed(Clip(file, 0, prompt_seconds)) for file in files])
            rests_ND = torch.stack([embed(Clip(file, prompt_seconds)) for file in files])
            rows[name] = {
                **word_errors(clips, texts),
                "equal_error_rate": verification_errors(clips, prompts_ND, rests_ND),
            }
    report = {"rows": rows, "clips": len(clips), "prompt_seconds": prompt_seconds, "versions": versions()}
    write_atomically(str(output_file.parent), output_file.name, (json.dumps(report, indent=1) + "\n").encode())
    print("| | words wrong (%) | speakers mistaken (%) |\n|---|---|---|")
    for name, row in rows.items():
        low, high = row["interval"]
        wrong = f"{100 * row['word_error_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        print(f"| {name} | {wrong} | {100 * row['equal_error_rate']:.1f} |")


def write_clips(folder: Path, waveforms: Sequence[torch.Tensor], rate_hz: int) -> list[Path]:
    files = [folder / f"{number}.wav" for number in range(len(waveforms))]
    for file, samples_S in zip(files, waveforms, strict=True):
        write_wav(file, Waveform(samples_S, rate_hz))
    return files


def word_errors(clips: Sequence[LabelledClip], texts: Sequence[str]) -> dict:
    """Wrong words of all words, with an interval over clips of the mean rate."""
    spoken = [metrics.words_of(clip.text) for clip in clips]
    wrong = [edit_distance(words, metrics.words_of(text)) for words, text in zip(spoken, texts, strict=True)]
    rates = [errors / len(words) for errors, words in zip(wrong, spoken, strict=True)]
    return {"word_error_rate": sum(wrong) / sum(map(len, spoken)), "interval": bootstrap_interval(rates)}


def verification_errors(clips: Sequence[LabelledClip], prompts_ND: torch.Tensor, rests_ND: torch.Tensor) -> float:
    """Equal error rate of all prompts against what follows in all other clips."""
    normalized = [torch.nn.functional.normalize(vectors_ND, dim=1) for vectors_ND in (prompts_ND, rests_ND)]
    cosines_NN = (normalized[0] @ normalized[1].T).numpy()
    speakers_N = np.array([clip.speaker for clip in clips])
    is_same_NN = speakers_N[:, None] == speakers_N[None]
    is_other_clip_NN = ~np.eye(len(clips), dtype=bool)
    return equal_error_rate(cosines_NN[is_same_NN & is_other_clip_NN], cosines_NN[~is_same_NN])


if __name__ == "__main__":
    run_command(score_listeners, __doc__)
