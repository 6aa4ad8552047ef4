"""SIGKILL tokenisation, training or continuations at random moments, on 1 to 4 ranks; count what is lost or twice.

    uv run python scripts/benchmarks/kill_runs.py --of tokenization --kills 100 --seed 0 --folder outputs/kills
    uv run python scripts/benchmarks/kill_runs.py --of tokenization --layout tar --kills 20 --folder outputs/kills_tar
    uv run python scripts/benchmarks/kill_runs.py --of training --kills 50 --seed 0 --folder outputs/kills
    uv run python scripts/benchmarks/kill_runs.py --of continuation --kills 20 --seed 0 --folder outputs/kills
    uv run python scripts/benchmarks/kill_runs.py --of study --kills 5 --seed 0 --max_seconds 90 --folder outputs/kills

Tokenisation is started again until it finishes, its shards are compared with an undisturbed run's, and the folder is
begun anew, until there were enough kills. Training (the tiny recipe, packed, from those codes) goes on from its last
checkpoint on another number of ranks; every step writes down which frames of which clips it used, and what the steps
up to the last checkpoint used is compared with the data. Of 1,000 continuations the files are compared with an
undisturbed run's, byte by byte, and of a small study its report and the bits of its runs.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch.distributed.checkpoint as dcp
from layouts import LAYOUTS, lossless_rows

from llama_mimi.audio.mimi import load_codec_config, whole_frames
from llama_mimi.checkpoint.dcp import find_step
from llama_mimi.common.command_line import run_command, to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.data.order import CorpusOrder, Position
from llama_mimi.training.metrics import BITS

CORPUS, CODEC = "assets/tiny/corpus/train-*.parquet", "assets/tiny/mimi"
SHUFFLE_BLOCK = 64
NUM_PROMPTS = 250
STUDY = """
name = "killed"
output_dir = "{folder}/out"
[config]
flattened = "config/tiny.toml"
hierarchical = "config/tiny_hierarchical.toml"
[settings]
"lr_scheduler.warmup_steps" = 2
"checkpoint.interval" = 5
"validation.freq" = 24
[launch]
parallel = 2
threads = 1
[[tables]]
title = "Architectures"
architecture = ["flattened", "hierarchical"]
steps = [24, 12]
[benchmarks.sStoryCloze]
data_dir = "assets/tiny/benchmarks/storycloze"
limit = 20
[generation]
corpus = "assets/tiny/corpus/validation-*.parquet"
prompt_seconds = 1.6
recording_seconds = 2.6
seconds = 1
limit = 4
"""


@dataclass(frozen=True)
class KillFlags:
    """What is killed, and how often.

    Args:
        max_seconds: a run is killed at a random moment up to this
        model_name: folder of the model whose continuations are killed
        layout: of the corpus that is tokenised, as in layouts.py; Parquet is the corpus as it is
    """

    of: Literal["tokenization", "training", "continuation", "study"]
    kills: int
    folder: Path
    seed: int = 0
    max_seconds: float = 40.0
    model_name: str = "models/tiny"
    layout: str = "parquet"


def kill_runs(flags: KillFlags) -> None:
    flags.folder.mkdir(parents=True, exist_ok=True)
    if flags.of == "continuation":
        return kill_continuation(flags)
    if flags.of == "study":
        return kill_study(flags)
    codes = flags.folder / f"codes-{flags.layout}"
    corpus = corpus_of(flags)
    if not (codes / "manifest.json").exists():
        log = flags.folder / "codes.log"
        if start(tokenization(corpus, codes), 2, log).wait():
            raise UserError(f"the undisturbed tokenisation failed; see {log}")
    print(f"{flags.kills} kills of {flags.of}, seed {flags.seed}", flush=True)
    if flags.of == "tokenization":
        kill_tokenization(flags, corpus, codes)
    else:
        kill_training(flags, codes)


def corpus_of(flags: KillFlags) -> str:
    """The corpus in the layout wanted, made anew."""
    if flags.layout == "parquet":
        return CORPUS
    if flags.layout not in LAYOUTS:
        raise UserError(f"--layout is '{flags.layout}'; it is one of {', '.join(LAYOUTS)}")
    folder = flags.folder / f"corpus-{flags.layout}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return str(LAYOUTS[flags.layout](folder, lossless_rows(CORPUS, 10**6, 20.0)))


def tokenization(corpus: str, output_dir: Path) -> list[str]:
    flags = {"corpus": corpus, "codec": CODEC, "output_dir": output_dir, "clips_per_shard": 32, "num_workers": 1}
    return ["scripts/tokenize_corpus.py", *to_cli_args(flags)]


def start(command: list[str], nproc: int, log: Path, **environment: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with open(log, "w") as output:
        return subprocess.Popen([*torchrun, *command], stdout=output, stderr=output, env=env)


def kill_at(process: subprocess.Popen, seconds: float) -> bool:
    """SIGKILL a process and all below it after ``seconds``; False if it had ended before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
        return False
    os.kill(process.pid, signal.SIGSTOP)  # torchrun starts nothing more while its ranks are killed
    pids = family(process.pid)
    while pids:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pids = [pid for pid in pids if is_alive(pid)]
    process.wait()
    return True


def family(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that was killed and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_tokenization(flags: KillFlags, corpus: str, codes: Path) -> None:
    expected = {path.name: pq.read_table(path) for path in sorted(codes.glob("shard-*.parquet"))}
    generator = random.Random(flags.seed)
    output = flags.folder / "killed_codes"
    shutil.rmtree(output, ignore_errors=True)
    kills = finished = with_shards = 0
    began = time.monotonic()
    while kills < flags.kills or not (output / "manifest.json").exists():
        if (output / "manifest.json").exists():
            finished += 1
            shutil.rmtree(output)
        nproc = generator.randint(1, 4)
        process = start(tokenization(corpus, output), nproc, flags.folder / "killed_codes.log")
        seconds = generator.uniform(0, flags.max_seconds) if kills < flags.kills else 600
        if kill_at(process, seconds):
            kills += 1
        elif process.returncode:
            raise UserError(f"tokenisation ended with {process.returncode}; see {flags.folder / 'killed_codes.log'}")
        shards = sorted(output.glob("shard-*.parquet"))
        with_shards += bool(shards)
        for shard in shards:  # whatever is visible is whole and right
            if not pq.read_table(shard).equals(expected[shard.name]):
                raise UserError(f"'{shard}' differs from the undisturbed run's after {kills} kills")
        if (output / "manifest.json").exists() and [shard.name for shard in shards] != list(expected):
            raise UserError(f"a manifest was written with {len(shards)} of {len(expected)} shards after {kills} kills")
        print(f"kill {kills}: {nproc} ranks, {seconds:.1f} s, {len(shards)}/{len(expected)} shards", flush=True)
    finished += 1
    ids = Counter(name for shard in expected for name in pq.read_table(output / shard)["id"].to_pylist())
    wanted = Counter(name for table in expected.values() for name in table["id"].to_pylist())
    print(
        f"tokenisation ({flags.layout}): {kills} kills (seed {flags.seed}, {with_shards} starts ended with shards "
        f"there), {finished} times finished; of {len(wanted)} clips {sum((wanted - ids).values())} were lost and "
        f"{sum((ids - wanted).values())} there twice; {(time.monotonic() - began) / 60:.0f} min"
    )


def kill_continuation(flags: KillFlags) -> None:
    prompts, log = flags.folder / "prompts", flags.folder / "continuation.log"
    prompts.mkdir(exist_ok=True)
    for path in sorted(Path("assets/tiny/benchmarks").rglob("*.ogg"))[:NUM_PROMPTS]:
        shutil.copy(path, prompts / f"{path.parent.name}_{path.name}")

    def continuation(output_dir: Path) -> list[str]:
        amount = {"num_samples": 1000 // NUM_PROMPTS, "seconds": 0.8, "temperature": 1.0}
        places = {"model_name": flags.model_name, "prompts": prompts, "output_dir": output_dir}
        return ["inference.py", *to_cli_args(places | amount), "--device", "cpu"]

    whole, killed = flags.folder / "whole_continuations", flags.folder / "killed_continuations"
    if start(continuation(whole), 2, log).wait():
        raise UserError(f"the undisturbed run failed; see {log}")
    expected = {path.name: path.read_bytes() for path in whole.glob("*.wav")}
    generator, began = random.Random(flags.seed), time.monotonic()
    shutil.rmtree(killed, ignore_errors=True)
    kills = finished = 0
    while kills < flags.kills or not (killed / "results.jsonl").exists():
        if (killed / "results.jsonl").exists():
            finished += 1
            shutil.rmtree(killed)
        nproc = generator.randint(1, 4)
        process = start(continuation(killed), nproc, log)
        seconds = generator.uniform(0, flags.max_seconds) if kills < flags.kills else 600
        if kill_at(process, seconds):
            kills += 1
        elif process.returncode:
            raise UserError(f"a run ended with {process.returncode}; see {log}")
        print(f"kill {kills}: {nproc} ranks, {seconds:.1f} s, {len(list(killed.glob('*.wav')))} files", flush=True)
    lines = Counter(json.loads(line)["file"] for line in (killed / "results.jsonl").read_text().splitlines())
    found = {path.name: path.read_bytes() for path in killed.glob("*.wav")}
    print(
        f"continuation: {kills} kills (seed {flags.seed}), {finished + 1} times finished; of {len(expected)} samples "
        f"{len(expected.keys() - lines.keys())} were lost and {sum(lines.values()) - len(lines)} there twice, "
        f"{sum(found.get(name) != content for name, content in expected.items())} had other bytes; "
        f"{(time.monotonic() - began) / 60:.0f} min"
    )
    if found != expected or set(lines.values()) != {1}:
        raise UserError("the samples are not those of the undisturbed run")


def kill_study(flags: KillFlags) -> None:
    """Kill a study of four runs; compare its report and its index with those of an undisturbed study."""
    generator, began = random.Random(flags.seed), time.monotonic()
    log = flags.folder / "study.log"
    whole, killed = (write_study(flags.folder / name) for name in ("whole_study", "killed_study"))
    if start_study(whole, log).wait():
        raise UserError(f"the undisturbed study failed; see {log}")
    kills = starts = 0
    while True:
        starts += 1
        process = start_study(killed, log)
        seconds = generator.uniform(5, flags.max_seconds) if kills < flags.kills else 3600
        if kill_at(process, seconds):
            kills += 1
        elif process.returncode:
            raise UserError(f"the study ended with {process.returncode}; see {log}")
        elif kills == flags.kills:
            break
        else:  # before it was to be killed
            write_study(killed.parent)
        done = list((killed.parent / "out" / "results").rglob("official*.json"))
        print(f"kill {kills}: {seconds:.1f} s, {len(done)} results", flush=True)
    reports = [(study.parent / "out" / "report.md").read_text().replace(str(study), "") for study in (whole, killed)]
    scores = [
        [{key: line[key] for key in ("run", "state", BITS)} for line in map(json.loads, lines)]
        for lines in ((study.parent / "out" / "index.jsonl").read_text().splitlines() for study in (whole, killed))
    ]
    is_same = reports[0] == reports[1] and scores[0] == scores[1]
    print(
        f"study: {kills} kills (seed {flags.seed}), {starts} starts; {len(scores[0])} runs, the report is "
        f"{'the same' if is_same else 'another'}; {(time.monotonic() - began) / 60:.0f} min"
    )
    if not is_same:
        raise UserError("the study does not say what the undisturbed one says")


def write_study(folder: Path) -> Path:
    """A study that takes minutes, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(STUDY.format(folder=folder))
    return folder / "study.toml"


def start_study(study: Path, log: Path) -> subprocess.Popen:
    with open(log, "w") as output:
        return subprocess.Popen([sys.executable, "scripts/study.py", study], stdout=output, stderr=output)


def kill_training(flags: KillFlags, codes: Path) -> None:
    generator = random.Random(flags.seed)
    run, audit = flags.folder / "run", flags.folder / "audit"
    for folder in (run, audit):
        shutil.rmtree(folder, ignore_errors=True)
    audit.mkdir()
    kills, began, resumed = 0, time.monotonic(), []
    for number in itertools.count():
        nproc, workers = generator.randint(1, 4), generator.choice([0, 1, 2])
        is_last = kills == flags.kills
        steps = last_step(run) + 20 if is_last else 100_000
        config = {
            "job.config_file": "config/tiny.toml",
            "job.dump_folder": run,
            "training.dataset": codes,
            "training.steps": steps,
            "training.dataloader.num_workers": workers,
            "lr_scheduler.total_steps": 1000,
            "data.packing": "pack",
            "data.shuffle_window": SHUFFLE_BLOCK,
            "checkpoint.interval": 7,
        }
        command = ["scripts/benchmarks/audited_training.py", *to_cli_args(config), "--validation.no-enable"]
        process = start(command, nproc, flags.folder / "run.log", AUDIT=str(audit / f"{number:04}"))
        resumed.append(last_step(run))
        seconds = 600.0 if is_last else generator.uniform(0, flags.max_seconds)
        if kill_at(process, seconds):
            kills += 1
        elif process.returncode or not is_last:
            raise UserError(f"training ended with {process.returncode}; see {flags.folder / 'run.log'}")
        print(f"kill {kills}: {nproc} ranks, {workers} workers, {seconds:.1f} s, step {last_step(run)}", flush=True)
        if is_last:
            break
    used = Counter(frame for frames in trained_on(audit).values() for frame in frames)
    expected = frames_of_position(run, codes)
    lost, twice = sum((expected - used).values()), sum((used - expected).values())
    print(
        f"training: {kills} kills (seed {flags.seed}), resumed from {len(set(resumed)) - 1} checkpoints on 1 to 4 "
        f"ranks; {last_step(run)} steps used {used.total():,} frames, {used.total() / len(set(used)):.2f} epochs; "
        f"{lost} frames lost, {twice} twice; {(time.monotonic() - began) / 60:.0f} min"
    )
    if lost or twice:
        raise UserError("the frames used are not those of the data's order")


def last_step(run: Path) -> int:
    checkpoint = run / "checkpoint"
    try:
        return int(find_step(checkpoint).name.removeprefix("step-"))
    except UserError:
        return 0


def trained_on(audit: Path) -> dict[int, list[tuple[int, int, int]]]:
    """Frames (row group, row, frame) that each step used, in the run that did it last: the others were undone."""
    steps: dict[int, tuple[str, list[tuple[int, int, int]]]] = {}
    for file in sorted(audit.glob("*.jsonl")):
        run = file.name.split("-")[0]
        lines = file.read_text().split("\n")[:-1]  # a line that was cut off has no end
        for entry in map(json.loads, lines):
            earlier_run, frames = steps.get(entry["step"], ("", []))
            if earlier_run != run:
                frames = []
            frames += [(g, r, frame) for g, r, start, end in entry["pieces"] for frame in range(start, end)]
            steps[entry["step"]] = (run, frames)
    return {step: frames for step, (_, frames) in steps.items()}


def frames_of_position(run: Path, codes: Path) -> Counter[tuple[int, int, int]]:
    """All frames of the windows that the last checkpoint says were begun, but for what is left of them."""
    step = find_step(run / "checkpoint")
    state = {"dataloader": {"position": ""}}
    dcp.load(state, checkpoint_id=step, no_dist=True)
    ranks = json.loads(state["dataloader"]["position"])["ranks"]
    cursors = [Position.from_json(position).cursors[0] for position in ranks]
    config = json.loads((run / "job_config.json").read_text())
    corpus = CodeCorpus(str(codes), CODEC, config["codec"]["num_quantizers"], with_text=False)
    order = CorpusOrder(corpus.rows_per_group, config["data"]["shuffle_window"], config["debug"]["seed"])
    max_frames = whole_frames(config["data"]["max_audio_seconds"], load_codec_config(CODEC, 1))
    end = max(cursor.next_window for cursor in cursors)
    left = {window: (0, 0) for c in cursors for window in range(c.next_window, end, len(cursors))}
    left |= {begun.window: (begun.rows_used, begun.frames_used) for cursor in cursors for begun in cursor.begun}
    lengths = [[len(corpus.read_group(g).codes(row)) for row in range(n)] for g, n in enumerate(corpus.rows_per_group)]
    frames: Counter[tuple[int, int, int]] = Counter()
    for window in range(end):
        num_rows, first_frame = left.get(window, (order.num_rows(window), 0))
        for index in range(num_rows + (first_frame > 0)):
            group, row = order.row(window, index)
            stop = first_frame if index == num_rows else min(lengths[group][row], max_frames)
            frames.update((group, row, frame) for frame in range(stop))
    return frames


if __name__ == "__main__":
    run_command(kill_runs, __doc__)
