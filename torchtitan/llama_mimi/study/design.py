"""A study as its TOML file says it: tables of arms, each arm trained with every seed."""

import difflib
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from llama_mimi.common.command_line import as_words, read_flags
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS, EvaluationOptions
from llama_mimi.judging.script import GenerationOptions
from llama_mimi.study.budget import cost_of_step, resolved
from llama_mimi.tokens.units import Architecture
from llama_mimi.training.config_file import fits

AXES = ("architecture", "flavor", "num_quantizers", "level_weights", "steps")
FIXED = {"model.flavor", "model.architecture", "codec.num_quantizers", "loss.level_weights", "job.dump_folder"}
FIXED |= {"job.config_file", "debug.seed", "lr_scheduler.total_steps", "checkpoint.folder"}
FIXED |= {"checkpoint.last_save_model_only"}
OF_SETTINGS = AXES[:-1]  # which [[when]] and braces may name; arms of one trunk differ in their steps alone
OWN = ("model_name", "output_dir", "name", "codes_dir")  # flags that the study gives scripts of eval/ itself
Flags = dict[str, Any]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Arm:
    """What is trained, with each seed.

    Args:
        architecture, flavor, num_quantizers, level_weights: settings of the run.
        steps: at whose end the learning rate has decayed.
    """

    architecture: Architecture
    flavor: str
    num_quantizers: int
    level_weights: str
    steps: int

    @property
    def trunk(self) -> "Arm":
        """What arms that differ in their steps alone have in common."""
        return replace(self, steps=0)

    @property
    def name(self) -> str:
        weights = re.sub(r"[^\w.]+", "_", self.level_weights)
        parts = (self.architecture, self.flavor, f"q{self.num_quantizers}", weights)
        return "-".join([*parts, str(self.steps)] if self.steps else parts)


@dataclass(frozen=True)
class Run:
    """An arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-seed{self.seed}"


@dataclass(frozen=True)
class Table:
    """Arms that are compared; the first is what the others differ from.

    Args:
        axes: in which they differ.
    """

    title: str
    arms: tuple[Arm, ...]
    axes: tuple[str, ...]

    def label(self, arm: Arm) -> str:
        names = {"num_quantizers": "Q = {}", "steps": "{:,} steps", "level_weights": "weights {}"}
        return ", ".join(names.get(axis, "{}").format(getattr(arm, axis)) for axis in self.axes) or arm.name


@dataclass(frozen=True)
class Before:
    """What must be there before the first run.

    Args:
        makes: a file that the command makes; the command is started without it, and if the study has not seen it end.
        command: a script of this repository and its flags.
    """

    makes: str
    command: list[str]


@dataclass(frozen=True)
class Launch:
    """How commands are started.

    Args:
        parallel: runs at the same time.
        nproc_per_node: ranks of scoring and judging, and of training that `train` does not start, on this machine.
        threads: of each process; None leaves it to PyTorch.
        train: command that starts training and takes its flags, in place of torchrun on this machine.
        slurm: options of sbatch for a job of the array.
    """

    parallel: int = 1
    nproc_per_node: int = 1
    threads: int | None = None
    train: list[str] = field(default_factory=list)
    slurm: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """All that is run, and where it goes.

    Args:
        path: of its file.
        note: what readers of its report should know first, in Markdown.
        output_dir: of everything.
        seeds: of weights and order of the data.
        config: TOML file of a run by architecture.
        settings: on top of that; values may name {num_quantizers} and other axes.
        when: settings of arms that have the values of some axes.
        tables: what is compared.
        before: commands.
        launch: of commands.
        benchmarks: flags of the scripts in eval/.
        scorings: what their results are called, but for the suffix.
        generation: flags of eval/generation.py; empty where nothing is judged.
    """

    path: Path
    name: str
    note: str
    output_dir: Path
    seeds: tuple[int, ...]
    config: Mapping[Architecture, str]
    settings: Flags
    when: tuple[tuple[Flags, Flags], ...]
    tables: tuple[Table, ...]
    before: tuple[Before, ...]
    launch: Launch
    benchmarks: Mapping[str, Flags]
    scorings: Mapping[str, str]
    generation: Flags

    @property
    def arms(self) -> list[Arm]:
        """Each once, in the order of the tables."""
        return list(dict.fromkeys(arm for table in self.tables for arm in table.arms))

    @property
    def families(self) -> list[tuple[Arm, int, list[Arm]]]:
        """Trunk, seed, and the arms that branch off there, by their steps; each is one job."""
        trunks: dict[Arm, list[Arm]] = {}
        for arm in self.arms:
            trunks.setdefault(arm.trunk, []).append(arm)
        return [
            (trunk, seed, sorted(arms, key=lambda arm: arm.steps))
            for seed in self.seeds
            for trunk, arms in trunks.items()
        ]

    @property
    def runs(self) -> list[Run]:
        return [Run(arm, seed) for arm in self.arms for seed in self.seeds]

    @property
    def size(self) -> str:
        """Numbers of seeds and arms, in words."""
        seeds, arms = len(self.seeds), len(self.arms)
        return f"{seeds} seed{'s' * (seeds != 1)} of {arms} arm{'s' * (arms != 1)}"

    def flags(self, arm: Arm) -> Flags:
        """Settings of training an arm, but for its steps and seed."""
        return _flags(self.config, self.settings, self.when, arm)


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: it cannot be read, has an unknown key, or says something that no run can be.
    """
    values = _read_toml(path)
    for name in ("config", "settings", "launch", "benchmarks", "generation"):
        if not isinstance(values.get(name, {}), dict):
            raise _refused(path, f"{name} is {values[name]!r}; it is a section, [{name}]")
    for name in ("tables", "when", "before"):
        some = values.get(name, [])
        if not isinstance(some, list) or not all(isinstance(one, dict) for one in some):
            raise _refused(path, f"{name} is {some!r}; each is a section with two brackets, [[{name}]]")
    for name in ("name", "output_dir", "note"):
        if not isinstance(values.get(name, ""), str):
            raise _refused(path, f"{name} is {values[name]!r}; it is a text")
    config = {**values.pop("config")}
    if not config:
        raise _refused(path, "[config] names no file of a run")
    if unknown := config.keys() - set(get_args(Architecture)):
        raise _refused(path, f"config.{min(unknown)} is no architecture; there are {', '.join(get_args(Architecture))}")
    launch = _built(Launch, values.pop("launch", {}), path, "launch")
    benchmarks = values.pop("benchmarks", {})
    if unknown := benchmarks.keys() - BENCHMARK_SCRIPTS.keys():
        raise _refused(path, f"benchmarks.{min(unknown)} is none of {', '.join(BENCHMARK_SCRIPTS)}")
    for name, flags in benchmarks.items():
        if not isinstance(flags, dict):
            raise _refused(path, f"benchmarks.{name} is {flags!r}; it is a section, [benchmarks.{name}]")
    settings = values.pop("settings", {})
    when = tuple((some, some.pop("settings", {})) for some in values.pop("when", []))
    for axes, changed in when:
        if not isinstance(changed, dict) or not changed or not axes:
            raise _refused(path, "a part of [[when]] has no axis, or no settings")
        if unknown := axes.keys() - set(OF_SETTINGS):
            raise _refused(
                path,
                f"a part of [[when]] has the unknown key '{min(unknown)}'; it names some of {', '.join(OF_SETTINGS)} "
                "and settings",
            )
    if not isinstance(settings.get("training.steps", 1), int) or settings.get("training.steps", 1) < 1:
        raise _refused(path, f"training.steps is {settings['training.steps']!r}; it is a positive number")
    if fixed := {key for some in (settings, *(changed for _, changed in when)) for key in some} & FIXED:
        raise _refused(
            path, f"{min(fixed)} is set, which its axis or the study itself says; leave it out of [settings]"
        )
    if any("training.steps" in changed for _, changed in when):
        raise _refused(path, "training.steps stands in a part of [[when]]; say steps in [settings] or as an axis")
    tables = [_table(path, table, config, settings, when, launch) for table in values.pop("tables")]
    for axes, _ in when:
        there = [arm for table in tables for arm in table.arms if _applies(axes, arm)]
        for axis, some in axes.items():
            if gone := [value for value in _listed(some) if value not in (getattr(arm, axis) for arm in there)]:
                raise _refused(path, f"a part of [[when]] has {axis} = {gone[0]!r}, which fits no arm")
    for table in tables if launch.train else ():
        if any(resolved(_flags(config, settings, when, arm)).training.global_batch_size < 1 for arm in table.arms):
            raise _refused(
                path, "launch.train starts ranks that the study does not know; set training.global_batch_size"
            )
    before = [_built(Before, one, path, "before") for one in values.pop("before", [])]
    name, note, seeds = values.pop("name"), values.pop("note", ""), values.pop("seeds", [0])
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds) or len({*seeds}) < len(seeds):
        raise _refused(path, f"seeds is {seeds!r}; it is a list of different numbers")
    if launch.parallel < 1 or launch.nproc_per_node < 1:
        raise _refused(path, "launch.parallel and launch.nproc_per_node are 1 or more")
    output_dir, generation = Path(values.pop("output_dir")), values.pop("generation", {})
    scorings = {
        name: BENCHMARK_SCRIPTS[name].result_path(_options(EvaluationOptions, flags, path, f"benchmarks.{name}")).stem
        for name, flags in benchmarks.items()
    }
    if generation:
        _options(GenerationOptions, generation, path, "generation")
    if values:
        raise _refused(path, f"the key '{min(values)}' is unknown")
    if not tables or not seeds:
        raise _refused(path, "it has no [[tables]] or no seeds")
    return Study(
        path,
        name,
        note,
        output_dir,
        tuple(seeds),
        config,
        settings,
        when,
        tuple(tables),
        tuple(before),
        launch,
        benchmarks,
        scorings,
        generation,
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the study '{path}' cannot be read ({error}); name a file such as config/studies/tiny.toml"
        ) from error
    for key in ("name", "output_dir", "config", "tables"):
        if key not in values:
            raise _refused(path, f"it does not say '{key}'")
    return values


def _table(
    path: Path,
    values: dict[str, Any],
    config: Mapping[Architecture, str],
    settings: Flags,
    when: Sequence[tuple[Flags, Flags]],
    launch: Launch,
) -> Table:
    """Arms of a table: every combination of the values of its axes; what it does not say is the base config's."""
    title = values.pop("title", None)
    if not isinstance(title, str):
        raise _refused(path, "a table of [[tables]] has no title")
    chosen = {key: _listed(value) for key, value in values.items()}
    if unknown := chosen.keys() - {*AXES, "flops"}:
        near = difflib.get_close_matches(min(unknown), AXES, n=1, cutoff=0)[0]
        raise _refused(path, f"the table '{title}' has the axis '{min(unknown)}'; the nearest is '{near}'")
    for axis, kind in {"num_quantizers": int, "steps": int, "flops": int | float}.items():
        if not all(isinstance(value, kind) and value > 0 for value in chosen.get(axis, [])):
            raise _refused(path, f"the table '{title}' has {axis} = {chosen[axis]!r}; they are positive numbers")
    if empty := [axis for axis, some in chosen.items() if not some]:
        raise _refused(path, f"the table '{title}' has no values of '{empty[0]}'")
    if "flops" in chosen and "steps" in chosen:
        raise _refused(path, f"the table '{title}' has both steps and flops; choose one")
    arms = []
    for architecture in chosen.get("architecture", [next(iter(config))]):
        if architecture not in config:
            raise _refused(path, f"the table '{title}' has {architecture!r}, for which [config] names no file")
        base = resolved({"job.config_file": config[architecture]})
        default = {
            "flavor": base.model.flavor,
            "num_quantizers": base.codec.num_quantizers,
            "level_weights": base.loss.level_weights,
            "steps": settings.get("training.steps", base.training.steps),
        }
        axes = [chosen.get(axis, [value]) for axis, value in default.items() if axis != "steps"]
        for flavor, num_quantizers, level_weights in itertools.product(*axes):
            arm = Arm(architecture, flavor, num_quantizers, level_weights, default["steps"])
            flags = _flags(config, settings, when, arm)
            if "flops" in chosen:
                step = cost_of_step(flags, launch.nproc_per_node)
                if not step.is_known:
                    why = f"how long clips of '{flags.get('training.dataset')}' are is not known"
                    raise _refused(path, f"the table '{title}' has flops, but {why}; tokenise it first, or say steps")
                arms += [replace(arm, steps=max(1, round(flops / step.flops))) for flops in chosen["flops"]]
            else:
                resolved(flags)  # refused now, not after hours
                arms += [replace(arm, steps=steps) for steps in chosen.get("steps", [arm.steps])]
    differing = tuple(axis for axis in AXES if len({getattr(arm, axis) for arm in arms}) > 1)
    return Table(title, tuple(dict.fromkeys(arms)), differing)


def _flags(config: Mapping[Architecture, str], settings: Flags, when: Sequence[tuple[Flags, Flags]], arm: Arm) -> Flags:
    base = resolved({"job.config_file": config[arm.architecture]})
    flags: Flags = {
        "job.config_file": config[arm.architecture],
        "model.flavor": arm.flavor,
        "codec.num_quantizers": arm.num_quantizers,
        "loss.level_weights": arm.level_weights,
    }
    if arm.architecture == "flattened":  # rows hold the same audio whatever Q is
        for section in ("training", "validation"):
            L = getattr(base, section).seq_len
            flags[f"{section}.seq_len"] = L * arm.num_quantizers // base.codec.num_quantizers
    chosen = settings.copy()
    for axes, more in when:
        if _applies(axes, arm):
            chosen |= more
    values = {axis: getattr(arm, axis) for axis in OF_SETTINGS}
    try:
        return flags | {key: v.format_map(values) if isinstance(v, str) else v for key, v in chosen.items()}
    except (LookupError, ValueError, AttributeError) as error:
        raise UserError(
            f"a setting of the study has braces, in which may stand {', '.join(OF_SETTINGS)} alone ({error!r})"
        ) from error


def _applies(axes: Flags, arm: Arm) -> bool:
    """Whether an arm has one of the values of each axis."""
    return all(getattr(arm, axis) in _listed(some) for axis, some in axes.items())


def _listed(some: Any) -> list[Any]:
    return some if isinstance(some, list) else [some]


def _options(kind: type[Options], flags: Flags, path: Path, section: str) -> Options:
    """Flags of a script in eval/, which are refused before anything is trained."""
    if own := flags.keys() & set(OWN):
        raise _refused(path, f"{section}.{min(own)} is what the study itself says; leave it out")
    try:
        return read_flags(kind, as_words({**flags, "model_name": "model"}))
    except UserError as error:
        raise _refused(path, f"[{section}]: {error}") from error


def _built(kind: type, values: dict[str, Any], path: Path, section: str) -> Any:
    known = get_type_hints(kind)
    if unknown := values.keys() - known.keys():
        raise _refused(path, f"{section}.{min(unknown)} is unknown; there are {', '.join(known)}")
    if wrong := [key for key, value in values.items() if not fits(value, known[key])]:
        raise _refused(path, f"{section}.{wrong[0]} is {values[wrong[0]]!r}; it takes {known[wrong[0]]}")
    try:
        return kind(**values)
    except TypeError as error:
        raise _refused(path, f"[{section}] lacks a key ({error})") from error


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"the study '{path}' cannot be run: {why}")
