"""Shared fixtures. Tests run offline, with ``assets/tiny`` and with files that they write."""

import contextlib
import io
import logging
import os
import re
import runpy
import shlex
import sys

# Set before transformers and datasets are imported. A test that needs the network then fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import SpeechTokenizer, load_speech_tokenizer
from llama_mimi.training.checks import check_files
from llama_mimi.training.config_file import parse_config

ROOT = Path(__file__).parent.parent
TINY = ROOT / "assets" / "tiny"

torch.set_num_threads(1)
# The longest test modules run first.
LONG = ["readme", "training", "evaluation", "parallelism", "scripts", "judging", "study", "order", "code_store"]
# Use the same examples in every run, so that failures can be reproduced.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def costly(max_examples: int) -> hypothesis.settings:
    """Return settings for a slow property: all examples if THOROUGH is set (as in .ci/nightly), otherwise a sixth."""
    return hypothesis.settings(max_examples=max_examples // (1 if os.environ.get("THOROUGH") else 6), deadline=None)


def run_here(path: str, *words: object) -> tuple[int, str]:
    """Run a command in this process, which saves imports; return its exit code and standard error."""
    stderr = io.StringIO()
    level = logging.getLogger().level  # some commands change it
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.chdir(ROOT)
        patch.setattr("sys.argv", [path, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / path), run_name="__main__")
            sys.exit(0)
    logging.getLogger().setLevel(level)
    return end.value.code or 0, stderr.getvalue()


def next_command(printed: str) -> str:
    """Return the command that an output names as the next one; its parser must accept the flags."""
    (command,) = re.findall("^next: uv run (.*)$", printed, re.M)
    words = shlex.split(command)
    place = next(place for place, word in enumerate(words) if word.endswith((".py", "llama_mimi.train")))
    path, flags = words[place], words[place + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        if path == "llama_mimi.train":
            parse_config(flags)
        else:
            patch.setattr("sys.argv", [path, *flags])
            patch.setattr("llama_mimi.common.command_line.print_loading", lambda what: sys.exit())  # follows the parser
            with pytest.raises(SystemExit) as end:
                runpy.run_path(path, run_name="__main__")
            assert end.value.code is None
    return command


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def checked_config(flags: list[str]) -> Any:
    """Return a config that passed all checks."""
    job_config = parse_config(flags)
    check_files(job_config)
    return job_config


@pytest.fixture(scope="session")
def codec() -> MimiCodec:
    return MimiCodec(str(TINY / "mimi"), num_quantizers=4)


@pytest.fixture(scope="session")
def tokenizer() -> SpeechTokenizer:
    return load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), 4)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """A converted model with random weights."""
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": tokenizer.vocabulary.size})
    decoder = LlamaForCausalLM(hf_config(args))
    decoder.config.update({"num_quantizers": 4, "codec": str(TINY / "mimi")})
    folder = tmp_path_factory.mktemp("models") / "random"
    decoder.save_pretrained(folder)
    tokenizer.text_tokenizer.save_pretrained(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden from this run")
