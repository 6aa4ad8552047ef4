"""Numbers of a study: means over seeds with both kinds of uncertainty, and differences.

A mean is over seeds. Its interval over pairs (or prompts) says what other pairs would give, and the one over seeds what
other seeds would give; neither says both.
"""

import math
import statistics
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from report import HEADINGS, heading
from result_files import read_result
from scipy.stats import t as student

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, visible_files
from llama_mimi.evaluation.accuracy import group_credits
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.script import BENCHMARK_SCRIPTS
from llama_mimi.judging.intervals import interval_of_parts
from llama_mimi.judging.table import COLUMNS, KIND, column_of, is_reference, percent
from llama_mimi.study.config import Run, Study, Variant
from llama_mimi.study.run import GENERATION, steps
from llama_mimi.training.metrics import BITS

# Measures of continuations that depend on what else the machine did, or are no merit.
NOT_COMPARED = ("real_time_factor", "seconds")
ROUNDING = 1e-9  # of a mean; seeds that differ by less are equal
Lines = Sequence[Mapping[str, Any]]
Parts = list[dict[str, float]]  # for each part of a column, values by pair or prompt


@dataclass(frozen=True)
class Measured:
    """A column of an arm, on the pairs or prompts that all arms of a table have.

    Args:
        of_seeds: the value of each seed.
        parts_of_seeds: of each seed the values by pair or prompt; empty where there are none.
        shown: of a value.
    """

    of_seeds: dict[int, float]
    parts_of_seeds: dict[int, Parts]
    shown: Callable[[float], float] = float

    @property
    def mean(self) -> float:
        return self.shown(statistics.mean(self.of_seeds.values()))

    @property
    def count(self) -> int:
        """Of pairs, groups of pairs or prompts."""
        return sum(map(len, next(iter(self.parts_of_seeds.values()), [])))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % over pairs or prompts, by bootstrap; each has its mean over seeds. One alone gives none."""
        if not self.parts_of_seeds or min(map(len, next(iter(self.parts_of_seeds.values())))) < 2:
            return None
        parts = zip(*self.parts_of_seeds.values(), strict=True)
        low, high = interval_of_parts(
            [[statistics.mean(seed[key] for seed in part) for key in part[0]] for part in parts]
        )
        return self.shown(low), self.shown(high)

    @property
    def half_over_seeds(self) -> float | None:
        """Half of the 95 % interval over seeds, by Student's t; of perplexities that of their logarithms."""
        return half_width([*self.of_seeds.values()])

    @property
    def stands_out(self) -> bool:
        """True where both intervals of a difference exclude zero; bits have only the interval over seeds.

        An interval without a width says nothing: seeds that agree but for rounding, or equal pairs.
        """
        half, mean = self.half_over_seeds, abs(statistics.mean(self.of_seeds.values()))
        if half is None or not ROUNDING * mean < half < mean:
            return False
        if self.interval is None:
            return not self.parts_of_seeds
        low, high = self.interval
        return low < high and not low <= self.shown(0.0) <= high

    def text(self, digits: int, *, is_difference: bool = False) -> str:
        """The mean with both intervals, as `LEGEND` says; a difference has a sign, and a star if it stands out."""
        if not self.of_seeds:
            return ""
        is_ratio = self.shown is math.exp
        sign = "+" if is_difference and not is_ratio else ""
        text = f"{self.mean:{sign}.{digits}f}"
        if self.interval is not None:
            low, high = self.interval
            text += f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
        if self.half_over_seeds is not None:
            text += f" ± {'a factor of ' if is_ratio else ''}{self.shown(self.half_over_seeds):.{digits}f}"
        return text + (" *" if is_difference and self.stands_out else "")

    def minus(self, other: "Measured") -> "Measured":
        """The difference pair by pair and seed by seed, of the seeds that both have; of perplexities the ratio."""
        seeds = [seed for seed in self.of_seeds if seed in other.of_seeds]
        parts_of_seeds = {
            seed: [
                {key: a[key] - b[key] for key in a}
                for a, b in zip(self.parts_of_seeds[seed], other.parts_of_seeds[seed], strict=True)
            ]
            for seed in seeds
            if seed in self.parts_of_seeds
        }
        return Measured({s: self.of_seeds[s] - other.of_seeds[s] for s in seeds}, parts_of_seeds, self.shown)


def half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


class Results:
    """What the runs of a study have, by column: a part of a benchmark, a measure of continuations, or `BITS`.

    Args:
        study: whose results they are.
        lines: of its index.
    """

    def __init__(self, study: Study, lines: Lines) -> None:
        self._study = study
        runs = {run.name: run for run in study.runs}
        self.lines = {line["run"]: {**line} | results_of(study, runs[line["run"]]) for line in lines}
        self._files: dict[str, dict[str, Any]] = {}
        self._measured: dict[tuple[tuple[Variant, ...], str], dict[Variant, Measured]] = {}

    @property
    def columns(self) -> list[str]:
        """In the order of a table."""
        scores = {name for line in self.lines.values() for name in line["scores"]}
        if {f"salmon/{part}" for part in SALMON_PARTS} <= scores:
            scores.add("salmon/mean")
        measures = {name for line in self.lines.values() for name in line["generations"]} - set(NOT_COMPARED)
        bits = [BITS] if any(line.get(BITS) for line in self.lines.values()) else []
        return [*bits, *_ordered(scores, HEADINGS), *_ordered(measures, COLUMNS)]

    def path(self, run: Run, column: str) -> str | None:
        """The result file of a column of a run, from the study's folder; bits stand in the index."""
        benchmark = column.split("/")[0]
        return self.lines[run.name]["files"].get(benchmark if is_accuracy(column) else "generation")

    def measured(self, arms: Sequence[Variant], column: str) -> dict[Variant, Measured]:
        """A column of those arms that have it, on the pairs or prompts that all of their runs have."""
        key = tuple(arms), column  # tables, differences and pictures ask for the same
        if key not in self._measured:
            self._measured[key] = self._measure(arms, column)
        return self._measured[key]

    def is_gone(self, arms: Sequence[Variant], column: str) -> bool:
        """Whether runs have values of a column, and none of them of a pair or prompt that the others have."""
        return not self.measured(arms, column) and any(
            self._parts(Run(arm, seed), column) for arm in arms for seed in self._study.seeds
        )

    def _measure(self, arms: Sequence[Variant], column: str) -> dict[Variant, Measured]:
        runs = {(arm, seed): Run(arm, seed) for arm in arms for seed in self._study.seeds}
        if column == BITS:
            bits = {key: self.lines[run.name].get(BITS, {}).get("all") for key, run in runs.items()}
            by_arm = {arm: {s: v for (a, s), v in bits.items() if a == arm and v is not None} for arm in arms}
            return {arm: Measured(of_seeds, {}) for arm, of_seeds in by_arm.items() if of_seeds}
        found = {key: parts for key, run in runs.items() if (parts := self._parts(run, column))}
        if not found:
            return {}
        num_parts = len(next(iter(found.values())))
        keys = [sorted(set.intersection(*(set(parts[i]) for parts in found.values()))) for i in range(num_parts)]
        if not all(keys):
            return {}
        of_arms = {}
        for arm in dict.fromkeys(arm for arm, _ in found):
            own = {
                seed: [{key: part[key] for key in keys[i]} for i, part in enumerate(parts)]
                for (a, seed), parts in found.items()
                if a == arm
            }
            of_seeds = {
                s: statistics.mean(statistics.mean(part.values()) for part in parts) for s, parts in own.items()
            }
            of_arms[arm] = Measured(of_seeds, own, shown_of(column))
        return of_arms

    def references(self, column: str, prompts: Container[str]) -> dict[str, tuple[str, float]]:
        """File and mean of what stands beside continuations, on those prompts: recordings, shuffled pairs and such."""
        found: dict[str, tuple[str, float]] = {}
        if is_accuracy(column) or column == BITS:
            return found
        for path in visible_files(self._study.output_dir / "generations", "*.json"):
            name = str(path.relative_to(self._study.output_dir))
            report = self._file(name)
            if report.get("kind") != KIND or not is_reference(report["samples"]):
                continue
            samples = [sample for sample in report["samples"] if sample["prompt"] in prompts]
            if values := [sample[column] for sample in samples if sample.get(column) is not None]:
                found[report["system"]] = name, shown_of(column)(statistics.mean(values))
        return found

    def _parts(self, run: Run, column: str) -> Parts | None:
        path = self.path(run, column)
        if path is None:
            return None
        report = self._file(path)
        if not report:
            raise UserError(f"'{path}' is not a result; remove it, so that it is made again")
        if report.get("kind") == KIND:
            values: dict[str, list[float]] = {}
            for sample in report["samples"]:
                if sample.get(column) is not None:
                    values.setdefault(sample["prompt"], []).append(sample[column])
            return [{prompt: statistics.mean(some) for prompt, some in values.items()}] if values else None
        part = column.partition("/")[2]
        credits = group_credits(report["pairs"], by_group=report["scoring"]["by_group"])
        wanted = SALMON_PARTS if column == "salmon/mean" else (part,)
        parts = [{group: value for (of, group), value in credits.items() if of == name} for name in wanted]
        return parts if all(parts) else None

    def _file(self, path: str) -> dict[str, Any]:
        if path not in self._files:
            self._files[path] = read_result(self._study.output_dir / path) or {}
        return self._files[path]


def results_of(study: Study, run: Run) -> dict[str, Any]:
    """Scores, means of continuations, and result files of a run."""
    paths = {step.name: step.output for step in steps(study, run)[2:] if step.output.exists()}
    found = {name: read_json(str(path.parent), path.name) or {} for name, path in paths.items()}
    return {
        "scores": {f"{name}/{part}": score for name in found for part, score in found[name].get("parts", {}).items()},
        "generations": found.get(GENERATION, {}).get("results", {}),
        "files": {name: str(path.relative_to(study.output_dir)) for name, path in paths.items()},
    }


def _ordered(names: set[str], order: Iterable[str]) -> list[str]:
    """Those that have a place in an order, then the others."""
    known = [name for name in order if name in names]
    return known + sorted(names - set(known))


def is_accuracy(column: str) -> bool:
    return column.split("/")[0] in BENCHMARK_SCRIPTS


def shown_of(column: str) -> Callable[[float], float]:
    return percent if is_accuracy(column) else column_of(column).shown


def digits_of(column: str) -> int:
    return 1 if column == BITS or is_accuracy(column) else column_of(column).digits


def heading_of(column: str) -> str:
    if column == BITS:
        return "validation bits/s over admissible tokens"
    return heading(column) if is_accuracy(column) else column_of(column).heading
