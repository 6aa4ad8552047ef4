"""Shared fixtures. Everything runs offline on ``assets/tiny`` and on what the tests make themselves."""

import os

# Before any import of transformers or datasets: a test that reaches for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.tokens.sequences import SequenceBuilder, load_sequences
from llama_mimi.training.config_check import check_files
from llama_mimi.training.config_file import parse_config

ROOT = Path(__file__).parent.parent
TINY = ROOT / "assets" / "tiny"

torch.set_num_threads(1)
# The same examples at every run: a failure can be seen again, and CI does not depend on luck.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def checked_config(flags: list[str]) -> Any:
    """A config that may run here."""
    job_config = parse_config(flags)
    check_files(job_config)
    return job_config


@pytest.fixture(scope="session")
def codec() -> MimiCodec:
    return MimiCodec(str(TINY / "mimi"), num_quantizers=4)


@pytest.fixture(scope="session")
def sequences() -> SequenceBuilder:
    return load_sequences(str(TINY / "llama"), str(TINY / "mimi"), 4)


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden from this run")
