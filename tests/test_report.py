"""Reports of result files: means, intervals, differences, tests and refused files."""

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mimi.common.command_line import parse_options
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.report import comparisons
from llama_mimi.report.comparisons import comparable_sets, comparison, report_results, summary
from llama_mimi.report.document import to_markdown
from llama_mimi.report.estimates import Estimate, estimate, same_items
from llama_mimi.report.results import measure_of, read_results
from llama_mimi.study.config import read_study
from llama_mimi.study.report import write_report

TINY_STUDY = ROOT / "config" / "studies" / "tiny"


def result_file(folder, model, corrects, benchmark="salmon", preset="official", voices=1, **changed):
    """Write a result file with the credits of each part and `voices` pairs per group; return the file's path."""
    content = {
        "format": FORMAT,
        "benchmark": benchmark,
        "preset": preset,
        "model_sha256": model * 8,
        "scoring": {"by_group": preset != "original"},
        "codec": {"sliding_window": preset != "original"},
        "settings": {"max_audio_seconds": 20.0, "dtype": "float32"},
        "audio_sha256": "data",
        "data_kind": "other",
        "notes": ["a note"],
        "rules": {},
        "pairs": [
            {"part": part, "group": f"g{i // voices}", "correct": float(correct), "is_cut": i == 0}
            for part, of_part in corrects.items()
            for i, correct in enumerate(of_part)
        ],
    }
    return written(folder / benchmark / model / f"{preset}.json", content | changed)


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def samples(values, measure="similarity"):
    """Return samples by prompt. A list has numbered samples; a single value has no sample number."""
    return [
        {"prompt": prompt, "sample": number if isinstance(some, list) else None, measure: value}
        for prompt, some in values.items()
        for number, value in enumerate(some if isinstance(some, list) else [some])
    ]


def generations_file(folder, system, values, measure="similarity", **changed):
    """Write a result file of eval/generation.py; return its path."""
    content = {"format": FORMAT, "kind": "generations", "system": system, "prompts_sha256": "p", "seconds": 2.0}
    content |= {"measures": {"pauses": {}}, "audio_sha256": system, "data_kind": "other"}
    content |= {"made_by": {"model_sha256": system * 8}, "samples": samples(values, measure)}
    return written(folder / f"{system}.json", content | changed)


@pytest.fixture
def make(monkeypatch, capsys):
    """Return a function that runs the script with flags and returns the printed text."""

    def run(*flags):
        monkeypatch.chdir(ROOT)
        report_results(**vars(parse_options(report.Options, [*map(str, flags)])))
        return capsys.readouterr().out

    return run


def cells(text, title):
    """Return the cells in the tables of a section, by measure and column."""
    (section,) = [part for part in re.split(r"^#+ ", text, flags=re.M) if part.splitlines()[:1] == [title]]
    found, header = {}, None
    for line in [*section.splitlines(), ""]:
        row = [cell.strip().replace("\\", "") for cell in line.split("|")[1:-1]]
        if not row or header is None:
            header = row or None
        elif set(row) != {"---"}:
            measure = re.sub(r"(, synthetic)?( \(n = .*)?$", "", row[0])
            found |= {(measure, column): cell for column, cell in zip(header[1:], row[1:], strict=True) if cell}
    return found


def test_means_and_intervals_of_models(tmp_path, make):
    salmon = {part: [1] * (10 + i) + [0] * (10 - i) for i, part in enumerate(SALMON_PARTS)}
    result_file(tmp_path / "one", "big", salmon)
    words = {"lexical_dev": [1, 1, 1, 0, 0, 0, 0, 0]}
    for preset in ("official", "original"):
        result_file(tmp_path / "two", "big", words, "sLM21", preset, voices=4)
    few = {"speaker_consistency": [0.5] * 20}
    result_file(tmp_path / "two", "small", few, audio_sha256="other")
    result_file(tmp_path / "two", "small", few, preset="official-levels_0")
    make("--results", tmp_path / "one", tmp_path / "two", "--output_file", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    official, original = cells(text, "Accuracy, preset official"), cells(text, "Accuracy, preset original")
    assert official["SALMon speaker consistency", "big"] == "85.0 (64.0 to 94.8)"
    assert official["SALMon mean", "big"] == "67.5 (59.9 to 74.3)" and ("SALMon mean", "small") not in official
    # One word is correct in three of four voices, the other in none: two words (official) or eight pairs (original).
    assert official["sWUGGY", "big"] == "37.5 (5.6 to 85.8)" and original["sWUGGY", "big"] == "37.5 (13.7 to 69.4)"
    assert cells(text, "Accuracy, preset official-levels\\_0")
    assert "big, salmon: 8 of 160 pairs were cut at 20 s." in text and "published" not in text
    assert "SALMon speaker consistency: systems were scored on different audio." in text
    assert (tmp_path / "report-1.png").read_bytes().startswith(b"\x89PNG")


def test_two_models_on_the_same_pairs_are_compared(tmp_path, make):
    result_file(tmp_path, "x", {"rir_consistency": [1] * 12 + [0] * 8})
    path = result_file(tmp_path, "y", {"rir_consistency": [1] * 2 + [0] * 10 + [1] + [0] * 7})
    # A folder and a table of the same audio have different names for groups.
    path.write_text(path.read_text().replace('"group": "g', '"group": "sample_'))
    result_file(tmp_path, "z", {"rir_consistency": [1] * 20}, audio_sha256="other")
    text = make("--results", tmp_path)
    # p-value for 10 pairs against 1: 2 * (1 + 11) / 2**11
    assert "| SALMon rir consistency, data data | x | y | 10 | 1 | 0.012 |" in text and text.count("| 0.012 |") == 1
    difference = cells(text, "Differences, Accuracy, preset official")["SALMon rir consistency, data data", "y"]
    assert difference.startswith("15.0, -45.0 (-70.0 to -20.0)") and "*" not in difference  # one seed


def test_published_numbers_are_only_beside_official_data(tmp_path, make):
    words = {"lexical_dev": [1, 0], "syntactic_dev": [1, 1]}
    path = result_file(tmp_path, "toy", words, "sLM21", data_kind="synthetic")
    text = make("--results", tmp_path)
    assert "| measure (synthetic data) | toy |" in text and "| sBLIMP (n = 2) |" in text and "8B" not in text
    result_file(tmp_path, "other", {"rir_consistency": [1, 0]})  # now only some rows are from synthetic data
    assert "| sBLIMP, synthetic (n = 2) |" in make("--results", tmp_path)
    path.write_text(path.read_text().replace('"synthetic"', '"official"'))
    text = make("--results", tmp_path)
    assert cells(text, "Published by others")["sBLIMP", "Llama-Mimi-8B"] == "55.1" and "synthetic" not in text
    assert "- Llama-Mimi-8B: WavSLM" in text and "similarity" not in text


def test_mistakes_get_one_sentence(tmp_path, make):
    for folder, number in (("a", FORMAT), ("b", FORMAT), ("old", 2)):
        result_file(tmp_path / folder, "m", {"rir_consistency": [1]}, format=number)
    for folders, message in (
        (["old"], f"has format 2, not {FORMAT}; remove the file and re-run the evaluation"),
        (["a", "b"], "repeats a result of m on salmon"),
        (["typo"], "typo' does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            make("--results", *(tmp_path / folder for folder in folders))


def test_damaged_results_end_in_one_sentence_that_names_them(tmp_path):
    paths = [result_file(tmp_path, "m", {"rir_consistency": [1, 0]}), generations_file(tmp_path, "m", {"one": [3.0]})]
    for path in paths:
        content = json.loads(path.read_text())
        lacking = [json.dumps({k: v for k, v in content.items() if k != key}) for key in ("data_kind", "format")]
        wrong = [json.dumps(content | {key: None}) for key in ("pairs", "samples", "settings") if key in content]
        for text in [*lacking, *wrong, path.read_text()[:-2], "", "[" * 100_000, "\x00"]:
            path.write_text(text)
            with pytest.raises(UserError, match=f"^'{path}'"):
                read_results([path])


def test_other_json_and_hidden_files_are_left_out(tmp_path, make):
    with pytest.raises(UserError, match="result files are missing in"):
        make("--results", tmp_path)
    path = result_file(tmp_path, "m", {"rir_consistency": [1, 0]})
    expected = make("--results", tmp_path)
    path.with_name("._official.json").write_bytes(b"\x00\x05\x16\x07")  # file of macOS
    for name, content in (("settings", {"model": "a", "versions": {}}), ("list", [1]), ("number", 7)):
        written(tmp_path / f"{name}.json", content)
    assert make("--results", tmp_path) == expected


# Continuations.


some_values = st.none() | st.integers(0, 9).map(float)
of_samples = st.dictionaries(st.sampled_from("abcde"), st.lists(some_values, min_size=3, max_size=3), min_size=5)


@settings(max_examples=30, deadline=None)
@given(of_samples, of_samples, st.lists(some_values, min_size=5, max_size=5))
def test_systems_are_compared_on_the_same_samples(a, b, reference):
    """Compare with a plain loop: a sample counts if it has a value of each system that has any values."""
    of_prompts = dict(zip("abcde", reference, strict=True))
    systems = {"a": a, "b": b, "r": of_prompts}
    rows = pd.concat([pd.DataFrame(samples(of)).assign(system=name, part="x") for name, of in systems.items()])
    rows = rows.rename(columns={"prompt": "item", "similarity": "value"}).astype({"value": float})
    found, left_out = same_items(rows.assign(sample=rows["sample"].fillna(-1).astype(int)))
    value = {"a": lambda p, k: a[p][k], "b": lambda p, k: b[p][k], "r": lambda p, k: of_prompts[p]}
    value = {name: of for name, of in value.items() if any(of(p, k) is not None for p in "abcde" for k in range(3))}
    assert set(found) == set(value)
    if not {"a", "b"} & set(value):
        return
    kept = {p: [k for k in range(3) if all(of(p, k) is not None for of in value.values())] for p in "abcde"}
    kept = {p: numbers for p, numbers in kept.items() if numbers}
    for name, of in value.items():
        means = {p: pytest.approx(np.mean([of(p, k) for k in ks])) for p, ks in kept.items()}
        assert found.droplevel("part")[name].to_dict() == means
    assert left_out == 15 - sum(map(len, kept.values()))


def test_continuations_are_summarised_on_the_same_samples(tmp_path):
    generations_file(tmp_path, "a", {"x": [1.0, None], "y": [3.0, None], "z": [None, None]})
    generations_file(tmp_path, "b", {"x": [2.0, 2.0], "y": [4.0, 4.0], "z": [1.0, 1.0]})
    generations_file(tmp_path, "silent", {"x": [None, None]})
    generations_file(tmp_path, "recording", {"x": 5.0, "y": 6.0, "z": 7.0}, made_by=None)
    written(tmp_path / "prompts.json", {})
    ((title, items),) = comparable_sets(read_results([tmp_path]).items)
    text = to_markdown([summary(items, title)])
    found = [cells(text, title)["speaker similarity", name] for name in ("a", "b", "recording")]
    assert found == ["2.000 (1.000 to 3.000)", "3.000 (2.000 to 4.000)", "5.500 (5.000 to 6.000)"]
    assert "(n = 2) |" in text and "4 samples are excluded" in text and "no value for silent" in text


def test_speakers_are_clusters_and_the_table_names_the_speaker_encoder(tmp_path):
    """Prompts without a speaker, and pairs of benchmarks, are clusters of one item."""
    rows = samples({"x": [1.0], "y": [2.0], "z": [3.0]}, "similarity/1.5")
    rows = [row | {"similarity": 0.0} | ({} if row["prompt"] == "y" else {"speaker": "17"}) for row in rows]
    measures = {"similarity": {"model": "microsoft/wavlm-base-plus-sv"}}
    generations_file(tmp_path, "a", {}, samples=rows, measures=measures)
    result_file(tmp_path, "m", {"rir_consistency": [1, 0]})
    items = read_results([tmp_path]).items
    clusters = dict(zip(items["item"], items["cluster"], strict=True))
    assert clusters == {"x": "17", "y": "y", "z": "17", "0": "0", "1": "1"}
    _, (title, continuations) = comparable_sets(items)
    assert title.startswith("Continuations, 2 s, speaker encoder wavlm-base-plus-sv, measures ")
    headings = [row[0] for row in summary(continuations, title).tables[0].rows]
    assert headings == ["speaker similarity (n = 3)", "speaker similarity, first 1.5 s (n = 3)"]


def test_an_unknown_measure_has_its_own_name(tmp_path):
    generations_file(tmp_path, "a", {"x": [1.0], "y": [3.0]}, "new_measure")
    rows = summary(read_results([tmp_path]).items, "t").tables[0].rows
    assert rows == [["new_measure (n = 2)", "2.00 (1.00 to 3.00)"]]


def test_logarithms_are_shown_as_perplexities_and_ratios(tmp_path):
    for name, low, high in (("a", 10.0, 1000.0), ("b", 5.0, 500.0)):
        values = {"x": [math.log(low)], "y": [math.log(high)]}
        generations_file(tmp_path, name, values, "log_perplexity")
    items = read_results([tmp_path]).items
    assert summary(items, "t").tables[0].rows[0][1:] == ["100.0 (10.0 to 1000.0)", "50.0 (5.0 to 500.0)"]
    section = comparison(items, "t", {"A": ["a"], "B": ["b"]}, None)
    assert section.tables[0].rows[0][2] == "50.0, ratio 0.50 (0.50 to 0.50)"


# Differences over seeds.


def difference(*by_pair_of_seeds, measure="distillmos"):
    index = pd.MultiIndex.from_tuples([("p", str(i)) for i in range(len(by_pair_of_seeds[0]))], names=["part", "item"])
    return estimate(pd.DataFrame(dict(enumerate(by_pair_of_seeds)), index=index), measure_of(measure))


def test_a_star_is_where_neither_interval_contains_zero():
    text = {
        ((0.2, 0.3), (0.22, 0.31)): "+0.26 (+0.21 to +0.30) ± 0.10 *",
        ((0.2, 0.3), (0.2, 0.3)): "+0.25 (+0.20 to +0.30) ± 0.00",  # equal seeds
        ((0.2, 0.3),): "+0.25 (+0.20 to +0.30)",  # one seed
    }
    assert {seeds: difference(*seeds).text(is_difference=True) for seeds in text} == text
    for seeds in (
        ((0.2, 0.3), (0.2, 0.9)),  # seeds differ
        ((-1.0, 2.0), (-1.0, 2.0)),  # pairs differ
        ((0.2,), (0.21,)),  # one pair
        ((0.1, 0.2 + 0.1), (0.3 - 0.2, 0.3), (0.1, 0.3)),  # seeds differ by rounding
        ((0.25, 0.25), (0.26, 0.26)),  # equal pairs
    ):
        assert not difference(*seeds).is_significant
    ratio = difference((0.2, 0.21), (0.2, 0.22), measure="log_perplexity")
    assert ratio.text(is_difference=True) == "ratio 1.23 (1.22 to 1.24) ± a factor of 1.03 *"
    bits = measure_of("bits/4")
    assert Estimate(bits, (1.0, 1.1), None, 0).is_significant  # no items
    assert not Estimate(bits, (1.0, 1.0, 1.0), None, 0).is_significant


def test_variants_are_compared_pair_by_pair_and_seed_by_seed(tmp_path):
    """Compare with plain computations. One run has failed, and one run lacks the value of a prompt."""
    random = np.random.default_rng(0)
    credits = {name: random.integers(0, 2, 20) for name in ("a0", "a1", "b0", "b1", "c1")}
    for name, of_run in credits.items():
        result_file(tmp_path, name, {"speaker_consistency": of_run.tolist()}, data_kind="synthetic")
        voices = {f"p{i}": [None if (name, i) == ("b0", 3) else float(random.normal())] for i in range(6)}
        generations_file(tmp_path, name, voices)
    generations_file(tmp_path, "recording", {f"p{i}": 0.1 * i for i in range(7)}, made_by=None)
    items = read_results([tmp_path]).items
    groups = {"A": ["a0", "a1"], "B": ["b0", "b1"], "C": ["c0", "c1"]}
    section = comparison(items, "Title", groups, "forest")
    table, references = section.tables
    assert table.header == ["measure", "A", "B", "C"] and section.pictures[0].name == "forest.png"
    speaker, similarity = table.rows
    assert speaker[0] == "SALMon speaker consistency, synthetic (n = 20)" and similarity[0].endswith("(n = 5)")
    percent = {name: 100 * of_run.mean() for name, of_run in credits.items()}
    mean, low, high, half = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\) ± (\S+)", speaker[1]).groups())
    assert mean == pytest.approx((percent["a0"] + percent["a1"]) / 2, abs=0.05) and low < mean < high
    assert half == pytest.approx(12.7062 * statistics.stdev([percent["a0"], percent["a1"]]) / 2**0.5, abs=0.05)
    changes = [percent[f"b{seed}"] - percent[f"a{seed}"] for seed in range(2)]
    assert f", {statistics.mean(changes):+.1f} (" in speaker[2]
    assert f", {percent['c1'] - percent['a1']:+.1f} (" in speaker[3] and "±" not in speaker[3]
    assert references.rows == [["speaker similarity", "0.240"]]  # mean over the prompts 0, 1, 2, 4, 5
    alone = comparison(items, "Title", {"A": ["a0"], "B": ["nobody"]}, None)
    assert [len(table.rows[0]) for table in alone.tables] == [3, 2] and not alone.pictures


def test_measures_without_a_common_item_are_named_and_conditions_are_not_mixed(tmp_path):
    generations_file(tmp_path, "a", {"x": [1.0], "y": [None]})
    generations_file(tmp_path, "b", {"x": [None], "y": [1.0]})
    for preset in ("official", "official-levels_0"):
        result_file(tmp_path, "a", {"rir_consistency": [1, 0]}, preset=preset)
    section = comparison(read_results([tmp_path]).items, "t", {"A": ["a"], "B": ["b"]}, None)
    assert section.texts == ["Measures without a row, because no item has values of all models: speaker similarity."]
    names = [row[0] for row in section.tables[0].rows]
    assert names == [f"SALMon rir consistency, {preset} (n = 2)" for preset in ("official-levels_0", "official")]


def test_a_model_that_was_trained_again_has_two_names(tmp_path):
    result_file(tmp_path, "m", {"rir_consistency": [1, 0]})
    result_file(tmp_path, "m", {"lexical_dev": [1, 0]}, benchmark="sLM21", model_sha256="0" * 64)
    path = result_file(tmp_path, "m", {}, benchmark="sStoryCloze")
    assert json.loads(path.read_text())["pairs"] == []  # all clips have secret answers
    assert set(read_results([tmp_path]).items["system"]) == {"m mmmmmmmm", "m 00000000"}


@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(comparisons, "forest", lambda *_, **__: b"a picture")
    monkeypatch.setattr(comparisons, "tradeoff", lambda *_: b"a picture")
    lines = [json.loads(line) for line in (TINY_STUDY / "index.jsonl").read_text().splitlines()]
    return replace(read_study(Path("config/studies/tiny.toml")), output_dir=tmp_path), lines


def test_the_committed_study_says_what_its_results_do(tmp_path, tiny_study):
    """The saved values reproduce the report. The page on studies counts the report's differences."""
    study, lines = tiny_study
    shutil.copy(TINY_STUDY / "results.parquet", tmp_path)
    text = write_report(study, lines).read_text()
    assert text == (TINY_STUDY / "report.md").read_text()
    assert {line["state"] for line in lines} == {"done"} and len(lines) == len(study.runs)
    assert (TINY_STUDY / "results.parquet").stat().st_size < 500_000
    for picture in re.findall(r"\]\(([^)]+)\)", text):
        assert (TINY_STUDY / picture).is_file() and (tmp_path / picture).is_file()
    of_tables = [cells(text, table.title) for table in study.tables]
    differences = [cell for of_table in of_tables for cell in of_table.values() if ", " in cell]
    stars = sum(cell.endswith("*") for cell in differences)
    page = (ROOT / "config/studies/README.md").read_text()
    assert f"{len(differences)} differences" in page and f"{stars} have a star" in page


def test_a_study_without_results_names_its_runs(tiny_study):
    study, lines = tiny_study
    lines[0] |= {"state": "failed", "failed": {"step": "salmon", "why": "no <disk>"}}
    lines[1] |= {"state": "unfinished"}
    text = write_report(study, lines).read_text()
    label = "flattened, Q = 4, weights uniform, 420 steps, seed"
    assert f"- {label} 0: salmon failed: no \\<disk\\>\n- {label} 1: not finished\n" in text
    # Bits have no items. Bits of different numbers of levels are not compared.
    found = {key[1]: cell for key, cell in cells(text, "Quantizers").items()}
    assert found == {"Q = 4": "288.3 ± 3.4", "Q = 2": "103.9 ± 1.3", "Q = 8": "680.5 ± 7.7"}
    bits = cells(text, "Weight of level 0")["validation bits/s, Q = 4", "weights semantic:100"]
    assert bits == "367.2, +78.9 ± 7.5 *"
