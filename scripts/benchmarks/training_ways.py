"""One way to train at one shape, measured in a process of its own; see bench_train.py.

The plain loop and TorchTitan's own Llama 3 are written here only.
"""

import copy
import dataclasses
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mimi.train import Trainer  # first, as TorchTitan looks for its device when it is imported

# isort: split

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from measuring import DEVICE
from simulated import random_clips, speech_lengths, write_codes
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from transformers import CsmForConditionalGeneration, LlamaForCausalLM, MimiConfig

from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import LLAMA_3_VOCABULARY, write_tokenizer
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.model.architectures import build_model
from llama_mimi.model.cross_entropy import audio_targets, cross_entropy, pending_logits
from llama_mimi.model.llama import FLAVORS, LLAMA_3_2_ROPE, LlamaMimiArgs, depth_args
from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.tokens.vocabulary import AudioVocabulary
from llama_mimi.train_spec import build_speech_tokenizer
from llama_mimi.training.config_file import parse_config

NUM_QUANTIZERS = 4
LOSS_POSITIONS = {"cpu": 4096, "cuda": 32_768}[DEVICE]
WARM_UP = {"cpu": 2, "cuda": 5}[DEVICE]  # steps: compilation, also for another number of clips, and allocations
# What torchrun tells the one process that it starts.
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


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
            depth=depth_args(dim=256, n_layers=2, n_heads=4, n_kv_heads=1, ffn_dim=2048),
        ),
        512,
        2048,
        1024,
        2,
        13.4,
        6,
    ),
    "1B": Shape(FLAVORS["1B"], LLAMA_3_VOCABULARY, 2048, 1024, 16, 13.4, 20),
    "8B": Shape(FLAVORS["8B"], LLAMA_3_VOCABULARY, 2048, 1024, 4, 13.4, 20),
}
PLAIN, UNMASKED, STOCK, OURS = "plain loop", "plain loop without its mask", "TorchTitan's Llama 3", "this trainer"
PLAIN_CSM, OURS_CSM = "plain loop over CSM", "this trainer, hierarchical"


def measure(shape: str, folder: str, way: str, options: str, num_layers: int, profile: str | None = None) -> Any:
    """Useful tokens/s and peak memory of one way to train; None if the memory was not enough."""
    os.environ.update(ONE_RANK)
    FLAVORS[shape] = changed(SHAPES[shape].args, n_layers=num_layers)
    text_only = changed(FLAVORS[shape], vocab_size=SHAPES[shape].text_entries)
    hf_config(text_only).save_pretrained(Path(folder) / "llama")
    try:
        step, job_config = WAYS.get(way, plain_loop)(shape, Path(folder), way, options)
        for _ in range(WARM_UP):
            step()
        tokens, positions, start = 0, 0, seconds()
        for _ in range(SHAPES[shape].steps):
            useful, all_of_it = step()
            tokens, positions = tokens + useful, positions + all_of_it
        took = seconds() - start
        if profile:
            write_profile(step, Path(profile))
    except torch.OutOfMemoryError:
        return None
    return {
        "useful_tokens_per_s": tokens / took,
        "useful_share": tokens / positions,
        "flops_per_token": model_flops(shape, job_config),
        "flops_per_token_of_all_layers": model_flops(shape, job_config, SHAPES[shape].args.n_layers),
        "peak_memory_bytes": memory_bytes(),
    }


def trainer(shape: str, folder: Path, way: str, options: str) -> tuple[Callable[[], tuple[int, int]], Any]:
    """A step of TorchTitan's trainer, with this project's train spec or with the stock model and loss."""
    flags = training_flags(shape, folder, packed=way != STOCK)
    if way == OURS_CSM:
        flags += hierarchical_flags(shape)
    job_config = parse_config([*flags, *options.split()])
    if way == STOCK:
        register_stock(shape, job_config)
    built = Trainer(job_config)
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
    values = vars(args) | {"vocab_size": build_speech_tokenizer(job_config).vocabulary.size}
    names = {field.name for field in dataclasses.fields(TransformerModelArgs)}
    stock = TransformerModelArgs(**{name: value for name, value in values.items() if name in names})
    spec = dataclasses.replace(
        get_train_spec("llama_mimi"),
        model_cls=Transformer,
        model_args={shape: stock},
        parallelize_fn=parallelize_llama,
        build_optimizers_fn=build_optimizers,
        build_loss_fn=build_cross_entropy_loss,
        build_metrics_processor_fn=None,
    )
    register_train_spec("stock", spec)
    job_config.model.name = "stock"


def plain_loop(shape: str, folder: Path, way: str, options: str) -> tuple[Callable[[], tuple[int, int]], Any]:
    job_config = parse_config(training_flags(shape, folder, packed=False))
    tokenizer = build_speech_tokenizer(job_config)
    args = changed(FLAVORS[shape], vocab_size=tokenizer.vocabulary.size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_config(args)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    order = clips_in_order(folder)
    B, L = SHAPES[shape].batch_size, SHAPES[shape].seq_len

    def step() -> tuple[int, int]:
        inputs_BL = torch.zeros(B, L, dtype=torch.long)
        labels_BL = torch.full((B, L), IGNORE_INDEX)
        for row in range(B):
            ids_L = tokenizer.encode(torch.from_numpy(next(order)), is_cut=False)[:L]
            inputs_BL[row, : len(ids_L)] = ids_L
            labels_BL[row, 2 : len(ids_L)] = ids_L[2:]
        mask_BL = (torch.arange(L) < (labels_BL != IGNORE_INDEX).sum(dim=1, keepdim=True) + 2).long().to(DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            output = model(
                inputs_BL.to(DEVICE),
                attention_mask=None if way == UNMASKED else mask_BL,
                labels=labels_BL.to(DEVICE),
                use_cache=False,
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return int((labels_BL != IGNORE_INDEX).sum()), labels_BL.numel()

    return step, job_config


def csm_loop(shape: str, folder: Path, way: str, options: str) -> tuple[Callable[[], tuple[int, int]], Any]:
    """`CsmForConditionalGeneration` with its own loss, one clip a row, padding with its mask."""
    job_config = parse_config([*training_flags(shape, folder, packed=False), *hierarchical_flags(shape)])
    tokenizer = build_speech_tokenizer(job_config)
    args = changed(FLAVORS[shape])
    args.update_from_config(job_config)
    torch.manual_seed(0)
    model = CsmForConditionalGeneration(csm_config(args, codec=str(folder / "mimi"))).to(DEVICE)
    weights = [parameter for name, parameter in model.named_parameters() if not name.startswith("codec_model.")]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    order = clips_in_order(folder)
    B, L, K = SHAPES[shape].batch_size, job_config.training.seq_len, args.codebook_size
    head = torch.tensor(tokenizer.prefix_ids())

    def step() -> tuple[int, int]:
        labels_BLQ = torch.full((B, L, NUM_QUANTIZERS), IGNORE_INDEX)
        for row in range(B):
            frames_TQ = torch.from_numpy(next(order).astype(np.int64))
            frames_TQ = torch.cat([frames_TQ, torch.full((1, NUM_QUANTIZERS), K)])[: L - len(head)]
            labels_BLQ[row, len(head) : len(head) + len(frames_TQ)] = frames_TQ
        labels_BLQ = labels_BLQ.to(DEVICE)
        is_frame_BL = labels_BLQ[..., 0] != IGNORE_INDEX
        mask_BL = is_frame_BL.long()
        mask_BL[:, : len(head)] = 1
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            embedded_BLD = model.backbone_model.embed_tokens(labels_BLQ.clamp(min=0))
            text_BnD = model.embed_text_tokens(head.to(DEVICE)).expand(B, -1, -1)
            inputs_BLD = torch.cat([text_BnD, embedded_BLD[:, len(head) :]], dim=1)
            output = model(inputs_embeds=inputs_BLD, attention_mask=mask_BL, labels=labels_BLQ, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return int(is_frame_BL.sum()) * NUM_QUANTIZERS, labels_BLQ.numel()

    return step, job_config


WAYS = {OURS: trainer, STOCK: trainer, OURS_CSM: trainer, PLAIN_CSM: csm_loop}


def clips_in_order(folder: Path) -> Iterator[np.ndarray]:
    """Codes of clips, shuffled once, without end."""
    table = pq.read_table(folder / "codes" / "shard-000000.parquet", columns=["codes"])
    codes = [np.stack(clip)[:, :NUM_QUANTIZERS] for clip in table["codes"].to_numpy()]
    return (codes[index] for index in itertools.cycle(np.random.default_rng(0).permutation(len(codes))))


def hierarchical_flags(shape: str) -> list[str]:
    """Rows of as much audio as those of tokens."""
    seq_len = SHAPES[shape].seq_len // NUM_QUANTIZERS
    return ["--model.architecture", "hierarchical", "--training.seq_len", str(seq_len)]


def training_flags(shape: str, folder: Path, *, packed: bool) -> list[str]:
    own = SHAPES[shape]
    precision = "bfloat16" if DEVICE == "cuda" else "float32"
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
        "training.dataloader.num_workers": int(DEVICE == "cuda"),  # as in the large configs
        "metrics.log_freq": 1_000_000,
    }
    return [*to_cli_args(flags), "--validation.no-enable", "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"]


def model_flops(shape: str, job_config: Any, num_layers: int | None = None) -> float:
    """Training FLOPs a token, of the model with its own vocabulary."""
    args = changed(FLAVORS[shape], n_layers=num_layers or FLAVORS[shape].n_layers)
    args.update_from_config(job_config)
    with torch.device("meta"):
        return args.get_nparams_and_flops(build_model(args), job_config.training.seq_len)[1]


def changed(args: LlamaMimiArgs, **values: Any) -> LlamaMimiArgs:
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def write_stand_ins(shape: str, folder: Path) -> None:
    """A tokenizer, a codec without weights, and codes of simulated lengths."""
    own = SHAPES[shape]
    write_tokenizer(folder / "llama", own.text_entries)
    MimiConfig(codebook_size=own.codebook_size).save_pretrained(folder / "mimi")
    (folder / "mimi" / "model.safetensors").touch()  # for codes only the codec's name and hash matter
    frames = np.maximum(1, (speech_lengths(2048) * (own.seconds_per_clip / 13.4)).astype(int))
    clips = random_clips(frames, MimiConfig(codebook_size=own.codebook_size))
    write_codes(folder / "codes", str(folder / "mimi"), [clips])


def measure_loss(way: str) -> dict[str, float]:
    N, dtype = LOSS_POSITIONS, torch.bfloat16 if DEVICE == "cuda" else torch.float32
    hidden_BLD = torch.randn(1, N, 2048, device=DEVICE, dtype=dtype, requires_grad=True)
    weight_VD = torch.empty(136_450, 2048, device=DEVICE, dtype=dtype).normal_(std=0.02).requires_grad_()
    targets_N = torch.randint(128_256, 128_256 + 4 * 2048, (N,), device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_bytes()
    if way == "in chunks":
        targets = audio_targets(targets_N, AudioVocabulary(128_256, 2048, 4))
        loss, *_ = cross_entropy(pending_logits(hidden_BLD, weight_VD), targets, torch.ones(N, device=DEVICE))
    else:
        loss = F.cross_entropy(F.linear(hidden_BLD, weight_VD).flatten(0, 1).float(), targets_N, reduction="sum")
    loss.backward()
    return {"bytes": memory_bytes() - before}


def write_profile(step: Callable[[], Any], path: Path) -> None:
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=40))


def seconds() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes() -> int:
    """The most that this process has held so far: on the GPU, or resident on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
