"""Compare the architectures and the loss recipes on the tiny corpus: one table and one picture.

    uv run python scripts/benchmarks/compare_arms.py

Every arm is trained, converted, scored and continues prompts, with each seed. All train on the same codes in the same
order. "same frames" is as many steps as the flattened arm has, "same FLOPs" as many as cost the same. What is done is
kept, so that a study that was stopped goes on. What training costs says
bench_hierarchical.py.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama_mimi.common.cpu import use_cpu_without_gpu

use_cpu_without_gpu()  # before anything imports TorchTitan

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from measuring import as_words, machine, measured  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from llama_mimi.common.errors import UserError, run_command  # noqa: E402
from llama_mimi.common.files import read_json, write_atomically  # noqa: E402
from llama_mimi.data.code_store import CodeCorpus  # noqa: E402
from llama_mimi.evaluation.accuracy import wilson_interval  # noqa: E402
from llama_mimi.generation.continuation import SamplingOptions, continue_codes  # noqa: E402
from llama_mimi.generation.loading import load_speech_model  # noqa: E402
from llama_mimi.model.architectures import build_model  # noqa: E402
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs  # noqa: E402
from llama_mimi.tokens.units import Architecture  # noqa: E402
from llama_mimi.training.config_file import parse_config  # noqa: E402

TINY = "assets/tiny"
Q, FRAME_RATE_HZ = 4, 12.5
STEPS, BATCH = 420, 4  # as config/tiny.toml on two ranks
PROMPT_FRAMES, MAX_NEW_SECONDS = 19, 5.0
BENCHMARKS = {"salmon": "salmon", "sLM21": "sLM21", "sStoryCloze": "storycloze"}
# What stands in the table, and its heading.
SCORES = {
    "salmon/speaker_consistency": "SALMon speaker",
    "sLM21/lexical_dev": "sWUGGY",
    "sLM21/syntactic_dev": "sBLIMP",
    "sStoryCloze/storycloze": "StoryCloze",
}
CONFIGS: dict[Architecture, str] = {"flattened": "config/tiny.toml", "hierarchical": "config/tiny_hierarchical.toml"}


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Args:
        name: in the table.
        architecture, level_weights: settings of the run.
        has_same_flops: trained for as many FLOPs as the flattened arm, in place of as many steps.
    """

    name: str
    architecture: Architecture
    level_weights: str = "uniform"
    has_same_flops: bool = False


ARMS = (
    Arm("flattened", "flattened"),
    Arm("hierarchical, same frames", "hierarchical"),
    Arm("hierarchical, same FLOPs", "hierarchical", has_same_flops=True),
    Arm("flattened, semantic:100", "flattened", "semantic:100"),
    Arm("flattened, geometric:100", "flattened", "geometric:100"),
)
ALL_ARMS = tuple(arm.name for arm in ARMS)


def compare_arms(
    output_dir: Path = Path("outputs/arms"),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = STEPS,
    num_prompts: int = 30,
    arms: tuple[str, ...] = ALL_ARMS,
) -> None:
    """Train every arm with every seed, and print what became of them.

    Args:
        output_dir: of runs, models, results and the picture
        seeds: of weights and data order
        steps: of the flattened arm
        num_prompts: of validation clips that are continued
        arms: names of those that are compared

    Raises:
        UserError: no such arm, or a step of one failed.
    """
    chosen = [arm for arm in ARMS if arm.name in arms]
    if len(chosen) != len(arms):
        raise UserError(f"--arms is {', '.join(arms)}; choose of: {'; '.join(arm.name for arm in ARMS)}")
    print(machine())
    for part in ("train", "validation"):
        corpus = f"{TINY}/corpus/{part}-*.parquet"
        command("scripts/tokenize_corpus.py", corpus=corpus, codec=f"{TINY}/mimi", output_dir=output_dir / part)
    one = partial(run_arm, output_dir=output_dir, steps=steps)
    # The first run encodes what all score; then each core takes one.
    jobs = [(arm, seed) for seed in seeds for arm in chosen]
    found = {jobs[0]: one(*jobs[0])}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found |= dict(zip(jobs[1:], pool.map(lambda job: one(*job), jobs[1:]), strict=True))
    torch.set_num_threads(1)
    for summary in found.values():  # one after the other, as its speed is measured
        summary |= continuations(Path(summary["folder"]), output_dir / "validation", num_prompts)
    by_arm = {arm: [found[arm, seed] for seed in seeds] for arm in chosen}
    print_table(by_arm)
    draw(by_arm, output_dir / "arms.png")


def run_arm(arm: Arm, seed: int, *, output_dir: Path, steps: int) -> dict[str, Any]:
    """Train, convert and score; read where that was done before."""
    flops = {architecture: flops_per_frame(architecture) for architecture in CONFIGS}
    own_steps = round(steps * flops["flattened"] / flops[arm.architecture]) if arm.has_same_flops else steps
    folder = output_dir / f"{arm.name.replace(', ', '_').replace(':', '_').replace(' ', '_')}-{own_steps}-{seed}"
    if earlier := read_json(str(folder), "summary.json"):
        return earlier
    flags = {
        "job.config_file": CONFIGS[arm.architecture],
        "job.dump_folder": folder / "run",
        "loss.level_weights": arm.level_weights,
        "training.dataset": output_dir / "train",
        "validation.dataset": output_dir / "validation",
        "training.local_batch_size": BATCH,
        "training.steps": own_steps,
        "validation.freq": own_steps,
        "checkpoint.interval": own_steps,
        "debug.seed": seed,
    }
    launch = ("torch.distributed.run", "--nproc_per_node=1", "--standalone")
    run(sys.executable, "-m", *launch, "-m", "llama_mimi.train", *as_words(flags))
    model = folder / "model"
    command("scripts/convert_dcp_to_hf.py", checkpoint=folder / "run" / "checkpoint", output_dir=model)
    scores: dict[str, Any] = {}
    for benchmark, data in BENCHMARKS.items():
        places = {"data_dir": f"{TINY}/benchmarks/{data}", "output_dir": folder / "results"}
        command(f"eval/{benchmark}.py", model_name=model, codes_dir=output_dir / "clip_codes", **places)
        report = json.loads((folder / "results" / benchmark / "model" / "official.json").read_text())
        scores |= {f"{benchmark}/{part}": result for part, result in report["parts"].items()}
    summary = {
        "folder": str(folder),
        "steps": own_steps,
        "flops_per_frame": flops[arm.architecture],
        "bits": validation_bits(folder / "run"),
        "scores": {
            name: {key: result[key] for key in ("accuracy", "interval", "count")} for name, result in scores.items()
        },
    }
    write_atomically(str(folder), "summary.json", json.dumps(summary, indent=1).encode())
    print(f"{arm.name}, seed {seed}: {own_steps} steps", flush=True)
    return summary


def command(script: str, **flags: object) -> None:
    run(sys.executable, script, *as_words(flags))


def run(*words: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"`{' '.join(words[1:])}` failed: {(done.stderr or done.stdout).strip()[-600:]}")


def flops_per_frame(architecture: Architecture) -> float:
    """Training FLOPs of a frame."""
    job_config = parse_config(["--job.config_file", CONFIGS[architecture]])
    args = LlamaMimiArgs(**vars(FLAVORS["tiny"]))
    args.update_from_config(job_config)
    with torch.device("meta"):
        model = build_model(args)
    return Q * args.get_nparams_and_flops(model, job_config.training.seq_len)[1]


def validation_bits(run_folder: Path) -> dict[str, float]:
    """Bits a second of audio at the last validation, by level and of all levels together."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for log in sorted((run_folder / "tb").rglob("events*")):  # a run that was stopped has one for each start
        events = EventAccumulator(str(log))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    prefix = "validation_bits_per_audio_second/"
    return {tag.removeprefix(prefix): of[max(of)] for tag, of in values.items() if tag.startswith(prefix)}


def continuations(folder: Path, codes: Path, num_prompts: int) -> dict[str, Any]:
    """What `generate` finds of a model, in a process of its own; read where that was done before."""
    name = f"continuations-{num_prompts}.json"
    if earlier := read_json(str(folder), name):
        return earlier
    found, done = measured(generate, model_folder=folder / "model", codes=codes, num_prompts=num_prompts)
    if not found:
        raise UserError(f"the model in '{folder}' does not generate: {done.stderr[-600:]}")
    write_atomically(str(folder), name, json.dumps(found).encode())
    return found


def generate(model_folder: str, codes: str, num_prompts: int) -> dict[str, Any]:
    """How many continuations end by themselves within `MAX_NEW_SECONDS`, and new frames a second."""
    model = load_speech_model(model_folder, device="cpu")
    corpus = CodeCorpus(codes, model.codec.name, Q, with_text=False)
    clips = [corpus.read_group(group) for group in range(len(corpus.sizes_G))]
    prompts = [group.codes(row)[:PROMPT_FRAMES] for group in clips for row in range(len(group.starts) - 1)]
    num_ended = num_frames = 0
    start = time.perf_counter()
    for number, prompt_TQ in enumerate(prompts[:num_prompts]):
        options = SamplingOptions(seconds=MAX_NEW_SECONDS, seed=number)
        (codes_TQ,) = continue_codes(model, torch.from_numpy(prompt_TQ.astype(np.int64)), options)
        new = len(codes_TQ) - len(prompt_TQ)
        num_frames += new
        num_ended += new < round(MAX_NEW_SECONDS * FRAME_RATE_HZ)
    speed = num_frames / (time.perf_counter() - start)
    return {"ended": num_ended, "prompts": min(num_prompts, len(prompts)), "generated_frames_per_s": speed}


def print_table(by_arm: dict[Arm, list[dict[str, Any]]]) -> None:
    """One row an arm: means over seeds with the least and the most; accuracies with the interval of one seed."""
    levels = [f"level_{level}" for level in range(Q)]
    heads = ["arm", "steps", "MFLOPs a frame", "bits/s", *(f"level {level}" for level in range(Q))]
    heads += [*SCORES.values(), "ended by itself", "new frames/s"]
    print("|", " | ".join(heads), "|")
    print("|---" * len(heads) + "|")
    for arm, runs in by_arm.items():
        cells = [arm.name, f"{runs[0]['steps']:,}", f"{runs[0]['flops_per_frame'] / 1e6:.0f}"]
        cells += [mean_and_range([found["bits"][name] for found in runs]) for name in ("all", *levels)]
        for name in SCORES:
            accuracies = [found["scores"][name]["accuracy"] for found in runs]
            low, high = wilson_interval(statistics.mean(accuracies), runs[0]["scores"][name]["count"])
            cells.append(f"{100 * statistics.mean(accuracies):.1f} % ({100 * low:.0f} to {100 * high:.0f})")
        ended, prompts = (sum(found[key] for found in runs) for key in ("ended", "prompts"))
        cells.append(f"{100 * ended / prompts:.0f} % of {prompts}")
        cells.append(mean_and_range([found["generated_frames_per_s"] for found in runs]))
        print("|", " | ".join(cells), "|")


def mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def draw(by_arm: dict[Arm, list[dict[str, Any]]], path: Path) -> None:
    """Bits by level as stacked bars, and accuracies with a point for each seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    names = [arm.name.replace(", ", "\n") for arm in by_arm]
    places = np.arange(len(names))
    bottom = np.zeros(len(names))
    for level in range(Q):
        heights = np.array([np.mean([found["bits"][f"level_{level}"] for found in runs]) for runs in by_arm.values()])
        left.bar(places, heights, bottom=bottom, label=f"level {level}")
        bottom += heights
    left.set_ylabel("validation, bits per second of audio")
    for number, (name, title) in enumerate(SCORES.items()):
        for place, runs in zip(places, by_arm.values(), strict=True):
            values = [100 * found["scores"][name]["accuracy"] for found in runs]
            x = place + 0.18 * (number - 1.5)
            label = title if place == 0 else None
            right.plot([x] * len(values), values, "o", color=f"C{number}", alpha=0.7, label=label)
    right.axhline(50, color="gray", linewidth=0.8)
    right.set_ylabel("accuracy, %, a point for each seed")
    for axes in (left, right):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize="small", frameon=False)
        axes.set_xticks(places, names, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\n{path}")


if __name__ == "__main__":
    run_command(compare_arms, __doc__)
