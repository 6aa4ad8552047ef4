"""Study files: tables of model variants, and the seeds of each variant."""

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from llama_mimi.common.choices import Architecture
from llama_mimi.common.command_line import parse_options, to_cli_args
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.options import PRIMARY, PROMPT_RULES, TEXT_RULES, EvaluationOptions
from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS
from llama_mimi.judging.options import GenerationOptions, read_criteria
from llama_mimi.report.results import BITS, FIXED_LENGTH, MEASURES
from llama_mimi.study.budget import cost, resolved
from llama_mimi.training.config_file import fits

Flags = dict[str, Any]
AXES = {"architecture": "{}", "flavor": "{}", "num_quantizers": "Q = {}", "level_weights": "weights {}"}  # labels
AXES |= {"tasks": "tasks {}", "setup": "{}", "steps": "{:,} steps"}
LISTS: Flags = {"architecture": list[Architecture], "flavor": list[str], "num_quantizers": list[int]}  # types of axes
LISTS |= {"level_weights": list[str], "tasks": list[str], "setup": list[str]}
# Training settings and flags of eval/ that a study file must not set, because axes or the study set them.
OWN = {"model.architecture", "model.flavor", "codec.num_quantizers", "loss.level_weights", "data.tasks"}
OWN |= {"job.config_file", "job.dump_folder", "checkpoint.folder", "debug.seed"}
OWN |= {"model_name", "output_dir", "codes_dir", "name"}


class Variant(NamedTuple):
    """A model to train. Its fields are the axes of a study."""

    architecture: Architecture
    flavor: str
    num_quantizers: int
    level_weights: str
    tasks: str  # separated by commas
    setup: str  # name of settings in [[override]]; empty: no further settings
    steps: int

    @property
    def name(self) -> str:
        weights = re.sub(r"[^\w.]+", "_", self.level_weights)
        tasks = "" if self.tasks == "audio" else f"-{self.tasks.replace(',', '_')}"
        setup = self.setup and "-" + re.sub(r"[^\w.]+", "_", self.setup)
        return f"{self.architecture}-{self.flavor}-q{self.num_quantizers}-{weights}{tasks}{setup}-{self.steps}"


class Run(NamedTuple):
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-seed{self.seed}"


class Table(NamedTuple):
    """Variants to compare. The first variant is the baseline."""

    title: str
    variants: tuple[Variant, ...]
    # The contrast that the table is made for: a measure, and the variant that is compared with the baseline in this
    # measure. None for a table of one variant.
    primary: tuple[str, Variant] | None


def label(variant: Variant, variants: Sequence[Variant]) -> str:
    """Return a variant's values on the axes that vary among ``variants``, such as "hierarchical, Q = 4"."""
    axes = [axis for axis in AXES if len({getattr(other, axis) for other in variants}) > 1]
    return ", ".join(AXES[axis].format(getattr(variant, axis)) for axis in axes) or variant.name


@dataclass(frozen=True)
class Launch:
    """The section [launch]: settings for starting commands."""

    parallel: int = 1  # number of parallel runs
    nproc_per_node: int = 1  # number of ranks on this machine, for all commands
    threads: int | None = None  # CPU threads per process; default: PyTorch's choice
    train: list[str] = field(default_factory=list)  # training command, instead of torchrun
    slurm: list[str] = field(default_factory=list)  # options for sbatch


@dataclass(frozen=True)
class Study:
    """Content of a study file."""

    path: Path
    name: str
    output_dir: Path
    config: dict[Architecture, str]  # training config files
    note: str = ""  # introduction of the report
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: Flags = field(default_factory=dict)  # training settings; texts may contain axes, such as {steps}
    override: list[Flags] = field(default_factory=list)  # values of axes, and settings for variants with these values
    launch: Launch = Launch()
    benchmarks: dict[Literal["salmon", "sLM21", "sStoryCloze", "prosaudit"], Flags] = field(default_factory=dict)
    generation: Flags = field(default_factory=dict)  # flags of eval/generation.py; default: do not judge
    tables: tuple[Table, ...] = ()

    @property
    def variants(self) -> list[Variant]:
        """Unique variants in the order of the tables."""
        return list(dict.fromkeys(variant for table in self.tables for variant in table.variants))

    @cached_property
    def evaluations(self) -> dict[str, EvaluationOptions]:
        """Parsed flags of each benchmark."""
        return {name: parse_options(EvaluationOptions, to_cli_args(flags)) for name, flags in self.benchmarks.items()}

    @property
    def runs(self) -> list[Run]:
        return [Run(variant, seed) for variant in self.variants for seed in self.seeds]

    def flags(self, variant: Variant) -> Flags:
        """Return the training settings of a variant, without steps and seed."""
        flags: Flags = {"job.config_file": self.config[variant.architecture], "model.flavor": variant.flavor}
        flags |= {"codec.num_quantizers": variant.num_quantizers, "loss.level_weights": variant.level_weights}
        flags |= {"data.tasks": variant.tasks}
        if variant.architecture == "flattened":  # sequences have the same audio length for every Q
            base = resolved({"job.config_file": flags["job.config_file"]})
            for section in ("training", "validation"):
                length = getattr(base, section).seq_len
                flags[f"{section}.seq_len"] = length * variant.num_quantizers // base.codec.num_quantizers
        flags |= self.settings
        for override in self.override:
            flags |= override["settings"] if applies(override, variant) else {}
        try:
            return {k: v.format_map(variant._asdict()) if isinstance(v, str) else v for k, v in flags.items()}
        except (AttributeError, LookupError, ValueError) as error:
            raise UserError(f"settings contain the unknown name {error} in braces; use {', '.join(AXES)}") from error


def applies(override: Flags, variant: Variant) -> bool:
    """Return True if each axis in an [[override]] lists the variant's value on this axis."""
    return all(getattr(variant, axis) in values for axis, values in override.items() if axis in AXES)


def read_study(path: Path) -> Study:
    """Read a study file; raise a `UserError` for unknown keys, and for invalid settings of training or eval/."""
    try:
        values = tomllib.loads(path.read_text())
        values["launch"] = Launch(**_checked(values.get("launch", {}), get_type_hints(Launch), "[launch]"))
        for override in values.get("override", []):
            _checked(override, LISTS | {"settings": Flags}, "[[override]]", "settings")
        types = LISTS | {"title": str, "steps": list[int], "flops": list[float], "primary": Flags}
        grids = [_checked(some, types, "[[tables]]", "title") for some in values.pop("tables", [])]
        _checked(values, get_type_hints(Study), "the file", "name", "output_dir", "config")
        study = Study(path, **values | {"output_dir": Path(values["output_dir"])})
        computed = _scored(study) | (_judged(study.generation) if study.generation else set())
        _check(study := replace(study, tables=tuple(_table(study, grid, computed) for grid in grids)))
    except (OSError, TypeError, ValueError, UserError) as error:
        raise UserError(f"the study '{path}' cannot be used: {error}") from error
    return study


def _checked(values: Any, types: Mapping[str, Any], name: str, *required: str) -> Flags:
    """Check the keys and types of a section; return the section."""
    if not isinstance(values, dict):
        raise UserError(f"{name} is {values!r}; expected a section")
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{name} has the unknown key '{key}'; use one of {', '.join(types)}")
        if not fits(value, types[key]):
            raise UserError(f"{name} sets {key} to {value!r}; expected {types[key]}")
    if missing := set(required) - values.keys():
        raise UserError(f"{name} lacks the key '{min(missing)}'; add the key")
    return values


def _scored(study: Study) -> set[str]:
    """Return the names of the accuracies that the study's benchmarks compute; check the flags of the benchmarks."""
    found: set[str] = set()
    for name, options in study.evaluations.items():
        script = BENCHMARK_SCRIPTS[name]
        script.result_path(options)  # raises a `UserError` for invalid flags
        _, scoring = options.scoring(script.levels)
        rules = {*scoring.by_levels} - {PRIMARY}
        rules |= {*PROMPT_RULES} if script.has_prompts and not scoring.as_released else set()
        rules |= {*script.text_rules} if scoring.allows_text else set()
        parts = {measure for measure in MEASURES if measure.startswith(f"{name}/")}
        root = Path(options.data_dir or "")
        if name in ("salmon", "sStoryCloze") and options.data_dir and root.is_dir():  # a part may be any folder
            parts |= {f"{name}/{folder.resolve().name}" for folder in (root, *root.iterdir()) if folder.is_dir()}
        found |= parts | {f"{part}:{rule}" for part in parts for rule in rules}
    return found


def _judged(flags: Flags) -> set[str]:
    """Return the names of the measures that eval/generation.py computes with these flags; check the flags."""
    options = parse_options(GenerationOptions, to_cli_args(flags | {"model_name": "model"}))
    measures = options.measures
    found = {"seconds", "silent", "ended", "distinct_frames"}
    found |= {name for name in MEASURES if name.split("/")[0] == measures.quality}
    if measures.speaker_model is not None:
        found |= {"similarity", f"{FIXED_LENGTH}{options.similarity_seconds:g}"}
    if measures.asr_model is not None:
        found |= {"words_per_minute", "auto_bleu"}
    if measures.text_model is not None:
        found |= {"log_perplexity", "log_generative_perplexity"}
    if measures.judge_model is not None:
        found |= {f"judge/{name}" for name in read_criteria(measures.judge_criteria).names}
    return found


def _table(study: Study, grid: Flags, computed: set[str]) -> Table:
    """Return a table; raise a `UserError` if its primary contrast is missing, or is not one contrast of the study.

    ``computed`` are the names of the measures that the study computes, without bits/s.
    """
    title, variants = grid["title"], _variants(study, grid)
    name, types = f"primary of '{title}'", {"measure": str} | get_type_hints(Variant)
    if len(variants) == 1:
        if "primary" in grid:
            raise UserError(f"{name} is {grid['primary']}, but the table has one variant; remove primary")
        return Table(title, variants, None)
    primary = _checked(grid.get("primary", {}), types, name, "measure")
    measure = primary.pop("measure")
    others = [v for v in variants[1:] if all(getattr(v, axis) == value for axis, value in primary.items())]
    if len(others) != 1:
        problem = f"{name} selects {len(others)} variants besides the baseline"
        raise UserError(f"{problem}; set values of axes that select exactly one")
    both = variants[0], others[0]
    task = TEXT_RULES.get(measure.partition(":")[2])  # of both models, if the measure is a text rule
    if task and not all(task in variant.tasks.split(",") for variant in both):
        computed = computed - {measure}
    levels = {variant.num_quantizers for variant in both}
    bits = {f"{BITS}{number}" for number in levels if len(levels) == 1}  # bits of other numbers are not comparable
    if measure not in computed | bits:
        problem = f"{name} names the measure '{measure}', which the study does not compute for both variants"
        rules = "" if not study.benchmarks else " (benchmarks: also with a further scoring rule, '<name>:<rule>')"
        choices = ", ".join(sorted(one for one in computed | bits if ":" not in one))
        raise UserError(f"{problem}; use one of {choices}{rules}")
    return Table(title, variants, (measure, others[0]))


def _variants(study: Study, grid: Flags) -> tuple[Variant, ...]:
    """Return a variant for each combination of a table's axis values. If an axis is missing, use the config's value."""
    found: list[Variant] = []
    for architecture in grid.get("architecture") or [*study.config][:1]:
        if architecture not in study.config:
            raise UserError(f"[config] lacks the key '{architecture}', used in '{grid['title']}'; add this key")
        base = resolved({"job.config_file": study.config[architecture]})
        for values in itertools.product(
            grid.get("flavor") or [base.model.flavor],
            grid.get("num_quantizers") or [base.codec.num_quantizers],
            grid.get("level_weights") or [base.loss.level_weights],
            grid.get("tasks") or [",".join(base.data.tasks)],
            grid.get("setup") or [""],
        ):
            variant = Variant(architecture, *values, steps=0)
            flags = study.flags(variant)
            budgets = [some / cost(flags, study.launch.nproc_per_node).step_flops for some in grid.get("flops", [])]
            steps = [*grid.get("steps", []), *map(round, budgets)] or [resolved(flags).training.steps]
            found += [variant._replace(steps=number) for number in steps]
    return tuple(dict.fromkeys(found))


def _check(study: Study) -> None:
    """Raise a `UserError` for values that have the right type but are invalid."""
    launch, sections = study.launch, [study.settings, study.generation, *study.benchmarks.values()]
    own = OWN & set().union(*sections, *(some["settings"] for some in study.override))
    values = [{**some, axis: [value]} for some in study.override for axis in some.keys() & AXES for value in some[axis]]
    unused = [some for some in values if not any(applies(some, variant) for variant in study.variants)]
    configs = [resolved(study.flags(v) | {"training.steps": v.steps}) for v in study.variants]
    is_unknown_batch = launch.train and any(config.training.global_batch_size < 1 for config in configs)
    can_stop = any(config.validation.enable and config.validation.patience for config in configs)
    for is_wrong, message in (
        (not study.runs, "the study lacks tables or seeds; add [[tables]], and at least one seed"),
        (
            len({table.title for table in study.tables}) < len(study.tables),
            "two tables have the same title; change one",
        ),
        (len({*study.seeds}) < len(study.seeds), f"seeds is {study.seeds}; set each seed only once"),
        (own, f"only axes or the study itself may set {', '.join(sorted(own))}; remove these keys"),
        (unused, f"the [[override]] {unused[:1]} does not apply to any variant; use values from [[tables]]"),
        (can_stop, "all runs of a study must train for their number of steps; set validation.patience to 0"),
        (is_unknown_batch, "the number of ranks of launch.train is unknown; set training.global_batch_size"),
    ):
        if is_wrong:
            raise UserError(message)
