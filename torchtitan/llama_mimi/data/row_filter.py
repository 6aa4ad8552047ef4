"""Filter clips by their length and by an expression over the columns of their rows."""

import ast
import contextlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llama_mimi.common.errors import UserError

ROLE = "filter/"  # before the name of a column that is read for this alone
OPERATORS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, among: any(_holds(operator.eq, value, one) for one in among),
    ast.NotIn: lambda value, among: not any(_holds(operator.eq, value, one) for one in among),
}


@dataclass(frozen=True)
class RowFilter:
    """Limits on the length of a clip, and an expression such as ``language == "en" and dnsmos >= 3``.

    Raises:
        UserError: ``where`` is more than comparisons of columns with numbers and texts, joined by and, or and not.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        try:
            _ = self.columns
        except (SyntaxError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"--where is {self.where!r}; it compares columns with numbers and texts, such as "
                'language == "en" and dnsmos >= 3'
            ) from error

    @property
    def columns(self) -> dict[str, str]:
        """Columns that ``where`` names, by the role under which a corpus reads them."""
        return {} if self.where is None else {ROLE + name: name for name in _parsed(self.where)[1]}

    def of_values(self, values: Mapping[str, Any]) -> str | None:
        """Return why a row is left out before its audio is read, such as a column without a value; None keeps it."""
        if self.where is None:
            return None
        tree, names = _parsed(self.where)
        row = {name: values.get(ROLE + name) for name in names}
        if missing := [name for name in names if row[name] in (None, "")]:
            return f"no {missing[0]}"
        return None if _is_true(tree, row) else f"not {self.where}"

    def of_length(self, seconds: float, *, is_cut: bool) -> str | None:
        """Return why a clip of ``seconds``, or more if it is cut, is left out; None keeps it."""
        if seconds < self.min_seconds:
            return f"under {self.min_seconds:g} s"
        if self.max_seconds is not None and (is_cut or seconds > self.max_seconds):
            return f"over {self.max_seconds:g} s"
        return None


@lru_cache(maxsize=8)
def _parsed(where: str) -> tuple[ast.expr, list[str]]:
    """Return the expression, and the columns that it names; parse once, and not for each row."""
    tree = ast.parse(where.strip(), mode="eval").body
    names = list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
    _is_true(tree, dict.fromkeys(names, 0))  # which looks at every part
    return tree, names


def _is_true(node: ast.expr, row: Mapping[str, Any]) -> bool:
    match node:
        case ast.BoolOp():
            parts = [_is_true(part, row) for part in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        case ast.UnaryOp(op=ast.Not()):
            return not _is_true(node.operand, row)
        case ast.Compare() if all(type(op) in OPERATORS for op in node.ops):
            is_list = [False, *(isinstance(op, ast.In | ast.NotIn) for op in node.ops)]
            sides = [_side(*side, row) for side in zip((node.left, *node.comparators), is_list, strict=True)]
            return all(map(_holds, [OPERATORS[type(op)] for op in node.ops], sides, sides[1:]))
    raise ValueError("not a comparison")


def _side(node: ast.expr, is_list: bool, row: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and not is_list:
        return row[node.id]
    constant = ast.literal_eval(node)
    if not isinstance(constant, tuple | list if is_list else str | int | float):
        raise ValueError("neither a text nor a number")
    return constant


def _holds(compare: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    """Compare two values; a text next to a number counts as a number, as tables of text have no others."""
    with contextlib.suppress(ValueError, TypeError):
        if isinstance(left, str) and isinstance(right, bool):  # a group of several types is text, also its booleans
            left = json.loads(left)
        elif isinstance(left, str) and isinstance(right, int | float):
            left = float(left)
        if isinstance(right, str) and isinstance(left, int | float):
            right = float(right)
        return compare(left, right)
    return compare is operator.ne
