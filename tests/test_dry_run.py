"""The dry run, in a new process with a fake process group."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from llama_mimi.model.llama import FLAVORS, LlamaMimi

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "dry_run.py"
TINY_FLAGS = ["--job.config_file", "config/tiny.toml"]
LORA_FLAGS = [*TINY_FLAGS, "--model.converters", "lora", "--checkpoint.initial_load_in_hf"]
HSDP_TP = ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.tensor_parallel_degree", "2"]
FLOAT8 = ["--model.converters", "quantize.linear.float8"]
CASES = {  # name: number of GPUs, True if a step is taken, flags
    "tiny": (8, True, TINY_FLAGS),
    "tiny, content": (8, True, TINY_FLAGS),
    "tiny, hierarchical": (8, True, [*TINY_FLAGS, "--model.architecture", "hierarchical"]),
    "tiny, hierarchical, content": (8, True, [*TINY_FLAGS, "--model.architecture", "hierarchical"]),
    "tiny, full checkpointing": (8, True, [*TINY_FLAGS, "--activation_checkpoint.mode", "full"]),
    "tiny, lora": (1, True, LORA_FLAGS),
    "tiny, lora, content": (1, True, LORA_FLAGS),
    "tiny, float8": (8, True, [*TINY_FLAGS, *FLOAT8]),
    "tiny, float8, content": (8, True, [*TINY_FLAGS, *FLOAT8]),
    "tiny, hsdp and tp": (8, True, [*TINY_FLAGS, *HSDP_TP]),
    "8B, 64": (64, False, ["--job.config_file", "config/llama3_1_8b.toml"]),
}
MEASURE = """
import contextlib, json, os, sys
from pathlib import Path
from unittest.mock import patch
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from llama_mimi import dry_run
import torch

def profiled(*args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sizes = dry_run.measure(*args)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total.append(total[-1] + event.nbytes())
    return sizes | {"profiled": max(total)}

found = {}
for name, (num_gpus, takes_step, flags) in json.loads(sys.argv[1]).items():
    job_config, parallel_dims = dry_run.prepare(flags, num_gpus)
    dry_run.write_missing(job_config, Path(sys.argv[2]))
    model = dry_run.build_model(job_config, parallel_dims)
    has_content = name.endswith("content")
    with contextlib.ExitStack() as stack:
        if not has_content:  # use the norm of the CPU, as in the run with content
            stack.enter_context(patch.object(dry_run.FusedRMSNorm, "apply", torch.nn.functional.rms_norm))
            stack.enter_context(dry_run.no_content())
        if takes_step:
            sizes = (profiled if has_content else dry_run.measure)(job_config, parallel_dims, model)
        else:
            sizes = dry_run.build_states(job_config, parallel_dims, model)[1]
    meshes = {mesh: m.size() for mesh, m in parallel_dims.get_all_one_dimensional_meshes().items()}
    found[name] = sizes | {"meshes": meshes}
    torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    result = run("-c", MEASURE, json.dumps(CASES), str(tmp_path_factory.mktemp("stand_ins")))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def shard_numel(flavor, vocab_size, num_shards):
    """Return the number of weights of a rank; FSDP divides the rows of each matrix and rounds up."""
    args = FLAVORS[flavor]
    args.vocab_size = vocab_size
    with torch.device("meta"):
        model = LlamaMimi(args)
    return sum(-(-p.shape[0] // num_shards) * p[0].numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "flavor", "num_shards"), [("tiny", "tiny", 8), ("8B, 64", "8B", 64)])
def test_states_are_those_of_the_shards(found, name, flavor, num_shards):
    expected = 4 * shard_numel(flavor, 1538 if flavor == "tiny" else 136_450, num_shards)
    sizes = found[name]
    assert sizes["parameters"] == sizes["gradients"] == expected
    assert 2 * expected < sizes["optimizer states"] < 2 * expected + 4096, "two moments, and a step counter a matrix"


def test_a_step_takes_the_memory_that_it_takes_with_content(found):
    """Only small tensors such as counters differ."""
    own, real = found["tiny"], found["tiny, content"]
    assert all(own[key] == pytest.approx(real[key], abs=1024) for key in own.keys() - {"meshes"})
    assert own["peak"] > sum(own[key] for key in ("parameters", "gradients", "optimizer states"))
    assert found["tiny, full checkpointing"]["peak"] < 0.7 * own["peak"]
    hierarchical = [found[f"tiny, hierarchical{end}"]["peak"] for end in ("", ", content")]
    assert hierarchical[0] == pytest.approx(hierarchical[1], abs=4096)


def test_the_profiler_agrees(found):
    """With LoRA, only the updates have gradients and moments."""
    own, real = found["tiny, lora"], found["tiny, lora, content"]
    assert own["peak"] == pytest.approx(real["profiled"], rel=0.05)
    assert own["gradients"] < own["parameters"] / 3
    assert own["optimizer states"] == pytest.approx(2 * own["gradients"], abs=1024)


def test_float8_takes_the_memory_that_it_takes_with_content(found):
    own, real = found["tiny, float8"], found["tiny, float8, content"]
    assert all(own[key] == pytest.approx(real[key], abs=1024) for key in own.keys() - {"meshes"})
    assert own["peak"] == pytest.approx(real["profiled"], rel=0.05)


def test_meshes_are_as_configured(found):
    assert found["8B, 64"]["meshes"]["fsdp"] == 64 and "tp" not in found["8B, 64"]["meshes"]
    meshes = found["tiny, hsdp and tp"]["meshes"]
    wanted = {"dp_replicate": 2, "fsdp": 2, "tp": 2, "batch": 4, "loss": 4}
    assert {name: meshes[name] for name in wanted} == wanted
    part = 4 * shard_numel("tiny", 1538, num_shards=4)  # two replicas; tensor parallelism does not split norms
    assert 0.99 * part < found["tiny, hsdp and tp"]["parameters"] < 1.01 * part


def test_the_last_line_gives_a_verdict():
    for gpu_gb, code, verdict in (("0.01", 1, "does not fit: a GPU needs"), ("80", 0, "fits: a GPU needs")):
        result = run(str(SCRIPT), "--num_gpus", "8", *TINY_FLAGS, "--gpu_gb", gpu_gb)
        assert result.returncode == code and result.stdout.splitlines()[-1].startswith(verdict), result.stderr
        assert "| peak |" in result.stdout
