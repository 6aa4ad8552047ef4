"""config/SETTINGS.md is generated from the settings of this project: uv run python tests/test_reference.py"""

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, PAGE = ROOT / "torchtitan/llama_mimi/job_config.py", ROOT / "config/SETTINGS.md"
HEADER = "| key | default | meaning |\n|---|---|---|\n"


def render() -> str:
    """Return the page: the text before the table, and a table with a row for each setting."""
    classes = {node.name: node.body for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.ClassDef)}
    sections = {field.target.id: classes[field.annotation.id] for field in classes["JobConfig"]}
    rows = [
        f"| `{section}.{field.target.id}` | `{default(field.value)}` | {cell(text.value.value)} |\n"
        for section, body in sections.items()
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
    ]
    return PAGE.read_text().partition(HEADER)[0] + HEADER + "".join(rows)


def default(value: ast.expr) -> str:
    """Return a default value as TOML writes it."""
    if isinstance(value, ast.Call):  # field(default_factory=list), or a lambda that returns a list
        factory = value.keywords[0].value
        return ast.unparse(factory.body).replace("'", '"') if isinstance(factory, ast.Lambda) else "[]"
    constant = ast.literal_eval(value)
    if isinstance(constant, bool):
        return str(constant).lower()
    return "unset" if constant is None else f'"{constant}"' if isinstance(constant, str) else str(constant)


def cell(text: str) -> str:
    return re.sub(r"[*<|]", r"\\\g<0>", " ".join(text.split()))


def test_settings_page_is_up_to_date():
    assert PAGE.read_text() == render(), f"{PAGE} is out of date; rewrite it by: uv run python tests/test_reference.py"


if __name__ == "__main__":
    PAGE.write_text(render())
