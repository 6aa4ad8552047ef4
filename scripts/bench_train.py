"""What a training step costs, in one table: this trainer, a plain loop, and TorchTitan's own Llama 3 of the same size.

    uv run python scripts/bench_train.py                          # CPU: tiny and mid
    uv run python scripts/bench_train.py --shapes 1B 8B           # one GPU
    uv run python scripts/bench_train.py --shapes 1B --profile outputs/profile.txt

Every way trains on the same clips of random codes, simulated lengths, in a process of its own, all ways in turn,
--repeats times. The plain loop is written here only: `LlamaForCausalLM`, one clip a row, padding with its mask as a
tokenizer gives it (and without, which a decoder could do), logits of everything, AdamW. No way checkpoints activations.
A useful token is one that enters the loss. FLOPs are 6 a multiplied weight and useful token, and attention over a whole
row; on a CPU MFU is the share of what a large matrix product reaches there.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mimi.train import SpeechTrainer  # first, as TorchTitan looks for its device when it is imported

# isort: split

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bench_data import random_clips, speech_lengths, write_store
from tokenizers import Tokenizer, models
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.tools.utils import get_peak_flops
from transformers import LlamaForCausalLM, MimiConfig, PreTrainedTokenizerFast

from llama_mimi.config_check import parse_config
from llama_mimi.cross_entropy import cross_entropy, pending_logits
from llama_mimi.errors import UserError, run_cli
from llama_mimi.hf import hf_config
from llama_mimi.model import FLAVORS, LLAMA_3_2_ROPE, LlamaMimi, LlamaMimiArgs
from llama_mimi.sequences import IGNORE_INDEX, SequenceBuilder, load_sequences
from llama_mimi.versions import versions

NUM_QUANTIZERS = 4
OUT_OF_MEMORY = 3  # exit code
LOSS_POSITIONS = {"cpu": 4096, "cuda": 32_768}
WARM_UP = {"cpu": 2, "cuda": 5}  # steps: compilation, also for another number of clips, and allocations


@dataclass(frozen=True)
class Shape:
    """A model and its rows. ``seconds_per_clip`` is the mean of simulated lengths; steps are timed after a warm-up."""

    args: LlamaMimiArgs
    text_entries: int
    codebook_size: int
    seq_len: int
    batch_size: int
    seconds_per_clip: float
    steps: int


SHAPES = {
    "tiny": Shape(FLAVORS["tiny"], 512, 256, 256, 8, 3.3, 20),
    "mid": Shape(
        LlamaMimiArgs(
            dim=512,
            n_layers=8,
            n_heads=8,
            n_kv_heads=4,
            multiple_of=64,
            rope_theta=500000,
            rope_scaling_args=LLAMA_3_2_ROPE,
            enable_weight_tying=True,
        ),
        512,
        2048,
        1024,
        2,
        13.4,
        6,
    ),
    "1B": Shape(FLAVORS["1B"], 128_256, 2048, 1024, 16, 13.4, 20),
    "8B": Shape(FLAVORS["8B"], 128_256, 2048, 1024, 4, 13.4, 20),
}
PLAIN, UNMASKED, STOCK, OURS = "plain loop", "plain loop without its mask", "TorchTitan's Llama 3", "this trainer"
AUDIO = "--model.vocabulary audio"
PADDED = "--data.packing pad"
COMPILED = "--compile.enable"
FLOAT8 = f"{COMPILED} --model.converters quantize.linear.float8 --quantize.linear.float8.filter_fqns output"
# Rows of the table: way and flags. Packed rows are not compiled on CPUs.
CPU_ROWS = [(PLAIN, ""), (UNMASKED, ""), (STOCK, ""), (OURS, PADDED), (OURS, ""), (OURS, AUDIO)]
GPU_ROWS = [
    (PLAIN, ""),
    (UNMASKED, ""),
    (STOCK, COMPILED),
    (OURS, f"{PADDED} {COMPILED}"),
    (OURS, ""),
    (OURS, COMPILED),
    (OURS, f"{COMPILED} {AUDIO}"),
    (OURS, FLOAT8),
]
DEFAULT_FLAGS = {"cpu": "", "cuda": COMPILED}  # of this trainer, as its figures are given in the last line


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "mid"] if device == "cpu" else ["1B"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num_threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", type=Path, help="write where the time of this trainer's steps goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # JSON: one measurement, in its own process
    flags = parser.parse_args()
    torch.set_num_threads(flags.num_threads)
    if flags.worker:
        with contextlib.redirect_stdout(sys.stderr):
            job = json.loads(flags.worker)
            measured = measure_loss(job["way"]) if job["shape"] == "loss" else measure(**job)
        print(json.dumps(measured))
        return
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    peak_flops = get_peak_flops(name) if device == "cuda" else matmul_flops()
    print(f"{name}, {os.cpu_count()} cores, {flags.num_threads} threads; 100 % MFU is {peak_flops / 1e12:.3f} TFLOP/s")
    print(", ".join(f"{package} {version}" for package, version in versions().items()) + "\n")
    print("| shape | way | useful tokens/s | times the plain loop | MFU | peak memory | useful tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results = []
    for shape in flags.shapes:
        with tempfile.TemporaryDirectory() as folder:
            results.append(rows_of(shape, Path(folder), flags, device, peak_flops))
    loss_memory(flags)
    compared = [result for result in results if result["ratio_to_plain_loop"]] or results
    print(json.dumps({"device": name, **compared[-1], "all": results}))


def rows_of(shape: str, folder: Path, flags: argparse.Namespace, device: str, peak_flops: float) -> dict[str, Any]:
    """Measure and print the rows of a shape; returns what the last line says of it."""
    write_stand_ins(shape, folder)
    rows = CPU_ROWS if device == "cpu" else GPU_ROWS
    job = {"shape": shape, "folder": str(folder), "num_layers": SHAPES[shape].args.n_layers}
    if shape == "8B":  # all layers and the optimizer's states are 160 GB
        rows = [(OURS, COMPILED)]
        job["num_layers"] = most_layers(job, flags)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {row: [] for row in rows}
    for _ in range(flags.repeats):
        for way, options in rows:
            run = worker({**job, "way": way, "options": options}, flags)
            runs[way, options] += [run] if run else []
    medians = {row: statistics.median(run["useful_tokens_per_s"] for run in own) for row, own in runs.items() if own}
    plain = medians.get((PLAIN, ""))
    for (way, options), own in runs.items():
        if not own:
            print(f"| {shape}, {job['num_layers']} layers | {way} `{options}` | none: see above | | | | |", flush=True)
            continue
        rates = sorted(run["useful_tokens_per_s"] for run in own)
        median = medians[way, options]
        times = f"{median / plain:.2f}" if plain else ""
        mfu = own[0]["flops_per_token"] * median / peak_flops
        memory = max(run["peak_memory_bytes"] for run in own)
        print(
            f"| {shape}, {job['num_layers']} layers | {way} `{options}` | {median:,.0f} "
            f"({rates[0]:,.0f} to {rates[-1]:,.0f}) | {times} | {100 * mfu:.1f} % | {memory / 1e9:.2f} GB | "
            f"{100 * own[0]['useful_share']:.0f} % |".replace(" ``", ""),
            flush=True,
        )
    if flags.profile:
        path = flags.profile.resolve().with_stem(f"{flags.profile.stem}-{shape}")
        worker({**job, "way": OURS, "options": DEFAULT_FLAGS[device], "profile": str(path)}, flags)
    ours = runs[OURS, DEFAULT_FLAGS[device]]
    if not ours:
        raise UserError(f"this trainer did not run at the shape {shape}; see above")
    rate = medians[OURS, DEFAULT_FLAGS[device]]
    return {
        "shape": shape,
        "num_layers": job["num_layers"],
        # With all layers, at the same share of the peak; fewer are trained where all do not fit.
        "useful_tokens_per_s_of_all_layers": rate
        * ours[0]["flops_per_token"]
        / ours[0]["flops_per_token_of_all_layers"],
        "useful_tokens_per_s": rate,
        "plain_loop_useful_tokens_per_s": plain,
        "ratio_to_plain_loop": rate / plain if plain else None,
        "mfu": ours[0]["flops_per_token"] * rate / peak_flops,
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in ours),
    }


def most_layers(job: dict[str, Any], flags: argparse.Namespace) -> int:
    for num_layers in range(SHAPES["8B"].args.n_layers, 0, -2):
        attempt = {**job, "num_layers": num_layers, "way": OURS, "options": COMPILED}
        if worker(attempt, flags):
            return num_layers
    raise UserError("not even two layers of the 8B shape fit into this GPU's memory")


def worker(job: dict[str, Any], flags: argparse.Namespace) -> Any:
    """One measurement in a process of its own; None, and why on standard error, if it failed."""
    command = [sys.executable, __file__, "--num_threads", str(flags.num_threads), "--worker", json.dumps(job)]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = os.environ | ranks | {"OMP_NUM_THREADS": str(flags.num_threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    why = "out of memory" if done.returncode == OUT_OF_MEMORY else done.stderr[-2000:]
    measured = None if done.returncode else json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(job), measured or f"failed: {why}", file=sys.stderr, flush=True)  # what was measured is not lost
    return measured


def measure(shape: str, folder: str, way: str, options: str, num_layers: int, profile: str | None = None) -> Any:
    """Useful tokens/s and peak memory of one way to train."""
    FLAVORS[shape] = changed(SHAPES[shape].args, n_layers=num_layers)
    text_only = changed(FLAVORS[shape], vocab_size=SHAPES[shape].text_entries)
    hf_config(text_only).save_pretrained(Path(folder) / "llama")
    try:
        step, job_config = (trainer if way in (OURS, STOCK) else plain_loop)(shape, Path(folder), way, options)
        for _ in range(WARM_UP["cuda" if torch.cuda.is_available() else "cpu"]):
            step()
        tokens, positions, start = 0, 0, seconds()
        for _ in range(SHAPES[shape].steps):
            useful, all_of_it = step()
            tokens, positions = tokens + useful, positions + all_of_it
        took = seconds() - start
        if profile:
            write_profile(step, Path(profile))
    except torch.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    return {
        "useful_tokens_per_s": tokens / took,
        "useful_share": tokens / positions,
        "flops_per_token": model_flops(shape, job_config),
        "flops_per_token_of_all_layers": model_flops(shape, job_config, SHAPES[shape].args.n_layers),
        "peak_memory_bytes": memory_bytes(),
    }


def trainer(shape: str, folder: Path, way: str, options: str) -> tuple[Callable[[], tuple[int, int]], Any]:
    """A step of TorchTitan's trainer, with this project's train spec or with the stock model and loss."""
    job_config = parse_config([*training_flags(shape, folder, packed=way == OURS), *options.split()])
    if way == STOCK:
        register_stock(shape, job_config)
    built = SpeechTrainer(job_config)
    counted = [0, 0]

    def counting() -> Iterator[Any]:
        for batch in built.batch_generator(built.dataloader):
            counted[0] += int((batch[1] != IGNORE_INDEX).sum())
            counted[1] += batch[1].numel()
            yield batch

    batches = counting()

    def step() -> tuple[int, int]:
        counted[:] = 0, 0
        built.step += 1
        built.train_step(batches)
        return counted[0], counted[1]

    return step, job_config


def register_stock(shape: str, job_config: Any) -> None:
    """TorchTitan's own Llama 3, which has no tied embeddings, with its loss, on this project's batches."""
    args = FLAVORS[shape]
    values = vars(args) | {"vocab_size": sequences_of(job_config).vocabulary.size}
    stock = TransformerModelArgs(**{key: value for key, value in values.items() if key != "enable_weight_tying"})
    spec = dataclasses.replace(
        get_train_spec("llama_mimi"),
        model_cls=Transformer,
        model_args={shape: stock},
        parallelize_fn=parallelize_llama,
        build_loss_fn=build_cross_entropy_loss,
        build_metrics_processor_fn=None,
    )
    register_train_spec("stock", spec)
    job_config.model.name = "stock"


def plain_loop(shape: str, folder: Path, way: str, options: str) -> tuple[Callable[[], tuple[int, int]], Any]:
    job_config = parse_config(training_flags(shape, folder, packed=False))
    sequences = sequences_of(job_config)
    args = changed(FLAVORS[shape], vocab_size=sequences.vocabulary.size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_config(args)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    table = pq.read_table(folder / "codes" / "shard-000000.parquet", columns=["codes"])
    codes = [np.stack(clip)[:, :NUM_QUANTIZERS] for clip in table["codes"].to_numpy()]
    order = itertools.cycle(np.random.default_rng(0).permutation(len(codes)))
    B, L = SHAPES[shape].batch_size, SHAPES[shape].seq_len

    def step() -> tuple[int, int]:
        inputs_BL = torch.zeros(B, L, dtype=torch.long)
        labels_BL = torch.full((B, L), IGNORE_INDEX)
        for row in range(B):
            ids_L = sequences.sequence(torch.from_numpy(codes[next(order)]), is_cut=False)[:L]
            inputs_BL[row, : len(ids_L)] = ids_L
            labels_BL[row, 2 : len(ids_L)] = ids_L[2:]
        mask_BL = (torch.arange(L) < (labels_BL != IGNORE_INDEX).sum(dim=1, keepdim=True) + 2).long().to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = model(
                inputs_BL.to(device),
                attention_mask=None if way == UNMASKED else mask_BL,
                labels=labels_BL.to(device),
                use_cache=False,
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return int((labels_BL != IGNORE_INDEX).sum()), labels_BL.numel()

    return step, job_config


def training_flags(shape: str, folder: Path, *, packed: bool) -> list[str]:
    own = SHAPES[shape]
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    flags = {
        "job.config_file": "config/tiny.toml",
        "job.dump_folder": folder / f"run-{os.getpid()}",
        "model.flavor": shape,
        "model.hf_assets_path": folder / "llama",
        "codec.name": folder / "mimi",
        "codec.num_quantizers": NUM_QUANTIZERS,
        "data.packing": "pack" if packed else "pad",
        "data.max_audio_seconds": 20.0,
        "training.dataset": folder / "codes",
        "training.local_batch_size": own.batch_size,
        "training.seq_len": own.seq_len,
        "training.mixed_precision_param": precision,
        "training.dataloader.num_workers": int(torch.cuda.is_available()),  # as in the large configs
        "metrics.log_freq": 1_000_000,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    return [*words, "--validation.no-enable", "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]


def sequences_of(job_config: Any) -> SequenceBuilder:
    model, codec = job_config.model, job_config.codec
    return load_sequences(model.hf_assets_path, codec.name, codec.num_quantizers, model.vocabulary)


def model_flops(shape: str, job_config: Any, num_layers: int | None = None) -> float:
    """Training FLOPs a token, of the model with its own vocabulary."""
    L = SHAPES[shape].seq_len
    args = changed(FLAVORS[shape], n_layers=num_layers or FLAVORS[shape].n_layers)
    args = changed(args, vocab_size=sequences_of(job_config).vocabulary.size, max_seq_len=L)
    with torch.device("meta"):
        return args.get_nparams_and_flops(LlamaMimi(args), L)[1]


def changed(args: LlamaMimiArgs, **values: Any) -> LlamaMimiArgs:
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def write_stand_ins(shape: str, folder: Path) -> None:
    """A tokenizer, a codec without weights, and codes of simulated lengths."""
    own = SHAPES[shape]
    words = {f"w{i}": i for i in range(own.text_entries)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), bos_token="w1")
    tokenizer.save_pretrained(folder / "llama")
    MimiConfig(codebook_size=own.codebook_size).save_pretrained(folder / "mimi")
    (folder / "mimi" / "model.safetensors").touch()  # of a codec for codes only its name and hash matter
    frames = np.maximum(1, (speech_lengths(2048) * (own.seconds_per_clip / 13.4)).astype(int))
    clips = random_clips(frames, MimiConfig(codebook_size=own.codebook_size))
    write_store(folder / "codes", str(folder / "mimi"), clips)


def loss_memory(flags: argparse.Namespace) -> None:
    """Print what the loss alone takes, forward and backward, at the width and vocabulary of the 1B model."""
    for way in ("in chunks", "full logits"):
        run = worker({"way": way, "shape": "loss", "options": ""}, flags)
        held = f"{run['bytes'] / 1e9:.2f} GB more at the peak" if run else "out of memory"
        print(f"\nloss of {LOSS_POSITIONS['cuda' if torch.cuda.is_available() else 'cpu']:,} positions, {way}: {held}")


def measure_loss(way: str) -> dict[str, float]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    N = LOSS_POSITIONS[device]
    hidden_BLD = torch.randn(1, N, 2048, device=device, dtype=dtype, requires_grad=True)
    weight_VD = torch.empty(136_450, 2048, device=device, dtype=dtype).normal_(std=0.02).requires_grad_()
    targets_N = torch.randint(len(weight_VD), (N,), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_bytes()
    if way == "in chunks":
        loss, _ = cross_entropy(pending_logits(hidden_BLD, weight_VD), torch.arange(N, device=device), targets_N)
    else:
        loss = F.cross_entropy(F.linear(hidden_BLD, weight_VD).flatten(0, 1).float(), targets_N, reduction="sum")
    loss.backward()
    return {"bytes": memory_bytes() - before}


def write_profile(step: Callable[[], Any], path: Path) -> None:
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=40))


def matmul_flops() -> float:
    """FLOP/s of a float32 matrix product on this CPU, the best of ten."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes() -> int:
    """The most that this process has held so far: on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run_cli(main)
