"""Studies: the runs of a file, their cost, their commands, and their lines in the index."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_here
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from transformers import CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.audio.reading import Waveform, write_wav
from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.judging.script import FORMAT as GENERATIONS_FORMAT
from llama_mimi.model.llama import FLAVORS
from llama_mimi.report import comparisons
from llama_mimi.study.budget import step_flops
from llama_mimi.study.config import read_study
from llama_mimi.study.report import write_report
from llama_mimi.study.run import StudyRunner, check_unchanged, read_record, steps, training_flags, write_index
from llama_mimi.training.config_file import parse_config

# Keys of a result of eval/generation.py that are the same in all of them.
JUDGED = {
    "format": GENERATIONS_FORMAT,
    "kind": "generations",
    "prompts_sha256": "p" * 64,
    "audio_sha256": "a" * 64,
    "seconds": 0.5,
    "measures": {},
    "made_by": None,
    "data_kind": "other",
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
[[override]]
num_quantizers = [8]
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


def test_variants_are_the_combinations_of_each_table(tmp_path):
    study = read_study(written(tmp_path))
    assert [variant.name for variant in study.variants] == [
        "flattened-tiny-q4-uniform-40",
        "flattened-tiny-q4-uniform-20",
        "hierarchical-tiny-q4-uniform-40",
        "hierarchical-tiny-q4-uniform-20",
        "flattened-tiny-q8-uniform-40",
    ]
    assert len({run.name for run in study.runs}) == 10
    first, second = study.tables
    assert [first.label(variant) for variant in first.variants[1:3]] == [
        "flattened, 20 steps",
        "hierarchical, 40 steps",
    ]
    assert [second.label(variant) for variant in second.variants] == ["Q = 4", "Q = 8"]
    assert study.label(study.runs[-1]) == "flattened, Q = 8, 40 steps, seed 5"
    weights = replace(study.variants[0], level_weights="geometric:100")
    assert weights.name == "flattened-tiny-q4-geometric_100-40"  # a folder's name
    assert replace(first, variants=(weights,)).label(weights) == weights.name


def test_settings_of_a_variant(tmp_path):
    study = read_study(written(tmp_path, a=("assets/tiny/llama", "models/base-q{num_quantizers}")))
    for variant in study.variants:
        config = parse_config(to_cli_args(study.flags(variant)))
        Q = variant.num_quantizers
        assert (config.codec.num_quantizers, config.model.architecture) == (Q, variant.architecture)
        assert config.model.hf_assets_path == f"models/base-q{Q}"
        assert config.training.seq_len == {"hierarchical": 64, "flattened": 64 * Q}[variant.architecture]
        assert config.training.local_batch_size == (1 if Q == 8 else 2)


def test_a_run_ends_with_a_validation(tmp_path):
    """At the smallest divisor of its steps that is not below the config's ``validation.freq``, 210."""
    study = read_study(written(tmp_path))
    runs = [replace(study.runs[0], variant=replace(study.variants[0], steps=n)) for n in (24, 420, 421, 1050, 840)]
    assert [training_flags(study, run)["validation.freq"] for run in runs] == [24, 210, 421, 210, 210]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name =", "name", "cannot be used: Expected '='"),
        ('name = "mini"\n', "", "the file has no name"),
        ('name = "mini"', "name = 3", "sets name to 3"),
        ("steps = [40, 20]", "stepz = [40]", r"\[\[tables\]\] has the unknown key 'stepz'; .* steps"),
        ("num_quantizers = [4, 8]", 'num_quantizers = ["4"]', r"sets num_quantizers to \['4'\]; it takes list\[int\]"),
        ("[[override]]", "[override]", "is 'num_quantizers'; write a section"),
        ('hierarchical = "config/tiny_hierarchical.toml"\n', "", "has no file for the architecture 'hierarchical'"),
        ("steps = [40, 20]", "steps = [0]", "training.steps is 0; set a positive"),
        ("num_quantizers = [4, 8]", 'level_weights = ["heavy"]', "loss.level_weights is 'heavy'"),
        ("steps = [40, 20]", "flops = [1e12]", "has flops; .* tokenise or pack the corpus"),
        ("seeds = [3, 5]", "seeds = [3, 3]", r"seeds is \[3, 3\]; list different numbers"),
        ("[generation]", "[launch]\nparallel = 0\n[generation]", "are 1 or more"),
        ("[generation]", '[launch]\ntrain = ["bash", "x"]\n[generation]', "set training.global_batch_size"),
        (SALMON, SALMON + 'output_dir = "x"\n', "it sets output_dir, which an axis"),
        ("num_quantizers = [8]", "num_quantizers = [6]", r"num_quantizers = 6.* applies to no variant"),
        (SALMON, SALMON + "limmit = 3\n", "Unrecognized options: --limmit, 3"),
        ('corpus = "x.parquet"', "seconds = 3", "Missing from"),
    ],
)
def test_mistakes_in_a_study(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        read_study(written(tmp_path, a=(old, new)))


def test_results_are_found_under_the_names_that_the_scripts_give(tmp_path):
    study = read_study(written(tmp_path, a=(SALMON, SALMON + 'limit = 3\nlevels = "0"\n')))
    outputs = {step.name: step.output for step in steps(study, study.runs[0])}
    folder = study.output_dir / "results" / "salmon" / "flattened-tiny-q4-uniform-40-seed3"
    assert outputs["salmon"] == folder / "official-levels_0-limit_3.json"
    assert outputs["sLM21"].name == "official.json"


def test_steps_of_a_budget(tmp_path):
    """The same FLOPs are more steps of a cheaper model."""
    study = read_study(written(tmp_path))
    flat, deep = (step_flops(study.flags(study.variants[i]), 2) for i in (0, 2))
    layers, D, Q, K, V, B, T = 1_574_400, 192, 4, 256, 1538, 2 * 2, 64
    # A position of the flattened model: layers, norm and the output, and attention over 256 positions.
    assert flat == B * T * Q * (6 * (layers + D + V * D) + 12 * 4 * D * 256)
    # A frame of the hierarchical model: layers, norm and 257 entries, and attention over 64 positions; then Q positions
    # of a layer of width 96 behind a projection, attention over Q positions, and once the matrices of three levels.
    depth = 96 * (96 + 32 + 32 + 96) + 3 * 96 * 768 + 2 * 96
    backbone = 6 * (layers + D + (K + 1) * D) + 12 * 4 * D * 64
    levels = Q * (6 * (depth + 96 + D * 96) + 12 * 1 * 96 * Q) + 6 * 3 * (K + 1) * 96
    assert deep == B * T * (backbone + levels)
    budget = 10 * flat / 2  # of one rank
    packed = ('"training.steps" = 40', '"training.steps" = 40\n"data.packing" = "pack"')
    text = written(tmp_path, a=("steps = [40, 20]", f"flops = [{budget!r}]"), b=packed)
    variants = read_study(text).tables[0].variants
    assert [variant.steps for variant in variants] == [10, round(10 * flat / deep)]


@pytest.mark.parametrize(
    ("architecture", "share"), [("flattened", 1.0), ("hierarchical", 1.0), ("hierarchical", 1 / 16)]
)
def test_a_step_costs_what_pytorch_counts_of_the_stock_model(tmp_path, architecture, share):
    """Forward and backward of a row of 64 frames, of which a share trains the depth decoder."""
    study = read_study(written(tmp_path))
    flags = study.flags(next(variant for variant in study.variants if variant.architecture == architecture))
    flops = step_flops({**flags, "model.depth_train_fraction": share, "training.local_batch_size": 1}, 1)
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
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_the_shipped_studies_can_be_planned(capsys):
    hours = {"paper_1b": "5 runs: 2,806.9 GPU hours", "paper_8b": "1 runs: 3,448.8 GPU hours", "tiny": "21 runs: "}
    for path in sorted((ROOT / "config" / "studies").glob("*.toml")):
        assert run_here("scripts/study.py", path, "--plan")[0] == 0
        assert hours[path.stem] in capsys.readouterr().out
        study = read_study(path)
        assert run_here("scripts/study.py", path, "--slurm")[0] == 0
        first, second = capsys.readouterr().out.splitlines()
        job = shlex.split(first.removeprefix("job=$(").removesuffix(")"))
        assert job[:3] == ["sbatch", "--parsable", f"--array=0-{len(study.runs) - 1}"]
        assert job[3:] == [*study.launch.slurm, "scripts/study.slurm", str(path)]
        assert shlex.split(second) == ["sbatch", "--dependency=afterany:$job", *job[3:]]


class Played(StudyRunner):
    """A runner whose commands write files like those of the real ones, and are listed.

    Args:
        breaks: (script, part of a path) of commands that fail.
        why: error of these commands.
    """

    def __init__(self, study, breaks=(), why="it broke"):
        super().__init__(study)
        self.done, self.breaks, self.why = [], set(breaks), why

    def start(self, name, log, command):
        flags = dict(itertools.pairwise(command))
        script = next((word for word in command if word.endswith(".py")), "train")
        out = Path(flags.get("--output_dir", flags.get("--job.dump_folder", "")))
        self.done.append((script, flags.get("--model_name", str(out))))
        if any(part in self.done[-1][1] and script == broken for broken, part in self.breaks):
            raise UserError(self.why)
        if script == "train":
            checkpoint = out / "checkpoint" / f"step-{flags['--training.steps']}"
            checkpoint.mkdir(parents=True)
            (checkpoint / ".metadata").touch()
            config = {"training": {"dataset": "d"}, "job": {"dump_folder": str(out)}, "of": flags["--model.flavor"]}
            (out / "job_config.json").write_text(json.dumps(config))
            with SummaryWriter(str(out / "tb")) as log:
                bits = 100 + 10 * int(flags["--codec.num_quantizers"]) + int(flags["--debug.seed"])
                log.add_scalar("validation_admissible_bits_per_audio_second/all", bits, int(flags["--training.steps"]))
                log.add_scalar("validation_admissible_bits_per_audio_second/all", 999, 1)
        elif script == "scripts/convert_dcp_to_hf.py":
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").touch()
        else:
            model = Path(flags["--model_name"]).name
            self.write(script, model, out)

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
            path, content = out / f"{model}.json", JUDGED | {"system": model, "samples": samples}
        else:
            benchmark = Path(name).stem
            part = {"salmon": "speaker_consistency", "sLM21": "lexical_dev"}[benchmark]
            pairs = [
                {"part": part, "group": str(i), "correct": float((i + value) % 3 > 0), "is_cut": False}
                for i in range(20)
            ]
            accuracy = statistics.mean(pair["correct"] for pair in pairs)
            content = {
                "format": FORMAT,
                "benchmark": benchmark,
                "preset": "official",
                "audio_sha256": "a" * 64,
                "data_kind": "other",
                "settings": {"dtype": "float32", "max_audio_seconds": 3.0},
                "notes": [],
                "mean_of_parts": None,
                "scoring": {"by_group": True},
                "pairs": pairs,
                "parts": {part: {"accuracy": accuracy, "interval": [0, 1], "count": 20, "pairs": 20, "pairs_cut": 0}},
                "model_sha256": "m" * 64,
                "codec": {"sha256": "c" * 64, "sliding_window": True},
                "versions": {"commit": "abc"},
            }
            path = out / benchmark / model / "official.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def whole(runner):
    """Run all of a study, and return the lines of its index and its report."""
    runner.train_and_score(runner.study.runs)
    runner.judge()
    lines = write_index(runner.study)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comparisons, "forest", lambda *_, **__: b"a picture")
        patched.setattr(comparisons, "tradeoff", lambda *_: b"a picture")
        return lines, write_report(runner.study, lines).read_text()


def test_a_study_is_done_once(tmp_path):
    runner = Played(read_study(written(tmp_path)))
    lines, report = whole(runner)
    counts = {script: [name for name, _ in runner.done].count(script) for script, _ in runner.done}
    scripts = ("train", "scripts/convert_dcp_to_hf.py", "eval/salmon.py", "eval/sLM21.py", "eval/generation.py")
    assert counts == dict.fromkeys(scripts, 10)
    assert [line["run"] for line in lines] == [run.name for run in runner.study.runs]
    line = lines[-1]
    assert line["state"] == "done" and line["seconds"].keys() == {"train", "convert", "salmon", "sLM21", "generation"}
    assert line["label"] == "flattened, Q = 8, 40 steps, seed 5" and line["model_sha256"] == "m" * 64
    assert line["admissible_bits_per_audio_second"] == {"all": 185.0}  # of the last step alone
    assert len({line["config_sha256"] for line in lines}) == 1 and line["data_sha256"]
    again = Played(runner.study)
    assert whole(again)[1] == report and again.done == []


def test_a_run_that_fails_is_named_and_tried_again(tmp_path):
    study = read_study(written(tmp_path))
    breaks = {
        "flattened-tiny-q4-uniform-20-seed3": "eval/generation.py",
        "hierarchical-tiny-q4-uniform-40-seed5": "eval/sLM21.py",
        "flattened-tiny-q8-uniform-40-seed3": "train",
    }
    lines, _ = whole(Played(study, [(script, run) for run, script in breaks.items()]))
    failed = {line["run"]: line["failed"] for line in lines if line["state"] == "failed"}
    steps_of = {run: Path(script).stem for run, script in breaks.items()}
    assert failed == {run: {"step": step, "why": "it broke"} for run, step in steps_of.items()}
    assert {line["state"] for line in lines if line["run"] not in breaks} == {"done"}
    lines, report = whole(Played(study))
    assert {line["state"] for line in lines} == {"done"}
    shutil.rmtree(study.output_dir)
    assert whole(Played(study))[1] == report  # as if nothing had failed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SALMON, 'data_dir = "elsewhere"\n', "made with data_dir = 'assets/.*/salmon', but it is 'elsewhere' now"),
        ('"training.steps" = 40', '"training.steps" = 40\n"optimizer.lr" = 0.5', "optimizer.lr = not set, .* 0.5 now"),
        ('"training.local_batch_size" = 1', "", "training.local_batch_size = 1, but it is None now"),
        ('corpus = "x.parquet"', 'corpus = "x.parquet"\nseconds = 3', "seconds = not set, but it is 3 now; restore"),
    ],
)
def test_other_flags_are_refused(tmp_path, old, new, message):
    whole(Played(read_study(written(tmp_path))))
    check_unchanged(read_study(written(tmp_path)))
    with pytest.raises(UserError, match=message):
        check_unchanged(read_study(written(tmp_path, a=(old, new))))


def test_an_edited_config_is_refused(tmp_path):
    shutil.copyfile("config/tiny.toml", tmp_path / "mine.toml")
    path = written(tmp_path, a=("config/tiny.toml", str(tmp_path / "mine.toml")))
    whole(Played(read_study(path)))
    with (tmp_path / "mine.toml").open("a") as file:
        file.write("# a comment\n")
    with pytest.raises(UserError, match="'train' of flattened-.* was made with SHA-256 of the config = "):
        check_unchanged(read_study(path))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .*; choose another output_dir"):
        whole(Played(read_study(written(tmp_path, a=('/out"', '/file"')))))


def test_commands_have_their_threads(tmp_path):
    """Runs are judged one after the other, with the threads of all parallel runs."""
    launch = ("[generation]", "[launch]\nparallel = 3\nthreads = 2\n[generation]")
    runner = StudyRunner(read_study(written(tmp_path, a=launch)))
    for step, threads in (("train", "2"), ("generation", "6")):
        command = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
        runner.start(step, tmp_path / "log", command)
        assert (tmp_path / "log").read_text() == threads + "\n"


def test_a_study_that_is_not_done_says_so_in_the_end(tmp_path):
    path = written(tmp_path, a=('hf_assets_path" = "assets/tiny/llama', 'hf_assets_path" = "nowhere'))
    for flags, message in (
        (["--report_only"], "not done: flattened-tiny-q4-uniform-40-seed3, .*; the report says why"),
        (["--part", 99], "--part 99; they are positive and 0 to 9"),
    ):
        code, stderr = run_here("scripts/study.py", path, *flags)
        assert code == 1 and re.search(message, stderr)


def test_a_run_that_lost_its_end_is_trained_to_it_again(tmp_path):
    """A run that was killed between its last checkpoint and its validation would have no bits."""
    study = read_study(written(tmp_path))
    whole(Played(study))
    path = study.output_dir / "runs" / study.runs[-1].name / "record.json"
    record = json.loads(path.read_text())
    del record["seconds"]["train"]
    path.write_text(json.dumps(record))
    runner = Played(study)
    whole(runner)
    assert [name for name, _ in runner.done] == ["train"]


def test_an_interrupt_starts_nothing_more(tmp_path):
    class Interrupted(Played):
        def start(self, name, log, command):
            super().start(name, log, command)
            if len(self.done) == 3:
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C
                assert self._is_stopping.wait(30)

    runner = Interrupted(read_study(written(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        runner.train_and_score(runner.study.runs)
    assert len(runner.done) == 3 and not any(read_record(runner.study, run)["failed"] for run in runner.study.runs)


def test_a_real_command_that_fails_gives_its_own_sentence(tmp_path):
    runner = StudyRunner(read_study(written(tmp_path)))
    log = tmp_path / "logs" / "convert.log"
    flags = {"checkpoint": "nowhere", "output_dir": tmp_path}
    with pytest.raises(UserError, match="^error: .*nowhere"):
        runner.start("convert", log, [sys.executable, "scripts/convert_dcp_to_hf.py", *to_cli_args(flags)])
    assert log.exists()
