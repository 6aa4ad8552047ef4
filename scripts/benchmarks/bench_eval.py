"""How fast benchmarks are scored: one clip at a time, in batches, and with codes that are there already.

    uv run python scripts/benchmarks/bench_eval.py --model_name models/tiny
    uv run python scripts/benchmarks/bench_eval.py --random_1b --dtype bfloat16 --pairs 100  # GPU, without a network

One clip at a time is what the first release does: read, encode, write the codes as text, call the tokenizer, make all
logits, take the mean over the labels. It is written here only, with `transformers` as it comes. Every measurement is a
process of its own, which loads the model before the clock starts; the ways take turns. Batches are of preset
"official": "original" encodes clip by clip, to have the codes of the release. Scores of one clip at a time must be
those of preset "original" to 1e-4.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from gpu_check import write_stand_ins
from measuring import DEVICE, device_name, machine, measured, median_and_range
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MimiModel

from llama_mimi.audio.mimi import DEFAULT_CODEC, MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.command_line import run_command
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.common.resume import ProgressLog
from llama_mimi.evaluation.benchmarks import Benchmark
from llama_mimi.evaluation.codes import encode_clips
from llama_mimi.evaluation.results import MAX_AUDIO_SECONDS
from llama_mimi.evaluation.scoring import Scoring, score_clips
from llama_mimi.evaluation.script import BATCH_TOKENS, BENCHMARK_SCRIPTS
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.speech_model import DECODER_DTYPES, DecoderPrecision
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer, load_speech_tokenizer
from llama_mimi.tokens.vocabulary import text_from_codes

FOLDERS = {"salmon": "salmon", "sLM21": "sLM21", "sStoryCloze": "storycloze"}  # in assets/tiny/benchmarks
ALONE, BATCHED, CACHED = "one clip at a time", "in batches", "in batches, codes cached"


@dataclass(frozen=True)
class Scored:
    """What is scored.

    Args:
        model_name: hub id or folder
        dtype: precision of the decoder
        pairs: so many of each benchmark, spread over it
    """

    model_name: str = "models/tiny"
    data_dir: Path = Path("assets/tiny/benchmarks")
    dtype: DecoderPrecision = "float32"
    pairs: int = 60


def bench_eval(scored: Scored, random_1b: bool = False, repeats: int = 3) -> None:
    """Measure all benchmarks.

    Args:
        random_1b: random weights of the 1B shape in place of a model
    """
    if scored.pairs < 1 or repeats < 1:
        raise UserError("--pairs and --repeats must be 1 or more")
    print(machine())
    print(f"| pairs per second | {ALONE} | {BATCHED} | {CACHED} | times as fast |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if random_1b:
            scored = replace(scored, model_name=write_random_model(Path(folder) / "random"))
        rows = [row(scored, benchmark, Path(folder), repeats) for benchmark in FOLDERS]
    together = [len(rows) / sum(1 / rates[way] for _, rates, _ in rows) for way in (ALONE, BATCHED, CACHED)]
    ratios = {name: [rates[BATCHED] / rates[ALONE], rates[CACHED] / rates[ALONE]] for name, rates, _ in rows}
    ratios["together"] = [together[1] / together[0], together[2] / together[0]]
    cells = [f"{rate:.1f}" for rate in together]
    print(f"| together | {' | '.join(cells)} | {' and '.join(f'{ratio:.1f}' for ratio in ratios['together'])} |")
    print("\n" + "\n".join(check for *_, checks in rows for check in checks) + "\n")
    name = "random 1B" if random_1b else scored.model_name
    print(json.dumps({"device": device_name(), "model": name, "pairs": scored.pairs, "ratios": ratios}))


def row(scored: Scored, benchmark: str, folder: Path, repeats: int) -> tuple[str, dict[str, float], list[str]]:
    """Measure one benchmark and print its line.

    Returns:
        Its name, pairs per second by way, and what else was compared.
    """
    rates: dict[str, list[float]] = {way: [] for way in (ALONE, BATCHED, CACHED)}
    scores: dict[str, list[float]] = {}
    for repeat in range(repeats):  # in turn, so that a slow minute of the machine hits all of them
        for way, of_way in rates.items():
            # The codes that the batches made are there for the last way.
            result = measure(scored, benchmark, way, folder / f"{benchmark}_{repeat}")
            of_way.append(result["pairs"] / result["seconds"])
            scores[way] = result["scores"]
    medians = {way: statistics.median(of_way) for way, of_way in rates.items()}
    cells = [median_and_range(measured_rates, 1) for measured_rates in rates.values()]
    ratios = [f"{medians[way] / medians[ALONE]:.1f}" for way in (BATCHED, CACHED)]
    print(f"| {benchmark} | {' | '.join(cells)} | {' and '.join(ratios)} |", flush=True)
    original = measure(scored, benchmark, "original", folder / benchmark)["scores"]
    furthest = max(abs(a - b) for a, b in zip(scores[ALONE], original, strict=True))
    if scored.dtype == "float32" and furthest > 1e-4:
        raise UserError(f"{benchmark}: scores of preset original are off by {furthest:.1e}; this is a bug, report it")
    checks = [f"{benchmark}, one clip at a time and preset original: {compare(scores[ALONE], original)}"]
    for dtype in get_args(DecoderPrecision):
        if dtype != scored.dtype:
            other = measure(replace(scored, dtype=dtype), benchmark, CACHED, folder / f"{benchmark}_0")["scores"]
            checks.append(f"{benchmark}, {scored.dtype} and {dtype}: {compare(scores[CACHED], other)}")
    return benchmark, medians, checks


def compare(scores_a: list[float], scores_b: list[float]) -> str:
    """How far two ways to score the same pairs differ."""
    difference = max(abs(a - b) for a, b in zip(scores_a, scores_b, strict=True))
    decisions = [[x > y for x, y in zip(scores[::2], scores[1::2], strict=True)] for scores in (scores_a, scores_b)]
    flipped = sum(a != b for a, b in zip(*decisions, strict=True))
    return f"scores differ by {difference:.1e} at most, {flipped} of {len(decisions[0])} decisions differ"


def measure(scored: Scored, benchmark: str, way: str, folder: Path) -> dict[str, Any]:
    """One measurement in its own process."""
    found, done = measured(probe, benchmark=benchmark, way=way, folder=folder, **vars(scored))
    if found is None:
        raise UserError(f"scoring {benchmark} {way} failed: {done.stderr[-2000:]}")
    return found


def probe(
    benchmark: str, way: str, folder: str, model_name: str, data_dir: str, dtype: DecoderPrecision, pairs: int
) -> dict[str, Any]:
    levels = BENCHMARK_SCRIPTS[benchmark].levels
    all_pairs = BENCHMARK_SCRIPTS[benchmark].read(f"{data_dir}/{FOLDERS[benchmark]}").pairs
    some_pairs = all_pairs[:: max(1, len(all_pairs) // pairs)][:pairs]
    clips = Benchmark(some_pairs).clips
    decoder, tokenizer, codec_name = load_parts(model_name, dtype)
    if way == ALONE:
        mimi = MimiCodec(codec_name, decoder.config.num_quantizers, DEVICE, sliding_window=False).model
        start = time.perf_counter()
        scores = [
            score_alone(clip.source.read_bytes(), decoder, tokenizer.text_tokenizer, mimi, levels) for clip in clips
        ]
        return {"pairs": len(some_pairs), "seconds": time.perf_counter() - start, "scores": scores}
    scoring = Scoring(levels, as_released=way == "original")
    codec = MimiCodec(codec_name, decoder.config.num_quantizers, DEVICE, sliding_window=not scoring.as_released)
    model = FlattenedModel(decoder, tokenizer, codec)
    start = time.perf_counter()
    ids, codes = encode_clips(
        codec, clips, folder, DistributedContext(), MAX_AUDIO_SECONDS, as_released=scoring.as_released
    )
    with tempfile.TemporaryDirectory() as log:
        scored = score_clips(
            model, codes, scoring, BATCH_TOKENS[DEVICE == "cuda"], ProgressLog(Path(log), {}), DistributedContext()
        )
    seconds = time.perf_counter() - start
    return {"pairs": len(some_pairs), "seconds": seconds, "scores": [scored[audio_id] for audio_id in ids]}


def load_parts(model_name: str, dtype: DecoderPrecision) -> tuple[LlamaForCausalLM, SpeechTokenizer, str]:
    """Decoder, token sequences and the codec's name of the model.

    Nothing of the codec is loaded here: it changes how the process keeps memory, and one clip at a time is to go as it
    would without this project.
    """
    decoder = load_pretrained(AutoModelForCausalLM, model_name, what="model", dtype=DECODER_DTYPES[dtype])
    codec_name = getattr(decoder.config, "codec", None) or DEFAULT_CODEC
    return (
        decoder.to(DEVICE).eval(),
        load_speech_tokenizer(model_name, codec_name, decoder.config.num_quantizers),
        codec_name,
    )


def write_random_model(folder: Path) -> str:
    """A model of the shape of Llama-3.2-1B with 136,450 entries, and of Mimi, all weights random.

    Returns:
        Its folder.
    """
    write_stand_ins(folder)
    tokenizer = load_speech_tokenizer(str(folder / "llama"), str(folder / "mimi"), 4)
    args = LlamaMimiArgs(**{**vars(FLAVORS["1B"]), "vocab_size": tokenizer.vocabulary.size})
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(hf_config(args, num_quantizers=4, codec=str(folder / "mimi"))).bfloat16()
    decoder.save_pretrained(folder / "1b")
    tokenizer.text_tokenizer.save_pretrained(folder / "1b")
    return str(folder / "1b")


@torch.no_grad()
def score_alone(
    content: bytes, decoder: LlamaForCausalLM, tokenizer: Any, codec: MimiModel, levels: tuple[int, ...] | None
) -> float:
    """The first release's way to a score; higher is likelier."""
    Q = decoder.config.num_quantizers
    samples_S = read_audio(content, codec.config.sampling_rate, max_seconds=MAX_AUDIO_SECONDS).samples_S
    codes_QT = codec.encode(samples_S[None, None].to(decoder.device), num_quantizers=Q).audio_codes[0]
    ids_1L = tokenizer(text_from_codes(codes_QT.T.cpu()), return_tensors="pt").input_ids
    labels_1L = ids_1L.clone()
    if levels is not None:
        labels_1L[:, [position for position in range(ids_1L.shape[1]) if (position - 2) % Q or position < 2]] = -100
    return -decoder(input_ids=ids_1L.to(decoder.device), labels=labels_1L.to(decoder.device)).loss.item()


if __name__ == "__main__":
    run_command(bench_eval, __doc__)
