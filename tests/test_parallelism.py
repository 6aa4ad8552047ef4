"""Ten steps under every parallelism that CPUs can run are those of one process, in losses and gradient norms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY
from forked_ranks import run_ranks
from simulated import write_codes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mimi.data.code_store import CodedClip
from llama_mimi.model import cross_entropy
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

pytestmark = pytest.mark.distributed

STEPS, GLOBAL_BATCH = 10, 8
LOSS, NORM, VALIDATION = "loss_metrics/global_avg_loss", "grad_norm", "validation_metrics/loss"
FSDP = "--parallelism.data_parallel_shard_degree"
HSDP = "--parallelism.data_parallel_replicate_degree"
TP = "--parallelism.tensor_parallel_degree"
BITS = [f"{prefix}admissible_bits_per_audio_second/all" for prefix in ("", "validation_")]
BATCH = "--training.local_batch_size"
AUDIO = ["--model.vocabulary", "audio"]
UNTIED = ["--model.flavor", "tiny_untied"]
HIERARCHICAL = [
    "--model.architecture",
    "hierarchical",
    "--model.depth_train_fraction",
    "0.5",
    "--loss.level_weights",
    "4,2,1,1",
]
FLOAT8 = "FSDP, float8 emulated"
BFLOAT16 = "FSDP, bfloat16"
LOOSE = {FLOAT8: ({"rel": 5e-3}, {"rel": 0.3}), BFLOAT16: ({"rel": 1e-3}, {"rel": 0.05})}  # losses, gradient norms
# name: ranks, flags; what is not one process alone is compared with the first run of the same model
RUNS = {
    "one process": (1, [BATCH, "8"]),
    "gradient accumulation": (1, [BATCH, "2", "--training.global_batch_size", "8"]),
    "selective checkpointing, compiled blocks": (
        1,
        [BATCH, "8", "--activation_checkpoint.mode", "selective", "--compile.enable", "--compile.backend", "aot_eager"],
    ),
    FLOAT8: (
        2,
        [BATCH, "4", "--model.converters", "quantize.linear.float8", "--quantize.linear.float8.emulate"],
    ),
    BFLOAT16: (2, [BATCH, "4", "--training.mixed_precision_param", "bfloat16"]),
    "FSDP": (2, [BATCH, "4"]),
    "FSDP, gradient accumulation": (2, [BATCH, "2", "--training.global_batch_size", "8"]),
    "TP": (2, [BATCH, "8", TP, "2"]),
    "FSDP, more ranks than key heads": (4, [BATCH, "2"]),
    "HSDP": (4, [BATCH, "2", HSDP, "2", FSDP, "2"]),
    "FSDP x TP": (4, [BATCH, "4", FSDP, "2", TP, "2"]),
    "without text: one process": (1, [*AUDIO, BATCH, "8"]),
    "without text: TP": (2, [*AUDIO, BATCH, "8", TP, "2"]),
    "untied: one process": (1, [*UNTIED, BATCH, "8"]),
    "untied: FSDP, resharded": (2, [*UNTIED, BATCH, "4", "--parallelism.fsdp_reshard_after_forward", "always"]),
    "untied: TP": (2, [*UNTIED, BATCH, "8", TP, "2"]),
    "hierarchical: one process": (1, [*HIERARCHICAL, BATCH, "8"]),
    "hierarchical: selective checkpointing, compiled blocks, gradient accumulation": (
        1,
        [
            *HIERARCHICAL,
            *(BATCH, "4", "--training.global_batch_size", "8"),
            *("--activation_checkpoint.mode", "selective", "--compile.enable", "--compile.backend", "aot_eager"),
        ],
    ),
    "hierarchical: FSDP": (2, [*HIERARCHICAL, BATCH, "4"]),
    "hierarchical: HSDP": (4, [*HIERARCHICAL, BATCH, "2", HSDP, "2", FSDP, "2"]),
}
# What is compared by default; the others are of the full test run.
QUICK = {
    "FSDP, gradient accumulation",
    "TP",
    "hierarchical: FSDP",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """The runs, each in a folder of its own, on eight clips that are one global batch."""
    folder = tmp_path_factory.mktemp("parallelism")
    write_eight_clips(folder / "codes")
    for base, vocabulary in (("tied", "llama"), ("untied", "llama"), ("without text", "audio")):
        tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, vocabulary)
        config = LlamaConfig.from_pretrained(TINY / "llama")
        config.update({"vocab_size": tokenizer.vocabulary.size, "tie_word_embeddings": base != "untied"})
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "base" / base)
        tokenizer.text_tokenizer.save_pretrained(folder / "base" / base)
    save_hierarchical(folder / "seed" / "step-0")
    common = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--checkpoint.interval": 100,
        "--training.dataset": folder / "codes",
        "--data.shuffle_window": 2,
        "--training.seq_len": 64,
        "--training.steps": STEPS,
        "--lr_scheduler.warmup_steps": 0,
        "--optimizer.lr": 2e-4,  # Adam turns rounding of small gradients into steps of this size
        "--metrics.log_freq": 1,
        # Of two ranks one has a batch more than the other.
        "--validation.dataset": folder / "codes",
        "--data.validation_clips": 7,
        "--validation.local_batch_size": 1,
        "--validation.seq_len": 64,
        "--validation.freq": STEPS,
    }
    for name in runs_of(request.session.items):
        num_ranks, flags = RUNS[name]
        base = {"hierarchical": "tied"}.get(base_of(name), base_of(name))
        own = {"--job.dump_folder": folder / name, "--model.hf_assets_path": folder / "base" / base}
        words = [str(word) for item in (common | own).items() for word in item]
        initial = ["--checkpoint.initial_load_in_hf"]
        if base_of(name) == "hierarchical":  # a Llama's folder has no depth decoder
            initial = ["--checkpoint.initial_load_path", str(folder / "seed" / "step-0")]
        command = ["-m", "llama_mimi.train", *words, *initial, *flags]
        run_ranks(num_ranks, command, folder / name / "log.txt", set_up)
    return folder


def runs_of(items):
    """The runs that the tests to come compare, and what they are compared with."""
    here = [item for item in items if item.path == Path(__file__) and "name" in item.fixturenames]
    names = [item.callspec.params["name"] for item in here]
    return list(dict.fromkeys(name for compared in names for name in (one_process(compared), compared)))


def one_process(name: str) -> str:
    """The run of the same model in one process."""
    return "one process" if base_of(name) == "tied" else f"{base_of(name)}: one process"


def set_up():
    FLAVORS["tiny_untied"] = replace(FLAVORS["tiny"], enable_weight_tying=False)
    # Several chunks a step; by the 515 rows that the first of two ranks has of 1,029 and by the second's 514 they would
    # be of other sizes.
    cross_entropy.CHUNK_BYTES, cross_entropy.CHUNK_MULTIPLE = 4 * 514 * 127, 1


def save_hierarchical(step):
    """First weights, which every run of that architecture loads."""
    torch.manual_seed(0)
    args = replace(
        FLAVORS["tiny"],
        architecture="hierarchical",
        enable_weight_tying=False,
        vocab_size=1538,
        num_quantizers=4,
        codebook_size=256,
        max_seq_len=64,
    )
    model = build_model(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=step, no_dist=True)


def write_eight_clips(folder):
    """Of random codes in four shards, so that four ranks have row groups of their own."""
    generator = np.random.default_rng(0)
    shards = []
    for name in ("a", "b", "c", "d"):
        codes = [generator.integers(0, 256, (T, 8)).astype(np.uint16) for T in generator.integers(5, 15, 2)]
        shards.append(
            [CodedClip(f"{name}{i}", codes_TQ, len(codes_TQ) / 12.5, False) for i, codes_TQ in enumerate(codes)]
        )
    write_codes(folder, str(TINY / "mimi"), shards)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in RUNS
        if not name.endswith("one process")
    ],
)
def test_ten_steps_equal_one_process(folder, name):
    one = read(folder, one_process(name))
    found = read(folder, name)
    loss, norm = LOOSE.get(name, ({"abs": 1e-4}, {"rel": 1e-3}))
    assert len(one[LOSS]) == len(one[NORM]) == STEPS
    assert found[LOSS] == pytest.approx(one[LOSS], **loss)
    assert found[NORM] == pytest.approx(
        one[NORM], **norm
    )  # clipping and Adam would hide a wrong scale of the gradients
    assert len(one[VALIDATION]) == 2
    assert found[VALIDATION] == pytest.approx(one[VALIDATION], **loss)
    for bits in BITS:
        assert one[bits] and found[bits] == pytest.approx(one[bits], rel=loss.get("rel", 1e-4))


def base_of(name: str) -> str:
    """The model of a run: what its name begins with."""
    return name.split(":")[0] if ":" in name else "tied"


def read(folder, name) -> dict[str, list[float]]:
    (logs,) = [path for path in (folder / name / "tb").rglob("events*") if path.is_file()]
    events = EventAccumulator(str(logs))
    events.Reload()
    tags = {LOSS, NORM, VALIDATION, *BITS} & set(events.Tags()["scalars"])
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
