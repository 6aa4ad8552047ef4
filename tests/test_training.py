"""The trainer on CPU ranks, compared with a plain loop, with a resumed run, and with a golden run.

Regenerate the golden curve after an intended change:

    uv run pytest tests/test_training.py -k golden --regenerate-golden
"""

import copy
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import ROOT, TINY, next_command
from forked_ranks import ForkedRanks
from simulated import write_codes
from torch.optim import AdamW
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CsmForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from llama_mimi.checkpoint.conversion import convert_checkpoint, prepare_base_model
from llama_mimi.checkpoint.csm import csm_args, csm_config, csm_state
from llama_mimi.checkpoint.dcp import load_model_state
from llama_mimi.checkpoint.storage import check_step
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.build import build_dataloader
from llama_mimi.generation.continuation import continue_codes
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS
from llama_mimi.report.curves import read_curves
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.config_file import parse_config

GOLDEN = Path(__file__).parent / "golden" / "tiny_loss.json"
LOSS = "loss_metrics/global_avg_loss"
HIERARCHICAL = {"model.architecture": "hierarchical", "model.depth_train_fraction": 0.25, "data.packing": "pack"}
SCHEDULE = {"lr_scheduler.total_steps": 420}  # as in the first command of the README


def flags_of(dump_folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the flags of a tiny run that logs every step and has no validation."""
    common = {"job.config_file": ROOT / "config/tiny.toml", "job.dump_folder": dump_folder}
    return to_cli_args({**common, "metrics.log_freq": 1, "validation.enable": False, **settings})


def start(num_ranks: int, dump_folder: Path, settings: dict[str, Any], **own: Any) -> ForkedRanks:
    command = ["-m", "llama_mimi.train", *flags_of(dump_folder, settings)]
    return ForkedRanks(num_ranks, command, dump_folder / "log.txt", **own)


def train(num_ranks: int, dump_folder: Path, settings: dict[str, Any], **own: Any) -> dict[int, float]:
    ranks = start(num_ranks, dump_folder, settings, **own)
    assert ranks.wait() == 0, ranks.output[-4000:]
    return losses(dump_folder)


def losses(dump_folder: Path, tag: str = LOSS) -> dict[int, float]:
    return read_curves(dump_folder).get(tag, {})


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    """20 steps of the run in the README, with checkpoints at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("golden")
    train(2, folder, {**SCHEDULE, "training.steps": 20, "checkpoint.interval": 10})
    return folder


def test_the_log_of_a_run(golden_run):
    """Its start fits a screen of 24 lines with 100 columns, and its end names the next command."""
    log = (golden_run / "log.txt").read_text()
    start, step, _ = log.partition("step: 1/20")
    assert step and sum(-(-len(line) // 100) for line in start.splitlines()) <= 24
    assert "WARNING" not in log and "Warning" not in log
    folders = f"--checkpoint {golden_run}/checkpoint --output_dir models/{golden_run.name}"
    assert log.splitlines()[-1].startswith("next: ")
    assert next_command(log) == f"python scripts/convert_dcp_to_hf.py {folders}"


def test_golden_loss_curve(golden_run, pytestconfig):
    measured = losses(golden_run)
    if pytestconfig.getoption("--regenerate-golden"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(measured, indent=1) + "\n")
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text()).items()}
    assert measured.keys() == golden.keys() == set(range(1, 21))
    assert measured == pytest.approx(golden, abs=5e-3)  # the order of additions depends on the CPU
    assert measured[20] < measured[1] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, HIERARCHICAL], ids=["flattened", "hierarchical"])
def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, variant):
    """The run has gradient accumulation, two loader workers and asynchronous checkpoints."""
    settings = {"training.steps": 4, "checkpoint.interval": 2, "checkpoint.async_mode": "async", **variant}
    settings |= {"training.local_batch_size": 2, "training.global_batch_size": 8, "training.dataloader.num_workers": 2}
    whole = train(2, tmp_path / "whole", settings)
    killed = tmp_path / "killed"
    ranks = start(2, killed, settings)
    deadline = time.monotonic() + 240
    try:
        while not (killed / "checkpoint" / "step-2" / ".metadata").exists():
            assert ranks.is_running() and time.monotonic() < deadline, ranks.output[-4000:]
            time.sleep(0.05)
    finally:
        ranks.kill()
    assert not (killed / "checkpoint" / "step-4").exists(), "it was killed too late"
    shutil.rmtree(killed / "tb")  # read only values that were logged after the kill
    resumed = train(2, killed, settings)
    assert resumed.keys() == {3, 4}, "it did not start after the checkpoint"
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)


def test_a_run_goes_on_on_other_ranks(golden_run, tmp_path):
    """A checkpoint of two ranks continues on one and on three ranks."""
    for num_ranks, steps in ((1, 22), (3, 24)):
        folder = shutil.copytree(golden_run, tmp_path / f"{num_ranks}")
        shutil.rmtree(folder / "tb")
        resumed = train(num_ranks, folder, {**SCHEDULE, "training.steps": steps})
        assert resumed.keys() == set(range(21, steps + 1)) and max(resumed.values()) < 7.2
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-20", f"step-{steps}"]
        # A rank reads two clips per step. The first 20 steps had two ranks.
        assert losses(folder, "data/clips_seen") == {step: 80 + 2 * num_ranks * (step - 20) for step in resumed}


def test_a_flipped_bit_ends_a_resumed_run(golden_run, tmp_path):
    folder = shutil.copytree(golden_run, tmp_path / "run")
    path = folder / "checkpoint" / "step-20" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ranks = start(2, folder, {**SCHEDULE, "training.steps": 21})
    assert ranks.wait() == 1 and "Traceback" not in ranks.output
    assert f"error: '{path}' is damaged: a checksum does not match" in ranks.output
    assert f"use the last good step '{folder / 'checkpoint' / 'step-10'}'" in ranks.output


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_a_full_disk_keeps_the_steps_before(mode, golden_run, tmp_path):
    folder = shutil.copytree(golden_run, tmp_path / "run")
    settings = {"training.steps": 23, "checkpoint.interval": 22, "checkpoint.keep_latest_k": 0}
    ranks = start(2, folder, {**SCHEDULE, **settings, "checkpoint.async_mode": mode}, set_up=no_large_files)
    assert ranks.wait() == 1 and "Traceback" not in ranks.output
    assert f"error: '{folder}' cannot be used (File too large); " in ranks.output
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-10", "step-20"]
    check_step(folder / "checkpoint" / "step-20", verify=True)


def no_large_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A Llama with random weights and the extended vocabulary, as from scripts/prepare_base_model.py."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4)
    config = LlamaConfig.from_pretrained(TINY / "llama")
    config.vocab_size = tokenizer.vocabulary.size
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.text_tokenizer.save_pretrained(folder)
    return folder


def assert_equals_plain_loop(
    run: Path, num_ranks: int, base: Path, settings: dict[str, Any], loss_of: Callable | None = None, tp: int = 1
) -> LlamaForCausalLM:
    """Compare the loss of each step with a plain loop over a model of Hugging Face; return this model."""
    measured = train(num_ranks, run, settings_of(base) | settings | {"parallelism.tensor_parallel_degree": tp})
    ranks, model, optimizer = plain_loop(base, settings, num_ranks // tp)
    for step in range(1, settings["training.steps"] + 1):
        loss = (loss_of or plain_loss)(model, [next(batches) for batches in ranks])
        plain_step(model, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step
    return model


def settings_of(base: Path) -> dict[str, Any]:
    """Return the settings of a run with initial weights from a folder and a constant learning rate."""
    return {
        "model.hf_assets_path": base,
        "checkpoint.initial_load_in_hf": True,
        "optimizer.lr": 5e-4,  # at 3e-3, rounding errors reach 1.3e-4 on some CPUs
        "lr_scheduler.warmup_steps": 0,
        "lr_scheduler.decay_ratio": 0.0,
    }


def plain_loop(base: Path, settings: dict[str, Any], dp_world_size: int) -> tuple[list, LlamaForCausalLM, AdamW]:
    """Return iterators over the batches of every rank, a model of Hugging Face, and its optimizer."""
    job_config = parse_config(flags_of(Path("none"), settings_of(base) | settings))
    tokenizer = load_speech_tokenizer(str(base), str(TINY / "mimi"), 4)
    ranks = [iter(build_dataloader(dp_world_size, rank, tokenizer, job_config)) for rank in range(dp_world_size)]
    model = LlamaForCausalLM.from_pretrained(base)
    return ranks, model, adamw(model)


def adamw(model: torch.nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def plain_loss(model: LlamaForCausalLM, batches: list) -> torch.Tensor:
    """Return the mean loss over the targets of all ranks, computed from all logits."""
    inputs_BL = torch.cat([inputs["input"] for inputs, _ in batches])
    labels_BL = torch.cat([labels_BL for _, labels_BL in batches])
    logits_BLV = model(inputs_BL).logits
    assert logits_BLV.shape[-1] == model.config.vocab_size
    return F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX)


def plain_step(model: torch.nn.Module, optimizer: AdamW, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [{"training.steps": 20, "training.local_batch_size": 2}, {"training.steps": 2, "data.tasks": "tts"}],
    ids=["audio", "tts"],
)
def test_a_run_equals_a_plain_loop_over_hugging_face(base_model, tmp_path, settings):
    assert_equals_plain_loop(tmp_path, 1, base_model, settings)


@pytest.mark.slow
def test_torchtitans_entry_point_is_the_same_trainer(base_model, tmp_path):
    """TorchTitan's entry point also prepares runs: it loads initial weights despite an empty checkpoint folder."""
    program = tmp_path / "torchtitan_train.py"  # on a GPU `-m torchtitan.train`
    program.write_text(
        "import runpy\nfrom llama_mimi.common.cpu import use_cpu_without_gpu\n"
        "use_cpu_without_gpu()\nrunpy.run_module('torchtitan.train', run_name='__main__')\n"
    )
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    flags = flags_of(tmp_path / "run", settings_of(base_model) | {"training.steps": 1})

    def run(*own):
        command = [*torchrun, program, *flags, *own]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)

    done = run("--data.max_skip_fraction", "2")
    assert done.returncode == 1 and "error: data.max_skip_fraction is 2.0; set a fraction" in done.stderr
    assert "UserError" not in done.stdout + done.stderr
    done = run()
    assert done.returncode == 0, done.stderr[-4000:]
    (batches,), model, _ = plain_loop(base_model, {}, dp_world_size=1)
    loss = plain_loss(model, [next(batches)])
    assert losses(tmp_path / "run") == {1: pytest.approx(loss.item(), abs=1e-4)}


def test_without_text_from_the_base_model_to_a_converted_one(base_model, tmp_path):
    """Preparation, training and conversion with ``model.vocabulary = "audio"`` equal a model of Hugging Face."""
    prepared, run, converted = (tmp_path / name for name in ("prepared", "run", "converted"))
    prepare_base_model(str(base_model), prepared, codec=str(TINY / "mimi"), vocabulary="audio")
    settings = {"model.vocabulary": "audio", "checkpoint.last_save_model_only": True, "training.steps": 4}
    model = assert_equals_plain_loop(run, 2, prepared, settings)
    assert model.config.vocab_size == 3 + 4 * 256 + 2

    convert_checkpoint(run / "checkpoint", converted)
    ids_1L = AutoTokenizer.from_pretrained(converted)("<audio><3_0><5_1><7_2><9_3>", return_tensors="pt").input_ids
    assert ids_1L.tolist() == [[0, 1027, 3 + 12, 3 + 21, 3 + 30, 3 + 39]]
    stock = AutoModelForCausalLM.from_pretrained(converted)
    torch.testing.assert_close(stock(ids_1L).logits, model(ids_1L).logits, atol=1e-4, rtol=0)
    prompt_TQ = torch.tensor([[3, 5, 7, 9]])
    speech = load_speech_model(str(converted), device="cpu")
    (codes_TQ,) = continue_codes(speech, prompt_TQ, SamplingOptions(seconds=0.4))
    assert torch.equal(codes_TQ[:1], prompt_TQ)


def loss_of_clips(model: torch.nn.Module, batches: list) -> torch.Tensor:
    """Return the mean loss over the targets of packed batches, with a forward pass for each clip."""
    losses_of_clips, num_targets = [], 0
    for inputs, labels_BL in batches:
        for row, starts_L in enumerate(inputs["positions"] == 0):
            bounds = [*starts_L.nonzero().flatten().tolist(), len(starts_L)]
            for begin, end in itertools.pairwise(bounds):
                logits_LV = model(inputs["input"][row : row + 1, begin:end]).logits[0]
                labels_L = labels_BL[row, begin:end]
                num_targets += int((labels_L != IGNORE_INDEX).sum())
                loss = F.cross_entropy(logits_LV, labels_L, ignore_index=IGNORE_INDEX, reduction="sum")
                losses_of_clips.append(loss)
    assert len(losses_of_clips) > 2 * 2 * len(batches), "rows contain several clips"
    return torch.stack(losses_of_clips).sum() / num_targets


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_packed_ranks_equal_hugging_face_clip_by_clip(base_model, tmp_path, tp):
    """Packed rows under FSDP or tensor parallelism equal a separate forward pass for each clip."""
    settings = {"data.packing": "pack", "training.steps": 4}
    assert_equals_plain_loop(tmp_path, 2, base_model, settings, loss_of_clips, tp)


def test_hierarchical_ranks_equal_transformers(tmp_path):
    """8 steps of FSDP equal a plain loop over `CsmForConditionalGeneration` with the same initial weights.

    Clips are cut, so that they have no end: the end has one embedding here, but one embedding per level in CSM.
    """
    settings = {"model.architecture": "hierarchical", "data.max_audio_seconds": 0.8, "optimizer.lr": 5e-4}
    settings |= {"lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_ratio": 0.0, "training.steps": 8}
    job_config = parse_config(flags_of(tmp_path, settings))
    args = copy.copy(FLAVORS["tiny"])
    args.update_from_config(job_config)
    torch.manual_seed(0)
    model = build_model(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-0", no_dist=True)
    measured = train(2, tmp_path / "run", settings | {"checkpoint.initial_load_path": tmp_path / "step-0"})
    csm = CsmForConditionalGeneration(csm_config(args, codec=str(TINY / "mimi"), num_quantizers=4))
    csm.load_state_dict(csm_state(model.state_dict(), args), strict=False)
    csm.tie_weights()
    optimizer = adamw(csm)
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "llama", "hierarchical")
    ranks = [iter(build_dataloader(2, rank, tokenizer, job_config)) for rank in range(2)]
    for step in range(1, 9):
        batches = [next(rank) for rank in ranks]
        inputs_BLQ = torch.cat([inputs["input"] for inputs, _ in batches])
        labels_BLQ = torch.cat([labels_BLQ for _, labels_BLQ in batches])
        is_frame_BL = inputs_BLQ[..., 1] >= 0
        frames_BLD = csm.backbone_model.embed_tokens(tokenizer.vocabulary.entries(inputs_BLQ))
        text_BLD = csm.embed_text_tokens(inputs_BLQ[..., 0])
        embedded_BLD = torch.where(is_frame_BL[..., None], frames_BLD, text_BLD)
        hidden_BLD = csm.backbone_model(inputs_embeds=embedded_BLD).last_hidden_state
        is_target_BL = labels_BLQ[..., 0] != IGNORE_INDEX
        codes_NQ = tokenizer.vocabulary.entries(labels_BLQ[is_target_BL])
        assert codes_NQ.max() < 256, "no clip ends"
        level_0_NV = csm.lm_head(hidden_BLD[is_target_BL])
        depth_NqV = csm.depth_decoder(
            input_ids=F.pad(codes_NQ[:, :-1], (1, 0)), backbone_last_hidden_state=hidden_BLD[is_target_BL]
        ).logits
        loss = F.cross_entropy(torch.cat([level_0_NV[:, None], depth_NqV], 1).flatten(0, 1), codes_NQ.flatten())
        plain_step(csm, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step


def test_a_llama_is_where_a_hierarchical_run_begins(base_model, tmp_path):
    """A hierarchical run loads the weights of a Llama on two ranks; a learning rate of zero keeps them."""
    own = {"model.architecture": "hierarchical", "training.steps": 1, "optimizer.lr": 0.0}
    train(2, tmp_path, settings_of(base_model) | own)
    args = csm_args(AutoConfig.from_pretrained(tmp_path / "hf_assets"))
    theirs = csm_state(load_model_state(tmp_path / "checkpoint" / "step-1", args), args)
    llama = LlamaForCausalLM.from_pretrained(base_model).state_dict()
    assert torch.equal(theirs["embed_text_tokens.weight"], llama["model.embed_tokens.weight"])
    names = [name.removeprefix("model.") for name in llama if name.startswith(("model.layers.", "model.norm."))]
    assert len(names) > 30 and all(torch.equal(theirs[f"backbone_model.{n}"], llama[f"model.{n}"]) for n in names)


def write_random_codes(folder: Path, num_clips: int, seed: int) -> Path:
    codes = np.random.default_rng(seed).integers(0, 32, (num_clips, 10, 8)).astype(np.uint16)
    clips = [CodedClip(f"{number}", codes_TQ, 0.8, False) for number, codes_TQ in enumerate(codes)]
    write_codes(folder, str(TINY / "mimi"), [clips])
    return folder


@pytest.fixture(scope="module")
def overfitting(tmp_path_factory):
    """Settings of a run that overfits, and two runs: one with an early stop, and one without that swaps the corpora."""
    folder = tmp_path_factory.mktemp("overfitting")
    sizes = {"training": 4, "old": 3, "new": 4}
    training, old, new = (write_random_codes(folder / name, sizes[name], seed) for seed, name in enumerate(sizes))
    settings = {"training.dataset": training, "training.seq_len": 64, "training.steps": 14, "data.shuffle_window": 1}
    settings |= {"optimizer.lr": 6e-3, "lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_ratio": 0.0}
    settings |= {"validation.enable": True, "validation.seq_len": 64, "validation.freq": 2, "checkpoint.interval": 2}
    settings |= {"checkpoint.keep_latest_k": 4, "checkpoint.async_mode": "async"}
    train(2, folder / "whole", settings | {"validation.dataset": f"{old},{new}"})
    settings |= {"validation.dataset": f"{new},{old}", "validation.patience": 3}
    train(2, folder / "stopped", settings)
    return settings, folder / "whole", folder / "stopped"


def validations(folder: Path) -> dict[str, dict[int, float]]:
    """Return the curve of each corpus in validation.json."""
    steps = json.loads((folder / "validation.json").read_text())
    return {name: {int(step): found[name]["loss"] for step, found in steps.items()} for name in ("new", "old")}


def test_an_early_stop_is_at_the_step_that_the_losses_give(overfitting):
    """The losses of both corpora are those of a run that validates them in another order. All checkpoints are saved."""
    _, whole, stopped = overfitting
    losses_of_new = losses(whole, "validation_metrics/new/loss")
    best, end = None, None
    for step in range(2, 15, 2):
        if best is None or losses_of_new[step] < losses_of_new[best]:
            best = step
        elif end is None and step == best + 3 * 2:
            end = step
    assert 2 < best < end < 14, losses_of_new
    assert losses(stopped) == pytest.approx({step: losses(whole)[step] for step in range(1, end + 1)}, abs=1e-4)
    steps = [1, *range(2, end + 1, 2)]
    for other, own, name in (("", "old/", "old"), ("new/", "", "new")):
        curve = losses(stopped, f"validation_metrics/{own}loss")
        assert validations(stopped)[name] == pytest.approx(curve, rel=1e-6)
        reference = losses(whole, f"validation_metrics/{other}loss")
        assert curve == pytest.approx({step: reference[step] for step in steps}, abs=1e-4)
        tag = "validation_admissible_bits_per_audio_second/"
        reference = losses(whole, f"{tag}{other}level_3")
        assert losses(stopped, f"{tag}{own}level_3") == pytest.approx({s: reference[s] for s in steps}, rel=1e-4)
    saved = range(end - 6, end + 1, 2)  # keep_latest_k is 4
    assert {path.name for path in (stopped / "checkpoint").iterdir()} == {f"step-{step}" for step in saved}
    log = (stopped / "log.txt").read_text()
    assert f"training stops at step {end}: the loss on new has not become lower since step {best}; set a " in log
    assert f"validate step: {end}  old  loss: " in log and f"validate step: {end}  loss: " in log
    assert f"--checkpoint {stopped}/checkpoint/step-{best} --output_dir" in next_command(log)


@pytest.mark.parametrize(("state", "steps"), [("stopped", 0), ("not validated", 0), ("not saved", 2)])
def test_an_early_stop_does_not_depend_on_kills(overfitting, tmp_path, state, steps):
    """A stopped run does not continue. A run that is killed during its last ``steps`` has the same stop and losses."""
    settings, _, stopped = overfitting
    run = shutil.copytree(stopped, tmp_path / "stopped")
    shutil.rmtree(run / "tb")
    saved = json.loads((run / "validation.json").read_text())
    end = int(max(saved, key=int))
    if state == "not validated":
        del saved[str(end)]
        (run / "validation.json").write_text(json.dumps(saved))
    elif state == "not saved":  # for example with --checkpoint.load_step; the last validation is of the earlier attempt
        shutil.rmtree(run / "checkpoint" / f"step-{end}")
    assert train(2 if steps else 1, run, settings).keys() == set(range(end - steps + 1, end + 1))
    for name, curve in validations(stopped).items():
        assert validations(run)[name] == pytest.approx(curve, abs=1e-4)
    assert (run / "checkpoint" / f"step-{end}" / ".metadata").is_file()
    first, again = ((folder / "log.txt").read_text() for folder in (stopped, run))
    assert f"training stops at step {end}: " in again
    assert next_command(again) == next_command(first).replace(str(stopped), str(run))
