"""Run the 1B recipe for 20 steps on GPUs with random weights: everything but the numbers in the weights is real.

    uv run python scripts/gpu_check.py --num_gpus 1

Llama-3.2-1B and Mimi are replaced by random models of the same shape (136,450 vocabulary entries, 2,048 codes), the
corpus by assets/tiny; the settings are those of config/llama3_2_1b_peoples_speech.toml. Needs no network.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import MimiConfig, MimiModel, PreTrainedTokenizerFast

from llama_mimi.errors import UserError, run_cli
from llama_mimi.hf import hf_config
from llama_mimi.model import FLAVORS

CONFIG = "config/llama3_2_1b_peoples_speech.toml"
LLAMA_3_VOCABULARY = 128_256


def write_tokenizer(folder: Path, num_entries: int = LLAMA_3_VOCABULARY) -> None:
    """A tokenizer whose words mean nothing, with BOS and padding among its last 256, where Llama 3 has them."""
    words = {f"w{i}": i for i in range(num_entries)}
    bos, pad = f"w{num_entries - 256}", f"w{num_entries - 252}"
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, pad_token=pad).save_pretrained(folder)


def write_stand_ins(folder: Path) -> None:
    """A Llama-3.2-1B without weights, a tokenizer of Llama 3's size, and a Mimi with random weights."""
    write_tokenizer(folder / "llama")
    args = FLAVORS["1B"]
    args.vocab_size = LLAMA_3_VOCABULARY
    hf_config(args).save_pretrained(folder / "llama")
    torch.manual_seed(0)
    MimiModel(MimiConfig()).save_pretrained(folder / "mimi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    flags = parser.parse_args()
    if torch.cuda.device_count() < flags.num_gpus:
        raise UserError(f"--num_gpus is {flags.num_gpus}, but {torch.cuda.device_count()} GPUs are visible here")

    write_stand_ins(flags.output_dir / "stand_ins")
    overrides = {
        "job.dump_folder": flags.output_dir / "run",
        "model.hf_assets_path": flags.output_dir / "stand_ins" / "llama",
        "codec.name": flags.output_dir / "stand_ins" / "mimi",
        "training.dataset": "assets/tiny/corpus/train-*.parquet",
        "training.dataset_path": "None",
        "training.dataloader.num_workers": 2,
        "training.global_batch_size": 32 * flags.num_gpus,
        "training.steps": flags.steps,
        "validation.dataset": "assets/tiny/corpus/validation-*.parquet",
        "validation.dataset_path": "None",
        "metrics.log_freq": 5,
    }
    words = [str(word) for key, value in overrides.items() for word in (f"--{key}", value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={flags.num_gpus}"]
    train = ["-m", "llama_mimi.train", "--job.config_file", CONFIG, "--checkpoint.no-initial_load_in_hf", *words]
    sys.exit(subprocess.run([*torchrun, *train]).returncode)


if __name__ == "__main__":
    run_cli(main)
