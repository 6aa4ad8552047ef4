"""Studies: runs of a study file, their FLOPs, commands and lines in the index."""

import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, run_here
from test_report import generations_file, result_file
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from transformers import CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.common.command_line import to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.hierarchical import HierarchicalModel
from llama_mimi.generation.kv_cache import _layer_step
from llama_mimi.judging.script import FORMAT as GENERATIONS_FORMAT
from llama_mimi.model.llama import FLAVORS
from llama_mimi.report import comparisons
from llama_mimi.study.budget import cost
from llama_mimi.study.config import Run, label, read_study
from llama_mimi.study.report import write_report
from llama_mimi.study.run import (
    check_unchanged,
    judge,
    run_folder,
    start,
    steps,
    train_and_score,
    write_index,
)
from llama_mimi.tokens.tokenizer import load_speech_tokenizer
from llama_mimi.training.config_file import parse_config

K = 256  # codebook size of the codec in assets/tiny
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
primary = {{ measure = "bits/4", architecture = "hierarchical", steps = 40 }}
[[tables]]
title = "Quantizers"
num_quantizers = [4, 8]
primary = {{ measure = "similarity", num_quantizers = 8 }}
[benchmarks.salmon]
data_dir = "assets/tiny/benchmarks/salmon"
[benchmarks.sLM21]
data_dir = "assets/tiny/benchmarks/sLM21"
[generation]
corpus = "x.parquet"
speaker_model = "x"
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
    pairs = itertools.product(("flattened", "hierarchical"), (40, 20))
    names = [f"{architecture}-tiny-q4-uniform-{steps}" for architecture, steps in pairs]
    assert [variant.name for variant in study.variants] == [*names, "flattened-tiny-q8-uniform-40"]
    assert len({run.name for run in study.runs}) == 10
    first, second = study.tables
    labels = [label(variant, first.variants) for variant in first.variants]
    assert labels[1:3] == ["flattened, 20 steps", "hierarchical, 40 steps"]
    assert [label(variant, second.variants) for variant in second.variants] == ["Q = 4", "Q = 8"]
    weights = study.variants[0]._replace(level_weights="geometric:100")
    assert weights.name == "flattened-tiny-q4-geometric_100-40"  # valid as a folder name
    assert label(weights, [weights]) == weights.name
    assert first.primary == ("bits/4", study.variants[2])
    assert second.primary == ("similarity", study.variants[4])


def test_settings_of_a_variant(tmp_path):
    study = read_study(written(tmp_path, a=("assets/tiny/llama", "models/base-q{num_quantizers}")))
    for variant in study.variants:
        config = parse_config(to_cli_args(study.flags(variant)))
        Q = variant.num_quantizers
        assert (config.codec.num_quantizers, config.model.architecture) == (Q, variant.architecture)
        assert config.model.hf_assets_path == f"models/base-q{Q}"
        assert config.training.seq_len == {"hierarchical": 64, "flattened": 64 * Q}[variant.architecture]
        assert config.training.local_batch_size == (1 if Q == 8 else 2)


def test_a_setup_is_a_name_for_settings(tmp_path):
    setups = '[[override]]\nsetup = ["LoRA, r = 4"]\nsettings = { "lora.rank" = 4 }\n[[tables]]'
    axis = 'num_quantizers = [4]\nsetup = ["plain", "LoRA, r = 4"]\nprimary = {{ measure = "similarity", setup'
    axis = axis.replace("{{", "{") + ' = "LoRA, r = 4" }'
    old = 'num_quantizers = [4, 8]\nprimary = { measure = "similarity", num_quantizers = 8 }'
    over = '[[override]]\nnum_quantizers = [8]\nsettings = { "training.local_batch_size" = 1 }\n[[tables]]'
    study = read_study(written(tmp_path, a=(old, axis), b=(over, setups)))
    plain, lora = study.tables[1].variants
    assert lora.name == "flattened-tiny-q4-uniform-LoRA_r_4-40" and label(lora, (plain, lora)) == "LoRA, r = 4"
    ranks = [parse_config(to_cli_args(study.flags(variant))).lora.rank for variant in (plain, lora)]
    assert ranks == [16, 4]


def test_a_run_ends_with_a_validation(tmp_path):
    """The frequency is the smallest divisor of the steps that is not below the config's ``validation.freq`` (210)."""
    study = read_study(written(tmp_path))
    runs = [Run(study.variants[0]._replace(steps=n), 0) for n in (24, 420, 421, 1050, 840)]
    assert [steps(study, run)[0].flags["validation.freq"] for run in runs] == [24, 210, 421, 210, 210]


PATIENCE = '"validation.patience" = 1\n"checkpoint.keep_latest_k" = 0'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mini"\n', "", "the file lacks the key 'name'"),
        ("steps = [40, 20]", "stepz = [40]", r"\[\[tables\]\] has the unknown key 'stepz'; .* steps"),
        ("num_quantizers = [4, 8]", 'num_quantizers = ["4"]', r"sets num_quantizers to \['4'\]; expected list\[int\]"),
        ("[[override]]", "[override]", "is 'num_quantizers'; expected a section"),
        ('hierarchical = "config/tiny_hierarchical.toml"\n', "", "lacks the key 'hierarchical'"),
        ("steps = [40, 20]", "steps = [40, 0]", "training.steps is 0; set a positive"),
        ("assets/tiny/llama", "base-q{num_quantisers}", "unknown name 'num_quantisers' in braces; use archit"),
        ("seeds = [3, 5]", "seeds = [3, 3]", r"seeds is \[3, 3\]; set each seed only once"),
        ("[generation]", '[launch]\ntrain = ["bash", "x"]\n[generation]', "set training.global_batch_size"),
        (SALMON, SALMON + 'output_dir = "x"\n', "only axes or the study itself may set output_dir"),
        ("num_quantizers = [8]", "num_quantizers = [8, 6]", r"'num_quantizers': \[6\].* does not apply to any variant"),
        (SALMON, SALMON + "limmit = 3\n", "Unrecognized options: --limmit, 3"),
        ('corpus = "x.parquet"', "seconds = 3", "Missing from"),
        (
            'primary = { measure = "similarity", num_quantizers = 8 }',
            "",
            "primary of 'Quantizers' lacks the key 'measure'",
        ),
        (
            "num_quantizers = 8 }",
            "num_quantizers = 4 }",
            "primary of 'Quantizers' selects 0 variants besides the baseline",
        ),
        (', architecture = "hierarchical", steps = 40', "", "primary of 'Architectures' selects 3 variants besides"),
        (
            '"similarity", num',
            '"prosaudit/english_dev_lexical", num',
            "'prosaudit/.*', which the study does not compute; use",
        ),
        ("num_quantizers = [4, 8]", "num_quantizers = [4]", "primary of 'Quantizers' is .* has one variant; remove"),
        ("[benchmarks.salmon]", "[benchmarks.prosaudit]\n[benchmarks.salmon]", "--data_dir is missing"),
        ('"training.steps" = 40', PATIENCE, "runs of a study must train for their number of steps; set validation.pat"),
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
    """A cheaper model gets more steps for the same FLOPs."""
    study = read_study(written(tmp_path))
    flat, deep = (cost(study.flags(study.variants[i]), num_ranks=1).step_flops for i in (0, 2))
    budget = (", steps = 40", ""), ("steps = [40, 20]", f"flops = [{10 * flat!r}]")
    study = read_study(written(tmp_path, **dict(zip("ab", budget, strict=True))))
    assert [variant.steps for variant in study.tables[0].variants] == [10, round(10 * flat / deep)] and deep < flat


def shapes(*names):
    """Return the architectures, flavors and Q of shipped studies."""
    tables = [
        table
        for name in names
        for table in tomllib.loads(Path(ROOT, f"config/studies/{name}.toml").read_text())["tables"]
    ]
    axes = [
        (table.get("architecture", ["flattened"]), table.get("flavor", ["768x8"]), table.get("num_quantizers", [8]))
        for table in tables
    ]
    return sorted({shape for values in axes for shape in itertools.product(*values)})


SHAPES = [("flattened", "tiny", 4), ("hierarchical", "tiny", 4), *shapes("isoflop_1e18", "isoframe")]


def built(architecture, flavor, Q):
    """Return a model of transformers without weights, with the tokenizer and the codec of assets/tiny."""
    tokenizer = load_speech_tokenizer(str(TINY / "llama"), str(TINY / "mimi"), Q, "llama", architecture)
    own = {
        "architecture": architecture,
        "num_quantizers": Q,
        "codebook_size": K,
        "vocab_size": tokenizer.vocabulary.size,
    }
    args = replace(FLAVORS[flavor], **own)
    with torch.device("meta"):
        if architecture == "flattened":
            return LlamaForCausalLM(hf_config(args)), tokenizer
        return CsmForConditionalGeneration(csm_config(args, codec=str(TINY / "mimi"), num_quantizers=Q)), tokenizer


def cost_of(folder, architecture, flavor, Q, **settings):
    study = read_study(written(folder))
    flags = study.flags(study.variants[0]._replace(architecture=architecture, flavor=flavor, num_quantizers=Q))
    return cost(flags | settings, num_ranks=1)


@pytest.mark.parametrize(("architecture", "flavor", "Q"), SHAPES)
@pytest.mark.parametrize("fraction", [1.0, 1 / 16])
def test_a_step_costs_what_pytorch_counts_of_the_stock_model(tmp_path, architecture, flavor, Q, fraction):
    """Count the FLOPs of forward and backward for 64 frames. A fraction of the frames trains the depth decoder."""
    if fraction < 1 and architecture == "flattened":
        pytest.skip("only the depth decoder can be trained on a fraction")
    settings = {"model.depth_train_fraction": fraction, "training.local_batch_size": 1}
    flops = cost_of(tmp_path, architecture, flavor, Q, **settings).step_flops
    model, _ = built(architecture, flavor, Q)
    model.set_attn_implementation("eager")  # the backward pass of this attention recomputes nothing
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if architecture == "flattened":
            total = model(input_ids=torch.zeros(1, Q * 64, dtype=torch.long)).logits.sum()
        else:
            embeds_BTD = torch.zeros(1, 64, model.config.hidden_size, requires_grad=True)
            hidden_TD = model.backbone_model(inputs_embeds=embeds_BTD).last_hidden_state[0]
            codes_NQ = torch.zeros(round(fraction * 64), Q, dtype=torch.long)
            depth = model.depth_decoder(input_ids=codes_NQ, backbone_last_hidden_state=hidden_TD[: len(codes_NQ)])
            total = model.lm_head(hidden_TD).sum() + depth.logits.sum()
        total.backward()
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("architecture", "flavor", "Q"), [*SHAPES, ("flattened", "1B", 4), ("hierarchical", "1B", 4)])
def test_generation_costs_what_pytorch_counts_of_the_decoding_loop(tmp_path, architecture, flavor, Q):
    """Decode one frame after 10 s of context, without weights."""
    decoder, tokenizer = built(architecture, flavor, Q)
    codec = SimpleNamespace(num_quantizers=Q, device=torch.device("meta"))
    model = {"flattened": FlattenedModel, "hierarchical": HierarchicalModel}[architecture](decoder, tokenizer, codec)
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        caches = model.caches(num_rows=1, capacity=126 * Q)
        for cache in caches:  # its matrix products are counted, but not the kernel for CPUs
            cache._layer = partial(_layer_step, is_explicit=True)
        context = caches[0]
        context._lengths[0] = 125 * (Q if architecture == "flattened" else 1)
        model.next_frame(caches, lambda logits_BV, level: torch.zeros(1, dtype=torch.long))
    flops = cost_of(tmp_path, architecture, flavor, Q).generation_flops
    assert flops == pytest.approx(12.5 * counter.get_total_flops(), rel=0.01)


SMALLER = {  # replacements in the studies and configs of 80 million weights
    '"config/': '"{folder}/',
    '"outputs/': '"{folder}/',
    '"models/audio-mimi-q{num_quantizers}"': '"assets/tiny/llama"',
    "[0, 1, 2, 3, 4]": "[0]",
    "768x8+256x1": "256x1+64x1",
    "768x8+512x4": "256x1+64x2",
    "768x8": "256x1",
    "512x8": "256x2",
    "1024x12": "256x3",
    "[1e18]": "[1.2e11]",
    "\nsteps = 3000": "\nsteps = 3",
    "nproc_per_node = 8": "nproc_per_node = 1",
    '"data/salmon"': '"assets/tiny/benchmarks/salmon"\nlimit = 2',
    '"data/sLM21"': '"assets/tiny/benchmarks/sLM21"\nlimit = 2',
    '"data/storycloze"': '"assets/tiny/benchmarks/storycloze"\nlimit = 2',
    "kyutai/mimi": "assets/tiny/mimi",
    '"data/codes/libri_light, data/codes/peoples_speech_all"': '"assets/tiny/corpus/train-*.parquet"',
    '"peoples_speech_validation"\ndataset_path = "data/peoples_speech"': '"assets/tiny/corpus/validation-*.parquet"',
    "weights = [60.0, 30.0]\n": "",
    "validation_clips = 5120": "validation_clips = 4",
    "local_batch_size = 32": "local_batch_size = 2",
    "global_batch_size = 256": "global_batch_size = 2",
    "[compile]\nenable = true": "[compile]\nenable = false",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "Q", "architectures"),
    [("isoflop_1e18", 8, ["flattened", "hierarchical"]), ("isoframe", 4, ["hierarchical"])],
)
def test_the_studies_of_80_million_weights_run_at_a_small_size(tmp_path, name, Q, architectures):
    """Train, convert and score one run of an architecture. Only sizes and data differ from the study."""
    for file in (f"studies/{name}", "llama3_80m", "llama3_80m_hierarchical"):
        text = Path(f"config/{file}.toml").read_text().split("\n[generation]\n")[0]
        for old, new in SMALLER.items():
            text = text.replace(old, new.replace("{folder}", str(tmp_path)))
        (tmp_path / f"{Path(file).name}.toml").write_text(text)
    study = read_study(tmp_path / f"{name}.toml")
    of_q = [run for run in study.runs if run.variant.num_quantizers == Q]
    runs = [next(run for run in of_q if run.variant.architecture == architecture) for architecture in architectures]
    train_and_score(study, runs)
    lines = {line["run"]: line for line in write_index(study)}
    for run in runs:
        line, one = lines[run.name], cost(study.flags(run.variant), num_ranks=1)
        assert line["state"] == "done" and line["admissible_bits_per_audio_second"]["all"] > 0, line["failed"]
        assert one.step_seconds == 2 * 20.48 and line["flops"] == run.variant.steps * one.step_flops
        assert run.variant.steps == (round(1.2e11 / one.step_flops) if name == "isoflop_1e18" else 3)


@pytest.mark.slow
def test_the_shipped_studies_can_be_planned(capsys):
    hours = {"paper_1b": "5 runs: 2,806.9 GPU hours", "paper_8b": "1 runs: 3,448.8 GPU hours", "tiny": "21 runs: "}
    hours |= {"isoflop_1e18": "85 runs: 59.7 GPU hours", "isoframe": "60 runs: 18.0 GPU hours"}
    hours |= {"tiny_text_speech": "9 runs: ", "tiny_finetuning": "18 runs: "}
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


class Played:
    """A study with stand-in commands. They are recorded, and they write files like the real commands."""

    def __init__(self, study, breaks=()):
        self.study, self.done, self.breaks = study, [], breaks  # (script, part of a path) of failing commands

    def start(self, launch, name, log, command):
        flags = dict(itertools.pairwise(command))
        script = next((word for word in command if word.endswith(".py")), "train")
        out = Path(flags.get("--output_dir", flags.get("--job.dump_folder", "")))
        self.done.append((script, flags.get("--model_name", str(out))))
        if any(part in self.done[-1][1] and script == broken for broken, part in self.breaks):
            raise UserError("it broke")
        out.mkdir(parents=True, exist_ok=True)
        if script == "train":
            steps = int(flags["--training.steps"])
            (out / "checkpoint" / f"step-{steps}").mkdir(parents=True)
            with SummaryWriter(str(out / "tb")) as writer:
                bits = 100 + 10 * int(flags["--codec.num_quantizers"]) + int(flags["--debug.seed"])
                writer.add_scalar("validation_admissible_bits_per_audio_second/all", bits, steps)
                writer.add_scalar("validation_admissible_bits_per_audio_second/all", 999, 1)
                writer.add_scalar("validation_admissible_bits_per_audio_second/tts/all", 9, steps)  # a further task
                writer.add_scalar("validation_admissible_bits_per_audio_second/old/all", bits + 7, steps)
                writer.add_scalar("validation_admissible_bits_per_audio_second/old/tts/all", 9, steps)
        elif script == "scripts/convert_dcp_to_hf.py":
            (out / "config.json").touch()
        else:  # the values depend on the run
            model, benchmark = Path(flags["--model_name"]).name, Path(script).stem
            value = sum(map(ord, model)) % 5
            if benchmark == "generation":
                similarities = {f"p{i}": [0.1 * i + 0.01 * value, 0.2] for i in range(6)}
                made_by = {"model_sha256": "m" * 64}
                return generations_file(out, model, similarities, format=GENERATIONS_FORMAT, made_by=made_by)
            part = {"salmon": "speaker_consistency", "sLM21": "lexical_dev"}[benchmark]
            hashes = {"model_sha256": "m" * 64, "codec": {"sha256": "c" * 64, "sliding_window": True}}
            corrects = {part: [(i + value) % 3 > 0 for i in range(20)]}
            result_file(out, model, corrects, benchmark, format=FORMAT, versions={"commit": "abc"}, **hashes)


def whole(played):
    """Run the whole study; return the lines of the index, and the report."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llama_mimi.study.run.start", played.start)
        train_and_score(played.study, played.study.runs)
        judge(played.study)
        lines = write_index(played.study)
        patched.setattr(comparisons, "forest", lambda *_, **__: b"a picture")
        return lines, write_report(played.study, lines).read_text()


def test_a_study_is_done_once(tmp_path, capsys):
    """Finished commands are not repeated. An interrupted training is repeated, so that its last step has bits."""
    played = Played(read_study(written(tmp_path)))
    lines, report = whole(played)
    assert "generation is done; 50 steps of 10 runs are done" in capsys.readouterr().out
    counts = {script: [name for name, _ in played.done].count(script) for script, _ in played.done}
    scripts = ("train", "scripts/convert_dcp_to_hf.py", "eval/salmon.py", "eval/sLM21.py", "eval/generation.py")
    assert counts == dict.fromkeys(scripts, 10)
    assert [line["run"] for line in lines] == [run.name for run in played.study.runs]
    line = lines[-1]
    assert line["state"] == "done" and line["seconds"].keys() == {"train", "convert", "salmon", "sLM21", "generation"}
    assert line["label"] == "flattened, Q = 8, 40 steps, seed 5" and line["model_sha256"] == "m" * 64
    bits = {"all": 185.0, "tts/all": 9.0, "old/all": 192.0, "old/tts/all": 9.0}
    assert line["admissible_bits_per_audio_second"] == bits  # only the last step
    rows = [row.split("|") for row in report.splitlines() if row.startswith("| validation bits/s")]
    assert {row[1].split(", Q")[0].strip(" *") for row in rows} == {"validation bits/s", "validation bits/s, old"}

    again = Played(played.study)
    assert whole(again)[1] == report and again.done == []
    path = run_folder(played.study, played.study.runs[-1]) / "record.json"
    record = json.loads(path.read_text())
    del record["seconds"]["train"]  # as after a kill before the last validation
    path.write_text(json.dumps(record))
    assert whole(again)[1] == report and [name for name, _ in again.done] == ["train"]


def test_a_run_that_fails_is_named_and_tried_again(tmp_path):
    study = read_study(written(tmp_path))
    breaks = {"flattened-tiny-q4-uniform-20-seed3": "eval/generation.py", "flattened-tiny-q8-uniform-40-seed3": "train"}
    breaks["hierarchical-tiny-q4-uniform-40-seed5"] = "eval/sLM21.py"
    lines, _ = whole(Played(study, [(script, run) for run, script in breaks.items()]))
    failed = {line["run"]: line["failed"] for line in lines if line["state"] == "failed"}
    steps_of = {run: Path(script).stem for run, script in breaks.items()}
    assert failed == {run: {"step": step, "why": "it broke"} for run, step in steps_of.items()}
    assert {line["state"] for line in lines if line["run"] not in breaks} == {"done"}
    lines, report = whole(Played(study))
    assert {line["state"] for line in lines} == {"done"}
    shutil.rmtree(study.output_dir)
    assert whole(Played(study))[1] == report  # the same report as without failures


def test_other_flags_and_an_edited_config_are_refused(tmp_path):
    shutil.copyfile("config/tiny.toml", tmp_path / "mine.toml")
    mine = ("config/tiny.toml", str(tmp_path / "mine.toml"))
    study = read_study(written(tmp_path, a=mine))
    whole(Played(study))
    check_unchanged(study)
    for old, new, message in (
        (SALMON, 'data_dir = "elsewhere"\n', "data_dir = 'assets/.*/salmon', but the current value is 'elsewhere'"),
        ('"training.steps" = 40', '"training.steps" = 40\n"optimizer.lr" = 0.5', "optimizer.lr = not set, .* 0.5;"),
        ('"training.local_batch_size" = 1', "", "training.local_batch_size = 1, but the current value is None"),
        ('corpus = "x.parquet"', 'corpus = "x.parquet"\nseconds = 3', "not set, but the current value is 3; restore"),
    ):
        with pytest.raises(UserError, match=message):
            check_unchanged(read_study(written(tmp_path, a=mine, b=(old, new))))
    with (tmp_path / "mine.toml").open("a") as file:
        file.write("# a comment\n")
    with pytest.raises(UserError, match="'train' of flattened-.* was made with SHA-256 of the config = "):
        check_unchanged(study)


def test_a_real_command_has_its_threads_and_its_own_sentence(tmp_path):
    """Only one run is judged at a time, with the threads of all parallel runs."""
    launch = ("[generation]", "[launch]\nparallel = 3\nthreads = 2\n[generation]")
    study, log = read_study(written(tmp_path, a=launch)), tmp_path / "logs" / "log"
    for step, threads in (("train", "2"), ("generation", "6")):
        command = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
        start(study.launch, step, log, command)
        assert log.read_text() == threads + "\n"
    flags = {"checkpoint": "nowhere", "output_dir": tmp_path}
    with pytest.raises(UserError, match="^error: .*nowhere"):
        start(study.launch, "convert", log, [sys.executable, "scripts/convert_dcp_to_hf.py", *to_cli_args(flags)])


def test_a_study_that_is_not_done_says_so_in_the_end(tmp_path):
    path = written(tmp_path, a=('hf_assets_path" = "assets/tiny/llama', 'hf_assets_path" = "nowhere'))
    for flags, message in (
        (["--report_only"], "these runs are not done: flattened-tiny-q4-uniform-40-seed3, .*; fix the causes"),
        (["--part", 99], "--part is 99; set it to a number from 0 to 9"),
    ):
        code, stderr = run_here("scripts/study.py", path, *flags)
        assert code == 1 and re.search(message, stderr)
