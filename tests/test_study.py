"""A study: which runs a file means, what they cost, what becomes of them, and what its report says."""

import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import study_results
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY, run_here
from forked_ranks import run_ranks
from scipy.stats import t as student
from study_report import write_report
from study_results import Results
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from transformers import CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.audio.reading import Waveform, write_wav
from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.command_line import as_words, read_flags
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.evaluation.script import SALMON as SALMON_SCRIPT
from llama_mimi.evaluation.script import EvaluationOptions
from llama_mimi.judging.script import FORMAT as GENERATIONS_FORMAT
from llama_mimi.model.llama import FLAVORS
from llama_mimi.study import design
from llama_mimi.study.budget import cost_of_step
from llama_mimi.study.design import Arm, Run, read_study
from llama_mimi.study.registry import write_index
from llama_mimi.study.runs import judge, link_step, make_ready, run_families
from llama_mimi.study.workplace import StepFailed, Workplace, check_unchanged, training_flags
from llama_mimi.training.config_file import parse_config

BITS = "validation bits/s over admissible tokens"
# Keys of a result of eval/generation.py that are the same in all of them.
JUDGED = {
    "format": GENERATIONS_FORMAT,
    "kind": "generations",
    "prompts_sha256": "p" * 64,
    "audio_sha256": "a" * 64,
    "seconds": 0.5,
    "measures": {},
    "made_by": None,
    "results": {},
}
SALMON = 'data_dir = "assets/tiny/benchmarks/salmon"\n'
STUDY = """
name = "mini"
output_dir = "{folder}/out"
seeds = [3, 5]
[config]
flattened = "config/tiny.toml"
hierarchical = "config/tiny_hierarchical.toml"
[settings]
"training.steps" = 40
"model.hf_assets_path" = "assets/tiny/llama"
[[when]]
num_quantizers = 8
settings = {{ "training.local_batch_size" = 1 }}
[[tables]]
title = "Architectures"
architecture = ["flattened", "hierarchical"]
steps = [40, 20]
[[tables]]
title = "Quantizers"
num_quantizers = [4, 8]
[benchmarks.salmon]
data_dir = "assets/tiny/benchmarks/salmon"
[benchmarks.sLM21]
data_dir = "assets/tiny/benchmarks/sLM21"
[generation]
corpus = "x.parquet"
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def written(folder, text=STUDY, **changes):
    content = text.format(folder=folder)
    for old, new in changes.values():
        assert old in content
        content = content.replace(old, new)
    (folder / "study.toml").write_text(content)
    return folder / "study.toml"


def test_arms_are_the_combinations_of_each_table(tmp_path):
    study = read_study(written(tmp_path))
    names = ["flattened-tiny-q4-uniform-40", "flattened-tiny-q4-uniform-20", "hierarchical-tiny-q4-uniform-40"]
    assert [arm.name for arm in study.arms] == [
        *names,
        "hierarchical-tiny-q4-uniform-20",
        "flattened-tiny-q8-uniform-40",
    ]
    assert len(study.runs) == 10 and len({run.name for run in study.runs}) == 10
    # Arms that differ in their steps alone are one job.
    assert [(trunk.name, seed, [arm.steps for arm in arms]) for trunk, seed, arms in study.families][:3] == [
        ("flattened-tiny-q4-uniform", 3, [20, 40]),
        ("hierarchical-tiny-q4-uniform", 3, [20, 40]),
        ("flattened-tiny-q8-uniform", 3, [40]),
    ]
    first, second = study.tables
    assert [first.label(arm) for arm in first.arms[1:3]] == ["flattened, 20 steps", "hierarchical, 40 steps"]
    assert [second.label(arm) for arm in second.arms] == ["Q = 4", "Q = 8"]
    assert (study.size, replace(study, seeds=(3,)).size) == ("2 seeds of 5 arms", "1 seed of 5 arms")


def test_settings_of_an_arm(tmp_path):
    study = read_study(written(tmp_path, a=("assets/tiny/llama", "models/base-q{num_quantizers}")))
    configs = {arm: parse_config(as_words(study.flags(arm))) for arm in study.arms}
    for arm, config in configs.items():
        assert config.codec.num_quantizers == arm.num_quantizers and config.model.architecture == arm.architecture
        assert config.model.hf_assets_path == f"models/base-q{arm.num_quantizers}"
        # A row holds the same audio whatever Q is.
        assert config.training.seq_len == {"hierarchical": 64, "flattened": 64 * arm.num_quantizers}[arm.architecture]
        assert config.training.local_batch_size == (1 if arm.num_quantizers == 8 else 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mini"\n', "", "does not say 'name'"),
        ("steps = [40, 20]", "stepz = [40]", "has the axis 'stepz'; the nearest is 'steps'"),
        ("steps = [40, 20]", "steps = [40]\nflops = [1e12]", "both steps and flops"),
        ('title = "Quantizers"\n', "", "has no title"),
        ("seeds = [3, 5]", "seeds = []", "no [[tables]] or no seeds"),
        ("seeds = [3, 5]", "seedz = [3]", "the key 'seedz' is unknown"),
        ("[benchmarks.salmon]", "[benchmarks.salmonn]", "benchmarks.salmonn is none of salmon, sLM21, sStoryCloze"),
        ("[generation]", "[launch]\nparalel = 2\n[generation]", "launch.paralel is unknown; there are parallel,"),
        ("hierarchical = ", "hierarchic = ", "config.hierarchic is no architecture; there are flattened, hierarchical"),
        (
            'hierarchical = "config/tiny_hierarchical.toml"\n',
            "",
            "has 'hierarchical', for which [config] names no file",
        ),
        ("num_quantizers = [4, 8]", 'level_weights = ["heavy"]', "loss.level_weights is 'heavy'"),
        ("[[when]]", "[[before]]\nmakes = 'x'\n[[when]]", "[before] lacks a key"),
        ("name =", "name", "cannot be read"),
        ("num_quantizers = 8\n", "num_quantizer = 8\n", "a part of [[when]] has the unknown key 'num_quantizer'"),
        ('settings = { "training', 'setings = { "training', "a part of [[when]] has no axis, or no settings"),
        ('"training.steps" = 40', '"codec.num_quantizers" = 4', "codec.num_quantizers is set, which its axis"),
        ("seeds = [3, 5]", "seeds = [3, 3]", "seeds is [3, 3]; it is a list of different numbers"),
        ("seeds = [3, 5]", "seeds = 3", "seeds is 3"),
        ("steps = [40, 20]", "steps = [0]", "has steps = [0]; they are positive numbers"),
        ("num_quantizers = [4, 8]", 'num_quantizers = ["4"]', "has num_quantizers = ['4']"),
        ("num_quantizers = [4, 8]", "num_quantizers = []", "has no values of 'num_quantizers'"),
        ("steps = [40, 20]", "flops = [1e12]", "is not known; tokenise it first, or say steps"),
        ("[generation]", "[launch]\nparallel = 0\n[generation]", "are 1 or more"),
        ("[generation]", '[launch]\nparallel = "2"\n[generation]', "launch.parallel is '2'; it takes"),
        ("[generation]", '[launch]\ntrain = "bash x"\n[generation]', "launch.train is 'bash x'; it takes list[str]"),
        ("[generation]", '[launch]\ntrain = ["bash", "x"]\n[generation]', "set training.global_batch_size"),
        ("[benchmarks.salmon]\n" + SALMON, "[benchmarks]\nsalmon = 3\n", "it is a section, [benchmarks.salmon]"),
        ("num_quantizers = 8\n", "num_quantizers = 6\n", "has num_quantizers = 6, which fits no arm"),
        ("num_quantizers = 8\n", "num_quantizers = [8, 6]\n", "has num_quantizers = 6, which fits no arm"),
        ("[[when]]", "[when]", "when is {'num_quantizers': 8, 'settings': {'training.local_batch_size': 1}}; each is"),
        ('"training.steps" = 40', '"training.steps" = "40"', "training.steps is '40'; it is a positive number"),
        ('name = "mini"', "name = 3", "name is 3; it is a text"),
        ('settings = { "training.local_batch_size" = 1 }', "settings = 3", "has no axis, or no settings"),
        (
            'settings = { "training.local_batch_size"',
            'settings = { "training.steps"',
            "say steps in [settings] or as an",
        ),
        ("num_quantizers = 8\n", "steps = 40\n", "a part of [[when]] has the unknown key 'steps'"),
        ('"assets/tiny/llama"', '"models/q{quantizers}"', "braces, in which may stand architecture, flavor,"),
        ('"assets/tiny/llama"', '"models/{"', "a setting of the study has braces"),
        ('"assets/tiny/llama"', '"models/{flavor.x}"', "a setting of the study has braces"),
        (SALMON, SALMON + "limmit = 3\n", "[benchmarks.salmon]: Unrecognized options: --limmit, 3"),
        (SALMON, SALMON + "limit = 0\n", "--limit is 0; it must be 1 or more"),
        (SALMON, SALMON + 'output_dir = "x"\n', "benchmarks.salmon.output_dir is what the study itself says"),
        ('corpus = "x.parquet"', 'corpus = "x"\nsedonds = 3', "[generation]: Unrecognized options: --sedonds, 3"),
        ('corpus = "x.parquet"', "seconds = 3", "[generation]: Missing from"),
    ],
)
def test_mistakes_in_a_study(tmp_path, old, new, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_study(written(tmp_path, a=(old, new)))


def test_results_are_called_as_the_scripts_call_them(tmp_path):
    """What is not the preset's is named, so that no result is taken for another's."""
    more = SALMON + 'limit = 3\nlevels = "0"\nlikelihood = "grammar"\n'
    study = read_study(written(tmp_path, a=(SALMON, more)))
    assert study.scorings == {"salmon": "official-levels_0-grammar-limit_3", "sLM21": "official"}
    run, place = study.runs[0], Workplace(study)
    path = place.result(run, "salmon")
    options = read_flags(EvaluationOptions, as_words(place.flags(run)["salmon"]))
    assert path == SALMON_SCRIPT.result_path(options)


def test_steps_of_a_budget(tmp_path):
    """The same FLOPs are more steps where a frame costs less; a step is FLOPs of its frames."""
    study = read_study(written(tmp_path))
    flat, deep = (cost_of_step(study.flags(study.arms[i]), 2) for i in (0, 2))
    layers, D, Q, K, V, B, T = 1_574_400, 192, 4, 256, 1538, 2 * 2, 64
    # A position of the flattened arm: layers, norm and the output, and attention over 256 positions.
    assert flat.flops == B * T * Q * (6 * (layers + D + V * D) + 12 * 4 * D * 256) and flat.frames == B * T
    # A frame of the other: layers, norm and 257 entries, and attention over 64 positions; then Q positions of a layer
    # of width 96 behind a projection, attention over Q positions, and once the matrices of three levels.
    depth = 96 * (96 + 32 + 32 + 96) + 3 * 96 * 768 + 2 * 96
    backbone = 6 * (layers + D + (K + 1) * D) + 12 * 4 * D * 64
    levels = Q * (6 * (depth + 96 + D * 96) + 12 * 1 * 96 * Q) + 6 * 3 * (K + 1) * 96
    assert deep.flops == B * T * (backbone + levels)
    budget = 10 * flat.flops / 2  # of one rank
    packed = ('"training.steps" = 40', '"training.steps" = 40\n"data.packing" = "pack"')
    text = written(tmp_path, a=("steps = [40, 20]", f"flops = [{budget!r}]"), b=packed)
    arms = read_study(text).tables[0].arms
    assert [arm.steps for arm in arms] == [10, round(10 * flat.flops / deep.flops)]


@pytest.mark.parametrize(
    ("architecture", "share"), [("flattened", 1.0), ("hierarchical", 1.0), ("hierarchical", 1 / 16)]
)
def test_a_step_costs_what_pytorch_counts_of_the_stock_model(tmp_path, architecture, share):
    """Forward and backward of a row of 64 frames, of which a share trains the depth decoder."""
    study = read_study(written(tmp_path))
    flags = study.flags(next(arm for arm in study.arms if arm.architecture == architecture))
    step = cost_of_step({**flags, "model.depth_share": share}, 1)
    Q, K, T, V = 4, 256, 64, 1538
    args = replace(FLAVORS["tiny"], architecture=architecture, vocab_size=V, num_quantizers=Q, codebook_size=K)
    with torch.device("meta"):
        if architecture == "flattened":
            model = LlamaForCausalLM(hf_config(args))
            inputs = {"input_ids": torch.zeros(1, Q * T, dtype=torch.long)}
        else:
            model = CsmForConditionalGeneration(csm_config(args, codec=str(TINY / "mimi"), num_quantizers=Q))
            inputs = {"inputs_embeds": torch.zeros(1, T, args.dim, requires_grad=True)}
            codes_NQ = torch.zeros(round(share * T), Q, dtype=torch.long)
        model.set_attn_implementation("eager")  # its backward computes nothing twice
        with FlopCounterMode(display=False) as counter:
            if architecture == "flattened":
                total = model(**inputs).logits.sum()
            else:
                hidden_TD = model.backbone_model(**inputs).last_hidden_state[0]
                depth = model.depth_decoder(input_ids=codes_NQ, backbone_last_hidden_state=hidden_TD[: len(codes_NQ)])
                total = model.lm_head(hidden_TD).sum() + depth.logits.sum()
            total.backward()
    assert step.flops / step.frames == pytest.approx(counter.get_total_flops() / T, rel=0.01)


@pytest.mark.slow
def test_the_shipped_studies_can_be_planned(capsys):
    for path in sorted((ROOT / "config" / "studies").glob("*.toml")):
        assert run_here(str(ROOT / "scripts" / "study.py"), path, "--plan")[0] == 0
        said = capsys.readouterr().out
        study = read_study(path)
        assert f"{study.size}: " in said and said.count("\n| ") >= len(study.arms)
        assert run_here(str(ROOT / "scripts" / "study.py"), path, "--slurm")[0] == 0
        first, second = capsys.readouterr().out.splitlines()
        job = shlex.split(first.removeprefix("job=$(").removesuffix(")"))
        assert job[:3] == ["sbatch", "--parsable", f"--array=0-{len(study.families) - 1}"]
        assert job[3:] == [*study.launch.slurm, "scripts/study.slurm", str(path)]
        assert shlex.split(second) == ["sbatch", "--dependency=afterany:$job", *job[3:]]


# Runs, with commands that are played by this test.


class Played(Workplace):
    """Commands leave what the real ones leave, and are counted.

    Args:
        breaks: (script, part of a path) of commands that fail.
        why: what they say.
    """

    def __init__(self, study, breaks=(), why="it broke"):
        super().__init__(study)
        self.done, self.breaks, self.why = [], set(breaks), why

    def start(self, step, log, command):
        flags = dict(itertools.pairwise(command))
        name = next((word for word in command if word.endswith(".py")), "train")
        out = Path(flags.get("--output_dir", flags.get("--job.dump_folder", "")))
        self.done.append((name, flags.get("--model_name", str(out))))
        if any(part in self.done[-1][1] and script == name for script, part in self.breaks):
            raise StepFailed(step, self.why)
        if name == "train":
            checkpoint = out / "checkpoint" / f"step-{flags['--training.steps']}"
            checkpoint.mkdir(parents=True)
            (checkpoint / ".metadata").write_text(flags.get("--lr_scheduler.total_steps", ""))
            config = {"training": {"dataset": "d"}, "job": {"dump_folder": str(out)}, "of": flags["--model.flavor"]}
            (out / "job_config.json").write_text(json.dumps(config))
            with SummaryWriter(str(out / "tb")) as log:
                bits = 100 + 10 * int(flags["--codec.num_quantizers"]) + int(flags["--debug.seed"])
                log.add_scalar("validation_admissible_bits_per_audio_second/all", bits, int(flags["--training.steps"]))
                log.add_scalar("validation_admissible_bits_per_audio_second/all", 999, 1)
        elif name == "scripts/convert_dcp_to_hf.py":
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").touch()
        elif name == "scripts/make.py":
            Path(command[-1]).touch()
        else:
            model = Path(flags["--model_name"]).name
            self.write(name, model, out)

    def write(self, name, model, out):
        """Accuracies that depend on run and pair."""
        value = (len(model) * 7 + sum(map(ord, model))) % 5
        if name == "eval/generation.py":
            samples = [
                {
                    "prompt": f"p{i}",
                    "sample": s,
                    "file": "clip.wav",
                    "seconds": 0.5,
                    "similarity": 0.1 * i + 0.01 * value,
                    "distillmos": None if i == s == 0 else 1.5,
                }
                for i in range(6)
                for s in range(2)
            ]
            results = {name: {"mean": 1.5, "interval": [1, 2], "count": 6} for name in ("similarity", "distillmos")}
            recorded = [
                {"prompt": f"p{i}", "sample": None, "similarity": 0.5 + 0.01 * i, "file": "clip.wav", "seconds": 0.5}
                for i in range(7)
            ]
            of_recordings = JUDGED | {"system": "recording", "samples": recorded}
            out.mkdir(parents=True, exist_ok=True)
            (out / "recording.json").write_text(json.dumps(of_recordings))
            prompts = [{"name": f"p{i}", "speaker": None, "seconds": 0.5} for i in range(7)]
            (out / "prompts.json").write_text(json.dumps({"prompts": prompts}))
            write_wav(out / "clip.wav", Waveform(torch.linspace(-0.5, 0.5, 24_000), 24_000))
            path, content = (
                out / f"{model}.json",
                JUDGED | {"system": model, "samples": samples, "results": results},
            )
        else:
            benchmark = Path(name).stem
            part = {"salmon": "speaker_consistency", "sLM21": "lexical_dev"}[benchmark]
            pairs = [
                {"part": part, "name": str(i), "group": str(i), "correct": float((i + value) % 3 > 0)}
                for i in range(20)
            ]
            accuracy = statistics.mean(pair["correct"] for pair in pairs)
            content = {
                "format": FORMAT,
                "benchmark": benchmark,
                "preset": "official",
                "audio_sha256": "a" * 64,
                "settings": {"dtype": "float32", "max_audio_seconds": 3.0},
                "notes": [],
                "mean_of_parts": None,
                "scoring": {"by_group": True},
                "pairs": pairs,
                "parts": {part: {"accuracy": accuracy, "interval": [0, 1], "count": 20, "pairs": 20, "pairs_cut": 0}},
                "model_sha256": "m" * 64,
                "codec": {"sha256": "c" * 64, "attention": "windowed"},
                "versions": {"commit": "abc"},
            }
            path = out / benchmark / model / "official.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def whole(place):
    make_ready(place)
    run_families(place, list(range(len(place.study.families))))
    judge(place)
    lines = write_index(place)
    return lines, write_report(place, lines).read_text()


def test_a_study_is_done_once_and_a_trunk_is_shared(tmp_path):
    before = (
        f'[[before]]\nmakes = "{tmp_path}/made"\ncommand = ["scripts/make.py", "--as", "{tmp_path}/made"]\n[generation]'
    )
    place = Played(read_study(written(tmp_path, a=("[generation]", before))))
    lines, report = whole(place)
    trained = [Path(out).parent.name for name, out in place.done if name == "train"]
    # Of 20 and 40 steps the last fifth is decay: a trunk to step 16, then its decay, on to 32, then its decay.
    per_seed = ["q4-uniform", "q4-uniform-20", "q4-uniform", "q4-uniform-40"]
    for seed in (3, 5):
        own = [
            name.removeprefix("flattened-tiny-").removesuffix(f"-seed{seed}")
            for name in trained
            if name.startswith("flattened-tiny-q4") and name.endswith(str(seed))
        ]
        assert own == per_seed
    assert trained.count("flattened-tiny-q8-uniform-40-seed3") == 1 and "flattened-tiny-q8-uniform-seed3" not in trained
    trunk = place.folder(Run(study_arm(place, 0).trunk, 3)) / "run" / "checkpoint"
    assert sorted(path.name for path in trunk.iterdir()) == ["step-16", "step-32"]
    assert (trunk / "step-16" / ".metadata").read_text() == "20"  # constant until then
    branch = place.folder(Run(study_arm(place, 1), 3)) / "run" / "checkpoint"
    assert sorted(path.name for path in branch.iterdir()) == ["step-16", "step-20"]
    assert place.done[0][0] == "scripts/make.py" and all(line["state"] == "done" for line in lines)
    again = Played(place.study)
    assert whole(again)[1] == report and again.done == []


def study_arm(place, number):
    return place.study.arms[number]


def test_a_run_that_fails_is_a_hole_with_a_name_and_is_tried_again(tmp_path):
    study = read_study(written(tmp_path))
    breaks = [
        ("eval/sLM21.py", "hierarchical-tiny-q4-uniform-40-seed5"),
        ("train", "q8-uniform-40-seed3"),
        ("eval/generation.py", "flattened-tiny-q4-uniform-20-seed3"),
    ]
    place = Played(study, breaks)
    lines, report = whole(place)
    states = {line["run"]: line["state"] for line in lines}
    assert [run for run, state in states.items() if state == "failed"] == [
        "flattened-tiny-q4-uniform-20-seed3",
        "hierarchical-tiny-q4-uniform-40-seed5",
        "flattened-tiny-q8-uniform-40-seed3",
    ]
    assert "- hierarchical-tiny-q4-uniform-40-seed5: sLM21 failed: it broke" in report
    assert "- flattened-tiny-q8-uniform-40-seed3: train failed: it broke" in report
    assert "7 of 10 runs" in report
    whole_report = whole(Played(study))[1]
    assert "Not there" not in whole_report and "10 of 10 runs" in whole_report
    shutil.rmtree(study.output_dir)
    assert whole(Played(study))[1] == whole_report  # as if nothing had failed


def test_another_failure_is_a_hole_too(tmp_path, monkeypatch):
    """A full disk while a trunk is linked, for one."""
    place = Played(read_study(written(tmp_path)))

    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copytree", full)
    lines, report = whole(place)
    assert {line["state"] for line in lines if line["steps"] == 20} == {"failed"}
    assert "preparation failed: no space left" in report


def test_what_was_begun_otherwise_is_refused(tmp_path):
    whole(Played(read_study(written(tmp_path))))
    check_unchanged(Workplace(read_study(written(tmp_path))))
    for old, new, said in (
        (SALMON, 'data_dir = "elsewhere"\n', "--data_dir assets/.*/salmon, where .* has --data_dir elsewhere now"),
        ('"training.steps" = 40', '"training.steps" = 40\n"optimizer.lr" = 0.5', "--optimizer.lr not set, .* 0.5 now"),
        ('corpus = "x.parquet"', 'corpus = "x.parquet"\nseconds = 3', "--seconds not set, .* --seconds 3 now"),
    ):
        with pytest.raises(UserError, match=f"the step '.*' of flattened-tiny-q4.* was begun with {said}"):
            check_unchanged(Workplace(read_study(written(tmp_path, a=(old, new)))))


def test_a_config_that_was_edited_is_refused(tmp_path):
    shutil.copyfile("config/tiny.toml", tmp_path / "mine.toml")
    changes = {"a": ("config/tiny.toml", str(tmp_path / "mine.toml"))}
    whole(Played(read_study(written(tmp_path, **changes))))
    check_unchanged(Workplace(read_study(written(tmp_path, **changes))))
    with (tmp_path / "mine.toml").open("a") as file:
        file.write("# a word\n")
    with pytest.raises(UserError, match="mine.toml' was edited since flattened-tiny-q4-uniform-40-seed3 was begun"):
        check_unchanged(Workplace(read_study(written(tmp_path, **changes))))


@pytest.mark.parametrize("steps", ["[40, 20]", "[80, 60]"])
def test_a_trunk_is_not_gone_on_with_otherwise(tmp_path, steps):
    """Removing what the arms made, or training other ones, leaves what they share, whose rate was another."""
    study = read_study(written(tmp_path))
    whole(Played(study))
    for run in study.runs:
        shutil.rmtree(Workplace(study).folder(run))
    lr = ('"training.steps" = 40', '"training.steps" = 40\n"optimizer.lr" = 0.5')
    changed = written(tmp_path, a=lr, b=("steps = [40, 20]", f"steps = {steps}"))
    said = r"'trunk-16' of flattened-tiny-q4-uniform-seed3 was begun with --optimizer.lr not set, where .* 0.5 now"
    with pytest.raises(UserError, match=said):
        check_unchanged(Workplace(read_study(changed)))


def test_a_longer_arm_goes_on_with_the_trunk(tmp_path):
    whole(Played(read_study(written(tmp_path))))
    longer = read_study(written(tmp_path, a=("steps = [40, 20]", "steps = [40, 20, 60]")))
    check_unchanged(Workplace(longer))
    place = Played(longer)
    lines, _ = whole(place)
    assert [Path(out).parent.name for name, out in place.done if name == "train"][:2] == [
        "flattened-tiny-q4-uniform-seed3",
        "flattened-tiny-q4-uniform-60-seed3",
    ]
    # What arms share stands with each of them, as far as it is of it.
    trunks = {line["run"]: [s for s in line["seconds"] if s.startswith("trunk")] for line in lines}
    assert trunks["flattened-tiny-q4-uniform-20-seed3"] == ["trunk-16"]
    assert trunks["flattened-tiny-q4-uniform-60-seed3"] == ["trunk-16", "trunk-32", "trunk-48"]


def test_a_schedule_without_a_constant_part_has_no_trunk(tmp_path):
    """The warm-up of config/tiny.toml is of ten steps."""
    short = {"a": ("steps = [40, 20]", "steps = [10, 8]"), "b": ('"training.steps" = 40', '"training.steps" = 10')}
    study = read_study(written(tmp_path, **short))
    check_unchanged(Workplace(study))
    place = Played(study)
    whole(place)
    check_unchanged(Workplace(study))
    assert not [out for name, out in place.done if name == "train" and "uniform-seed" in out]


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    place = Played(read_study(written(tmp_path, a=('/out"', '/file"'))))
    with pytest.raises(UserError, match="cannot be written .*; choose another output_dir"):
        make_ready(place)


def test_rows_without_a_common_prompt_are_named(tmp_path):
    class Wordless(Played):
        def write(self, name, model, out):
            super().write(name, model, out)
            if name == "eval/generation.py":
                report = json.loads((out / f"{model}.json").read_text())
                for sample in report["samples"]:
                    if sample["prompt"] != f"p{int(model[-1]) % 2 + len(model) % 2}":
                        sample["similarity"] = None
                (out / f"{model}.json").write_text(json.dumps(report))

    _, report = whole(Wordless(read_study(written(tmp_path))))
    assert "so that there is no row of: speaker similarity." in report


def test_commands_have_their_threads(tmp_path):
    """Judging, of one run after the other, has those of all that else run at the same time."""
    place = Workplace(
        read_study(written(tmp_path, a=("[generation]", "[launch]\nparallel = 3\nthreads = 2\n[generation]")))
    )
    for step, threads in (("train", "2"), ("generation", "6")):
        place.start(step, tmp_path / "log", [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"])
        assert (tmp_path / "log").read_text() == threads + "\n"


def test_a_study_that_is_not_done_says_so_in_the_end(tmp_path, capsys):
    script = str(ROOT / "scripts" / "study.py")
    path = written(tmp_path, a=('hf_assets_path" = "assets/tiny/llama', 'hf_assets_path" = "nowhere'))
    for flags, said in (
        (["--report_only"], "0 of 10 runs are done; the report says why"),
        (["--part", 1, "--report_only"], "choose one"),
        (["--part", 99], "the study has the jobs 0 to 5"),
        (["--plan", "--mfu", 0], "--mfu is 0.0"),
    ):
        code, stderr = run_here(script, path, *flags)
        assert code == 1 and said in stderr


def test_a_run_that_lost_its_end_is_trained_to_it_again(tmp_path):
    """Killed between its last checkpoint and its validation, it would have no bits."""
    study = read_study(written(tmp_path))
    whole(Played(study))
    run = next(run for run in study.runs if run.arm.num_quantizers == 8)
    place = Played(study)
    record = place.record(run)
    place.note(run, seconds={step: s for step, s in record["seconds"].items() if step != "train"})
    whole(place)
    assert [name for name, _ in place.done] == ["train"]


def test_an_interrupt_starts_nothing_more(tmp_path):
    class Interrupted(Played):
        def start(self, step, log, command):
            super().start(step, log, command)
            if len(self.done) == 3:
                raise KeyboardInterrupt

    place = Interrupted(read_study(written(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        run_families(place, list(range(len(place.study.families))))
    assert len(place.done) == 3 and not any(place.record(run)["failed"] for run in place.study.runs)


def test_a_failed_trunk_fails_what_needs_it(tmp_path):
    place = Played(read_study(written(tmp_path)), [("train", "hierarchical-tiny-q4-uniform-seed3")])
    lines, _ = whole(place)
    failed = {line["run"]: line["failed"]["step"] for line in lines if line["failed"]}
    # The longer one is tried from the beginning again.
    assert failed == {
        f"hierarchical-tiny-q4-uniform-{n}-seed3": step for n, step in ((40, "trunk-32"), (20, "trunk-16"))
    }


def test_commands_before_that_make_nothing(tmp_path):
    before = f'[[before]]\nmakes = "{tmp_path}/gone"\ncommand = ["scripts/other.py"]\n[generation]'

    class Idle(Workplace):
        def start(self, step, log, command):
            pass

    with pytest.raises(UserError, match="did not make"):
        make_ready(Idle(read_study(written(tmp_path, a=("[generation]", before)))))


def test_a_real_command_that_fails_says_its_own_sentence(tmp_path):
    place = Workplace(read_study(written(tmp_path)))
    run, script = place.study.runs[0], "scripts/convert_dcp_to_hf.py"
    with pytest.raises(StepFailed, match="^error: .*nowhere"):
        place.do(run, "convert", [*place.on_ranks(), script], {"checkpoint": "nowhere", "output_dir": tmp_path})
    assert (place.folder(run) / "logs" / "convert.log").exists()


@pytest.mark.distributed
def test_a_branch_is_a_run_of_its_own(tmp_path):
    """Trunk, hard links and decay end with the weights that training alone ends with, to the bit."""
    flags = {"job.config_file": "config/tiny.toml", "validation.enable": False, "training.local_batch_size": 1}
    flags |= {"lr_scheduler.warmup_steps": 2, "training.dataloader.num_workers": 0, "checkpoint.interval": 100}

    def trained(folder, steps, **more):
        own = {"job.dump_folder": folder, "debug.seed": 7, "training.steps": steps}
        run_ranks(1, ["-m", "llama_mimi.train", *as_words(flags | own | more)], tmp_path / "log")

    trained(tmp_path / "alone", 10)
    trained(tmp_path / "trunk", 8, **{"lr_scheduler.total_steps": 20})
    link_step(tmp_path / "trunk", tmp_path / "branch", 8)
    trained(tmp_path / "branch", 10)
    weights = []
    for folder in ("alone", "branch"):
        state = {
            "tok_embeddings.weight": torch.empty(1538, 192),
            "layers.3.feed_forward.w1.weight": torch.empty(512, 192),
        }
        dcp.load(state, checkpoint_id=tmp_path / folder / "checkpoint" / "step-10", no_dist=True)
        weights.append(state)
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


# The report.


def test_numbers_of_the_report_are_the_plainest(tmp_path):
    place = Played(read_study(written(tmp_path)))
    lines, report = whole(place)
    by_run = {line["run"]: line for line in lines}
    a, b = study_arm(place, 0), study_arm(place, 2)
    values = {
        arm: [100 * by_run[Run(arm, seed).name]["scores"]["salmon/speaker_consistency"]["accuracy"] for seed in (3, 5)]
        for arm in (a, b)
    }
    row = next(line for line in report.splitlines() if line.startswith("| SALMon speaker consistency (n = 20) |"))
    found = row.split("|")[2]  # of the first arm
    mean, low, high, spread = map(float, re.match(r" (\S+) \((\S+) to (\S+)\) ± (\S+) ", found).groups())
    assert mean == pytest.approx(statistics.mean(values[a]), abs=0.05) and low <= mean <= high
    assert spread == pytest.approx(student.ppf(0.975, 1) * statistics.stdev(values[a]) / 2**0.5, abs=0.05)
    for seed in (3, 5):
        link = re.search(rf"\[{seed}\]\(([^)]+)\)", found)[1]
        assert link == f"results/salmon/{Run(a, seed).name}/official.json"
        assert (place.study.output_dir / link).is_file()
    by_seed = [y - x for x, y in zip(values[a], values[b], strict=True)]
    row = report.split("| difference from flattened, 40 steps |")[1].split("| SALMon speaker consistency |")[1]
    assert row.split("|")[1].startswith(f" {statistics.mean(by_seed):+.1f} (")  # behind 20 steps
    # A sample without a value leaves its prompt to the others, and all rows have the same prompts.
    measured = Results(place, lines).measured(place.study.tables[0].arms, "distillmos")
    assert {len(parts[0]) for one in measured.values() for parts in one.parts_of_seeds.values()} == {6}
    # Published rows stand beside the arms that they would be, and all of them at the end.
    first, second, end = (part.split("\n## ")[0] for part in report.split("\n## ")[1:4])
    similarity = next(line for line in first.splitlines() if line.startswith("| speaker similarity (n = 6) |"))
    by_a_digest = r"\[arXiv 2509.14882, by a digest\]"
    wanted = f" Llama-Mimi-1.3B, Q = 4 {by_a_digest}: 0.346; CSM-1.3B, Q = 4 {by_a_digest}: 0.320 "
    # A reference is of the prompts of the row: 0.50 to 0.55.
    assert similarity.split("|")[-2] == wanted + "[recording 0.525](generations/recording.json) "
    # Bits at the end of training, by seed; those of other levels are not compared.
    (bits,) = (line for line in second.splitlines() if line.startswith(f"| {BITS} |"))
    width = float(student.ppf(0.975, 1)) * statistics.stdev([143, 145]) / 2**0.5
    cells = [f"{mean} ± {width:.1f} [index](index.jsonl)" for mean in ("144.0", "184.0")]
    assert bits == f"| {BITS} | {cells[0]} | {cells[1]} |  |"
    (bits,) = (line for line in first.splitlines() if line.startswith(f"| {BITS} | +0.0"))
    assert bits == f"| {BITS} | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert "Llama-Mimi-1.3B, Q = 8" in second and "CSM" not in second
    assert "weighs 100" in end and "CSM" in end and "weighs" not in first + second
    assert (place.study.output_dir / "tradeoff-1.png").stat().st_size > 10_000
    # Bits of a log of an earlier version, over the whole vocabulary, are in no row.
    old = lines[0].pop("admissible_bits_per_audio_second")
    report = write_report(place, [lines[0] | {"bits_per_audio_second": old}, *lines[1:]]).read_text()
    assert f"There are no {BITS} of {lines[0]['run']}: earlier versions" in report
    assert f"| {BITS} | {lines[1]['admissible_bits_per_audio_second']['all']:.1f} [index]" in report


def test_a_run_ends_with_a_validation(tmp_path):
    """At the first number of steps from the config's on that divides all of them."""
    study = read_study(written(tmp_path))  # config/tiny.toml validates every 210 steps
    run = study.runs[0]
    found = [training_flags(study, run, tmp_path, steps)["validation.freq"] for steps in (24, 420, 421, 1050, 840)]
    assert found == [24, 210, 421, 210, 210]


def test_one_seed_has_no_spread():
    assert study_results.half_width([1.0]) is None
    assert study_results.half_width([1.0, 3.0]) == pytest.approx(12.706, abs=1e-3)
    one = study_results.Measured({0: 0.5}, {0: [{"a": 0.0, "b": 1.0}]})
    assert one.half_over_seeds is None and one.interval[0] <= 0.5 <= one.interval[1]


def test_a_difference_is_of_the_seeds_that_both_have():
    a = study_results.Measured(
        {0: 0.5, 1: 0.9}, {0: [{"x": 0.0, "y": 1.0}], 1: [{"x": 0.8, "y": 1.0}]}, study_results.percent
    )
    b = study_results.Measured({0: 0.25}, {0: [{"x": 0.0, "y": 0.5}]}, study_results.percent)
    difference = a.minus(b)
    assert difference.mean == 25.0 and difference.half_over_seeds is None and difference.interval == (0.0, 50.0)
    assert a.mean == 70.0 and a.interval == (40.0, 100.0)
    perplexity = study_results.Measured({0: math.log(3)}, {0: [{"x": math.log(3), "y": 0.0}]}, math.exp)
    half = study_results.Measured({0: math.log(6)}, {0: [{"x": math.log(6), "y": math.log(2)}]}, math.exp)
    assert half.minus(perplexity).mean == pytest.approx(2.0)
    assert half.minus(perplexity).interval == pytest.approx((2.0, 2.0))


def test_a_star_is_where_neither_interval_holds_zero():
    def difference(*by_pair_of_seeds, shown=float):
        parts = {seed: [{str(i): x for i, x in enumerate(xs)}] for seed, xs in enumerate(by_pair_of_seeds)}
        return study_results.Measured({s: statistics.mean(p[0].values()) for s, p in parts.items()}, parts, shown)

    close = difference((0.2, 0.3), (0.22, 0.31)).text(2, is_difference=True)
    assert close == "+0.26 (+0.21 to +0.30) ± 0.10 *"
    assert not difference((0.2, 0.3), (0.2, 0.9)).text(2, is_difference=True).endswith("*")  # seeds differ
    assert not difference((-1.0, 2.0), (-1.0, 2.0)).stands_out  # pairs differ
    assert not difference((0.2, 0.3)).stands_out and difference((0.2, 0.3)).text(1) == "0.2 (0.2 to 0.3)"
    assert difference((0.2,), (0.2,)).interval is None and not difference((0.2,), (0.2,)).stands_out  # one pair
    ratio = difference((0.2, 0.21), (0.2, 0.22), shown=math.exp)
    assert ratio.text(2, is_difference=True) == "1.23 (1.22 to 1.24) ± a factor of 1.03 *"
    # Neither do equal seeds, or seeds that differ by rounding, nor equal pairs.
    assert difference((0.2, 0.3), (0.2, 0.3)).text(2, is_difference=True) == "+0.25 (+0.20 to +0.30) ± 0.00"
    assert not difference((0.1, 0.2 + 0.1), (0.3 - 0.2, 0.3), (0.1, 0.3)).stands_out
    assert not difference((0.25, 0.25), (0.26, 0.26)).stands_out
    # Whichever is first, as logarithms have the interval.
    apart = [difference(*((sign * x, sign * x) for x in (2.0, 3.0, 1.0)), shown=math.exp) for sign in (1, -1)]
    assert [one.stands_out for one in apart] == [False, False]
    assert study_results.Measured({0: 1.0, 1: 1.1}, {}).stands_out  # of bits there are no pairs
    assert not study_results.Measured({0: 1.0, 1: 1.0, 2: 1.0}, {}).stands_out
    assert not difference((0.0, 0.0), (0.0, 0.0), shown=math.exp).stands_out


def test_the_committed_study_says_what_its_results_do(tmp_path):
    """Its report follows from the results beside it, and the README's table from the report."""
    shipped = ROOT / "config" / "studies" / "tiny"
    shutil.copytree(shipped, tmp_path / "tiny")
    study = replace(read_study(Path("config/studies/tiny.toml")), output_dir=tmp_path / "tiny")
    lines = [json.loads(line) for line in (shipped / "index.jsonl").read_text().splitlines()]
    report = write_report(Workplace(study), lines).read_text()
    assert report == (shipped / "report.md").read_text()
    assert {line["state"] for line in lines} == {"done"} and len(lines) == len(study.runs)
    for text in (report, (shipped / "page.html").read_text()):
        links = re.findall(r'(?:\]\(|href=")((?!data:)[^)"]+)', text)
        assert len(links) > 300 and all((shipped / unquote(link)).is_file() for link in links)
    assert (shipped / "page.html").stat().st_size < 3_000_000
    page = (shipped / "page.html").read_text()
    text = (ROOT / "README.md").read_text().split("## The study")[1].split("\n## ")[0]
    in_report, in_readme = cells_of(report), cells_of(text)
    flattened, quantizers, weights = (table.title for table in study.tables)
    from_first = "difference from flattened, 420 steps"
    same = {
        "flattened, Q = 4": (flattened, "measure", "flattened, 420 steps"),
        "hierarchical": (flattened, from_first, "hierarchical, 420 steps"),
        "half the steps": (flattened, from_first, "flattened, 210 steps"),
        "Q = 2": (quantizers, "difference from Q = 4", "Q = 2"),
        "Q = 8": (quantizers, "difference from Q = 4", "Q = 8"),
        "level 0 weighs 100": (weights, "difference from weights uniform", "weights semantic:100"),
    }
    assert len(in_readme) == 6 * 7
    for (_, _, column, measure), cell in in_readme.items():
        assert cell == in_report.get((*same[column], measure), "") or (not cell and column == "flattened, Q = 4")
    of_differences = [cell for (_, kind, _, _), cell in in_report.items() if kind.startswith("diff") and cell]
    stars = [cell.endswith("*") for cell in of_differences]
    assert f"{len(stars)} differences" in text and f"{sum(stars)} have a star" in text
    for cell in of_differences:
        assert f">{cell.replace(chr(92), '')}</td>" in page


def cells_of(markdown):
    """Cells without links, by title of the section, first heading, heading and measure."""
    found, title = {}, ""
    for block in markdown.split("\n\n"):
        title = block.removeprefix("## ") if block.startswith("## ") else title
        rows = [
            [re.sub(r" \[[^]]*\]\([^)]*\)", "", c).strip() for c in row.split("|")[1:-1]] for row in block.splitlines()
        ]
        if block.startswith("| ") and len(rows) > 2:
            for measure, *cells in rows[2:]:
                for heading, cell in zip(rows[0][1:], cells, strict=True):
                    found[title, rows[0][0], heading, re.sub(r" \(n = .*", "", measure)] = cell
    return found


def test_names_are_folders():
    arm = Arm("flattened", "1B", 4, "geometric:100", 7)
    assert arm.name == "flattened-1B-q4-geometric_100-7" and arm.trunk.name == "flattened-1B-q4-geometric_100"
    assert design.Table("t", (arm,), ()).label(arm) == arm.name and TINY.exists()
