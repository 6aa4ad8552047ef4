"""The GPU session: types of a sharded step on one rank, and budget, errors and all phases of the session."""

import json
import math
import os
import subprocess
import sys

import gpu_session
import measuring
import pytest
import torch
import torch.distributed as dist
import training_methods
from conftest import ROOT
from measuring import measure
from torch.distributed.tensor import DTensor, Shard
from training_methods import OURS, OURS_CSM, STOCK

from llama_mimi.common.errors import UserError
from llama_mimi.model.llama import FLAVORS


@pytest.mark.parametrize("method", [OURS, OURS_CSM, STOCK])
def test_one_rank_computes_in_the_types_of_several_ranks(tmp_path, monkeypatch, method):
    """Parameters are sharded float32, and the residual stream is bfloat16; autocast would keep float32 there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setitem(FLAVORS, "tiny", FLAVORS["tiny"])  # `job_config_of` replaces it
    monkeypatch.setattr(training_methods, "IS_SHARDED", True)
    training_methods.write_stand_ins("tiny", tmp_path)
    flags = "--training.mixed_precision_param bfloat16 --training.local_batch_size 2"
    job_config = training_methods.job_config_of("tiny", tmp_path, method, flags, num_layers=2)
    built = training_methods.build_trainer(job_config, method)
    try:
        (model,), types = built.model_parts, []
        for layer in model.layers.values():
            layer.register_forward_hook(lambda layer, inputs, output: types.append((inputs[0].dtype, output.dtype)))
        built.step = 1
        built.train_step(built.batch_generator(built.dataloader))
        assert types == [(torch.bfloat16, torch.bfloat16)] * 2
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
            assert parameter.dtype == parameter.grad.dtype == torch.float32
    finally:
        dist.destroy_process_group()


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Return a function that runs a session of stand-ins for phases; a stand-in can raise an error."""

    def run(phases, **flags):
        started = []

        def measure(function, timeout_s, phase, **arguments):
            started.append((phase, round(timeout_s)))
            gpu_session.record(arguments["output"], phase, {"figure": 1})
            if error := phases[phase][1]:
                raise UserError(error)
            return True

        expected = {phase: (None, seconds) for phase, (seconds, _) in phases.items()}
        monkeypatch.setattr(gpu_session, "PHASES", expected)
        monkeypatch.setattr(gpu_session, "measure", measure)
        output, message = tmp_path / "session.jsonl", None
        try:
            gpu_session.gpu_session(output, phases=tuple(phases), tiny=True, **flags)
        except UserError as error:
            message = str(error)
        return started, [json.loads(line) for line in output.read_text().splitlines()], message

    return run


def test_a_phase_that_does_not_fit_is_skipped_by_name(session):
    phases = {"start": (20, None), "correctness": (101, None), "training": (60, None)}
    started, lines, message = session(phases, budget_s=100)
    assert started == [("start", 40), ("training", 100)] and message is None
    assert [line for line in lines if "skipped" in line] == [
        {"phase": "correctness", "skipped": "the phase takes 101 s, and 100 s are left"}
    ]


def test_a_phase_that_fails_keeps_its_figures_and_ends_the_session_with_an_error(session):
    started, lines, message = session({"start": (1, None), "training": (1, "diverged"), "evaluation": (1, None)})
    assert [phase for phase, _ in started] == ["start", "training", "evaluation"]
    assert lines[1:3] == [{"phase": "training", "figure": 1}, {"phase": "training", "error": "diverged"}]
    assert message.startswith("failed phases: training; read the errors in")


def test_all_checks_report_before_the_session_fails(monkeypatch):
    checks = [
        ("right", lambda: 0.1, 0.2),
        ("wrong", lambda: 0.3, 0.2),
        ("broken", lambda: 1 / 0, 0),
        ("nan", lambda: math.nan, 1),
    ]
    monkeypatch.setattr(gpu_session, "checks", lambda shape: checks)
    results = []
    with pytest.raises(UserError, match="wrong results: wrong; broken; nan"):
        for result in gpu_session.correctness(gpu_session.TINY):
            results.append((result["check"], result["is_correct"]))
    assert results == [("right", True), ("wrong", False), ("broken", False), ("nan", False)]


def test_a_measurement_that_fails_ends_its_benchmark():
    assert measure(measuring.median_and_range, values=[1, 2]) == "2 (1 to 2)"
    with pytest.raises(UserError, match=r"(?s)median_and_range in measuring.py failed with .*no median for empty data"):
        measure(measuring.median_and_range, values=[])
    with pytest.raises(UserError, match=r"median_and_range in measuring.py was stopped after 0 s"):
        measure(measuring.median_and_range, timeout_s=0.01, values=[1])


@pytest.mark.slow
def test_every_phase_writes_its_figures(tmp_path):
    output = tmp_path / "session.jsonl"
    words = [sys.executable, "scripts/benchmarks/gpu_session.py", "--tiny", "--budget_s", "2000", "--output", output]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    figures = [json.loads(line) for line in output.read_text().splitlines()]
    found = {phase: set().union(*(line for line in figures if line["phase"] == phase)) for phase in gpu_session.PHASES}
    training = {"mfu", "useful_tokens_per_s", "step_seconds", "graphs", "peak_memory_bytes", "peak_host_memory_mb"}
    generation = {"prefill_and_first_frame_s", "tokens_per_s", "real_time_streams", "seconds_to_first_audio"}
    for phase, wanted in (
        ("start", {"device", "torch", "commit", "sdpa_in_training", "sdpa_in_generation", "matmul_tflops"}),
        ("correctness", {"difference", "limit"}),
        ("training", training),
        ("training_hierarchical", training),
        ("generation", generation),
        ("tokenising", {"encoded", "tokenised"}),
        ("evaluation", {"pairs_per_s"}),
        ("training_stock", training),
        ("generation_hierarchical", generation),
    ):
        assert wanted <= found.pop(phase), phase
    assert not found and sum("check" in line for line in figures) == 11
