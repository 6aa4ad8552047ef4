"""Ten steps under every parallelism that CPUs support give the losses and gradient norms of one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY
from forked_ranks import run_ranks
from simulated import write_codes
from test_hierarchical import built
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.model import cross_entropy
from llama_mimi.model.llama import FLAVORS
from llama_mimi.report.curves import read_curves
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

STEPS = 10
LOSS, NORM, VALIDATION = "loss_metrics/global_avg_loss", "grad_norm", "validation_metrics/loss"
BITS = [f"{prefix}admissible_bits_per_audio_second/all" for prefix in ("", "validation_")]
BATCH = "--training.local_batch_size"
GLOBAL_BATCH = "--training.global_batch_size"
FSDP = "--parallelism.data_parallel_shard_degree"
HSDP = "--parallelism.data_parallel_replicate_degree"
TP = "--parallelism.tensor_parallel_degree"
COMPILED = "--activation_checkpoint.mode selective --compile.enable --compile.backend aot_eager"
FLOAT8, CONVERTER = "FSDP, float8 emulated", "quantize.linear.float8"
BFLOAT16 = "FSDP, bfloat16"
LOOSE = {FLOAT8: ({"rel": 5e-3}, {"rel": 0.3}), BFLOAT16: ({"rel": 1e-3}, {"rel": 0.05})}  # losses, gradient norms
# Flags of each model; all runs of a model are compared with its first run.
MODELS = {
    "tied": "",
    "without text": "--model.vocabulary audio",
    "untied": "--model.flavor tiny_untied",
    "text head": "--model.architecture hierarchical --data.tasks asr",
    "hierarchical": "--model.architecture hierarchical --model.depth_train_fraction 0.5 --loss.level_weights 4,2,1,1",
}
# (model, name): ranks, flags
RUNS = {
    ("tied", "one process"): (1, f"{BATCH} 8"),
    ("tied", "gradient accumulation"): (1, f"{BATCH} 2 {GLOBAL_BATCH} 8"),
    ("tied", "selective checkpointing, compiled blocks"): (1, f"{BATCH} 8 {COMPILED}"),
    ("tied", FLOAT8): (2, f"{BATCH} 4 --model.converters {CONVERTER} --{CONVERTER}.emulate"),
    ("tied", BFLOAT16): (2, f"{BATCH} 4 --training.mixed_precision_param bfloat16"),
    ("tied", "FSDP"): (2, f"{BATCH} 4"),
    ("tied", "FSDP, gradient accumulation"): (2, f"{BATCH} 2 {GLOBAL_BATCH} 8"),
    ("tied", "TP"): (2, f"{BATCH} 8 {TP} 2"),
    ("tied", "FSDP, more ranks than key heads"): (4, f"{BATCH} 2"),
    ("tied", "HSDP"): (4, f"{BATCH} 2 {HSDP} 2 {FSDP} 2"),
    ("tied", "FSDP x TP"): (4, f"{BATCH} 4 {FSDP} 2 {TP} 2"),
    ("without text", "one process"): (1, f"{BATCH} 8"),
    ("without text", "TP"): (2, f"{BATCH} 8 {TP} 2"),
    ("untied", "one process"): (1, f"{BATCH} 8"),
    ("untied", "FSDP, resharded"): (2, f"{BATCH} 4 --parallelism.fsdp_reshard_after_forward always"),
    ("untied", "TP"): (2, f"{BATCH} 8 {TP} 2"),
    ("text head", "one process"): (1, f"{BATCH} 8"),
    ("text head", "FSDP"): (2, f"{BATCH} 4"),
    ("hierarchical", "one process"): (1, f"{BATCH} 8"),
    ("hierarchical", "compiled blocks, gradient accumulation"): (1, f"{BATCH} 4 {GLOBAL_BATCH} 8 {COMPILED}"),
    ("hierarchical", "FSDP"): (2, f"{BATCH} 4"),
    ("hierarchical", "HSDP"): (4, f"{BATCH} 2 {HSDP} 2 {FSDP} 2"),
}
# Runs that are compared by default; the nightly tests compare all.
QUICK = {("tied", "FSDP, gradient accumulation"), ("tied", "TP"), ("hierarchical", "FSDP"), ("text head", "FSDP")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """All runs, on eight clips that are one global batch."""
    folder = tmp_path_factory.mktemp("parallelism")
    write_eight_clips(folder / "codes")
    for base, vocabulary in (("tied", "llama"), ("untied", "llama"), ("without text", "audio")):
        tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, vocabulary)
        config = LlamaConfig.from_pretrained(TINY / "llama")
        config.update({"vocab_size": tokenizer.vocabulary.size, "tie_word_embeddings": base != "untied"})
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "base" / base)
        tokenizer.text_tokenizer.save_pretrained(folder / "base" / base)
    save_hierarchical(folder / "seed" / "hierarchical" / "step-0")
    save_hierarchical(folder / "seed" / "text head" / "step-0", predicts_text=True, enable_weight_tying=True)
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
        # With two ranks, one rank has one batch more.
        "--validation.dataset": folder / "codes",
        "--data.validation_clips": 7,
        "--validation.local_batch_size": 1,
        "--validation.seq_len": 64,
        "--validation.freq": STEPS,
    }
    for model, name in runs_of(request.session.items):
        num_ranks, flags = RUNS[model, name]
        is_hierarchical = model in ("hierarchical", "text head")
        base = "tied" if is_hierarchical else model
        own = {"--job.dump_folder": folder / model / name, "--model.hf_assets_path": folder / "base" / base}
        words = [str(word) for item in (common | own).items() for word in item]
        initial = ["--checkpoint.initial_load_in_hf"]
        if is_hierarchical:  # a Llama has no depth decoder
            initial = ["--checkpoint.initial_load_path", str(folder / "seed" / model / "step-0")]
        command = ["-m", "llama_mimi.train", *words, *initial, *MODELS[model].split(), *flags.split()]
        run_ranks(num_ranks, command, folder / model / name / "log.txt", set_up)
    return folder


def runs_of(items):
    """Return the runs that the selected tests compare, including the runs in one process."""
    here = [item for item in items if item.path == Path(__file__) and "run" in item.fixturenames]
    runs = [item.callspec.params["run"] for item in here]
    return list(dict.fromkeys(one for model, name in runs for one in ((model, "one process"), (model, name))))


def set_up():
    FLAVORS["tiny_untied"] = replace(FLAVORS["tiny"], enable_weight_tying=False)
    # Each step has several chunks. Two ranks have 515 and 514 of 1,029 rows, so their chunk sizes would differ.
    cross_entropy.CHUNK_BYTES, cross_entropy.CHUNK_MULTIPLE = 4 * 514 * 127, 1


def save_hierarchical(step, **settings):
    """Save the initial weights of hierarchical runs."""
    model, _ = built("hierarchical", max_seq_len=64, **settings)
    dcp.save(model.state_dict(), checkpoint_id=step, no_dist=True)


def write_eight_clips(folder):
    """Write random codes in four shards, so that each of four ranks has a row group."""
    generator = np.random.default_rng(0)
    shards = []
    for name in ("a", "b", "c", "d"):
        codes = [generator.integers(0, 256, (T, 8)).astype(np.uint16) for T in generator.integers(5, 15, 2)]
        clips = enumerate(codes)
        shards.append([CodedClip(f"{name}{i}", one_TQ, len(one_TQ) / 12.5, False, f"text {i}") for i, one_TQ in clips])
    write_codes(folder, str(TINY / "mimi"), shards, ["text"])


PARAMS = [pytest.param(run, marks=[] if run in QUICK else pytest.mark.slow, id=": ".join(run)) for run in RUNS]


@pytest.mark.parametrize("run", [param for param in PARAMS if "one process" not in param.id])
def test_ten_steps_equal_one_process(folder, run):
    model, name = run
    one, found = (read_curves(folder / model / name) for name in ("one process", name))
    loss, norm = LOOSE.get(name, ({"abs": 1e-4}, {"rel": 1e-3}))
    assert len(one[LOSS]) == len(one[NORM]) == STEPS and len(one[VALIDATION]) == 2
    assert found[LOSS] == pytest.approx(one[LOSS], **loss)
    assert found[NORM] == pytest.approx(one[NORM], **norm)  # clipping and Adam would hide a wrong scale of gradients
    assert found[VALIDATION] == pytest.approx(one[VALIDATION], **loss)
    for bits in BITS if model != "text head" else ():
        assert one[bits] and found[bits] == pytest.approx(one[bits], rel=loss.get("rel", 1e-4))
