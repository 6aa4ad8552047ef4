"""The commands of all READMEs run in a copy of the repository, or are listed with the test that runs them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, text=True, capture_output=True, check=True)
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).exists()]


READMES = tracked("*.md")
PROGRAMS = ("pip", "uv", "sbatch", "NUM_NODES", "HF_HUB_OFFLINE")
INSTALL = "pip install uv && uv sync --compile-bytecode && "
TORCHRUN = "uv run torchrun --standalone --nproc_per_node="
SCRIPT = "uv run python scripts/"
# Prefixes of commands that are not run here, with the reason or the test that runs them.
ELSEWHERE = {
    "uv run pytest": "the tests themselves",
    "uv sync": ".ci/run",
    "uv run python inference.py --model_name llm-jp/": "needs the hub; tests/test_generation.py",
    "HF_HUB_OFFLINE": "needs the hub; tests/test_generation.py",
    "uv run hf": "needs the hub; tests/test_recipes.py",
    f"{TORCHRUN}8": "needs the hub and GPUs; tests/test_config.py, tests/test_code_store.py",
    "sbatch": "tests/test_launch.py",
    "NUM_NODES": "tests/test_launch.py",
    f"{SCRIPT}prepare_base_model.py --base_model meta-llama/": "needs the hub; tests/test_scripts.py",
    f"{SCRIPT}benchmarks/gpu_session.py": "needs a GPU; tests/test_gpu_session.py",
    f"{SCRIPT}convert_dcp_to_hf.py --checkpoint outputs/tiny_text_speech": "needs the recipe; tests/test_scripts.py",
    "uv run python eval/asr.py --model_name models/tiny_text_speech": "tests/test_error_rates.py",
    "uv run python eval/tts.py": "tests/test_error_rates.py",
    f"{SCRIPT}tokenize_corpus.py --corpus data/my_voice": "needs a voice; tests/test_config.py",
    f"{TORCHRUN}1 -m llama_mimi.train --job.config_file config/finetune_voice.toml": "needs a voice and a GPU",
    f"{SCRIPT}convert_dcp_to_hf.py --checkpoint outputs/finetune_voice": "needs a GPU; tests/test_lora.py",
    "uv run python inference.py --model_name models/finetune_voice": "needs a GPU; tests/test_generation.py",
    f"{SCRIPT}study.py config/studies/tiny": "half an hour or more; tests/test_study.py",
    f"{SCRIPT}build_page.py --study": "needs the study; tests/test_pages.py",
    "uv run tensorboard": "serves until it is stopped",
    f"{SCRIPT}demo.py": "serves until it is stopped; tests/test_browser.py",
    f"{SCRIPT}tiny/train_tiny_listeners.py": "11 and 44 minutes; tests/test_tiny_listeners.py",
    f"{SCRIPT}tiny/score_listeners.py": "tests/test_tiny_listeners.py",
    f"{SCRIPT}tiny/train_tiny_codec.py": "74 minutes; tests/test_tiny_codec.py",
    f"{SCRIPT}tiny/build_tiny_assets.py": "needs espeak-ng",
}

BENCHMARKS = f"{SCRIPT}benchmarks/"
# Flags that replace those of slow commands.
SMALLEST = {
    f"{INSTALL}{TORCHRUN}2 -m llama_mimi.train --job.config_file config/tiny.toml": (
        "--training.steps 120 --checkpoint.interval 60 --validation.freq 120"
    ),
    f"{TORCHRUN}2 -m llama_mimi.train --job.config_file config/tiny_hierarchical.toml": (
        "--training.steps 10 --checkpoint.interval 10"
    ),
    f"{TORCHRUN}2 -m llama_mimi.train --job.config_file config/tiny_finetune.toml": (
        "--training.steps 10 --checkpoint.interval 10 --validation.freq 10 --checkpoint.keep_latest_k 0"
    ),
    "uv run python eval/generation.py": (
        '--model_name models/tiny --corpus "assets/tiny/corpus/validation-*.parquet" --prompt_seconds 1.6 '
        "--recording_seconds 2.6 --limit 3 --num_samples 1 --speaker_model assets/tiny/speaker_encoder"
    ),
    "uv run python scripts/dry_run.py": "--num_gpus 8 --job.config_file config/tiny.toml",  # the 8B takes three minutes
    f"{BENCHMARKS}bench_train.py": "--shapes tiny --repeats 1",
    f"{BENCHMARKS}bench_eval.py": "--pairs 2 --repeats 1",
    f"{BENCHMARKS}bench_data.py": "--clips 4 --repeats 1",
    f"{BENCHMARKS}bench_generation.py": "--shape tiny --new_frames 2 --repeats 1 --batch_sizes 2",
    f"{BENCHMARKS}fuzz_audio.py": "--num_files 30",
    f"{BENCHMARKS}simulate_intervals.py": "--simulations 3",
    f"{BENCHMARKS}kill_runs.py": "--of tokenization --kills 1 --max_seconds 20 --folder outputs/kills",
}


def smallest(command: str) -> str:
    return next((f"{start} {flags}" for start, flags in SMALLEST.items() if command.startswith(start)), command)


def commands(readme: Path) -> list[str]:
    """Return the commands in code blocks and between backticks, each once."""
    text = readme.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found += re.findall(r"`((?:uv|pip) [^`]+)`", text) + re.findall(r"^    (uv run .*)$", text, re.M)
    found = [re.sub(r"^uv run( --(extra|group) \w+)+", "uv run", " ".join(line.split())) for line in found]
    return list(dict.fromkeys(line for line in found if line.startswith(PROGRAMS)))


def is_elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


def program(command: str) -> list[str]:
    """Return the arguments that start a command without uv."""
    name, *words = shlex.split(command.removeprefix(INSTALL).removeprefix("uv run "))
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*{"python": [sys.executable], "torchrun": torchrun}[name], *words]


def test_listed_commands_exist():
    everything = [command for readme in READMES for command in commands(readme)]
    for beginning in (*ELSEWHERE, *SMALLEST):
        assert any(command.startswith(beginning) for command in everything), f"no README has '{beginning}'"
    assert all(is_elsewhere(command) or program(command)[0] == sys.executable for command in everything)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT).parent))
def test_files_and_links_exist(readme):
    text = readme.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (readme.parent / target).exists(), target
    for command in commands(readme):
        for word in shlex.split(command):
            if word.endswith((".py", ".toml", ".slurm", ".sh")):
                assert (ROOT / word).is_file(), command


def test_commands_of_one_machine_do_not_share_a_port():
    """Without --standalone all torchruns of a machine use port 29500."""
    for path in tracked("*.md", "*.toml", "scripts", "eval", "torchtitan", "inference.py"):
        assert not re.search(r"uv run torchrun (?!--standalone )", path.read_text(errors="replace")), path


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository."""
    folder = tmp_path_factory.mktemp("copy")
    for path in tracked():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "my_speech").mkdir()
    shutil.copy(next((ROOT / "assets/tiny/corpus").glob("train-*.parquet")), folder / "my_speech")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["commands", "benchmarks"])
def test_it_runs(copy, kind):
    """Benchmarks, which run only in .ci/nightly, need the model of the other commands."""
    first = [ROOT / "README.md", *(readme for readme in READMES if readme != ROOT / "README.md")]  # trains the model
    done = dict.fromkeys(smallest(c) for readme in first for c in commands(readme) if not is_elsewhere(c))
    printed = ""
    for command in done:
        if command.startswith(BENCHMARKS) != (kind == "benchmarks"):
            continue
        env = os.environ | {"PYTHONPATH": str(copy / "torchtitan")}
        result = subprocess.run(program(command), cwd=copy, env=env, text=True, capture_output=True, timeout=1200)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        printed += result.stdout
    following = set(re.findall(r"^next: uv run (?:--extra plots )?(.*)$", printed, re.M))
    known = [path for path in following if any(c.startswith(f"uv run {path}") for c in commands(first[0]))]
    # From training to conversion, a continuation, the first benchmark and the report.
    assert kind == "benchmarks" or len(known) == 4, following
    assert (copy / "continuation.wav").stat().st_size > 40_000
