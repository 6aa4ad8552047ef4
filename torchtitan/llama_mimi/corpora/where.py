"""Filter clips by their length and by an expression over the columns of their rows."""

import ast
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from operator import eq, ge, gt, le, lt, ne
from typing import Any

from llama_mimi.common.errors import UserError

ROLE = "filter/"  # prefix of the role of a column that an expression names
OPERATORS: dict[type, Callable] = {ast.Eq: eq, ast.NotEq: ne, ast.Lt: lt, ast.LtE: le, ast.Gt: gt, ast.GtE: ge}
OPERATORS[ast.In] = lambda value, values: any(_compare(eq, value, other) for other in values)
OPERATORS[ast.NotIn] = lambda value, values: not OPERATORS[ast.In](value, values)


class RowFilter:
    """Limits on the length of a clip, and an expression such as ``language == "en" and dnsmos >= 3``."""

    def __init__(self, min_seconds: float = 0.0, max_seconds: float | None = None, where: str | None = None) -> None:
        self._min_seconds, self._max_seconds, self._where = min_seconds, max_seconds, where
        self.columns: dict[str, str] = {}  # columns in the expression, by their role in a source
        if where is None:
            return
        try:
            self._tree = ast.parse(where.strip(), mode="eval").body
            names = [node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)]
            self.columns = {ROLE + name: name for name in names}
            _is_true(self._tree, dict.fromkeys(names, 0))  # checks every part of the expression
        except (SyntaxError, ValueError, TypeError, RecursionError) as error:
            problem = f"--where is {where!r}, which is not a comparison of columns with numbers or strings"
            raise UserError(f'{problem}; write an expression such as language == "en" and dnsmos >= 3') from error

    def of_values(self, values: Mapping[str, Any]) -> str | None:
        """Return why a row is filtered out before its audio is read (for example, a missing value), or None."""
        row = {name: values.get(role) for role, name in self.columns.items()}
        if missing := [name for name, value in row.items() if value in (None, "")]:
            return f"no {missing[0]}"
        return None if self._where is None or _is_true(self._tree, row) else f"not {self._where}"

    def of_length(self, seconds: float, *, is_cut: bool) -> str | None:
        """Return why a clip is filtered out by length, or None. ``is_cut``: the audio is longer than ``seconds``."""
        if seconds < self._min_seconds:
            return f"under {self._min_seconds:g} s"
        is_long = self._max_seconds is not None and (is_cut or seconds > self._max_seconds)
        return f"over {self._max_seconds:g} s" if is_long else None


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
            return all(_compare(OPERATORS[type(op)], *pair) for op, pair in zip(node.ops, pairwise(sides), strict=True))
    raise ValueError("not a comparison")


def _side(node: ast.expr, is_list: bool, row: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and not is_list:
        return row[node.id]
    constant = ast.literal_eval(node)
    if not isinstance(constant, tuple | list if is_list else str | int | float):
        raise ValueError("neither a string nor a number")
    return constant


def _compare(operator: Callable, left: Any, right: Any) -> bool:
    """Compare two values. Convert a string that is compared with a number, because CSV tables contain only strings."""
    with suppress(ValueError, TypeError):
        if isinstance(left, str) and isinstance(right, int | float):
            left = float(left)
        elif isinstance(right, str) and isinstance(left, int | float):
            right = float(right)
        return operator(left, right)
    return operator is ne
