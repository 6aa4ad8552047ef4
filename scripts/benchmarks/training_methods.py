"""Training methods for bench_train.py and gpu_session.py. Each method is measured in a new process."""

import dataclasses
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from llama_mimi.trainer import Trainer  # first: TorchTitan chooses its device when it is imported

# isort: split

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from measuring import DEVICE, peak_mb
from simulated import random_clips, speech_lengths, write_codes
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from transformers import LlamaForCausalLM, MimiConfig

from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import LLAMA_3_VOCABULARY, write_tokenizer
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.model.architectures import build_model
from llama_mimi.model.cross_entropy import cross_entropy, pending_logits, vocabulary_targets
from llama_mimi.model.llama import FLAVORS, LLAMA_3_2_ROPE, LlamaMimiArgs, depth_args
from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.tokens.vocabulary import AudioVocabulary
from llama_mimi.train_spec import build_speech_tokenizer
from llama_mimi.training.config_file import parse_config

NUM_QUANTIZERS = 4
LOSS_POSITIONS = {"cpu": 4096, "cuda": 32_768}[DEVICE]
WARM_UP = {"cpu": 2, "cuda": 5}[DEVICE]  # warm-up steps, for compilation and allocations
# Environment variables that torchrun sets for a single rank.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
IS_SHARDED = DEVICE == "cuda"  # shard the trainer's model, as in a run of several ranks
Step = Callable[[], tuple[int, int]]  # returns the numbers of useful tokens and of positions in a step


class Shape(NamedTuple):
    args: LlamaMimiArgs
    text_entries: int
    codebook_size: int
    seq_len: int
    batch_size: int
    seconds_per_clip: float  # mean of the simulated lengths
    steps: int


LAYERS: dict[str, Any] = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 1408}
ROPE: dict[str, Any] = {"rope_theta": 500000, "rope_scaling_args": LLAMA_3_2_ROPE}
DEPTH = depth_args(dim=256, n_layers=2, n_heads=4, n_kv_heads=1, ffn_dim=2048)
MID = LlamaMimiArgs(**LAYERS, **ROPE, enable_weight_tying=True, depth=DEPTH)
SHAPES = {
    "tiny": Shape(FLAVORS["tiny"], 512, 256, 256, 8, 3.3, 20),
    "mid": Shape(MID, 512, 2048, 1024, 2, 13.4, 6),
    "1B": Shape(FLAVORS["1B"], LLAMA_3_VOCABULARY, 2048, 1024, 16, 13.4, 20),
    "8B": Shape(FLAVORS["8B"], LLAMA_3_VOCABULARY, 2048, 1024, 4, 13.4, 20),
}
PLAIN, UNMASKED, STOCK, OURS = "plain loop", "plain loop without its mask", "TorchTitan's Llama 3", "this trainer"
OURS_CSM = "this trainer, hierarchical"


def write_stand_ins(shape: str, folder: Path) -> None:
    """Write a tokenizer, a codec without weights, and clips of random codes with simulated lengths."""
    own = SHAPES[shape]
    write_tokenizer(folder / "llama", own.text_entries)
    codec = MimiConfig(codebook_size=own.codebook_size)
    codec.save_pretrained(folder / "mimi")
    (folder / "mimi" / "model.safetensors").touch()  # codes need only the codec's name and hash
    frames = np.maximum(1, (speech_lengths(2048) * (own.seconds_per_clip / 13.4)).astype(int))
    write_codes(folder / "codes", str(folder / "mimi"), [random_clips(frames, codec)])


def measure_training(
    shape: str, folder: str, method: str, flags: str, num_layers: int, profile: str = "", steps: int = 0
) -> dict[str, Any]:
    """Train with one method; return its rates, times of steps, memory, new graphs, and FLOPs per useful token."""
    job_config = job_config_of(shape, Path(folder), method, flags, num_layers)
    step = (trainer if method in (OURS, OURS_CSM, STOCK) else llama_loop)(job_config, method)
    for _ in range(WARM_UP):
        step()
    compiled = torch._dynamo.utils.counters["stats"]
    num_graphs, counts, times = compiled["unique_graphs"], [], [synchronized_time()]
    for _ in range(steps or SHAPES[shape].steps):
        counts.append(step())
        times.append(synchronized_time())
    useful, positions = np.sum(counts, axis=0).tolist()
    result = {
        "useful_tokens_per_s": useful / (times[-1] - times[0]),
        "useful_fraction": useful / positions,
        "step_seconds": np.diff(times).round(4).tolist(),
        "graphs": [num_graphs, compiled["unique_graphs"]],  # compiled before and after the timed steps
        "peak_memory_bytes": memory_bytes(),
        "peak_host_memory_mb": peak_mb(),
    }
    if profile:
        write_profile(step, Path(profile))
    args = model_args(job_config)
    with torch.device("meta"):
        _, flops = args.get_nparams_and_flops(build_model(args), job_config.training.seq_len)
    return result | {"flops_per_token": flops}


def job_config_of(shape: str, folder: Path, method: str, flags: str, num_layers: int) -> Any:
    """Return the config of a run on the stand-ins in ``folder``, and prepare this process to be its only rank."""
    os.environ.update(ONE_RANK)
    FLAVORS[shape] = args = copy(SHAPES[shape].args)
    args.n_layers, args.vocab_size = num_layers, SHAPES[shape].text_entries
    hf_config(args).save_pretrained(folder / "llama")
    return parse_config([*training_flags(shape, folder, method), *flags.split()])


def training_flags(shape: str, folder: Path, method: str) -> list[str]:
    own, is_csm = SHAPES[shape], method == OURS_CSM
    flags = {
        "job.config_file": "config/tiny.toml",
        "job.dump_folder": folder / f"run-{os.getpid()}",
        "model.flavor": shape,
        "model.architecture": "hierarchical" if is_csm else "flattened",
        "model.hf_assets_path": folder / "llama",
        "codec.name": folder / "mimi",
        "codec.num_quantizers": NUM_QUANTIZERS,
        "data.packing": "pack" if method in (OURS, OURS_CSM) else "pad",
        "data.max_audio_seconds": 20.0,
        "training.dataset": folder / "codes",
        "training.local_batch_size": own.batch_size,
        "training.seq_len": own.seq_len // (NUM_QUANTIZERS if is_csm else 1),  # equal audio per row
        "training.mixed_precision_param": "bfloat16" if DEVICE == "cuda" else "float32",
        "training.dataloader.num_workers": int(DEVICE == "cuda"),  # as in the large configs
        "metrics.log_freq": 1_000_000,
        "validation.enable": False,
        "checkpoint.enable": False,
        "metrics.enable_tensorboard": False,
    }
    return to_cli_args(flags)


class OneRankFSDP(ParallelDims):
    """Degrees of parallelism of one rank, with FSDP2.

    Without FSDP2, TorchTitan uses autocast, which keeps the residual stream and the norms in float32.
    """

    @property
    def fsdp_enabled(self) -> bool:
        return True

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return name == "fsdp" or super()._mesh_exist(name, degree)


class ShardedTrainer(Trainer):
    """Trainer for one rank with the data types of a run on several ranks."""

    def init_distributed(self) -> ParallelDims:
        return OneRankFSDP(**vars(super().init_distributed()))


def build_trainer(job_config: Any, method: str) -> Trainer:
    """Build the trainer of this project, or (method `STOCK`) of TorchTitan's own model and loss."""
    if method == STOCK:
        register_stock(job_config)
    return (ShardedTrainer if IS_SHARDED else Trainer)(job_config)


def trainer(job_config: Any, method: str) -> Step:
    """Return a training step of `build_trainer`."""
    built = build_trainer(job_config, method)
    counts = [0, 0]

    def counted() -> Iterator[Any]:
        for batch in built.batch_generator(built.dataloader):
            counts[0] += int((batch[1] != IGNORE_INDEX).sum())
            counts[1] += batch[1].numel()
            yield batch

    batches = counted()

    def step() -> tuple[int, int]:
        counts[:] = 0, 0
        built.step += 1
        built.train_step(batches)
        return counts[0], counts[1]

    return step


def register_stock(job_config: Any) -> None:
    """Register TorchTitan's own Llama 3 and loss for this project's batches. The model's embeddings are not tied."""
    flavor = job_config.model.flavor
    values = vars(FLAVORS[flavor]) | {"vocab_size": build_speech_tokenizer(job_config).vocabulary.size}
    names = {field.name for field in dataclasses.fields(TransformerModelArgs)}
    stock = TransformerModelArgs(**{name: value for name, value in values.items() if name in names})
    spec = dataclasses.replace(
        get_train_spec("llama_mimi"),
        model_cls=Transformer,
        model_args={flavor: stock},
        parallelize_fn=parallelize_llama,
        build_tokenizer_fn=build_speech_tokenizer,  # skip the checks of a run
        build_optimizers_fn=build_optimizers,
        build_loss_fn=build_cross_entropy_loss,
        build_metrics_processor_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec("stock", spec)
    job_config.model.name = "stock"


def llama_loop(job_config: Any, method: str) -> Step:
    """Return a training step of `LlamaForCausalLM`. A sequence is one padded clip, with or without attention mask."""
    tokenizer = build_speech_tokenizer(job_config)
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_config(model_args(job_config))).to(DEVICE)
    clips = clips_in_order(job_config)
    B, L = job_config.training.local_batch_size, job_config.training.seq_len

    def loss() -> tuple[torch.Tensor, int, int]:
        inputs_BL = torch.zeros(B, L, dtype=torch.long)
        labels_BL = torch.full((B, L), IGNORE_INDEX)
        for row in range(B):
            ids_L = tokenizer.encode(torch.from_numpy(next(clips)), is_cut=False)[:L]
            inputs_BL[row, : len(ids_L)] = ids_L
            labels_BL[row, 2 : len(ids_L)] = ids_L[2:]
        mask_BL = (torch.arange(L) < (labels_BL != IGNORE_INDEX).sum(dim=1, keepdim=True) + 2).long().to(DEVICE)
        inputs = {"input_ids": inputs_BL.to(DEVICE), "attention_mask": None if method == UNMASKED else mask_BL}
        output = model(**inputs, labels=labels_BL.to(DEVICE), use_cache=False)
        return output.loss, int((labels_BL != IGNORE_INDEX).sum()), labels_BL.numel()

    return plain_step(list(model.parameters()), loss)


def plain_step(weights: list[torch.Tensor], loss: Callable[[], tuple[torch.Tensor, int, int]]) -> Step:
    """Return a step of AdamW. ``loss()`` returns a batch's loss, number of useful tokens, and number of positions."""
    optimizer = torch.optim.AdamW(weights, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step() -> tuple[int, int]:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            value, *counts = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return counts[0], counts[1]

    return step


def clips_in_order(job_config: Any) -> Iterator[np.ndarray]:
    """Return an endless iterator over the codes of all clips, always in the same random order."""
    table = pq.read_table(f"{job_config.training.dataset}/shard-000000.parquet", columns=["codes"])
    codes = [np.stack(clip)[:, :NUM_QUANTIZERS] for clip in table["codes"].to_numpy()]
    return (codes[index] for index in itertools.cycle(np.random.default_rng(0).permutation(len(codes))))


def model_args(job_config: Any) -> LlamaMimiArgs:
    """Return the model arguments of a job, including its vocabulary size."""
    args = copy(FLAVORS[job_config.model.flavor])
    args.update_from_config(job_config)
    return args


def measure_loss(method: str) -> int:
    """Return the peak memory of the loss, forward and backward, in bytes."""
    N, vocabulary = LOSS_POSITIONS, AudioVocabulary(LLAMA_3_VOCABULARY, 2048, 4)
    hidden_ND, weight_VD = loss_inputs(N, 2048, vocabulary, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_bytes()
    loss_of(method, hidden_ND, weight_VD, vocabulary).backward()
    return memory_bytes() - before


def loss_inputs(N: int, D: int, vocabulary: AudioVocabulary, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random hidden states (N, D) and a random output matrix (V, D), which require gradients."""
    hidden_ND = torch.randn(N, D, device=DEVICE, dtype=dtype, requires_grad=True)
    return hidden_ND, torch.empty(vocabulary.size, D, device=DEVICE, dtype=dtype).normal_(std=0.02).requires_grad_()


def loss_of(method: str, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, vocabulary: AudioVocabulary) -> torch.Tensor:
    """Return the loss, summed over positions. Method "in chunks" is the loss of this trainer."""
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.randint(vocabulary.base, vocabulary.audio_start_id, (len(hidden_ND),), generator=generator)
    targets_N = targets_N.to(DEVICE)
    if method == "in chunks":
        ones_N = torch.ones(len(hidden_ND), device=DEVICE)
        logits = pending_logits(hidden_ND[None], weight_VD)
        return cross_entropy(logits, vocabulary_targets(targets_N, vocabulary), ones_N)[0]
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), targets_N, reduction="sum")


def write_profile(step: Step, path: Path) -> None:
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=40))


def synchronized_time() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes() -> int:
    """Return the peak memory of this process, in bytes: allocated memory on a GPU, resident memory on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
