"""Run the 1B recipe on GPUs with random weights, without a network.

    uv run python scripts/benchmarks/gpu_check.py --num_gpus 1

Random models of the same shape (136,450 vocabulary entries, 2,048 codes) replace Llama-3.2-1B and Mimi, and assets/tiny
replaces the corpus. All other settings are from config/llama3_2_1b_peoples_speech.toml. The corpus is tokenised. Then
20 steps train on its codes, with one clip per row. Another 20 steps train on its audio, in packed rows.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import MimiConfig, MimiModel

from llama_mimi.checkpoint.dcp import complete_steps
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import LLAMA_3_VOCABULARY, write_tokenizer
from llama_mimi.common.command_line import run_command, to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs

CONFIG = "config/llama3_2_1b_peoples_speech.toml"
CORPUS = "assets/tiny/corpus/train-*.parquet"
VALIDATION_CORPUS = "assets/tiny/corpus/validation-*.parquet"


def write_stand_ins(folder: Path) -> None:
    """Write the config of Llama-3.2-1B, a tokenizer as large as Llama 3's tokenizer, and a random Mimi."""
    write_tokenizer(folder / "llama")
    args = LlamaMimiArgs(**{**vars(FLAVORS["1B"]), "vocab_size": LLAMA_3_VOCABULARY})
    hf_config(args).save_pretrained(folder / "llama")
    torch.manual_seed(0)
    MimiModel(MimiConfig()).save_pretrained(folder / "mimi")


def check_gpus(num_gpus: int = 1, steps: int = 20, output_dir: Path = Path("outputs/gpu_check")) -> None:
    """Tokenise the corpus, then train on its codes and on its audio."""
    if torch.cuda.device_count() < num_gpus:
        raise UserError(f"--num_gpus is {num_gpus}, but {torch.cuda.device_count()} GPUs are visible; lower --num_gpus")

    stand_ins, codes = output_dir / "stand_ins", output_dir / "codes"
    write_stand_ins(stand_ins)
    tokenization = {"corpus": CORPUS, "codec": stand_ins / "mimi", "output_dir": codes}
    launch(num_gpus, "scripts/tokenize_corpus.py", *to_cli_args(tokenization))
    on_audio = {"training.dataset": CORPUS, "training.dataloader.num_workers": 2, "data.packing": "pack"}
    for name, own in (("codes", {"training.dataset": codes}), ("audio", on_audio)):
        run = output_dir / name
        if complete_steps(run / "checkpoint"):
            raise UserError(f"'{run}' contains an earlier run; remove this folder or choose another --output_dir")
        overrides = {
            "job.config_file": CONFIG,
            "job.dump_folder": run,
            "model.hf_assets_path": stand_ins / "llama",
            "codec.name": stand_ins / "mimi",
            "training.global_batch_size": 32 * num_gpus,
            "training.steps": steps,
            "validation.dataset": VALIDATION_CORPUS,
            "validation.dataset_path": "None",
            "metrics.log_freq": 5,
            **own,
        }
        launch(num_gpus, "-m", "llama_mimi.train", "--checkpoint.no-initial_load_in_hf", *to_cli_args(overrides))
        if steps not in complete_steps(run / "checkpoint"):
            raise UserError(f"training ended without an error, but '{run}/checkpoint' has no step {steps}")


def launch(num_gpus: int, *words: str) -> None:
    """Start one process per GPU. If a process fails, exit with its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
    if returncode := subprocess.run([*torchrun, *words]).returncode:
        sys.exit(returncode)


if __name__ == "__main__":
    run_command(check_gpus, __doc__)
