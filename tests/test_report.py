"""The report over result files: what is in the table, beside it, and what is refused."""

import copy
import json
import tomllib

import pytest
import report
import tyro
from conftest import ROOT

from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.accuracy import mean_of_parts, part_results
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.judging import intervals

PUBLISHED = ROOT / "eval" / "published.toml"


def result_file(folder, model, preset, benchmark, corrects, *, cut=0, sha256="a" * 64, data="data", voices=1):
    """Writes a result file with the given credits in every part; returns its path."""
    pairs = [
        {
            "part": part,
            "name": str(i),
            "group": str(i // voices),
            "labels": {},
            "correct": float(correct),
            "is_tie": correct == 0.5,
            "is_cut": i < cut,
        }
        for part, of_part in corrects.items()
        for i, correct in enumerate(of_part)
    ]
    parts = part_results(pairs, by_group=preset != "original")
    content = {
        "format": 2,
        "benchmark": benchmark,
        "preset": preset,
        "model": model,
        "model_sha256": sha256,
        "scoring": {"by_group": preset != "original"},
        "codec": {"name": "a", "sha256": "b", "attention": "whole" if preset == "original" else "windowed"},
        "settings": {"max_audio_seconds": 20.0, "dtype": "float32"},
        "audio_sha256": data,
        "notes": [],
        "parts": parts,
        "mean_of_parts": mean_of_parts(parts, SALMON_PARTS),
        "pairs": pairs,
    }
    path = folder / benchmark / model.split("/")[-1] / f"{preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def make(monkeypatch, capsys):
    """Runs the script with some flags; returns what it prints."""

    def run(*flags):
        published = () if "--published" in flags else ("--published", PUBLISHED)
        tyro.cli(report.report, args=[*map(str, (*published, *flags))])
        return capsys.readouterr().out

    return run


def cells(text, name):
    """Cells by heading of the row that begins with a name."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    (row,) = [line for line in table if line[0] == name]
    return dict(zip(table[0], row, strict=True))


def test_a_table_of_models_by_benchmarks(tmp_path, make):
    salmon = {part: [1] * (10 + i) + [0] * (10 - i) for i, part in enumerate(SALMON_PARTS)}
    result_file(tmp_path / "one", "org/big", "official", "salmon", salmon, cut=3)
    words = {"lexical_dev": [1, 1, 1, 0, 0, 0, 0, 0]}
    result_file(tmp_path / "one", "org/big", "official", "sLM21", words, voices=4)
    result_file(tmp_path / "two", "org/big", "original", "sLM21", words, voices=4)
    result_file(
        tmp_path / "two",
        "small",
        "official",
        "salmon",
        {"speaker_consistency": [0.5] * 20},
        data="other",
        sha256="b" * 64,
    )
    result_file(
        tmp_path / "two", "small", "official-window_1s", "salmon", {"speaker_consistency": [1] * 20}, sha256="b" * 64
    )
    text = make("--results", tmp_path / "one", tmp_path / "two", "--picture", tmp_path / "bars.png")
    standard, other = text.split("## Other scoring")
    big = cells(standard, "big (official)")
    assert list(big)[1:3] == ["SALMon background alignment", "SALMon background all consistency"]
    assert big["SALMon speaker consistency"] == "85.0 (64.0 to 94.8)" and big["SALMon mean"].startswith("67.5 (")
    # Three of four voices of one word, none of the other: official counts two words, original eight pairs.
    assert big["sWUGGY"].startswith("37.5 (") and cells(standard, "big (original)")["sWUGGY"].startswith("37.5 (")
    assert big["sWUGGY"] != cells(standard, "big (original)")["sWUGGY"]
    small = cells(standard, "small (official)")
    assert small["SALMon speaker consistency"].startswith("50.0") and small["SALMon mean"] == small["sWUGGY"] == ""
    rerun = cells(standard, "Llama-Mimi-1.3B [independent rerun of the released checkpoint]")
    assert (rerun["SALMon mean"], rerun["sWUGGY"]) == ("73.3", "")
    assert "3 of 20 pairs were touched by the cut at 20 s" in standard and "window" not in standard
    assert "Rows of salmon were scored on different audio" in standard
    assert cells(other.split("## Differences")[0], "small (official-window_1s)")["SALMon speaker consistency"]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_two_models_on_the_same_pairs_are_compared(tmp_path, make):
    for folder, corrects in (("x", [1] * 12 + [0] * 8), ("y", [1] * 2 + [0] * 10 + [1] * 1 + [0] * 7)):
        result_file(tmp_path / folder, "model", "official", "salmon", {"rir_consistency": corrects}, sha256=folder * 64)
    result_file(tmp_path, "fewer", "official", "salmon", {"rir_consistency": [1] * 20}, data="other", sha256="z" * 64)
    text = make("--results", tmp_path, "--output_file", tmp_path / "report.md")
    # 10 pairs against 1: 2 * (1 + 11) / 2**11
    a, b = f"model ({'x' * 8}, official)", f"model ({'y' * 8}, official)"
    _, differences = text.split("## Differences between models")
    assert f"| SALMon rir consistency | {a} | {b} | 10 | 1 | 0.012 |" in differences
    assert differences.count("SALMon rir consistency") == 1
    assert f"fewer (official) and {a} are not compared on salmon: their audio" in differences
    assert (tmp_path / "report.md").read_text() + "\n" == text


def test_the_same_audio_may_come_with_other_names(tmp_path, make):
    """From a folder of files and from a table, where groups are called otherwise."""
    result_file(tmp_path / "x", "a", "official", "salmon", {"rir_consistency": [1] * 9})
    path = result_file(tmp_path / "x", "b", "official", "salmon", {"rir_consistency": [0] * 9}, sha256="b" * 64)
    content = json.loads(path.read_text())
    for pair in content["pairs"]:
        pair["group"] = f"sample_{pair['group']}_1.wav"
    path.write_text(json.dumps(content))
    assert "| a (official) | b (official) | 9 | 0 | 0.0039 |" in make("--results", tmp_path)


def test_published_numbers_have_sources():
    rows = tomllib.loads(PUBLISHED.read_text())["rows"]
    assert all(row["source"] and row["scores"] for row in rows)
    assert all(0 < score <= 100 for row in rows for score in row["scores"].values())
    by_model = {row["model"]: row["scores"] for row in rows}
    human, of_8b = by_model["human"], by_model["Llama-Mimi-8B"]
    assert (human["salmon/gender_consistency"], human["salmon/bg_all_consistency"]) == (98.6, 88.7)
    assert [of_8b[f"sLM21/{part}_dev"] for part in ("lexical", "syntactic")] == [68.8, 55.1]
    of_rerun = [score for column, score in rows[0]["scores"].items() if column != "salmon/mean"]
    assert sum(of_rerun) / 8 == pytest.approx(rows[0]["scores"]["salmon/mean"], abs=0.01)


@pytest.mark.parametrize("mistake", ["nothing", "damaged", "format", "twice", "published", "column", "folder"])
def test_mistakes_get_one_sentence(tmp_path, make, mistake):
    flags = ["--results", tmp_path]
    message = "there is no result file"
    if mistake != "nothing":
        path = result_file(tmp_path, "m", "official", "salmon", {"rir_consistency": [1]})
    if mistake == "damaged":
        path.write_text("{")
        message = "is not readable as JSON"
    elif mistake == "format":
        path.write_text(path.read_text().replace('"format": 2', '"format": 0'))
        message = "has format 0, not 2"
    elif mistake == "twice":
        result_file(tmp_path / "again", "m", "official", "salmon", {"rir_consistency": [1]})
        message = "is a second result of m on salmon"
    elif mistake == "published":
        flags += ["--published", ROOT / "README.md"]
        message = "is no list of published rows"
    elif mistake == "column":
        (tmp_path / "odd.toml").write_text(PUBLISHED.read_text().replace("salmon/mean", "salmon/man"))
        flags += ["--published", tmp_path / "odd.toml"]
        message = "has the column 'salmon/man'"
    elif mistake == "folder":
        flags.append(tmp_path / "typo")
        message = "typo' does not exist"
    with pytest.raises(UserError, match=message):
        make(*flags)


def test_a_perfect_model_is_drawn(tmp_path, make):
    result_file(tmp_path, "m", "official", "salmon", {"rir_consistency": [1] * 200, "gender_consistency": [0] * 75})
    text = make("--results", tmp_path, "--picture", tmp_path / "bars.png")
    assert cells(text, "m (official)")["SALMon rir consistency"] == "100.0 (98.1 to 100.0)"
    assert cells(text, "m (official)")["SALMon gender consistency"] == "0.0 (0.0 to 4.9)"
    assert (tmp_path / "bars.png").exists()


def generations_file(folder, system, **changed):
    """Writes a result of continuations of two prompts, as eval/generation.py does."""
    samples = [
        {"prompt": prompt, "sample": 0, "file": "a.wav", "missing": {}, "seconds": 2.0, "similarity": 0.5,
         "log_perplexity": 3.0, "judge/content": 4, "text": "a word"}
        for prompt in ("one", "two")
    ]  # fmt: skip
    content = {
        "format": 1,
        "kind": "generations",
        "prompts_sha256": "p",
        "seconds": 2.0,
        "measures": {"pauses": {}},
        "system": system,
        "audio_sha256": "a",
        "made_by": {"model_sha256": "b"},
        "results": {"similarity": {"mean": 0.5, "interval": [0.4, 0.6], "count": 2}},
        "samples": samples,
    }
    path = folder / f"{system}.json"
    path.write_text(json.dumps(content | changed))
    return path


ODD = (None, True, -1, 10**400, 1e308, float("nan"), "x", "\ud83d", [], {}, [[[]]], {"a": {"b": None}})


def mutants(content):
    """Copies of JSON, each with one value removed or of another type; of a list the first value stands for all."""
    keys = list(content) if isinstance(content, dict) else range(min(1, len(content)))
    for key in keys:
        for odd in ODD:
            changed = copy.copy(content)
            changed[key] = odd
            yield changed
        changed = copy.copy(content)
        del changed[key]
        yield changed
        if isinstance(content[key], dict | list):
            for inner in mutants(content[key]):
                changed = copy.copy(content)
                changed[key] = inner
                yield changed


@pytest.mark.parametrize("kind", ["benchmark", "generations"])
def test_results_of_other_versions_end_in_one_sentence_that_names_them(tmp_path, make, monkeypatch, kind):
    monkeypatch.setattr(intervals, "RESAMPLES", 10)
    result_file(tmp_path, "whole", "official", "salmon", {"rir_consistency": [1, 0]}, sha256="b" * 64)
    generations_file(tmp_path, "whole")
    if kind == "benchmark":
        path = result_file(tmp_path, "m", "official", "salmon", {"rir_consistency": [1, 0]})
    else:
        path = generations_file(tmp_path, "m")
    refused = 0
    contents = [json.dumps(mutant) for mutant in mutants(json.loads(path.read_text()))]
    whole = path.read_text()
    for content in [*contents, whole[:-2], "", "[" * 100_000, "\x00"]:
        path.write_text(content)
        try:
            make("--results", tmp_path)
        except UserError as error:
            assert f"'{path}'" in str(error) and "\n" not in str(error), content
            refused += 1
    assert len(contents) > 200 and refused > len(contents) / 2
    path.write_text(whole)
    make("--results", tmp_path, "--picture", tmp_path / "a.png", "--generations_picture", tmp_path / "b.png")


def test_other_json_and_hidden_files_are_left_out(tmp_path, make):
    path = result_file(tmp_path, "m", "official", "salmon", {"rir_consistency": [1, 0]})
    expected = make("--results", tmp_path)
    path.with_name("._official.json").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them
    for name, content in (("settings", {"model": "a", "versions": {}}), ("list", [1]), ("number", 7)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert make("--results", tmp_path) == expected
