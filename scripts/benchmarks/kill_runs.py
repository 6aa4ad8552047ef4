"""Kill tokenisation or training at random moments; count lost and repeated work.

    uv run python scripts/benchmarks/kill_runs.py --of tokenization --kills 100 --seed 0 --folder outputs/kills
    uv run python scripts/benchmarks/kill_runs.py --of tokenization --layout tar --kills 20 --folder outputs/kills_tar
    uv run python scripts/benchmarks/kill_runs.py --of training --kills 50 --seed 0 --folder outputs/kills

SIGKILL ends the command. The command is started again on 1 to 4 ranks until it finishes. If the command finishes before
the last kill, its output is removed and the command starts from the beginning. The shards are compared with the shards
of a run without kills. Training (tiny config, packed sequences) records the frames that each step uses. The recorded
frames must be the frames before the data position of the last checkpoint.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch.distributed.checkpoint as dcp
from audited_training import frame_numbers
from layouts import LAYOUTS, lossless_rows
from pydantic import TypeAdapter
from simulated import STORED_LEVELS, write_codes

from llama_mimi.audio.mimi import load_codec_config, whole_frames
from llama_mimi.checkpoint.dcp import find_step
from llama_mimi.common.command_line import run_command, to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus, CodedClip
from llama_mimi.data.order import CorpusOrder, Position

CORPUS, CODEC = "assets/tiny/corpus/train-*.parquet", "assets/tiny/mimi"
Command = list[Any]


@dataclass(frozen=True)
class KillFlags:
    """Options: the command to kill, the number of kills, and the times of the kills."""

    of: Literal["tokenization", "training"]  # command to kill
    kills: int  # number of kills
    folder: Path  # folder for all files
    seed: int = 0
    max_seconds: float = 40.0  # maximum time between a start of the command and the next kill, in seconds
    layout: str = "parquet"  # layout of the corpus to tokenise: a name in layouts.py, or 'parquet' (unchanged corpus)


def kill_runs(flags: KillFlags) -> None:
    flags.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    summary, is_right = (kill_training if flags.of == "training" else kill_tokenization)(flags)
    print(f"{flags.of}: {flags.kills} kills (seed {flags.seed}), {summary}; {(time.monotonic() - began) / 60:.0f} min")
    if not is_right:
        raise UserError(f"{flags.of}: the output differs from the output of an uninterrupted run; report this bug")


def kill_until_finished(
    flags: KillFlags, command: Callable[[int, bool], Command], output: Path, check: Callable[[], str]
) -> int:
    """Kill a command ``flags.kills`` times, then let the command finish; return how often it finished.

    ``command(num_ranks, is_last)`` returns the command; ``is_last`` is True for the last start. The folder
    ``output`` is removed after each finished run except the last run. ``check()`` is called after each start and
    returns a text for the log.
    """
    generator, log = random.Random(flags.seed), flags.folder / f"{flags.of}.log"
    shutil.rmtree(output, ignore_errors=True)
    kills = finishes = 0
    while True:
        is_last, num_ranks = kills == flags.kills, generator.randint(1, 4)
        seconds = 3600 if is_last else generator.uniform(0, flags.max_seconds)
        process = start(command(num_ranks, is_last), log)
        if kill_at(process, seconds):
            kills += 1
        elif process.returncode:
            raise UserError(f"{flags.of} failed with exit code {process.returncode}; see the error in '{log}'")
        else:
            finishes += 1
        print(f"{kills} kills; last start: {num_ranks} ranks, {seconds:.1f} s; {check()}", flush=True)
        if process.returncode == 0:
            if is_last:
                return finishes
            shutil.rmtree(output)


def new_folder(folder: Path) -> Path:
    """Create an empty folder in place of any old folder, and return its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def torchrun(num_ranks: int, *words: Any) -> Command:
    return ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone", *words]


def start(command: Command, log: Path) -> subprocess.Popen:
    with open(log, "w") as output:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=output, env=env)


def run(command: Command, log: Path) -> None:
    """Run a command to its end, without kills."""
    if start(command, log).wait():
        raise UserError(f"the run without kills failed; see the error in '{log}'")


def kill_at(process: subprocess.Popen, seconds: float) -> bool:
    """Kill a process and its descendants after ``seconds``; return False if the process ended earlier."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
        return False
    os.kill(process.pid, signal.SIGSTOP)  # torchrun must not start ranks again
    parents, pids = living(), [process.pid]
    for pid in pids:  # the list grows in the loop
        pids += [child for child, parent in parents.items() if parent == pid]
    while alive := living().keys() & set(pids):
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    return True


def living() -> dict[int, int]:
    """Return a dictionary from the pid of each process to the pid of its parent; zombies are excluded."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent, state in map(str.split, listing.splitlines()) if state[0] != "Z"}


def tokenization(corpus: str, output_dir: Path, num_ranks: int) -> Command:
    flags = {"corpus": corpus, "codec": CODEC, "output_dir": output_dir, "clips_per_shard": 32, "num_workers": 1}
    return torchrun(num_ranks, "scripts/tokenize_corpus.py", *to_cli_args(flags))


def kill_tokenization(flags: KillFlags) -> tuple[str, bool]:
    corpus, codes = CORPUS, new_folder(flags.folder / f"codes-{flags.layout}")
    if flags.layout != "parquet":
        folder = new_folder(flags.folder / f"corpus-{flags.layout}")
        corpus = str(LAYOUTS[flags.layout](folder, lossless_rows(CORPUS, 10**6, 20.0)))
    run(tokenization(corpus, codes, 2), flags.folder / "codes.log")
    expected = {path.name: pq.read_table(path) for path in sorted(codes.glob("shard-*.parquet"))}
    output = flags.folder / "killed_codes"

    def check() -> str:
        shards = sorted(output.glob("shard-*.parquet"))
        for shard in shards:  # every visible shard must be complete
            if not pq.read_table(shard).equals(expected[shard.name]):
                raise UserError(f"'{shard}' differs from the same shard of an uninterrupted run; report this bug")
        if (output / "manifest.json").exists() and [shard.name for shard in shards] != list(expected):
            problem = f"the manifest exists, but only {len(shards)} of {len(expected)} shards exist"
            raise UserError(f"{problem}; report this bug")
        return f"{len(shards)}/{len(expected)} shards"

    finishes = kill_until_finished(flags, lambda ranks, _: tokenization(corpus, output, ranks), output, check)
    found = {path.name for path in output.glob("shard-*.parquet")}  # `check` has compared them
    lost, total = (sum(len(expected[name]) for name in names) for names in (expected.keys() - found, expected))
    return f"{flags.layout}, finished {finishes} times; {lost}/{total} clips lost, 0 repeated", found == expected.keys()


def kill_training(flags: KillFlags) -> tuple[str, bool]:
    codes, audit, output = (new_folder(flags.folder / name) for name in ("numbered_codes", "audit", "run"))
    write_numbered_codes(codes / "train")
    resumed: list[int] = []

    def training(num_ranks: int, is_last: bool) -> Command:
        os.environ["AUDIT"] = str(audit / f"{len(resumed):04}")
        resumed.append(last_step(output))
        config = {
            "job.config_file": "config/tiny.toml",
            "job.dump_folder": output,
            "training.dataset": codes / "train",
            "training.steps": resumed[-1] + 20 if is_last else 100_000,
            "training.dataloader.num_workers": len(resumed) % 3,
            "lr_scheduler.total_steps": 100_000,
            "data.packing": "pack",
            "data.shuffle_window": 64,
            "checkpoint.interval": 7,
            "validation.enable": False,
        }
        return torchrun(num_ranks, "scripts/benchmarks/audited_training.py", *to_cli_args(config))

    kill_until_finished(flags, training, output, lambda: f"step {last_step(output)}")
    used, expected = frames_of_steps(audit), frames_of_position(output, codes / "train")
    lost, twice = (expected - used).total(), (used - expected).total()
    resumes = f"resumed from {len(set(resumed)) - 1} checkpoints on 1 to 4 ranks; {last_step(output)} steps"
    frames = f"{used.total():,} frames, {used.total() / len(used):.2f} epochs; {lost} frames lost, {twice} repeated"
    return f"{resumes} used {frames}", not lost + twice


def write_numbered_codes(folder: Path) -> None:
    """Write clips of 1 to 8 s. The codes of each frame encode the number of the frame; see `frame_numbers`."""
    ends = np.random.default_rng(0).integers(12, 100, 400).cumsum()
    codes_NQ = (np.arange(ends[-1])[:, None] // 256 ** np.arange(STORED_LEVELS) % 256).astype(np.uint16)
    parts = enumerate(np.split(codes_NQ, ends[:-1]))
    clips = [CodedClip(f"clip-{number}", codes_TQ, 0.08 * len(codes_TQ), False) for number, codes_TQ in parts]
    write_codes(folder, CODEC, [clips[at : at + 32] for at in range(0, len(clips), 32)])


def last_step(run: Path) -> int:
    with contextlib.suppress(UserError):
        return int(find_step(run / "checkpoint").name.removeprefix("step-"))
    return 0


def frames_of_steps(audit: Path) -> Counter[int]:
    """Return how often each frame was used. If a step was repeated after a kill, only its last run counts."""
    steps: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in audit.glob("*.jsonl"):
        for entry in map(json.loads, file.read_text().split("\n")[:-1]):  # the last line may be incomplete
            steps[entry["step"]][file.name.split("-")[0]] += entry["frames"]
    return Counter(frame for runs in steps.values() for frame in runs[max(runs)])


def frames_of_position(run: Path, codes: Path) -> Counter[int]:
    """Return how often each frame was used before the last checkpoint. A window can be partly used."""
    state = {"dataloader": {"position": ""}}
    dcp.load(state, checkpoint_id=find_step(run / "checkpoint"), no_dist=True)
    ranks = json.loads(state["dataloader"]["position"])["ranks"]
    cursors = [position.cursors[0] for position in TypeAdapter(list[Position]).validate_python(ranks)]
    config = json.loads((run / "job_config.json").read_text())
    corpus = CodeCorpus(str(codes), CODEC, config["codec"]["num_quantizers"])
    order = CorpusOrder(corpus.rows_per_unit, config["data"]["shuffle_window"], config["debug"]["seed"])
    max_frames = whole_frames(config["data"]["max_audio_seconds"], load_codec_config(CODEC, 1))
    units = map(corpus.read, range(len(corpus.rows_per_unit)))
    numbers = [[frame_numbers(row["codes"][:max_frames]) for row in rows] for rows in units]
    end = max(cursor.next_window for cursor in cursors)
    left = {window: (0, 0) for c in cursors for window in range(c.next_window, end, len(cursors))}
    left |= {begun.window: (begun.rows_used, begun.frames_used) for cursor in cursors for begun in cursor.begun}
    frames: Counter[int] = Counter()
    for window in range(end):
        num_rows, first_frame = left.get(window, (len(order.rows(window)), 0))
        for index in range(num_rows + (first_frame > 0)):
            unit, row = order.rows(window)[index]
            frames.update(numbers[unit][row][: first_frame if index == num_rows else None])
    return frames


if __name__ == "__main__":
    run_command(kill_runs, __doc__)
