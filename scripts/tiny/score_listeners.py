"""Measure the errors of an ASR model and a speaker encoder on held-out speech and on its codec reconstructions.

    uv run python scripts/tiny/score_listeners.py --corpus "assets/tiny/corpus/validation-*.parquet" \\
        --recogniser assets/tiny/recogniser --speaker_encoder assets/tiny/speaker_encoder --codec assets/tiny/mimi

The word error rate covers all words of the clips. The equal error rate measures speaker verification: for all pairs of
clips, the speaker encoder compares the first part of one clip with the second part of the other clip.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve
from tiny_codec import DEPTHS, LabelledClip, read_clips
from torchaudio.functional import edit_distance
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import Waveform, write_wav
from llama_mimi.common.command_line import run_command
from llama_mimi.common.files import write_atomically
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.statistics import crossed_interval
from llama_mimi.judging import metrics
from llama_mimi.judging.systems import Clip

CPU = torch.device("cpu")


def equal_error_rate(same_N: np.ndarray, different_N: np.ndarray) -> float:
    """Return the error rate at the threshold where the rates of false rejections and false acceptances are equal."""
    is_same = np.repeat([True, False], [len(same_N), len(different_N)])
    accepted, found, _ = roc_curve(is_same, np.concatenate([same_N, different_N]), drop_intermediate=False)
    nearest = np.abs(1 - found - accepted).argmin()
    return float((1 - found[nearest] + accepted[nearest]) / 2)


def score_listeners(
    corpus: str,
    recogniser: str,
    speaker_encoder: str,
    codec: str,
    prompt_seconds: float = 1.6,
    output_file: Path = Path("results/listeners.json"),
) -> None:
    """Score the ASR model and the speaker encoder, write the scores, and print a table.

    Args:
        corpus: held-out clips with the columns audio, speaker and text
        recogniser: hub id or folder of the ASR model
        speaker_encoder: hub id or folder of the speaker encoder
        codec: hub id or folder of the codec
        prompt_seconds: length of the first part of a clip in speaker verification, in seconds
    """
    mimi = MimiCodec(codec, DEPTHS[-1])
    clips = read_clips(corpus, mimi.sample_rate_hz)
    codes = mimi.encode_many([clip.samples_S for clip in clips])
    asr, embed = metrics.transcripts(recogniser, None, CPU, 8), metrics.speaker_encoder(speaker_encoder, CPU)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts_ND = None
        for depth in tqdm((0, *DEPTHS), unit="row"):
            name = f"{depth} level{'s' * (depth > 1)}" if depth else "original"
            files = [Path(folder) / f"{name}-{number}.wav" for number in range(len(clips))]
            for file, clip, codes_TQ in zip(files, clips, codes, strict=True):
                decoded_S = mimi.decode(codes_TQ[:, :depth])[: len(clip.samples_S)] if depth else clip.samples_S
                write_wav(file, Waveform(decoded_S, mimi.sample_rate_hz))
            texts = [value["text"] for value in asr.compute([(Clip(file),) for file in files])]
            if prompts_ND is None:  # the first parts are always recordings
                prompts_ND = torch.stack([embed(Clip(file, 0, prompt_seconds)) for file in files])
            rests_ND = torch.stack([embed(Clip(file, prompt_seconds)) for file in files])
            error_rate = verification_error_rate(clips, prompts_ND, rests_ND)
            rows[name] = word_errors(clips, texts) | {"equal_error_rate": error_rate}
    report = {"rows": rows, "clips": len(clips), "prompt_seconds": prompt_seconds, "versions": versions()}
    write_atomically(str(output_file.parent), output_file.name, (json.dumps(report, indent=1) + "\n").encode())
    print("| input | word error rate (%) | equal error rate (%) |\n|---|---|---|")
    for name, row in rows.items():
        low, high = row["interval"]
        wrong = f"{100 * row['word_error_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        print(f"| {name} | {wrong} | {100 * row['equal_error_rate']:.1f} |")


def word_errors(clips: Sequence[LabelledClip], texts: Sequence[str]) -> dict:
    """Return the word error rate of all clips together, and a 95 % interval over clips (Student's t).

    The rate is a ratio of two means, errors and words of a clip. So the interval uses the residuals of the ratio
    estimator (Cochran 1977, Sampling Techniques, chapter 6).
    """
    spoken = [metrics.words_of(clip.text) for clip in clips]
    pairs = zip(spoken, map(metrics.words_of, texts), strict=True)
    errors_N, words_N = np.array([(edit_distance(words, found), len(words)) for words, found in pairs]).T
    rate = float(errors_N.sum() / words_N.sum())
    residuals_N = (errors_N - rate * words_N) / words_N.mean()
    return {"word_error_rate": rate, "interval": crossed_interval([rate + residuals_N])[1:3]}


def verification_error_rate(clips: Sequence[LabelledClip], prompts_ND: torch.Tensor, rests_ND: torch.Tensor) -> float:
    """Compare the first part of each clip with the second part of every other clip; return the equal error rate."""
    cosines_NN = torch.nn.functional.cosine_similarity(prompts_ND[:, None], rests_ND[None], dim=2).numpy()
    speakers_N = np.array([clip.speaker for clip in clips])
    is_same_NN = speakers_N[:, None] == speakers_N[None]
    is_other_clip_NN = ~np.eye(len(clips), dtype=bool)
    return equal_error_rate(cosines_NN[is_same_NN & is_other_clip_NN], cosines_NN[~is_same_NN])


if __name__ == "__main__":
    run_command(score_listeners, __doc__)
