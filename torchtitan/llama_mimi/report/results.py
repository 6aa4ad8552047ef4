"""Result files of eval/ as one table with a row for each pair or sample."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, parse_json, visible_files
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.options import FURTHER_RULES, MAX_AUDIO_SECONDS
from llama_mimi.evaluation.results import FORMAT

KIND = "generations"  # value of the key "kind" in results of eval/generation.py
DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
BENCHMARKS = ("salmon", "sLM21", "sStoryCloze", "prosaudit")
SALMON = {f"salmon/{part}": f"SALMon {part}".replace("_", " ").replace("bg", "background") for part in SALMON_PARTS}
SALMON_MEAN = "salmon/mean"
FIXED_LENGTH = "similarity/"  # prefix of the speaker similarity at a fixed length; the number of seconds follows
BITS = "bits/"  # prefix of "validation bits/s"; the number of levels follows, and "/<name>" of a further corpus
NO_SAMPLE = -1  # sample number of references, which have a single sample
COLUMNS = "system measure item sample value conditions weights data data_kind is_reference cluster".split()


@dataclass(frozen=True)
class MeasureFormat:
    """Display format of a measure."""

    heading: str  # name with unit
    digits: int = 3  # number of decimals
    factor: float = 1.0  # shown value / stored value; 100 for percent
    is_log: bool = False  # values are logarithms; show exp of means, and ratios for differences
    is_accuracy: bool = False  # True for benchmarks
    is_error_rate: bool = False  # in percent, and can be above 100

    def text(self, value: float) -> str:
        """Return a stored value or mean as text."""
        return f"{math.exp(value) if self.is_log else self.factor * value:.{self.digits}f}"


_accuracy = partial(MeasureFormat, digits=1, factor=100, is_accuracy=True)
_error_rate = partial(MeasureFormat, digits=1, is_error_rate=True)
# Measures in the order of rows in a table. Other parts of benchmarks and the judge's criteria follow.
MEASURES = {
    **{name: _accuracy(heading) for name, heading in SALMON.items()},
    SALMON_MEAN: _accuracy("SALMon mean"),
    "sLM21/lexical_dev": _accuracy("sWUGGY"),
    "sLM21/syntactic_dev": _accuracy("sBLIMP"),
    "sStoryCloze/sStoryCloze": _accuracy("sStoryCloze"),
    "sStoryCloze/tStoryCloze": _accuracy("tStoryCloze"),
    "prosaudit/english_dev_protosyntax": _accuracy("ProsAudit protosyntax"),
    "prosaudit/english_dev_lexical": _accuracy("ProsAudit lexical"),
    "asr/wer": _error_rate("WER of transcripts (%)"),
    "asr/cer": _error_rate("CER of transcripts (%)"),
    "asr/wer_shuffled": _error_rate("WER of transcripts, shuffled texts (%)"),
    "asr/wer_gain": MeasureFormat("shuffled WER minus WER of transcripts", 1),
    "tts/wer": _error_rate("WER of speech (%)"),
    "tts/cer": _error_rate("CER of speech (%)"),
    "tts/wer_shuffled": _error_rate("WER of speech, shuffled texts (%)"),
    "tts/wer_gain": MeasureFormat("shuffled WER minus WER of speech", 1),
    "similarity": MeasureFormat("speaker similarity"),
    "seconds": MeasureFormat("seconds", 2),  # next to the similarity, which depends on the length
    "distillmos": MeasureFormat("DistillMOS (predicted)", 2),
    "aesthetics/CE": MeasureFormat("enjoyment", 2),
    "aesthetics/CU": MeasureFormat("usefulness", 2),
    "aesthetics/PC": MeasureFormat("complexity", 2),
    "aesthetics/PQ": MeasureFormat("quality", 2),
    "log_perplexity": MeasureFormat("perplexity", 1, is_log=True),
    "log_generative_perplexity": MeasureFormat("generative perplexity", 1, is_log=True),
    "auto_bleu": MeasureFormat("Auto-BLEU (%)", 1, 100),
    "words_per_minute": MeasureFormat("words/min", 0),
    "silent": MeasureFormat("silent (%)", 1, 100),
    "ended": MeasureFormat("ended by the model (%)", 1, 100),
    "distinct_frames": MeasureFormat("distinct frames (%)", 1, 100),
    "real_time_factor": MeasureFormat("real-time factor", 2),
}


def measure_of(name: str) -> MeasureFormat:
    """Return the display format of a measure, given its name in a result file, or ``<benchmark>/<part>:<rule>``."""
    primary, _, rule = name.partition(":")
    if rule in FURTHER_RULES:
        measure = measure_of(primary)
        return replace(measure, heading=f"{measure.heading}, {rule.replace('_', ' ')}")
    if name in MEASURES:
        return MEASURES[name]
    if name.split("/")[0] in BENCHMARKS:
        return _accuracy(name)
    if name.startswith(FIXED_LENGTH):
        return MeasureFormat(f"speaker similarity, first {name.removeprefix(FIXED_LENGTH)} s")
    if name.startswith(BITS):
        levels, _, corpus = name.removeprefix(BITS).partition("/")
        return MeasureFormat(f"validation bits/s, {f'{corpus}, ' if corpus else ''}Q = {levels}", 1)
    return MeasureFormat(name.replace("judge/", "judged "), 2)


def in_order(names: Iterable[str]) -> list[str]:
    """Return the measures without duplicates, in the order of a table: bits, accuracies, continuations.

    The further rules of a benchmark follow its primary rule.
    """
    places = {name: place for place, name in enumerate(MEASURES)}
    rules = {name: place for place, name in enumerate(("", *FURTHER_RULES))}

    def key(name: str) -> tuple[bool, bool, int, str, int]:
        primary, _, rule = name.partition(":")
        # The speaker similarity at a fixed length follows the speaker similarity.
        place = places.get(primary, places.get(primary.split("/")[0], len(places)))
        return not name.startswith(BITS), not measure_of(name).is_accuracy, place, primary, rules.get(rule, 0)

    return sorted(set(names), key=key)


def system_label(system: str) -> str:
    """Return the name that reports show for a system."""
    return re.sub(r"^reconstruction_q(\d+)$", r"codec, Q = \1", system)


class Results(NamedTuple):
    """Table of values from result files (a row for each pair or sample), and notes.

    Columns: system, measure, item (a group of pairs, or a prompt), sample (number within the item), value (NaN if
    missing), conditions (settings that must be equal in a comparison), weights (hash), data (hash of audio or prompts),
    data_kind ("official", "synthetic" or "other"), is_reference (True for recordings, for example), and cluster
    (items that are not independent: the speaker of a pair or prompt if known, else the item).
    """

    items: pd.DataFrame
    notes: list[str]  # lines to show in a report


def read_results(paths: Sequence[Path]) -> Results:
    """Read result files, and all result files in folders. Other JSON files and hidden files are ignored.

    A missing path, a damaged file, another format and a repeated result raise a `UserError`.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"'{missing[0]}' does not exist; choose folders with result files")
    files = {file for path in paths for file in (visible_files(path, "**/*.json") if path.is_dir() else [path])}
    frames = [pd.DataFrame(columns=COLUMNS)]
    notes: list[str] = []
    seen: dict[tuple[str, ...], str] = {}
    for file in sorted(files):
        try:
            report = parse_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"'{file}' is not readable as JSON ({first_line(error)}); remove the file") from error
        if not isinstance(report, dict) or not ("benchmark" in report or report.get("kind") == KIND):
            continue
        if report.get("pairs") == []:  # a test split without answers
            continue
        if (found := report.get("format")) != FORMAT:
            raise UserError(f"'{file}' has format {found!r}, not {FORMAT}; remove the file and re-run the evaluation")
        try:
            items, of_file = _benchmark(report, file.parent.name) if "benchmark" in report else _generations(report)
            items = items.assign(data_kind=report["data_kind"])[COLUMNS]
        except DAMAGE as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"'{file}' is a damaged result ({what}); remove it, and re-run the evaluation") from error
        one = items.iloc[0]
        about = report.get("benchmark", "the same prompts")
        of_weights = (one["weights"], one["data_kind"]) if "benchmark" in report else (one["data"],)
        identity = (about, one["system"], one["conditions"], *of_weights)
        audio = str(report.get("audio_sha256"))
        if identity not in seen:
            seen[identity] = audio
            frames.append(items)
            notes += of_file
        elif "benchmark" in report or seen[identity] != audio:  # the same references may be in several folders
            repeated = f"'{file}' repeats a result of {one['system']} on {about}"
            raise UserError(f"{repeated} ({one['conditions']}); move '{file}' to another folder")
    table = pd.concat(frames[1:] or frames, ignore_index=True)
    # If a system has results from several weights, the hash of the weights becomes part of the system's name.
    known = table["weights"].where(table["weights"] != "")
    is_double = known.groupby(table["system"]).transform("nunique") > 1
    table["system"] = table["system"].where(~is_double, table["system"] + " " + table["weights"].str[:8])
    return Results(table, notes)


def _benchmark(report: Mapping[str, Any], system: str) -> tuple[pd.DataFrame, list[str]]:
    benchmark, preset, settings = report["benchmark"], report["preset"], report["settings"]
    dtype, seconds, window = settings["dtype"], settings["max_audio_seconds"], report["codec"]["sliding_window"]
    conditions = [preset]
    conditions += [dtype] if dtype != "float32" else []
    conditions += [f"cut at {seconds:g} s"] if seconds != MAX_AUDIO_SECONDS else []
    if window == preset.startswith("original"):  # not the default of the preset
        conditions.append(f"codec with{'' if window else 'out'} sliding window")
    pairs = pd.DataFrame(report["pairs"])
    parts = pairs.groupby("part")
    # Groups are numbered, because a folder and a table can have different names for the same group.
    by_group = report["scoring"]["by_group"]
    number = parts["group"].transform(lambda names: pd.factorize(names)[0]) if by_group else parts.cumcount()
    item = number.astype(int).astype(str)
    speaker = pairs.get("speaker", pd.Series("", pairs.index))  # results of earlier commits do not have this column
    credits = {"": pairs["correct"]}  # accuracy of each pair by rule; the primary rule has no name
    for rule in report["rules"]:  # pairs without transcripts lack some rules
        credits[f":{rule}"] = pairs["rules"].map(lambda of, rule=rule: of.get(rule, {}).get("correct", math.nan))
    same = pd.DataFrame(
        {
            "system": system,
            "measure": f"{benchmark}/" + pairs["part"],
            "item": item,
            "sample": pairs.groupby(["part", item]).cumcount(),
            "conditions": ", ".join(conditions),
            "weights": report["model_sha256"],
            "data": report["audio_sha256"],
            "is_reference": False,
            "cluster": speaker.where(speaker != "", item),
        }
    )
    of_rules = [same.assign(measure=same["measure"] + rule, value=some.astype(float)) for rule, some in credits.items()]
    num_cut = int(sum(pairs["is_cut"]))
    cut = [f"{num_cut:,} of {len(pairs):,} pairs were cut at {seconds:g} s"] if num_cut else []
    return pd.concat(of_rules), [f"{system}, {benchmark}: {note}." for note in (*report["notes"], *cut)]


def _generations(report: Mapping[str, Any]) -> tuple[pd.DataFrame, list[str]]:
    samples = pd.DataFrame(report["samples"]).astype({"sample": float})
    numbers = set(samples.select_dtypes("number")) - {"sample"}  # includes new measures
    names = [name for name in samples if name in MEASURES or "/" in name or name in numbers]
    samples["cluster"] = samples.get("speaker", samples["prompt"]).fillna(samples["prompt"])
    items = samples.melt(["prompt", "sample", "cluster"], names, "measure", "value").rename(columns={"prompt": "item"})
    items["value"] = items["value"].astype(float)
    encoder = Path(report["measures"].get("similarity", {}).get("model", "")).name
    conditions = [f"{report['seconds']:g} s", *([f"speaker encoder {encoder}"] if encoder else [])]
    return items.assign(
        system=system_label(report["system"]),
        sample=items["sample"].fillna(NO_SAMPLE).astype(int),
        conditions=", ".join([*conditions, f"measures {digest(report['measures'])[:6]}"]),
        weights=(report.get("made_by") or {}).get("model_sha256", ""),
        data=report["prompts_sha256"],
        is_reference=samples["sample"].isna().all(),
    ), []
