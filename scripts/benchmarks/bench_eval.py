"""Measure the speed of benchmark scoring: one clip at a time, in batches, and with cached codes.

    uv run python scripts/benchmarks/bench_eval.py --model_name models/tiny

"One clip at a time" is the method of the first release of Llama-Mimi. It uses only `transformers`: it reads and encodes
a clip, writes the codes as text, calls the tokenizer, computes all logits, and averages the loss over the labels. Each
measurement runs in a new process. The process loads the model before the clock starts. The methods alternate. Batches
use the preset "official", because the preset "original" encodes one clip at a time.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_generation import Q, Shape, random_model
from measuring import DEVICE, device_name, machine, measure, median_and_range
from simulated import text_from_codes
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.common.choices import DEFAULT_CODEC, DecoderPrecision
from llama_mimi.common.command_line import run_command
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.hub import load_pretrained
from llama_mimi.common.resume import ProgressLog
from llama_mimi.evaluation.benchmarks import Benchmark
from llama_mimi.evaluation.codes import encode_clips
from llama_mimi.evaluation.options import MAX_AUDIO_SECONDS, Scoring
from llama_mimi.evaluation.scoring import score_clips
from llama_mimi.evaluation.script import BATCH_TOKENS, BENCHMARK_SCRIPTS
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.speech_model import DECODER_DTYPES
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

FOLDERS = {"salmon": "salmon", "sLM21": "sLM21", "sStoryCloze": "storycloze"}  # in assets/tiny/benchmarks
METHODS = ALONE, BATCHED, CACHED = "one clip at a time", "in batches", "in batches, codes cached"


@dataclass(frozen=True)
class Options:
    """Model and benchmark pairs to measure."""

    model_name: str = "models/tiny"  # hub id or folder of the model
    data_dir: Path = Path("assets/tiny/benchmarks")
    dtype: DecoderPrecision = "float32"  # precision of the decoder
    pairs: int = 60  # number of pairs per benchmark


def bench_eval(options: Options, repeats: int = 3) -> None:
    """Measure all benchmarks."""
    print(machine())
    print(f"| pairs per second | {' | '.join(METHODS)} | times as fast |\n|---|---|---|---|---|")
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in FOLDERS:
            medians[benchmark] = measure_benchmark(options, benchmark, Path(folder), repeats)
    medians["together"] = {name: statistics.harmonic_mean([own[name] for own in medians.values()]) for name in METHODS}
    print(f"| together | {' | '.join(f'{rate:.1f}' for rate in medians['together'].values())} | |\n")
    ratios = {name: [own[BATCHED] / own[ALONE], own[CACHED] / own[ALONE]] for name, own in medians.items()}
    report = {"device": device_name(), "model": options.model_name, "pairs": options.pairs, "ratios": ratios}
    print(json.dumps(report))


def measure_benchmark(options: Options, benchmark: str, folder: Path, repeats: int) -> dict[str, float]:
    """Measure a benchmark and print its table row; return the median speed of each method, in pairs per second."""
    rates: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats):
        for method in METHODS:  # the last method reuses the codes of the second method
            cache = folder / f"{benchmark}_{repeat}"
            result = measure(score, benchmark=benchmark, method=method, folder=cache, **vars(options))
            rates[method].append(result["pairs"] / result["seconds"])
    medians = {method: statistics.median(values) for method, values in rates.items()}
    cells = [median_and_range(values, 1) for values in rates.values()]
    ratios = [f"{medians[method] / medians[ALONE]:.1f}" for method in (BATCHED, CACHED)]
    print(f"| {benchmark} | {' | '.join(cells)} | {' and '.join(ratios)} |", flush=True)
    return medians


def score(
    benchmark: str, method: str, folder: str, model_name: str, data_dir: str, dtype: DecoderPrecision, pairs: int
) -> dict[str, Any]:
    """Score some pairs of a benchmark; return the number of pairs and the time in seconds."""
    script = BENCHMARK_SCRIPTS[benchmark]
    all_pairs = script.read(f"{data_dir}/{FOLDERS[benchmark]}").pairs
    some_pairs = all_pairs[:: max(1, len(all_pairs) // pairs)][:pairs]
    clips = Benchmark(some_pairs).clips
    decoder = load_pretrained(AutoModelForCausalLM, model_name, what="model", dtype=DECODER_DTYPES[dtype])
    decoder = decoder.to(DEVICE).eval()
    codec_name, Q = getattr(decoder.config, "codec", None) or DEFAULT_CODEC, decoder.config.num_quantizers
    tokenizer = load_speech_tokenizer(model_name, codec_name, Q)
    scoring = Scoring(script.levels, as_released=method == ALONE)
    codec = MimiCodec(codec_name, Q, DEVICE, sliding_window=not scoring.as_released)
    start = time.perf_counter()
    if method == ALONE:
        text_tokenizer, contents = tokenizer.text_tokenizer, [clip.source.read_bytes() for clip in clips]
        for content in contents:
            score_alone(content, decoder, text_tokenizer, codec.model, script.levels)
    else:
        context = DistributedContext()
        ids, codes = encode_clips(codec, clips, folder, context, MAX_AUDIO_SECONDS, as_released=False)
        model = FlattenedModel(decoder, tokenizer, codec)
        with tempfile.TemporaryDirectory() as log:
            batch_tokens = BATCH_TOKENS[DEVICE == "cuda"]
            names = [(audio_id, None) for audio_id in ids]
            score_clips(model, codes, names, scoring, batch_tokens, ProgressLog(Path(log), {}), context)
    return {"pairs": len(some_pairs), "seconds": time.perf_counter() - start}


@torch.no_grad()
def score_alone(
    content: bytes, decoder: LlamaForCausalLM, tokenizer: Any, codec: MimiModel, levels: tuple[int, ...] | None
) -> float:
    """Score a clip with the method of the first release of Llama-Mimi; a higher score means a higher likelihood."""
    Q = decoder.config.num_quantizers
    samples_S = read_audio(content, codec.config.sampling_rate, max_seconds=MAX_AUDIO_SECONDS).samples_S
    codes_QT = codec.encode(samples_S[None, None].to(decoder.device), num_quantizers=Q).audio_codes[0]
    ids_1L = tokenizer(text_from_codes(codes_QT.T.cpu()), return_tensors="pt").input_ids
    labels_1L = ids_1L.clone()
    if levels is not None:
        labels_1L[:, [position for position in range(ids_1L.shape[1]) if (position - 2) % Q or position < 2]] = -100
    return -decoder(input_ids=ids_1L.to(decoder.device), labels=labels_1L.to(decoder.device)).loss.item()


def write_random_model(folder: Path, shape: Shape) -> str:
    """Write a model and a codec with random weights; return the model's folder."""
    model = random_model(shape, "bfloat16")
    model.codec.model.save_pretrained(folder / "mimi")
    model.decoder.config.update({"num_quantizers": Q, "codec": str(folder / "mimi")})
    for part in (model.decoder, model.tokenizer.text_tokenizer):
        part.save_pretrained(folder / "model")
    return str(folder / "model")


if __name__ == "__main__":
    run_command(bench_eval, __doc__)
