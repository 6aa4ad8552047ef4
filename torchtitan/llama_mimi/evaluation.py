"""What the three benchmark scripts share: flags, scoring of pairs, intervals, and the result file."""

import argparse
import hashlib
import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_mimi.audio import read_audio
from llama_mimi.benchmarks import BenchmarkClip, Pair
from llama_mimi.codec import DTYPES
from llama_mimi.likelihood import ScoredTokens, mean_log_likelihoods
from llama_mimi.speech_model import SpeechModel, load_speech_model

Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


def run_benchmark(
    name: str, doc: str | None, hub_source: str, read_pairs: Callable[[str], list[Pair]], scored: ScoredTokens
) -> None:
    """A benchmark script: parse, score, report.

    Args:
        name: of the benchmark, and of its folder of results.
        doc: the script's docstring.
        hub_source: read when no ``--data_dir`` is given.
        read_pairs: a reader of `llama_mimi.benchmarks`.
        scored: the tokens that enter a score.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="llm-jp/Llama-Mimi-1.3B", help="hub id or folder")
    parser.add_argument("--data_dir", default=hub_source, help="official folder layout, or a hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    parser.add_argument("--codec", help="hub id or folder; by default what the model names")
    parser.add_argument("--device", help="by default the accelerator where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the decoder")
    parser.add_argument("--batch_size", type=int, default=8, help="clips a batch")
    parser.add_argument("--max_audio_seconds", type=float, default=20.0, help="longer clips are cut, and counted")
    flags = parser.parse_args()

    pairs = read_pairs(flags.data_dir)
    model = load_speech_model(flags.model_name, codec_name=flags.codec, device=flags.device, dtype=flags.dtype)
    clips = [clip for pair in pairs for clip in (pair.positive, pair.negative)]
    codes_hash = hashlib.sha256()
    results: list[dict[str, Any]] = []
    for clip, score, is_cut in score_clips(
        model, clips, scored, flags.batch_size, flags.max_audio_seconds, codes_hash, description=name
    ):
        results.append({"clip": clip.name, "score": score, "is_cut": is_cut})
    scored_pairs = [
        _scored_pair(pair, positive, negative)
        for pair, positive, negative in zip(pairs, results[::2], results[1::2], strict=True)
    ]
    report = {
        "benchmark": name,
        "model": flags.model_name,
        "data": flags.data_dir,
        "scoring": {"tokens": scored, "statistic": "mean log-likelihood per token", "tie": 0.5, "count": "rows"},
        "parts": part_results(scored_pairs),
        "codec": model.codec.name,
        "codes_sha256": codes_hash.hexdigest(),
        "settings": {key: getattr(flags, key) for key in ("dtype", "batch_size", "max_audio_seconds")}
        | {"device": str(model.device)},
        "versions": versions(),
        "pairs": scored_pairs,
    }
    path = flags.output_dir / name / Path(flags.model_name).name / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for part, result in report["parts"].items():
        low, high = result["interval"]
        cut = f", {result['pairs_cut']} pairs cut at {flags.max_audio_seconds:g} s" if result["pairs_cut"] else ""
        print(
            f"{part}: {100 * result['accuracy']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}, "
            f"{result['count']} pairs, {result['ties']} ties{cut})"
        )
    print(f"written to {path}")


def score_clips(
    model: SpeechModel,
    clips: Sequence[BenchmarkClip],
    scored: ScoredTokens,
    batch_size: int,
    max_seconds: float,
    codes_hash: Any,
    description: str = "",
) -> Iterator[tuple[BenchmarkClip, float, bool]]:
    """Score clips in order; yields each with its score and whether it was cut.

    Args:
        codes_hash: a `hashlib` object that takes in all codes: results compare only where it is the same.

    Raises:
        AudioError: a clip cannot be used. No pair is ever left out.
    """
    with tqdm(total=len(clips), unit="clip", desc=description) as progress:
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            codec = model.codec
            waveforms = [
                read_audio(
                    clip.source,
                    codec.sample_rate_hz,
                    max_seconds=max_seconds,
                    name=clip.name if isinstance(clip.source, bytes) else str(clip.source),
                    min_samples=codec.frame_size,
                )
                for clip in batch
            ]
            codes = codec.encode([waveform.samples_S for waveform in waveforms])
            for codes_TQ in codes:
                codes_hash.update(codes_TQ.to(torch.int32).numpy().tobytes())
            cut = [waveform.is_cut for waveform in waveforms]
            scores = mean_log_likelihoods(model, list(zip(codes, cut, strict=True)), scored)
            yield from zip(batch, scores, cut, strict=True)
            progress.update(len(batch))


def part_results(scored_pairs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy, 95 % interval and counts of each part; a tie counts half."""
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in scored_pairs:
        parts[pair["part"]].append(pair)
    results = {}
    for part, members in sorted(parts.items()):
        accuracy = sum(pair["correct"] for pair in members) / len(members)
        results[part] = {
            "accuracy": accuracy,
            "interval": wilson_interval(accuracy, len(members)),
            "count": len(members),
            "ties": sum(pair["correct"] == 0.5 for pair in members),
            "pairs_cut": sum(pair["is_cut"] for pair in members),
        }
    return results


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, score interval without continuity correction)."""
    center = accuracy + Z_95**2 / (2 * count)
    half = Z_95 * math.sqrt(accuracy * (1 - accuracy) / count + Z_95**2 / (4 * count**2))
    scale = 1 + Z_95**2 / count
    return (center - half) / scale, (center + half) / scale


def versions() -> dict[str, str]:
    """Versions a score depends on, and this repository's commit where it is one."""
    packages = ("llama-mimi", "torch", "torchaudio", "transformers", "soundfile")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {package: version(package) for package in packages} | {"commit": git.stdout.strip() or "unknown"}


def _scored_pair(pair: Pair, positive: dict[str, Any], negative: dict[str, Any]) -> dict[str, Any]:
    difference = positive["score"] - negative["score"]
    return {
        "part": pair.part,
        "name": pair.name,
        "positive": positive["clip"],
        "negative": negative["clip"],
        "positive_score": positive["score"],
        "negative_score": negative["score"],
        "correct": 0.5 if difference == 0 else float(difference > 0),
        "is_cut": positive["is_cut"] or negative["is_cut"],
    }
