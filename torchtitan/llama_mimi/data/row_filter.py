"""Which clips of a corpus are kept: by their length, and by what is said about them."""

import ast
import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import parse_json

ROLE = "filter/"  # before the name of a column that is read for this alone
OPERATORS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}


@dataclass(frozen=True)
class RowFilter:
    """What a clip must be.

    Args:
        min_seconds, max_seconds: of its audio.
        where: comparisons of columns with numbers and texts, joined by and, or and not, such as
            ``language == "en" and dnsmos >= 3``.

    Raises:
        UserError: the expression is none.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    where: str | None = None

    def __post_init__(self) -> None:
        if self.where is not None:
            self._check(self._parsed())

    @property
    def columns(self) -> dict[str, str]:
        """Columns that ``where`` names, by the role under which a corpus reads them."""
        if self.where is None:
            return {}
        return {ROLE + name: name for name in _names(self.where)}

    def of_values(self, values: Mapping[str, Any]) -> str | None:
        """Why a row is left out before it is read; None keeps it. A column without a value leaves it out."""
        known = {role: _decoded(values.get(role)) for role in self.columns}
        for role, name in self.columns.items():
            if known[role] is None:
                return f"no {name}"
        if self.where is None or self._value(self._parsed(), known):
            return None
        return f"not {self.where}"

    def of_length(self, seconds: float, *, is_cut: bool) -> str | None:
        """Why a clip is left out once it is read.

        Args:
            is_cut: it is longer than ``seconds``.
        """
        if seconds < self.min_seconds:
            return f"under {self.min_seconds:g} s"
        if self.max_seconds is not None and (is_cut or seconds > self.max_seconds):
            return f"over {self.max_seconds:g} s"
        return None

    def _parsed(self) -> ast.expr:
        try:
            return _parse(str(self.where))
        except SyntaxError as error:
            raise self._refused() from error

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.BoolOp():
                parts: list[ast.AST] = list(node.values)
            case ast.UnaryOp(op=ast.Not()):
                parts = [node.operand]
            case ast.Compare() if all(type(op) in OPERATORS for op in node.ops):
                parts = []
                for side, op in zip((node.left, *node.comparators), (None, *node.ops), strict=True):
                    if not isinstance(side, ast.Name):
                        kinds = (tuple, list) if isinstance(op, ast.In | ast.NotIn) else (str, int, float)
                        if not isinstance(self._constant(side), kinds):
                            raise self._refused()
            case _:
                raise self._refused()
        for part in parts:
            self._check(part)

    def _constant(self, node: ast.AST) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError) as error:
            raise self._refused() from error

    def _value(self, node: ast.AST, values: Mapping[str, Any]) -> bool:
        match node:
            case ast.BoolOp(op=ast.And()):
                return all(self._value(part, values) for part in node.values)
            case ast.BoolOp():
                return any(self._value(part, values) for part in node.values)
            case ast.UnaryOp():
                return not self._value(node.operand, values)
            case ast.Compare():
                sides = [self._side(side, values) for side in (node.left, *node.comparators)]
                return all(
                    _holds(OPERATORS[type(op)], left, right)
                    for op, left, right in zip(node.ops, sides, sides[1:], strict=False)
                )
        raise AssertionError("checked before")

    def _side(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        return values[ROLE + node.id] if isinstance(node, ast.Name) else self._constant(node)

    def _refused(self) -> UserError:
        return UserError(
            f"--where is {self.where!r}; it compares columns with numbers and texts, such as "
            'language == "en" and dnsmos >= 3'
        )


@lru_cache(maxsize=8)
def _parse(where: str) -> ast.expr:
    """Once, and not for each row."""
    return ast.parse(where.strip(), mode="eval").body


@lru_cache(maxsize=8)
def _names(where: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.id for node in ast.walk(_parse(where)) if isinstance(node, ast.Name)))


def _decoded(value: Any) -> Any:
    """A value as its source has it: formats of records hand them over as JSON. An empty text is none."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # a text of a Parquet file
            value = parse_json(value)
    return None if value == "" else value


def _holds(compare: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    """A text that is a number is compared as one, as tables of text have no others; what cannot be compared differs."""
    left, right = _number(left), [_number(one) for one in right] if isinstance(right, tuple | list) else _number(right)
    try:
        return compare(left, right)
    except TypeError:
        return False


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
