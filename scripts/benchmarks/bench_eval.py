"""How fast benchmarks are scored: one clip at a time, in batches, and with codes that are there already.

    uv run python scripts/benchmarks/bench_eval.py --model_name models/tiny
    uv run python scripts/benchmarks/bench_eval.py --random_1b --dtype bfloat16 --pairs 100  # GPU, without a network

One clip at a time is what the first release does: read, encode, write the codes as text, call the tokenizer, make all
logits, take the mean over the labels. It is written here only, with `transformers` as it comes. Every measurement is a
process of its own, which loads the model before the clock starts; the ways take turns. Batches are of preset
"official": "original" encodes clip by clip, to have the codes of the release. Scores of one clip at a time must be
those of preset "original" to 1e-4.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, machine, measured, median_and_range
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MimiModel

from llama_mimi.audio.mimi import DEFAULT_CODEC, CodecAttention, MimiCodec
from llama_mimi.audio.reading import read_audio
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import write_stand_ins
from llama_mimi.common.errors import UserError, run_cli
from llama_mimi.common.hub import load_pretrained
from llama_mimi.common.ranks import Ranks
from llama_mimi.evaluation.benchmarks import Benchmark, read_salmon, read_slm21, read_storycloze
from llama_mimi.evaluation.clip_codes import CodeCache, cache_key, encode_clips
from llama_mimi.evaluation.clip_scores import ScoreLog, score_clips
from llama_mimi.evaluation.scoring import preset
from llama_mimi.evaluation.script import BATCH_TOKENS
from llama_mimi.generation.speech_model import DECODER_DTYPES, SpeechModel
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.sequences import SequenceBuilder, load_sequences
from llama_mimi.tokens.units import text_from_codes

READERS: dict[str, tuple[Callable[[str], Benchmark], str, tuple[int, ...] | None]] = {
    "SALMon": (read_salmon, "salmon", None),
    "sLM21": (read_slm21, "sLM21", (0,)),
    "StoryCloze": (read_storycloze, "storycloze", (0,)),
}
ALONE, BATCHED, CACHED = "one clip at a time", "in batches", "in batches, codes cached"
MAX_SECONDS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="models/tiny", help="hub id or folder")
    parser.add_argument("--random_1b", action="store_true", help="random weights of the 1B shape in place of a model")
    parser.add_argument("--data_dir", type=Path, default=Path("assets/tiny/benchmarks"))
    parser.add_argument("--dtype", choices=DECODER_DTYPES, default="float32", help="of the decoder")
    parser.add_argument("--pairs", type=int, default=60, help="of each benchmark, spread over it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)  # benchmark, way, folder: one measurement
    flags = parser.parse_args()
    if flags.pairs < 1 or flags.repeats < 1:
        raise UserError("--pairs and --repeats must be 1 or more")
    if flags.probe:
        print(json.dumps(probe(flags, *flags.probe)))
        return
    print(machine())
    print(f"| pairs per second | {ALONE} | {BATCHED} | {CACHED} | times as fast |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if flags.random_1b:
            flags.model_name = write_random_model(Path(folder) / "random")
        rows = [row(flags, benchmark, Path(folder)) for benchmark in READERS]
    together = [len(rows) / sum(1 / rates[way] for _, rates, _ in rows) for way in (ALONE, BATCHED, CACHED)]
    ratios = {name: [rates[BATCHED] / rates[ALONE], rates[CACHED] / rates[ALONE]] for name, rates, _ in rows}
    ratios["together"] = [together[1] / together[0], together[2] / together[0]]
    cells = [f"{rate:.1f}" for rate in together]
    print(f"| together | {' | '.join(cells)} | {' and '.join(f'{ratio:.1f}' for ratio in ratios['together'])} |")
    print("\n" + "\n".join(check for *_, checks in rows for check in checks) + "\n")
    name = "random 1B" if flags.random_1b else flags.model_name
    print(json.dumps({"device": device_name(), "model": name, "pairs": flags.pairs, "ratios": ratios}))


def row(flags: argparse.Namespace, benchmark: str, folder: Path) -> tuple[str, dict[str, float], list[str]]:
    """Measure one benchmark and print its line.

    Returns:
        Its name, pairs per second by way, and what else was compared.
    """
    rates: dict[str, list[float]] = {way: [] for way in (ALONE, BATCHED, CACHED)}
    scores: dict[str, list[float]] = {}
    for repeat in range(flags.repeats):  # in turn, so that a slow minute of the machine hits all of them
        for way, of_way in rates.items():
            # The codes that the batches made are there for the last way.
            result = measure(flags.model_name, benchmark, way, folder / f"{benchmark}_{repeat}")
            of_way.append(result["pairs"] / result["seconds"])
            scores[way] = result["scores"]
    medians = {way: statistics.median(of_way) for way, of_way in rates.items()}
    cells = [median_and_range(measured_rates, 1) for measured_rates in rates.values()]
    ratios = [f"{medians[way] / medians[ALONE]:.1f}" for way in (BATCHED, CACHED)]
    print(f"| {benchmark} | {' | '.join(cells)} | {' and '.join(ratios)} |", flush=True)
    original = measure(flags.model_name, benchmark, "original", folder / benchmark)["scores"]
    furthest = max(abs(a - b) for a, b in zip(scores[ALONE], original, strict=True))
    if flags.dtype == "float32" and furthest > 1e-4:
        raise UserError(f"{benchmark}: scores of preset original are off by {furthest:.1e}; this is a bug, report it")
    checks = [f"{benchmark}, one clip at a time and preset original: {compare(scores[ALONE], original)}"]
    for dtype in DECODER_DTYPES:
        if dtype != flags.dtype:
            other = measure(flags.model_name, benchmark, CACHED, folder / f"{benchmark}_0", "--dtype", dtype)["scores"]
            checks.append(f"{benchmark}, {flags.dtype} and {dtype}: {compare(scores[CACHED], other)}")
    return benchmark, medians, checks


def compare(scores_a: list[float], scores_b: list[float]) -> str:
    """How far two ways to score the same pairs differ."""
    difference = max(abs(a - b) for a, b in zip(scores_a, scores_b, strict=True))
    decisions = [[x > y for x, y in zip(scores[::2], scores[1::2], strict=True)] for scores in (scores_a, scores_b)]
    flipped = sum(a != b for a, b in zip(*decisions, strict=True))
    return f"scores differ by {difference:.1e} at most, {flipped} of {len(decisions[0])} decisions differ"


def measure(model_name: str, benchmark: str, way: str, folder: Path, *more: str) -> dict[str, Any]:
    """One measurement in its own process."""
    words = (*sys.argv[1:], "--model_name", model_name, *more, "--probe", benchmark, way, folder)
    found, done = measured(__file__, *words)
    if found is None:
        raise UserError(f"scoring {benchmark} {way} failed: {done.stderr[-2000:]}")
    return found


def probe(flags: argparse.Namespace, benchmark: str, way: str, folder: str) -> dict[str, Any]:
    read, name, levels = READERS[benchmark]
    pairs = read(str(flags.data_dir / name)).pairs
    pairs = pairs[:: max(1, len(pairs) // flags.pairs)][: flags.pairs]
    clips = Benchmark(pairs).clips
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if way == ALONE:
        decoder, sequences, codec_name = load_parts(flags, device)
        codec = MimiCodec(codec_name, decoder.config.num_quantizers, device, attention="whole").model
        start = time.perf_counter()
        scores = [score_alone(clip.read(), decoder, sequences.tokenizer, codec, levels) for clip in clips]
        return {"pairs": len(pairs), "seconds": time.perf_counter() - start, "scores": scores}
    decoder, sequences, codec_name = load_parts(flags, device)
    chosen = preset("original" if way == "original" else "official", levels)
    attention: CodecAttention = "whole" if chosen.scoring.as_released else "windowed"
    model = SpeechModel(
        decoder, sequences, MimiCodec(codec_name, decoder.config.num_quantizers, device, attention=attention)
    )
    cache = CodeCache(folder, cache_key(model.codec, MAX_SECONDS, as_released=chosen.scoring.as_released))
    start = time.perf_counter()
    ids, codes = encode_clips(model.codec, clips, cache, Ranks(), MAX_SECONDS, as_released=chosen.scoring.as_released)
    with tempfile.TemporaryDirectory() as log:
        scored = score_clips(
            model, codes, chosen.scoring, BATCH_TOKENS[device == "cuda"], ScoreLog(Path(log), {}), Ranks()
        )
    seconds = time.perf_counter() - start
    return {"pairs": len(pairs), "seconds": seconds, "scores": [scored[audio_id] for audio_id in ids]}


def load_parts(flags: argparse.Namespace, device: str) -> tuple[LlamaForCausalLM, SequenceBuilder, str]:
    """Decoder, token sequences and the codec's name of the model.

    Nothing of the codec is loaded here: it changes how the process keeps memory, and one clip at a time is to go as it
    would without this project.
    """
    dtype = DECODER_DTYPES[flags.dtype]
    decoder = load_pretrained(AutoModelForCausalLM, flags.model_name, what="model", dtype=dtype).to(device).eval()
    codec_name = getattr(decoder.config, "codec", None) or DEFAULT_CODEC
    return decoder, load_sequences(flags.model_name, codec_name, decoder.config.num_quantizers), codec_name


def write_random_model(folder: Path) -> str:
    """A model of the shape of Llama-3.2-1B with 136,450 entries, and of Mimi, all weights random.

    Returns:
        Its folder.
    """
    write_stand_ins(folder)
    sequences = load_sequences(str(folder / "llama"), str(folder / "mimi"), 4)
    args = LlamaMimiArgs(**{**vars(FLAVORS["1B"]), "vocab_size": sequences.vocabulary.size})
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(hf_config(args, num_quantizers=4, codec=str(folder / "mimi"))).bfloat16()
    decoder.save_pretrained(folder / "1b")
    sequences.tokenizer.save_pretrained(folder / "1b")
    return str(folder / "1b")


@torch.no_grad()
def score_alone(
    content: bytes, decoder: LlamaForCausalLM, tokenizer: Any, codec: MimiModel, levels: tuple[int, ...] | None
) -> float:
    """The first release's way to a score; higher is likelier."""
    Q = decoder.config.num_quantizers
    samples_S = read_audio(content, codec.config.sampling_rate, max_seconds=MAX_SECONDS).samples_S
    codes_QT = codec.encode(samples_S[None, None].to(decoder.device), num_quantizers=Q).audio_codes[0]
    ids_1L = tokenizer(text_from_codes(codes_QT.T.cpu()), return_tensors="pt").input_ids
    labels_1L = ids_1L.clone()
    if levels is not None:
        labels_1L[:, [position for position in range(ids_1L.shape[1]) if (position - 2) % Q or position < 2]] = -100
    return -decoder(input_ids=ids_1L.to(decoder.device), labels=labels_1L.to(decoder.device)).loss.item()


if __name__ == "__main__":
    run_cli(main)
