"""Run the 1B recipe on GPUs with random weights: everything but the numbers in the weights is real.

    uv run python scripts/benchmarks/gpu_check.py --num_gpus 1

Llama-3.2-1B and Mimi are replaced by random models of the same shape (136,450 vocabulary entries, 2,048 codes), the
corpus by assets/tiny; the settings are those of config/llama3_2_1b_peoples_speech.toml. The corpus is tokenised, 20
steps are trained on its codes, one clip a row, and 20 on its audio, encoded beside them, in packed rows. Needs no
network.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.checkpoint.stand_ins import write_stand_ins
from llama_mimi.common.errors import UserError, run_cli

CONFIG = "config/llama3_2_1b_peoples_speech.toml"
CORPUS = "assets/tiny/corpus/train-*.parquet"
VALIDATION_CORPUS = "assets/tiny/corpus/validation-*.parquet"


def launch(flags: argparse.Namespace, *words: object) -> None:
    """One process a GPU; this one ends with theirs if they fail."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={flags.num_gpus}"]
    returncode = subprocess.run([*torchrun, *map(str, words)]).returncode
    if returncode:
        sys.exit(returncode)


def train(flags: argparse.Namespace, name: str, overrides: dict[str, object]) -> None:
    """The recipe with ``overrides``.

    Raises:
        UserError: it would be resumed, or took no step.
    """
    run = flags.output_dir / name
    if complete_steps(run / "checkpoint"):
        raise UserError(f"'{run}' holds an earlier run, which would only be resumed; remove it or change --output_dir")
    overrides = {
        "job.dump_folder": run,
        "model.hf_assets_path": flags.output_dir / "stand_ins" / "llama",
        "codec.name": flags.output_dir / "stand_ins" / "mimi",
        "training.global_batch_size": 32 * flags.num_gpus,
        "training.steps": flags.steps,
        "validation.dataset": VALIDATION_CORPUS,
        "validation.dataset_path": "None",
        "metrics.log_freq": 5,
        **overrides,
    }
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    launch(flags, "-m", "llama_mimi.train", "--job.config_file", CONFIG, "--checkpoint.no-initial_load_in_hf", *words)
    if flags.steps not in complete_steps(run / "checkpoint"):
        raise UserError(f"training ended without an error, but '{run}/checkpoint' has no step {flags.steps}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    flags = parser.parse_args()
    if torch.cuda.device_count() < flags.num_gpus:
        raise UserError(f"--num_gpus is {flags.num_gpus}, but {torch.cuda.device_count()} GPUs are visible here")

    write_stand_ins(flags.output_dir / "stand_ins")
    codes, codec = flags.output_dir / "codes", flags.output_dir / "stand_ins" / "mimi"
    tokenize = ["scripts/tokenize_corpus.py", "--corpus", CORPUS, "--codec", codec, "--output_dir", codes]
    launch(flags, *tokenize)
    train(flags, "codes", {"training.dataset": codes})
    train(
        flags,
        "audio",
        {"training.dataset": CORPUS, "training.dataloader.num_workers": 2, "data.packing": "pack"},
    )


if __name__ == "__main__":
    run_cli(main)
