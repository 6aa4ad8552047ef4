"""What the log says of a run, on cards that nobody here has."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from llama_mimi.data.dataloader import DataMeter
from llama_mimi.training.config_file import parse_config
from llama_mimi.training.loss import LevelMeter
from llama_mimi.training.metrics import Meters, SpeechMetrics
from llama_mimi.training.optimizer import StepGuard


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H800", None),
        ("NVIDIA B300 SXM6 AC", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_mfu_is_that_of_a_known_card(card, peak, monkeypatch, tmp_path):
    """TorchTitan takes some of the others for an A100, and this H800 for an H100 because of what lspci says."""
    monkeypatch.chdir(ROOT)
    memory = SimpleNamespace(device_name=card, reset_peak_stats=lambda: None)
    memory.get_peak_stats = lambda: SimpleNamespace(max_reserved_gib=1.0)
    lspci = SimpleNamespace(stdout="1b:00.0 3D controller: NVIDIA Corporation GH100 [H800] (rev a1)")
    monkeypatch.setattr("torchtitan.components.metrics.build_device_memory_monitor", lambda: memory)
    monkeypatch.setattr("torchtitan.tools.utils.subprocess.run", lambda *args, **kwargs: lspci)
    flags = ["--job.config_file", "config/tiny.toml", "--metrics.no-enable_tensorboard"]
    job_config = parse_config([*flags, "--job.dump_folder", str(tmp_path)])
    meter = LevelMeter()
    metrics = SpeechMetrics(
        job_config,
        SimpleNamespace(world_size=1, pp_enabled=False, get_optional_mesh=lambda name: None),
        meters=Meters(train=meter, data=(data_meter := DataMeter(codec_seconds=2.0, num_clips=3, num_frames=45_000))),
        guard=StepGuard(meter),
        level_shares=[1.0] * 4,
        frame_rate_hz=12.5,
    )
    logged = {}
    metrics.logger = SimpleNamespace(log=lambda values, step: logged.update(values))
    metrics.model_parts = []
    metrics.num_flops_per_token = 1_000_000
    assert metrics.should_log(1)
    levels_N = torch.tensor([0, 1, 2, 3] * 24 + [4] * 4)  # 24 frames, four clips that end
    meter.add(levels_N + 1.0, levels_N + 0.5, levels_N, 5)
    metrics.data_loading_times.append(1.0)
    metrics.time_last_log = time.perf_counter() - 8.0
    metrics.log(1, 1.0, 1.0, 0.5, {"n_tokens_seen": 1000, "lr": 1e-3})
    assert logged["time_metrics/data_loading(%)"] == pytest.approx(12.5, rel=0.1)
    assert logged["time_metrics/codec(%)"] == pytest.approx(25, rel=0.1) and data_meter.codec_seconds == 0
    assert {key: logged[f"loss_metrics/{key}"] for key in ("level_0", "level_3", "audio_end")} == {
        "level_0": 1,
        "level_3": 4,
        "audio_end": 5,
    }
    bits = {key: value for key, value in logged.items() if "bits" in key}
    own = {f"level_{level}": (level + 0.5) * 12.5 / math.log(2) for level in range(4)}
    assert bits == pytest.approx(
        {f"admissible_bits_per_audio_second/{key}": value for key, value in (own | {"all": sum(own.values())}).items()}
    )
    assert logged["loss_metrics/global_avg_loss"] == (24 * (1 + 2 + 3 + 4) + 4 * 5) / 100
    assert logged["throughput/useful_tokens_per_s"] == pytest.approx(100 / 8, rel=0.1)
    assert logged["throughput/audio_seconds_per_s"] == pytest.approx(24 / 12.5 / 8, rel=0.1)
    assert logged["time_metrics/end_to_end(s)"] == pytest.approx(8, rel=0.1)
    assert (logged["grad_norm"], logged["memory/max_reserved(GiB)"], logged["lr"]) == (0.5, 1.0, 1e-3)
    assert "n_tokens_seen" not in logged, "TorchTitan counts padding"
    assert logged["data/clips_seen"] == 3 and logged["data/hours_seen"] == 1.0
    mfu = logged.get("throughput/mfu(%)")
    expected = peak and 100 * 1e6 * logged["throughput/useful_tokens_per_s"] / peak
    assert mfu == (peak and pytest.approx(expected))
