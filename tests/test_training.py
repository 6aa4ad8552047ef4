"""The trainer on CPU ranks, compared with a plain loop, with itself resumed, and with a golden run.

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
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import ROOT, TINY
from forked_ranks import ForkedRanks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
from llama_mimi.data.build import build_dataloader
from llama_mimi.generation.continuation import SamplingOptions, continue_codes
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.config_file import parse_config

pytestmark = pytest.mark.distributed
GOLDEN = Path(__file__).parent / "golden" / "tiny_loss.json"
LOSS = "loss_metrics/global_avg_loss"


def flags_of(dump_folder: Path, **overrides) -> list[str]:
    """The tiny run with every step logged, validation off, and ``section__key=value`` overrides."""
    overrides = {"metrics__log_freq": 1, "validation__enable": False, **overrides}
    flags = []
    for key, value in overrides.items():
        key = key.replace("__", ".")
        if isinstance(value, bool):
            section, name = key.rsplit(".", 1)
            flags.append(f"--{section}.{name if value else 'no-' + name}")
        else:
            flags += [f"--{key}", str(value)]
    return ["--job.config_file", "config/tiny.toml", "--job.dump_folder", str(dump_folder), *flags]


def start(nproc: int, dump_folder: Path, **overrides) -> ForkedRanks:
    command = ["-m", "llama_mimi.train", *flags_of(dump_folder, **overrides)]
    return ForkedRanks(nproc, command, dump_folder / "log.txt")


def train(nproc: int, dump_folder: Path, **overrides) -> dict[int, float]:
    ranks = start(nproc, dump_folder, **overrides)
    assert ranks.wait() == 0, ranks.output[-4000:]
    return losses(dump_folder)


def losses(dump_folder: Path, tag: str = LOSS) -> dict[int, float]:
    """Step -> value from all TensorBoard files of a run, later files first to speak."""
    values: dict[int, float] = {}
    for folder in sorted((dump_folder / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    """20 steps of the README's run, with a checkpoint at step 10."""
    folder = tmp_path_factory.mktemp("golden")
    train(2, folder, training__steps=20, lr_scheduler__total_steps=420, checkpoint__interval=10)
    return folder


def test_golden_loss_curve(golden_run, pytestconfig):
    measured = losses(golden_run)
    if pytestconfig.getoption("--regenerate-golden"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(measured, indent=1) + "\n")
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text()).items()}
    assert measured.keys() == golden.keys() == set(range(1, 21))
    assert measured == pytest.approx(golden, abs=5e-3)  # other CPUs add in other orders
    assert measured[20] < measured[1] - 0.5


def test_level_losses_average_to_the_loss(golden_run):
    total = losses(golden_run)
    levels = [losses(golden_run, f"loss_metrics/level_{level}") for level in range(4)]
    for step in (1, 20):
        mean = sum(level[step] for level in levels) / 4
        assert mean == pytest.approx(total[step], abs=0.05)  # </audio>, one target a clip, is the rest


def test_hours_seen_are_those_of_the_targets(golden_run):
    """Counted by the loader of each rank, and by the loss."""
    rates, seconds = (
        losses(golden_run, tag) for tag in ("throughput/audio_seconds_per_s", "time_metrics/end_to_end(s)")
    )
    total = sum(rates[step] * seconds[step] for step in range(1, 21))
    assert losses(golden_run, "data/hours_seen")[20] == pytest.approx(total / 3600, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="flattened"),
        pytest.param(
            {"model__architecture": "hierarchical", "model__depth_share": 0.25, "data__packing": "pack"},
            id="hierarchical",
        ),
    ],
)
def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, variant):
    """With gradient accumulation, loader workers, whose positions must fit together, and saving in the background."""
    overrides = {
        **variant,
        "checkpoint__async_mode": "async",
        "training__steps": 4,
        "training__local_batch_size": 2,
        "training__global_batch_size": 8,
        "training__dataloader__num_workers": 2,
        "checkpoint__interval": 2,
    }
    whole = train(2, tmp_path / "whole", **overrides)
    killed = tmp_path / "killed"
    ranks = start(2, killed, **overrides)
    deadline = time.monotonic() + 240
    try:
        while not (killed / "checkpoint" / "step-2" / ".metadata").exists():
            assert ranks.is_running() and time.monotonic() < deadline, ranks.output[-4000:]
            time.sleep(0.05)
    finally:
        ranks.kill()
    assert not (killed / "checkpoint" / "step-4").exists(), "it was killed too late"
    shutil.rmtree(killed / "tb")  # what is read below was written after the kill
    resumed = train(2, killed, **overrides)
    assert resumed.keys() == {3, 4}, "it did not start after the checkpoint"
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=1e-5)


def test_a_run_goes_on_on_other_ranks(golden_run, tmp_path):
    """A checkpoint of two ranks, on one and on three."""
    for nproc, steps in ((1, 22), (3, 24)):
        folder = shutil.copytree(golden_run, tmp_path / f"{nproc}")
        shutil.rmtree(folder / "tb")
        resumed = train(nproc, folder, training__steps=steps, lr_scheduler__total_steps=420)
        assert resumed.keys() == set(range(21, steps + 1)) and max(resumed.values()) < 7.2
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-20", f"step-{steps}"]
        # A rank takes two clips a step; 20 steps of two ranks were before.
        assert losses(folder, "data/clips_seen") == {step: 80 + 2 * nproc * (step - 20) for step in resumed}


def test_a_flipped_bit_ends_a_resumed_run(golden_run, tmp_path):
    folder = shutil.copytree(golden_run, tmp_path / "run")
    path = folder / "checkpoint" / "step-20" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    flags = {"training__steps": 21, "lr_scheduler__total_steps": 420}
    ranks = start(2, folder, **flags)
    assert ranks.wait() == 1 and "Traceback" not in ranks.output
    assert f"error: '{path}' is damaged: a checksum does not match" in ranks.output
    assert f"use the last good step '{folder / 'checkpoint' / 'step-10'}'" in ranks.output


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_a_full_disk_keeps_the_steps_before(mode, golden_run, tmp_path):
    folder = shutil.copytree(golden_run, tmp_path / "run")
    flags = {"training__steps": 23, "lr_scheduler__total_steps": 420, "checkpoint__interval": 22}
    flags["checkpoint__keep_latest_k"] = 0
    command = ["-m", "llama_mimi.train", *flags_of(folder, checkpoint__async_mode=mode, **flags)]
    ranks = ForkedRanks(2, command, tmp_path / "log.txt", set_up=no_large_files)
    assert ranks.wait() == 1 and "Traceback" not in ranks.output
    assert "step-22' could not be written (File too large); " in ranks.output
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-10", "step-20"]
    check_step(folder / "checkpoint" / "step-20", verify=True)


def no_large_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A random Llama with the extended vocabulary, as scripts/prepare_base_model.py writes one."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4)
    config = LlamaConfig.from_pretrained(TINY / "llama")
    config.vocab_size = tokenizer.vocabulary.size
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.text_tokenizer.save_pretrained(folder)
    return folder


def test_20_steps_equal_a_plain_loop_over_hugging_face(base_model, tmp_path):
    overrides = {
        "model__hf_assets_path": base_model,
        "checkpoint__initial_load_in_hf": True,
        "training__steps": 20,
        "optimizer__lr": 5e-4,  # at 3e-3 Adam makes 1.3e-4 of rounding in one step of the 20 on some processors
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_ratio": 0.0,
        "training__local_batch_size": 2,
    }
    measured = train(1, tmp_path, **overrides)

    flags = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--job.dump_folder": tmp_path / "none",
        "--model.hf_assets_path": base_model,
        "--training.local_batch_size": 2,
        "--optimizer.lr": 5e-4,
    }
    (batches,), model, optimizer = plain_loop(base_model, flags, dp_world_size=1)
    for step in range(1, 21):
        inputs, labels_BL = next(batches)
        loss = plain_loss(model, inputs["input"], labels_BL)
        plain_step(model, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step


@pytest.mark.slow
def test_torchtitans_entry_point_is_the_same_trainer(base_model, tmp_path):
    """It prepares its runs, too: weights are loaded beside an empty checkpoint folder, and DDP is refused."""
    program = tmp_path / "torchtitan_train.py"  # on a GPU `-m torchtitan.train`
    program.write_text(
        "import runpy\nfrom llama_mimi.common.cpu import use_cpu_without_gpu\n"
        "use_cpu_without_gpu()\nrunpy.run_module('torchtitan.train', run_name='__main__')\n"
    )

    def run(nproc, folder, **overrides):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"]
        command = [*torchrun, program, *flags_of(folder, **overrides)]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)

    overrides = {"model__hf_assets_path": base_model, "checkpoint__initial_load_in_hf": True, "training__steps": 1}
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    done = run(1, tmp_path / "run", **overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = losses(tmp_path / "run")
    flags = {"--job.config_file": ROOT / "config/tiny.toml", "--model.hf_assets_path": base_model}
    (batches,), model, _ = plain_loop(base_model, flags, dp_world_size=1)
    inputs, labels_BL = next(batches)
    loss = plain_loss(model, inputs["input"], labels_BL)
    assert measured == {1: pytest.approx(loss.item(), abs=1e-4)}

    done = run(2, tmp_path / "ddp", parallelism__data_parallel_replicate_degree=2)
    assert done.returncode != 0
    assert "error: parallelism.data_parallel_replicate_degree is 2; use FSDP or HSDP" in done.stderr
    assert "UserError" not in done.stdout + done.stderr


def test_text_in_front_of_the_audio_is_read_and_not_predicted(base_model, tmp_path):
    """The task "tts", against Hugging Face's model; a batch has text, `<audio>` and audio tokens, in this order."""
    overrides = {
        "model__hf_assets_path": base_model,
        "checkpoint__initial_load_in_hf": True,
        "data__task": "tts",
        "training__steps": 2,
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_ratio": 0.0,
        "optimizer__lr": 5e-4,
    }
    measured = train(1, tmp_path, **overrides)
    flags = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--job.dump_folder": tmp_path / "none",
        "--data.task": "tts",
        "--optimizer.lr": 5e-4,
    }
    (batches,), model, optimizer = plain_loop(base_model, flags, dp_world_size=1)
    vocabulary = load_speech_tokenizer(str(base_model), str(TINY / "mimi"), 4).vocabulary
    for step in (1, 2):
        inputs, labels_BL = next(batches)
        for ids_L, labels_L in zip(inputs["input"], labels_BL, strict=True):
            start = (ids_L == vocabulary.audio_start_id).nonzero().item()
            assert start > 5 and (ids_L[:start] < vocabulary.base).all(), "text"
            assert (labels_L[:start] == IGNORE_INDEX).all() and vocabulary.is_audio(labels_L[start])
        loss = plain_loss(model, inputs["input"], labels_BL)
        plain_step(model, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step


def test_without_text_from_the_base_model_to_a_converted_one(base_model, tmp_path):
    """Preparation, training and conversion with ``model.vocabulary = "audio"``, against Hugging Face's model."""
    prepared, run, converted = (str(tmp_path / name) for name in ("prepared", "run", "converted"))
    prepare_base_model(str(base_model), Path(prepared), codec=str(TINY / "mimi"), vocabulary="audio")
    overrides = {
        "model__hf_assets_path": prepared,
        "model__vocabulary": "audio",
        "checkpoint__initial_load_in_hf": True,
        "checkpoint__last_save_model_only": True,
        "training__steps": 4,
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_ratio": 0.0,
    }
    measured = train(2, Path(run), **overrides)

    flags = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--job.dump_folder": tmp_path / "none",
        "--model.hf_assets_path": prepared,
        "--model.vocabulary": "audio",
    }
    ranks, model, optimizer = plain_loop(prepared, flags, dp_world_size=2)
    for step in range(1, 5):
        inputs, labels_BL = (torch.cat(parts) for parts in zip(*map(inputs_and_labels, ranks), strict=True))
        loss = plain_loss(model, inputs, labels_BL)
        plain_step(model, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step
    assert model.config.vocab_size == 3 + 4 * 256 + 2

    convert_checkpoint(Path(run) / "checkpoint", Path(converted))
    ids_1L = AutoTokenizer.from_pretrained(converted)("<audio><3_0><5_1><7_2><9_3>", return_tensors="pt").input_ids
    assert ids_1L.tolist() == [[0, 1027, 3 + 12, 3 + 21, 3 + 30, 3 + 39]]
    stock = AutoModelForCausalLM.from_pretrained(converted)
    torch.testing.assert_close(stock(ids_1L).logits, model(ids_1L).logits, atol=1e-4, rtol=0)
    speech = load_speech_model(converted, device="cpu")
    prompt_TQ = torch.tensor([[3, 5, 7, 9]])
    (codes_TQ,) = continue_codes(speech, prompt_TQ, SamplingOptions(seconds=0.4))
    assert torch.equal(codes_TQ[:1], prompt_TQ)


def test_hierarchical_ranks_equal_transformers(tmp_path):
    """8 steps of FSDP against a plain loop over `CsmForConditionalGeneration`, with the same first weights.

    Clips are cut: the rows of the ends, one for each level there, are one row here, which Adam moves otherwise.
    """
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4, "llama", "hierarchical")
    settings = {"model.architecture": "hierarchical", "data.max_audio_seconds": 0.8, "optimizer.lr": 5e-4}
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    job_config = parse_config(["--job.config_file", str(ROOT / "config/tiny.toml"), *flags])
    args = copy.copy(FLAVORS["tiny"])
    args.update_from_config(job_config)
    torch.manual_seed(0)
    model = build_model(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-0", no_dist=True)
    measured = train(
        2,
        tmp_path / "run",
        checkpoint__initial_load_path=tmp_path / "step-0",
        training__steps=8,
        lr_scheduler__warmup_steps=0,
        lr_scheduler__decay_ratio=0.0,
        **{key.replace(".", "__"): value for key, value in settings.items()},
    )
    csm = CsmForConditionalGeneration(csm_config(args, codec=str(TINY / "mimi"), num_quantizers=4))
    csm.load_state_dict(csm_state(model.state_dict(), args), strict=False)
    csm.tie_weights()
    optimizer = torch.optim.AdamW(csm.parameters(), lr=5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ranks = [iter(build_dataloader(2, rank, tokenizer, job_config)) for rank in range(2)]
    for step in range(1, 9):
        inputs_BLQ, labels_BLQ = (torch.cat(parts) for parts in zip(*map(inputs_and_labels, ranks), strict=True))
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
    """The path of the 1B config, on two ranks: a learning rate of zero leaves what was loaded."""
    train(
        2,
        tmp_path,
        model__architecture="hierarchical",
        model__hf_assets_path=base_model,
        checkpoint__initial_load_in_hf=True,
        training__steps=1,
        optimizer__lr=0.0,
    )
    config = AutoConfig.from_pretrained(tmp_path / "hf_assets")
    state = load_model_state(tmp_path / "checkpoint" / "step-1", csm_args(config))
    theirs = csm_state(state, csm_args(config))
    llama = LlamaForCausalLM.from_pretrained(base_model).state_dict()
    assert torch.equal(theirs["embed_text_tokens.weight"], llama["model.embed_tokens.weight"])
    for name in ("layers.3.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight", "norm.weight"):
        assert torch.equal(theirs[f"backbone_model.{name}"], llama[f"model.{name}"])


def inputs_and_labels(batches):
    inputs, labels_BL = next(batches)
    return inputs["input"], labels_BL


def plain_loop(base_model, flags, dp_world_size):
    """Every rank's batches, and Hugging Face's model with the run's optimizer, in this process."""
    job_config = parse_config([str(word) for flag in flags.items() for word in flag])
    tokenizer = load_speech_tokenizer(str(base_model), str(TINY / "mimi"), 4)
    ranks = [iter(build_dataloader(dp_world_size, rank, tokenizer, job_config)) for rank in range(dp_world_size)]
    model = LlamaForCausalLM.from_pretrained(base_model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job_config.optimizer.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    return ranks, model, optimizer


def plain_loss(model, inputs_BL, labels_BL):
    """Mean over the targets, from all logits."""
    logits_BLV = model(inputs_BL).logits
    assert logits_BLV.shape[-1] == model.config.vocab_size
    return F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX)


def plain_step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("dp_world_size", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_packed_ranks_equal_hugging_face_clip_by_clip(base_model, tmp_path, dp_world_size):
    """FSDP, or tensor parallel, over packed rows, against each clip of those rows in a forward pass of its own."""
    overrides = {
        "model__hf_assets_path": base_model,
        "checkpoint__initial_load_in_hf": True,
        "data__packing": "pack",
        "training__steps": 4,
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_ratio": 0.0,
        "optimizer__lr": 5e-4,
    }
    flags = {
        "--job.config_file": ROOT / "config/tiny.toml",
        "--job.dump_folder": tmp_path / "none",
        "--model.hf_assets_path": base_model,
        "--data.packing": "pack",
        "--optimizer.lr": 5e-4,
    }
    if dp_world_size == 1:
        overrides["parallelism__tensor_parallel_degree"] = 2
    measured = train(2, tmp_path, **overrides)
    ranks, model, optimizer = plain_loop(base_model, flags, dp_world_size)
    for step in range(1, 5):
        losses_of_clips, num_targets = [], 0
        for inputs, labels_BL in (next(batches) for batches in ranks):
            for row, starts_L in enumerate(inputs["positions"] == 0):
                bounds = [*starts_L.nonzero().flatten().tolist(), len(starts_L)]
                for begin, end in itertools.pairwise(bounds):
                    logits_LV = model(inputs["input"][row : row + 1, begin:end]).logits[0]
                    labels_L = labels_BL[row, begin:end]
                    num_targets += int((labels_L != IGNORE_INDEX).sum())
                    losses_of_clips.append(
                        F.cross_entropy(logits_LV, labels_L, ignore_index=IGNORE_INDEX, reduction="sum")
                    )
        assert len(losses_of_clips) > 2 * 2 * dp_world_size, "rows hold several clips"
        loss = torch.stack(losses_of_clips).sum() / num_targets
        plain_step(model, optimizer, loss)
        assert measured[step] == pytest.approx(loss.item(), abs=1e-4), step
