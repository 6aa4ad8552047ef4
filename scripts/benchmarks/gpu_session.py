"""Check and measure this project on one GPU, in ten minutes and without a network.

    uv run python scripts/benchmarks/gpu_session.py
    uv run python scripts/benchmarks/gpu_session.py --tiny --output outputs/tiny_session.jsonl  # on a CPU, in minutes

Each phase is a process. It appends each figure to --output as a JSON line at once, so that a stopped session keeps its
figures. A phase is skipped if its expected time is longer than the rest of the budget. Phases run one after another,
because the compilation of one phase would disturb the measurements of another phase. The functions of the other
benchmarks measure all figures. Models have random weights and the 1B shape; --tiny makes them tiny.
"""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import training_methods  # first: TorchTitan chooses its device when it is imported

# isort: split

import bench_data
import bench_eval
import bench_generation
import torch
from bench_generation import Q, Shape, random_model
from bench_train import matmul_flops
from layouts import in_parquet, lossless_rows
from measuring import DEVICE, device_name, measure
from torch.nn.attention import SDPBackend
from torchtitan.models.attention import VarlenMetadata
from training_methods import OURS, OURS_CSM, SHAPES, STOCK
from transformers import MimiConfig, MimiModel

from llama_mimi.audio.mimi import DTYPES, MimiCodec
from llama_mimi.common.choices import Architecture
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.versions import versions
from llama_mimi.generation.decoding import Request, decode
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.model.llama import PackedAttention
from llama_mimi.report.curves import read_curves
from llama_mimi.tokens.vocabulary import AudioVocabulary
from llama_mimi.training.metrics import peak_flops

COMPILED = {
    "cuda": "--compile.enable",
    "cpu": "--compile.enable --compile.components loss --compile.backend aot_eager",  # blocks need a GPU's kernel
}[DEVICE]
FLOAT32 = "--training.mixed_precision_param float32"
# Settings of the correctness checks.
REPEATABLE = "--training.mixed_precision_param bfloat16 --training.local_batch_size 4 --debug.seed 0"
REPEATABLE += " --metrics.log_freq 1 --metrics.enable_tensorboard"
METHODS: dict[Architecture, str] = {"flattened": OURS, "hierarchical": OURS_CSM}
Figures = Iterator[dict[str, Any]]
Training = Literal["training", "training_hierarchical", "training_stock"]
PhaseName = Literal[
    "start", "correctness", Training, "generation", "generation_hierarchical", "tokenising", "evaluation"
]


class Scale(NamedTuple):
    """Sizes of the measurements."""

    shape: Shape
    steps: int  # timed training steps; 0: those of the shape
    new_frames: int
    batch_sizes: tuple[int, ...]  # of generation
    clips: int  # of the tiny corpus, to tokenise
    copies: int  # of these clips
    num_workers: int
    pairs: int


FULL, TINY = Scale("1B", 0, 125, (1, 8, 64), 64, 64, 14, 100), Scale("tiny", 2, 3, (1, 2), 4, 2, 1, 2)


def start(scale: Scale) -> Figures:
    yield {"device": device_name(), "cores": os.cpu_count(), **versions(), "cuda": torch.version.cuda}
    prompt = torch.empty(1, 32, 154, 64, device=DEVICE, dtype=torch.bfloat16)
    choice = {}
    for use, has_cudnn in (("training", True), ("generation", False)):
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn)  # `SpeechModel` disables cuDNN
        choice[f"sdpa_in_{use}"] = SDPBackend(torch._fused_sdp_choice(prompt, prompt, prompt, is_causal=True)).name
    speeds = {"memory_gb_per_s": bench_generation.bandwidth() / 1e9, "matmul_tflops": matmul_flops() / 1e12}
    yield choice | speeds


def correctness(scale: Scale) -> Figures:
    """Yield the result of each check, also after a failure; raise a `UserError` at the end."""
    failed = []
    for name, check, limit in checks(scale.shape):
        try:
            difference = check()
            result: dict[str, Any] = {"difference": difference, "limit": limit, "is_correct": difference <= limit}
        except Exception:  # an error of one kernel must not hide the results of the other checks
            result = {"error": traceback.format_exc()[-2000:], "is_correct": False}
        failed += [] if result["is_correct"] else [name]
        yield {"check": name, **result}
    if failed:
        raise UserError(f"wrong results: {'; '.join(failed)}")


def checks(shape: Shape) -> Iterator[tuple[str, Callable[[], float], float]]:
    """Yield the name of each check, a function that returns a difference, and the limit of the difference."""
    yield "packed attention: bfloat16, float32", partial(attention_error, shape), 0.02
    yield "loss: in chunks, full logits", partial(loss_error, shape), 0.02
    yield "codes: GPU, CPU", different_codes, 0.005
    for architecture in METHODS:
        yield f"generation, {architecture}: GPU, CPU", partial(different_tokens, shape, architecture), 0
        yield f"generation, {architecture}: bfloat16, float32", partial(likelihood_loss, shape, architecture), 0.1
    for architecture, method in METHODS.items():  # last, because TorchTitan changes settings of the process
        error = partial(training_error, shape, method)
        yield f"training, {architecture}: bfloat16, float32", partial(error, "", FLOAT32), 0.05
        yield f"training, {architecture}: compiled, eager", partial(error, COMPILED, ""), 0.02


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def attention_error(shape: Shape) -> float:
    """Compare packed attention in bfloat16 with a loop over clips in float32; also compare the gradients."""
    args, bounds = SHAPES[shape].args, torch.tensor([0, 100, 256, 300, 512], dtype=torch.int32, device=DEVICE)
    clips = VarlenMetadata(cu_seq_q=bounds, cu_seq_k=bounds, max_q=256, max_k=256)
    heads = [args.n_heads, *[args.n_kv_heads or args.n_heads] * 2]
    parts = [torch.randn(2, H, 256, args.dim // args.n_heads, device=DEVICE, dtype=torch.bfloat16) for H in heads]
    upstream_BLHD, results = torch.randn_like(parts[0].transpose(1, 2)), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [part.detach().to(dtype).requires_grad_() for part in parts]
        output_BLHD = PackedAttention()(*inputs, clips).reshape(upstream_BLHD.shape)
        results.append([output_BLHD, *torch.autograd.grad(output_BLHD, inputs, upstream_BLHD.to(dtype))])
    return max(map(relative_error, *results))


def loss_error(shape: Shape) -> float:
    """Compare the loss in chunks with the loss of full logits, in bfloat16; also compare the gradients."""
    own, results = SHAPES[shape], []
    vocabulary = AudioVocabulary(own.text_entries, own.codebook_size, Q)
    inputs = training_methods.loss_inputs(2048, own.args.dim, vocabulary, torch.bfloat16)
    for method in ("in chunks", "full logits"):
        loss = training_methods.loss_of(method, *inputs, vocabulary)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    return max(map(relative_error, *results))


def different_codes() -> float:
    """Return the fraction of the tiny codec's codes in float32 that differ from those of the CPU."""
    codecs = [MimiCodec(bench_generation.TINY_CODEC, Q, device) for device in (DEVICE, "cpu")]
    clips = bench_data.read_clips(bench_data.audio_reader(bench_data.DataFlags.corpus, codecs[0]), 16)
    samples = [torch.from_numpy(clip.samples_S) for clip in clips]
    found, wanted = (torch.cat(codec.encode_many(samples)) for codec in codecs)
    return float((found != wanted).double().mean())


def different_tokens(shape: Shape, architecture: Architecture) -> float:
    """Count the greedy tokens in float32 that differ from those of the CPU: in a thread, in eight rows, in one row."""
    model = random_model(shape, "float32", architecture, num_layers=2)
    codec = copy(model.codec)
    codec.device = torch.device("cpu")
    wanted = greedy(replace(model, decoder=deepcopy(model.decoder).cpu(), codec=codec), 8)
    with ThreadPoolExecutor(1) as pool:
        found = [pool.submit(greedy, model, 8).result(), greedy(model, 8), greedy(model, 1)]
    return float(sum((tokens != wanted).sum() for tokens in found))


def likelihood_loss(shape: Shape, architecture: Architecture) -> float:
    """Return the mean log-likelihood, in nats, that greedy tokens lose in bfloat16; random tokens lose 0.4 or more."""
    model, means = random_model(shape, "float32", architecture, num_layers=2), []
    for drawn_from in (model, replace(model, decoder=deepcopy(model.decoder).bfloat16())):
        frames_RTQ = greedy(drawn_from, 8)
        ids = [model.tokenizer.encode(frames_TQ, is_cut=True) for frames_TQ in frames_RTQ]
        is_scored = [torch.arange(len(ids_L)) >= len(ids_L) - frames_RTQ[0].numel() for ids_L in ids]
        means.append(torch.cat(model.log_likelihoods(ids, is_scored, is_admissible_only=True)).nanmean())
    return float(means[0] - means[1])


def greedy(model: SpeechModel, num_rows: int) -> torch.Tensor:
    """Return the most likely frames (8, 8, Q) after eight prompts of different lengths."""
    prompt_TQ = bench_generation.prompt_of(model)
    frames: list[list[torch.Tensor]] = [[] for _ in range(8)]
    requests, sampling = [Request(prompt_TQ[4 * row :], 0) for row in range(8)], bench_generation.sampling_of(8)
    for row, frame in decode(model, requests, replace(sampling, temperature=0), num_rows):
        if isinstance(frame, torch.Tensor):
            frames[row].append(frame)
    return torch.stack([torch.stack(own) for own in frames])


def training_error(shape: Shape, method: str, *flags: str) -> float:
    """Return the largest relative difference of losses and gradient norms between three steps with two settings."""
    results = []
    for own in flags:
        own = f"{REPEATABLE} {own}"
        with tempfile.TemporaryDirectory() as folder:
            training_methods.write_stand_ins(shape, Path(folder))
            job_config = training_methods.job_config_of(shape, Path(folder), method, own, num_layers=2)
            built = training_methods.build_trainer(job_config, method)
            batches = built.batch_generator(built.dataloader)
            for built.step in (1, 2, 3):
                built.train_step(batches)
            built.close()
            torch.distributed.destroy_process_group()
            curves = read_curves(Path(job_config.job.dump_folder))
        values = [curves[tag][step] for tag in ("loss_metrics/global_avg_loss", "grad_norm") for step in (1, 2, 3)]
        results.append(torch.tensor(values))
    return float((results[0] / results[1] - 1).abs().max())


def training(scale: Scale, method: str) -> Figures:
    """Yield the figures of a training step; on a CPU, 100 % MFU is the speed of a large matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        training_methods.write_stand_ins(scale.shape, Path(folder))
        num_layers = SHAPES[scale.shape].args.n_layers
        result = training_methods.measure_training(scale.shape, folder, method, COMPILED, num_layers, steps=scale.steps)
    mfu = result["flops_per_token"] * result["useful_tokens_per_s"] / (peak_flops(device_name()) or matmul_flops())
    yield {"method": method, "mfu": mfu, **result}
    before, after = result["graphs"]
    if before != after:
        raise UserError(f"{after - before} graphs were compiled during the timed steps; find the size that varies")


def generation(scale: Scale, architecture: Architecture) -> Figures:
    """Yield the rates of prefilling and decoding for each batch size in bfloat16, and those of a stream."""
    model, first_audio = random_model(scale.shape, "bfloat16", architecture), list[float]()
    frame_rate_hz, num_bytes = model.codec.frame_rate_hz, bench_generation.layer_bytes(model)
    for size in scale.batch_sizes:
        _, first_call_s = bench_generation.ours(model, scale.new_frames, size)
        prefill_s, all_s = bench_generation.ours(model, scale.new_frames, size)
        frames_per_s = (scale.new_frames - 1) / (all_s - prefill_s)  # of each sample
        figures = {"batch_size": size, "first_call_s": first_call_s, "prefill_and_first_frame_s": prefill_s}
        figures |= {"tokens_per_s": Q * size * frames_per_s, "times_real_time": frames_per_s / frame_rate_hz}
        figures["real_time_streams"] = size * frames_per_s / frame_rate_hz
        yield figures | {"layers_gb_per_s": num_bytes * frames_per_s * model.tokenizer.positions_per_frame / 1e9}
        if size == 1:  # a stream uses the graphs of this batch size
            bench_generation.streamed(model, scale.new_frames, [])  # the codec loads its kernels
            begin = time.perf_counter()
            bench_generation.streamed(model, scale.new_frames, first_audio)
            rate = scale.new_frames / frame_rate_hz / (time.perf_counter() - begin)
            yield {"stream_times_real_time": rate, "seconds_to_first_audio": first_audio[0]}


def tokenising(scale: Scale) -> Figures:
    """Yield the rates of the codec alone, then with processes that read FLAC files, in audio-seconds per second."""
    with tempfile.TemporaryDirectory() as folder:
        flags, corpus = bench_data.DataFlags(num_quantizers=8, clips=scale.clips), Path(folder, "corpus")
        if scale.shape != "tiny":
            flags = replace(flags, codec=f"{folder}/mimi")
            MimiModel(MimiConfig()).save_pretrained(flags.codec)
        for name, dtype in DTYPES.items():
            codec = MimiCodec(flags.codec, flags.num_quantizers, DEVICE, dtype)
            clips = list(bench_data.read_clips(bench_data.audio_reader(flags.corpus, codec), flags.clips))
            bench_data.encode(codec, clips, 48)
            rate = bench_data.encode(codec, clips * scale.copies, 48)  # batches of 160 s, as in tokenize_corpus.py
            yield {"dtype": name, "encoded": rate}
        corpus.mkdir()
        in_parquet(corpus, lossless_rows(flags.corpus, flags.clips, 20.0) * scale.copies)
        rate = bench_data.tokenize(flags, str(corpus), Path(folder), count(), scale.num_workers)
        yield {"dtype": "float32", "num_workers": scale.num_workers, "tokenised": rate}


def evaluation(scale: Scale) -> Figures:
    """Yield the rates of scoring SALMon-like pairs in bfloat16, with and without encoding."""
    with tempfile.TemporaryDirectory() as folder:
        name, codes = bench_eval.write_random_model(Path(folder), scale.shape), f"{folder}/codes"
        options = bench_eval.Options(name, dtype="bfloat16", pairs=scale.pairs)
        for method in (bench_eval.BATCHED, bench_eval.CACHED):
            result = bench_eval.score("salmon", method, codes, **vars(options))
            yield {"method": method, "pairs_per_s": result["pairs"] / result["seconds"]}


# Functions and expected times in seconds, on an H200 with an empty compilation cache (estimates).
PHASES: dict[PhaseName, tuple[Callable[[Scale], Figures], int]] = {
    "start": (start, 40),  # the first imports on a machine are slow
    "correctness": (correctness, 140),
    "training": (partial(training, method=OURS), 75),
    "generation": (partial(generation, architecture="flattened"), 110),
    "tokenising": (tokenising, 45),
    "training_hierarchical": (partial(training, method=OURS_CSM), 75),
    "evaluation": (evaluation, 45),
    "training_stock": (partial(training, method=STOCK), 60),
    "generation_hierarchical": (partial(generation, architecture="hierarchical"), 110),
}


def run_phase(phase: PhaseName, output: str, tiny: bool) -> bool:
    """Run a phase, and append its figures to a file as soon as they exist."""
    begin = time.monotonic()
    for figures in PHASES[phase][0](TINY if tiny else FULL):
        record(Path(output), phase, {"seconds": round(time.monotonic() - begin, 1), **figures})
    return True


def record(output: Path, phase: PhaseName, figures: dict[str, Any]) -> None:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}
    with output.open("a") as file:
        file.write(json.dumps({"phase": phase, **rounded}) + "\n")


def gpu_session(
    output: Path = Path("outputs/gpu_session.jsonl"),
    budget_s: float = 540.0,
    phases: tuple[PhaseName, ...] = tuple(PHASES),
    tiny: bool = False,
) -> None:
    """Run phases until the budget ends.

    Args:
        output: file for the figures; a new session appends to the file
        budget_s: maximum duration of the session, in seconds
        phases: names of phases, in the order of running
        tiny: use tiny models; required without a GPU
    """
    if DEVICE == "cpu" and not tiny:
        raise UserError("no GPU is visible; set --tiny to run the phases with tiny models on the CPU")
    output.parent.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + budget_s, []
    for phase in phases:
        left_s, expected_s = end - time.monotonic(), PHASES[phase][1]
        if left_s < expected_s:
            record(output, phase, {"skipped": f"the phase takes {expected_s} s, and {left_s:.0f} s are left"})
            continue
        num_bytes = output.stat().st_size if output.exists() else 0  # before the phase
        try:
            limit_s = min(left_s, 2 * expected_s)
            if not measure(run_phase, limit_s, phase=phase, output=output.resolve(), tiny=tiny):
                raise UserError("the memory of the GPU is full")
        except UserError as error:
            failed.append(phase)
            record(output, phase, {"error": str(error)})
        print(output.read_bytes()[num_bytes:].decode(), end="")  # at once, in case the session is stopped
        print(f"{phase}: ended {budget_s - end + time.monotonic():.0f} s after the start", flush=True)
    if failed:
        raise UserError(f"failed phases: {', '.join(failed)}; read the errors in '{output}'")


if __name__ == "__main__":
    run_command(gpu_session, __doc__)
