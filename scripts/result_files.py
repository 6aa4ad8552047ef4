"""Result files of eval/, checked before use: other tools and other versions write JSON, too."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import parse_json, visible_files
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.judging.script import FORMAT as GENERATIONS_FORMAT
from llama_mimi.judging.table import KIND, column_of, columns_in

Check = Callable[[Any], bool]


def read_results(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return the results in files and below folders, by path; hidden files are left out, as is other programs' JSON.

    Raises:
        UserError: a path does not exist, or as `read_result`.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"'{missing[0]}' does not exist; name folders of result files")
    files = {file for path in paths for file in (visible_files(path, "**/*.json") if path.is_dir() else [path])}
    return {file: result for file in sorted(files) if (result := read_result(file)) is not None}


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result of a benchmark or of continuations, or None where a file is missing or has neither.

    Raises:
        UserError: it cannot be read, is of another format, or a value is missing or of another type.
    """
    try:
        result = parse_json(path.read_bytes())
        json.dumps(result, ensure_ascii=False).encode()  # refuse half a surrogate, which JSON can escape
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not readable as JSON ({first_line(error)}); move or remove it") from error
    # Most of the keys say what a file is: one may be missing.
    kinds = ((BENCHMARK, (FORMAT,)), (CONTINUATIONS, (1, GENERATIONS_FORMAT)))
    for checks, expected in kinds:
        if not isinstance(result, dict) or 2 * len(checks.keys() & result.keys()) <= len(checks):
            continue
        if (found := result.get("format")) not in expected:
            raise UserError(f"'{path}' has format {found!r}, not {expected[-1]}; move it, or run eval/ again")
        for key, fits in checks.items():
            if not fits(result.get(key)):
                state = "of another form" if key in result else "missing"
                raise UserError(f"'{path}' is an incomplete result: '{key}' is {state}; move it, or run eval/ again")
        return result
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # NaN is not


def _is_logarithm(value: Any) -> bool:
    return _is_number(value) and abs(value) < 300  # of a perplexity, and a ratio of two is a number, too


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _values(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _has(**checks: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(value.get(key)) for key, check in checks.items())


def _is_interval(value: Any) -> bool:
    return _list_of(_is_number)(value) and len(value) == 2 and value[0] <= value[1]


def _is_accuracy(value: Any) -> bool:
    if not _has(accuracy=_is_number, interval=_is_interval, count=_is_count)(value):
        return False
    low, high = value["interval"]
    return 0 <= low <= value["accuracy"] <= high <= 1


def _is_part(value: Any) -> bool:
    return _is_accuracy(value) and _has(pairs=_is_count, pairs_cut=_is_count)(value)


def _are_samples(value: Any) -> bool:
    is_sample = _has(prompt=_is_text, sample=_or_none(_is_count), file=_is_text, seconds=_is_number)
    if not _list_of(is_sample)(value) or not all("sample" in sample for sample in value):
        return False
    checks = {
        name: _or_none(_is_logarithm if column_of(name).shown is math.exp else _is_number)
        for name in columns_in({"": value})
    }
    return _list_of(_has(**checks))(value)


BENCHMARK: dict[str, Check] = {
    "benchmark": _is_text,
    "preset": _is_text,
    "model_sha256": _is_text,
    "audio_sha256": _is_text,
    "scoring": _has(by_group=_is_bool),
    "codec": _has(attention=_is_text),
    "settings": _has(dtype=_is_text, max_audio_seconds=_is_number),
    "notes": _list_of(_is_text),
    "parts": _values(_is_part),
    "mean_of_parts": _or_none(_is_accuracy),
    "pairs": _list_of(_has(part=_is_text, group=_is_text, correct=_is_number)),
}
CONTINUATIONS: dict[str, Check] = {
    "kind": lambda value: value == KIND,
    "prompts_sha256": _is_text,
    "seconds": _is_number,
    "measures": _is_object,
    "system": _is_text,
    "audio_sha256": _is_text,
    "made_by": _or_none(_is_object),
    "samples": _are_samples,
}
