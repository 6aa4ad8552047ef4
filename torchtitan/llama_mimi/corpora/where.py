"""Filter clips by their length and by an expression over the columns of their rows."""

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llama_mimi.common.errors import UserError

ROLE = "filter/"  # prefix of the role of a column that an expression names
# Parts of Python that an expression can have: comparisons of names and constants. Function calls are not among them.
ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Name, ast.Load, ast.Constant),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Tuple, ast.List),
)


class RowFilter:
    """Limits on the length of a clip, and an expression such as ``language == "en" and dnsmos >= 3``."""

    def __init__(self, min_seconds: float = 0.0, max_seconds: float | None = None, where: str | None = None) -> None:
        self._min_seconds, self._max_seconds, self._where = min_seconds, max_seconds, where
        self.columns: dict[str, str] = {}  # columns in the expression, by their role in a source
        if where is None:
            return
        self._numeric: set[str] = set()  # columns that are compared with numbers
        try:
            tree = ast.parse(where.strip(), mode="eval")
            for node in ast.walk(tree.body):
                if not isinstance(node, ALLOWED):
                    raise ValueError("not a comparison")
                if isinstance(node, ast.Name):
                    self.columns[ROLE + node.id] = node.id
                elif isinstance(node, ast.Compare):
                    parts = list(ast.walk(node))
                    if any(isinstance(part, ast.Constant) and isinstance(part.value, int | float) for part in parts):
                        self._numeric |= {part.id for part in parts if isinstance(part, ast.Name)}
            self._code = compile(tree, "--where", "eval")
            if not isinstance(self._evaluate(dict.fromkeys(self.columns.values(), "0")), bool):
                raise ValueError("not a comparison")
        except (SyntaxError, ValueError, TypeError, RecursionError) as error:
            problem = f"--where is {where!r}, which is not a comparison of columns with numbers or strings"
            raise UserError(f'{problem}; write an expression such as language == "en" and dnsmos >= 3') from error

    def _evaluate(self, row: Mapping[str, Any]) -> Any:
        """Return the value of the expression. Columns of CSV tables contain strings, which may have to be numbers."""
        values = dict(row)
        for name in self._numeric:
            with suppress(ValueError, TypeError):
                values[name] = float(row[name]) if isinstance(row[name], str) else row[name]
        return eval(self._code, {"__builtins__": {}}, values)

    def of_values(self, values: Mapping[str, Any]) -> str | None:
        """Return why a row is filtered out before its audio is read (for example, a missing value), or None."""
        row = {name: values.get(role) for role, name in self.columns.items()}
        if missing := [name for name, value in row.items() if value in (None, "")]:
            return f"no {missing[0]}"
        with suppress(TypeError):  # a value of another type, such as a list, does not fulfil the condition
            if self._where is None or self._evaluate(row):
                return None
        return f"not {self._where}"

    def of_length(self, seconds: float, *, is_cut: bool) -> str | None:
        """Return why a clip is filtered out by length, or None. ``is_cut``: the audio is longer than ``seconds``."""
        if seconds < self._min_seconds:
            return f"under {self._min_seconds:g} s"
        is_long = self._max_seconds is not None and (is_cut or seconds > self._max_seconds)
        return f"over {self._max_seconds:g} s" if is_long else None
