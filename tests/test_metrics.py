"""Metrics in the log, with simulated GPUs."""

import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from llama_mimi.common.errors import UserError
from llama_mimi.data.dataloader import DataMeter
from llama_mimi.training.config_file import parse_config
from llama_mimi.training.loss import LevelMeter
from llama_mimi.training.metrics import SpeechMetrics, SpeechValidator, peak_flops
from llama_mimi.training.optimizer import StepGuard

CARDS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B300 SXM6 AC": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_peak_is_that_of_a_known_card(card):
    assert peak_flops(card) == CARDS[card]


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA H800"])
def test_a_line_of_the_log(card, monkeypatch, tmp_path):
    """From the output of lspci, TorchTitan would use the FLOP/s of an H100 for this H800."""
    monkeypatch.chdir(ROOT)
    memory = SimpleNamespace(device_name=card, reset_peak_stats=lambda: None)
    memory.get_peak_stats = lambda: SimpleNamespace(max_reserved_gib=1.0)
    lspci = SimpleNamespace(stdout="1b:00.0 3D controller: NVIDIA Corporation GH100 [H800] (rev a1)")
    monkeypatch.setattr("torchtitan.components.metrics.build_device_memory_monitor", lambda: memory)
    monkeypatch.setattr("torchtitan.tools.utils.subprocess.run", lambda *args, **kwargs: lspci)
    flags = ["--job.config_file", "config/tiny.toml", "--metrics.no-enable_tensorboard"]
    job_config = parse_config([*flags, "--job.dump_folder", str(tmp_path)])
    guard, data = StepGuard(), DataMeter(codec_seconds=2.0, num_clips=3, num_frames=45_000)
    dims = SimpleNamespace(world_size=1, pp_enabled=False, get_optional_mesh=lambda name: None)
    meters = {"guard": guard, "validation": LevelMeter(), "data": data}
    metrics = SpeechMetrics(job_config, dims, **meters, frame_rate_hz=12.5)
    logged = {}
    metrics.logger = SimpleNamespace(log=lambda values, step: logged.update(values))
    metrics.model_parts, metrics.num_flops_per_token = [], 1_000_000
    assert metrics.should_log(1)
    levels_N = torch.tensor([0, 1, 2, 3] * 24 + [4] * 4)  # 24 frames, four clips that end
    guard.meter.add(levels_N + 1.0, levels_N + 0.5, levels_N + 1, 6)
    metrics.data_loading_times.append(1.0)
    metrics.time_last_log = time.perf_counter() - 8.0
    metrics.log(1, 1.0, 1.0, 0.5, {"n_tokens_seen": 1000, "lr": 1e-3})  # n_tokens_seen counts padding
    tokens_per_s = logged["throughput/useful_tokens_per_s"]
    bits = {f"level_{level}": (level + 0.5) * 12.5 / math.log(2) for level in range(4)}
    bits["all"] = sum(bits.values())
    mfu = {"throughput/mfu(%)": pytest.approx(100 * 1e6 * tokens_per_s / 989e12)} if "H100" in card else {}
    assert logged == mfu | {
        "loss_metrics/global_avg_loss": (24 * (1 + 2 + 3 + 4) + 4 * 5) / 100,
        **{f"loss_metrics/level_{level}": level + 1 for level in range(4)},
        "loss_metrics/audio_end": 5,
        **{f"admissible_bits_per_audio_second/{key}": pytest.approx(value) for key, value in bits.items()},
        "grad_norm": 0.5,
        "throughput/useful_tokens_per_s": pytest.approx(100 / 8, rel=0.1),
        "throughput/audio_seconds_per_s": pytest.approx(24 / 12.5 / 8, rel=0.1),
        "time_metrics/end_to_end(s)": pytest.approx(8, rel=0.1),
        "time_metrics/data_loading(%)": pytest.approx(12.5, rel=0.1),
        "time_metrics/codec(%)": pytest.approx(25, rel=0.1),
        "data/clips_seen": 3,
        "data/hours_seen": 1.0,
        "memory/max_reserved(GiB)": 1.0,
        "lr": 1e-3,
    }
    assert data.codec_seconds == 0
    with pytest.raises(UserError, match="'assets/tiny/corpus/validation-.*' does not contain a usable clip"):
        metrics.log_validation(1, start=0.0)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_a_run_stops_after_validations_without_a_lower_loss(patience):
    """Equal losses are not lower. Step 1 and the second corpus are not counted."""
    generator = random.Random(0)
    for _ in range(100):
        losses, ends = [generator.randint(1, 6) for _ in range(12)], []
        for place in range(1, len(losses) + 1):  # a plain loop
            best = losses.index(min(losses[:place]))
            ends += [place] if patience and place - 1 - best >= patience else []
        settings = SimpleNamespace(patience=patience, freq=10)
        config = SimpleNamespace(validation=settings, training=SimpleNamespace(steps=1000))
        validator = object.__new__(SpeechValidator)
        validator.job_config, validator._loaders = config, {"new": None, "old": None}
        validator._validations = {1: {"new": {"loss": 0}, "old": {"loss": 0}}}
        for place, loss in enumerate(losses, 1):
            validator._validations[10 * place] = {"old": {"loss": 0}, "new": {"loss": loss}}
            validator._check_patience(10 * place)
            assert validator.best_step == 10 * (losses.index(min(losses[:place])) + 1)
            if config.training.steps < 1000:
                break
        assert config.training.steps == (10 * ends[0] if ends else 1000)
