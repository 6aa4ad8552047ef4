"""Reports of result files: means, intervals, differences, tests and refused files."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report
import scipy
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mimi.common.command_line import parse_options
from llama_mimi.common.errors import UserError
from llama_mimi.evaluation.benchmarks import SALMON_PARTS
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.evaluation.statistics import Interval, crossed_interval, pooled_run_variance
from llama_mimi.report import comparisons
from llama_mimi.report.comparisons import comparable_sets, comparison, report_results, summary, with_stars
from llama_mimi.report.document import to_markdown
from llama_mimi.report.estimates import Estimate, same_items
from llama_mimi.report.results import COLUMNS, measure_of, read_results
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
        "scoring": {"as_released": preset == "original"},
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
    """Return the cells in the tables of a section, by measure and column. The first of several tables counts."""
    (section,) = [part for part in re.split(r"^#+ ", text, flags=re.M) if part.splitlines()[:1] == [title]]
    found, header = {}, None
    for line in [*section.splitlines(), ""]:
        row = [cell.strip().replace("\\", "") for cell in line.split("|")[1:-1]]
        if not row or header is None:
            header = row or None
        elif set(row) != {"---"}:
            measure = re.sub(r"(, synthetic)?( \(n = .*)?$", "", row[0])
            found = {(measure, column): cell for column, cell in zip(header[1:], row[1:], strict=True) if cell} | found
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
    assert "SALMon speaker consistency: systems were scored on different audio." in text
    assert (tmp_path / "report-1.png").read_bytes().startswith(b"\x89PNG")


def test_two_models_on_the_same_pairs_are_compared(tmp_path, make):
    result_file(tmp_path, "x", {"rir_consistency": [1] * 12 + [0] * 8})
    path = result_file(tmp_path, "y", {"rir_consistency": [1] * 2 + [0] * 10 + [1] + [0] * 7})
    # A folder and a table of the same audio have different names for groups.
    path.write_text(path.read_text().replace('"group": "g', '"group": "sample_'))
    result_file(tmp_path, "z", {"rir_consistency": [1] * 20}, audio_sha256="other")
    text = make("--results", tmp_path)
    difference = cells(text, "Differences, Accuracy, preset official")["SALMon rir consistency, data data", "y"]
    of_pairs = scipy.stats.ttest_rel([1] * 2 + [0] * 10 + [1] + [0] * 7, [1] * 12 + [0] * 8).confidence_interval()
    assert difference == f"15.0, -45.0 ({100 * of_pairs.low:+.1f} to {100 * of_pairs.high:+.1f})"  # no star


def test_synthetic_data_are_marked(tmp_path, make):
    words = {"lexical_dev": [1, 0], "syntactic_dev": [1, 1]}
    path = result_file(tmp_path, "toy", words, "sLM21", data_kind="synthetic")
    text = make("--results", tmp_path)
    assert "| measure (synthetic data) | toy |" in text and "| sBLIMP (n = 2) |" in text
    result_file(tmp_path, "other", {"rir_consistency": [1, 0]})  # now only some rows are from synthetic data
    assert "| sBLIMP, synthetic (n = 2) |" in make("--results", tmp_path)
    path.write_text(path.read_text().replace('"synthetic"', '"official"'))  # earlier commits wrote this value
    assert "synthetic" not in make("--results", tmp_path)
    assert set(read_results([tmp_path])["data_kind"]) == {"other"}


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
    found, left_out = same_items(rows.assign(sample=rows["sample"].fillna(-1).astype(int), cluster=rows["item"]))
    value = {"a": lambda p, k: a[p][k], "b": lambda p, k: b[p][k], "r": lambda p, k: of_prompts[p]}
    value = {name: of for name, of in value.items() if any(of(p, k) is not None for p in "abcde" for k in range(3))}
    assert set(found) == set(value)
    if not {"a", "b"} & set(value):
        return
    kept = {p: [k for k in range(3) if all(of(p, k) is not None for of in value.values())] for p in "abcde"}
    kept = {p: numbers for p, numbers in kept.items() if numbers}
    for name, of in value.items():
        means = {p: pytest.approx(np.mean([of(p, k) for k in ks])) for p, ks in kept.items()}
        assert found.droplevel(["part", "cluster"])[name].to_dict() == means
    assert left_out == 15 - sum(map(len, kept.values()))


def test_continuations_are_summarised_on_the_same_samples(tmp_path):
    generations_file(tmp_path, "a", {"x": [1.0, None], "y": [3.0, None], "z": [None, None]})
    generations_file(tmp_path, "b", {"x": [2.0, 2.0], "y": [4.0, 4.0], "z": [1.0, 1.0]})
    generations_file(tmp_path, "silent", {"x": [None, None]})
    generations_file(tmp_path, "recording", {"x": 5.0, "y": 6.0, "z": 7.0}, made_by=None)
    written(tmp_path / "prompts.json", {})
    ((title, items),) = comparable_sets(read_results([tmp_path]))
    text = to_markdown([summary(items, title)])
    found = [cells(text, title)["speaker similarity", name] for name in ("a", "b", "recording")]
    # Student's t with one degree of freedom: 12.706 standard errors, which are half of the difference.
    assert found == ["2.000 (-10.706 to 14.706)", "3.000 (-9.706 to 15.706)", "5.500 (-0.853 to 11.853)"]
    assert "(n = 2) |" in text and "4 samples are excluded" in text


def test_speakers_are_clusters_and_the_table_names_the_speaker_encoder(tmp_path):
    """Prompts and pairs without a speaker are clusters of one item."""
    rows = samples({"x": [1.0], "y": [2.0], "z": [3.0]}, "similarity/1.5")
    rows = [row | {"similarity": 0.0} | ({} if row["prompt"] == "y" else {"speaker": "17"}) for row in rows]
    measures = {"similarity": {"model": "microsoft/wavlm-base-plus-sv"}}
    generations_file(tmp_path, "a", {}, samples=rows, measures=measures)
    path = result_file(tmp_path, "m", {"rir_consistency": [1, 0], "speaker_consistency": [1, 0, 1]})
    report = json.loads(path.read_text())
    for pair, speaker in zip(report["pairs"], ("", "", "ann", "bob", "ann"), strict=True):
        pair["speaker"] = speaker
    written(path, report)
    items = read_results([tmp_path])
    clusters = dict(zip(items["measure"].str.split("/").str[-1] + items["item"], items["cluster"], strict=True))
    of_prompts = {"1.5x": "17", "1.5y": "y", "1.5z": "17"}
    of_rooms = {"rir_consistency0": "0", "rir_consistency1": "1"}
    of_speakers = {f"speaker_consistency{item}": name for item, name in enumerate(("ann", "bob", "ann"))}
    assert clusters.items() >= (of_prompts | of_rooms | of_speakers).items()
    _, (title, continuations) = comparable_sets(items)
    assert title.startswith("Continuations, 2 s, speaker encoder wavlm-base-plus-sv, measures ")
    headings = [row[0] for row in summary(continuations, title).tables[0].rows]
    assert headings == ["speaker similarity (n = 3)", "speaker similarity, first 1.5 s (n = 3)"]


def test_an_unknown_measure_has_its_own_name(tmp_path):
    generations_file(tmp_path, "a", {"x": [1.0], "y": [3.0]}, "new_measure")
    rows = summary(read_results([tmp_path]), "t").tables[0].rows
    assert rows == [["new_measure (n = 2)", "2.00 (-10.71 to 14.71)"]]


def test_limits_of_an_interval(tmp_path):
    """A fraction stays between 0 and 100 %. One prompt does not show the variation between prompts."""
    generations_file(tmp_path, "a", {"x": [1.0], "y": [1.0], "z": [0.0]}, "ended")
    generations_file(tmp_path / "b", "a", {"x": [2.0]}, "seconds", prompts_sha256="q")
    ended, seconds = (summary(items, "t").tables[0].rows for _, items in comparable_sets(read_results([tmp_path])))
    assert ended == [["ended by the model (%) (n = 3)", "66.7 (0.0 to 100.0)"]]
    assert seconds == [["seconds (n = 1)", "2.00"]]


def test_logarithms_are_shown_as_perplexities_and_ratios(tmp_path):
    for name, low, high in (("a", 10.0, 11.0), ("b", 5.0, 5.6)):
        values = {"x": [math.log(low)], "y": [math.log(high)]}
        generations_file(tmp_path, name, values, "log_perplexity")
    items = read_results([tmp_path])
    # The mean of log(10) and log(11), plus and minus 12.706 standard errors, which are log(11 / 10) / 2.
    assert summary(items, "t").tables[0].rows[0][1] == "10.5 (5.7 to 19.2)"
    section = comparison(items, "t", {"A": ["a"], "B": ["b"]}, None)
    ratio = (10 * 11 / 5 / 5.6) ** -0.5
    low, high = (ratio * (5.6 / 5 / 1.1) ** (sign * 12.7062 / 2) for sign in (-1, 1))
    assert section.tables[0].rows[0][2] == f"5.3, ratio {ratio:.2f} ({low:.2f} to {high:.2f})"


# Differences over runs and items.


@pytest.fixture
def runs(tmp_path):
    """Return the results of two variants A and B and a variant C with one failed run, and their values.

    Prompts have three speakers. In run b0, prompt p3 has no value.
    """
    random = np.random.default_rng(0)
    credits = {name: random.integers(0, 2, 20) for name in ("a0", "a1", "a2", "b0", "b1", "b2", "c1")}
    voices = {name: random.normal(size=6) for name in credits}
    voices["b0"][3] = np.nan
    for name, of_run in credits.items():
        result_file(tmp_path, name, {"speaker_consistency": of_run.tolist()}, data_kind="synthetic")
        values = {f"p{i}": [None if np.isnan(value) else value] for i, value in enumerate(voices[name])}
        generations_file(tmp_path, name, values)
    generations_file(tmp_path, "recording", {f"p{i}": 0.1 * i for i in range(7)}, made_by=None)
    items = read_results([tmp_path])
    is_prompt = items["measure"] == "similarity"
    items["cluster"] = items["item"].where(~is_prompt, "speaker" + (items["item"].str[-1:]))
    items["cluster"] = items["cluster"].replace(
        {"speaker3": "speaker0", "speaker4": "speaker1", "speaker5": "speaker2"}
    )
    return items, credits, voices


GROUPS = {"A": ["a0", "a1", "a2"], "B": ["b0", "b1", "b2"], "C": ["c0", "c1"]}


def shown(interval, digits, is_difference=True):
    form = f"{'+' if is_difference else ''}z.{digits}f"
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def test_variants_are_compared_over_runs_and_items_together(runs):
    """Compare with arrays made by hand. A mean uses its own prompts; a difference uses the prompts of both variants."""
    items, credits, voices = runs
    section = comparison(items, "Title", GROUPS, "forest")
    table, references = section.tables
    assert table.header == ["measure", "A", "B", "C"] and section.pictures[0].name == "forest.png"
    speaker, similarity = table.rows
    assert speaker[0] == "SALMon speaker consistency, synthetic (n = 20)"
    assert similarity[0] == "speaker similarity (n = 6; 3 speakers)"
    of = {
        label: np.array([credits[run] for run in systems if run in credits]) * 100.0
        for label, systems in GROUPS.items()
    }
    pooled = pooled_run_variance([of[label].mean(axis=1) for label in "ABC"])
    assert pooled.df == 4  # C has one run
    mean = crossed_interval(of["A"], run_variance=pooled)
    assert speaker[1] == shown(mean._replace(low=max(mean.low, 0), high=min(mean.high, 100)), 1, is_difference=False)
    for cell, label in zip(speaker[2:], "BC", strict=True):
        assert cell == f"{of[label].mean():.1f}, {shown(crossed_interval(of[label], of['A'], run_variance=pooled), 1)}"
    of = {label: np.array([voices[run] for run in systems if run in voices]) for label, systems in GROUPS.items()}
    kept, speakers = np.array([0, 1, 2, 4, 5]), np.array([0, 1, 2, 0, 1, 2])
    pooled = pooled_run_variance([of["A"].mean(axis=1), of["B"][:, kept].mean(axis=1)])
    both = crossed_interval(of["B"][:, kept], of["A"][:, kept], clusters_N=speakers[kept], run_variance=pooled)
    assert similarity[2] == f"{of['B'][:, kept].mean():.3f} (n = 5), {shown(both, 3)}, n = 5"
    assert similarity[3].split(", ")[1] == shown(
        crossed_interval(of["C"], of["A"], clusters_N=speakers, run_variance=pooled), 3
    )
    assert references.rows == [["speaker similarity", "0.250 (n = 6)"]]  # mean over the six prompts
    alone = comparison(items, "Title", {"A": ["a0"], "B": ["nobody"]}, None)
    assert [len(table.rows[0]) for table in alone.tables] == [3, 2] and not alone.pictures


def test_one_run_decides_nothing(runs):
    """The interval of a difference between single runs is that of a paired t-test, without a star."""
    items, credits, _ = runs
    items["value"] = items["value"].where(items["system"] != "b1", 5.0 + items["value"])  # far above a1
    section = comparison(items, "t", {"A": ["a1"], "B": ["b1"]}, None)
    low, high = scipy.stats.ttest_rel(credits["b1"] + 5.0, credits["a1"]).confidence_interval()
    assert f"({100 * low:+.1f} to {100 * high:+.1f})" in section.tables[0].rows[0][2] and low > 4
    assert "*" not in str(section.tables[0].rows) and not section.texts
    named = comparison(items, "t", {"A": ["a1"], "B": ["b1"]}, None, primary=("salmon/speaker_consistency", "B"))
    assert named.texts[0].endswith(", no p-value (too few runs).")


def test_unequal_variances_are_not_pooled(tmp_path):
    """With †, the interval of bits is that of Welch's t-test; else, that of Student's t-test."""
    values = pd.Series([1.0, 1.1, 0.9, 1.3, 1.35, 1.2, 20.0, 0.0, 20.0, 0.0], list("abcdefghij"))
    rows = [dict.fromkeys(COLUMNS, "") | {"system": run, "value": value} for run, value in values.items()]
    items = pd.DataFrame(rows).assign(measure="bits/4", is_reference=False, sample=0)
    first = list("abc")
    for second, mark, test in ((list("def"), "", {"equal_var": True}), (list("ghij"), " †", {"equal_var": False})):
        (row,) = comparison(items, "t", {"A": first, "B": second}, None).tables[0].rows
        low, high = scipy.stats.ttest_ind(values[second], values[first], **test).confidence_interval()
        assert row[0] == f"validation bits/s, Q = 4{mark}" and f"({low:+.1f} to {high:+.1f})" in row[2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 0.2) | st.just(math.nan), min_size=1, max_size=12), st.integers(0, 11))
def test_stars_keep_the_false_discovery_rate(p_values, primary):
    """Compare with the rule of Benjamini and Hochberg: the largest k for which the k-th p-value is at most 0.05 k/m."""
    measure = measure_of("bits/4")
    found = {
        f"m{i}": {"B": Estimate(measure, Interval(1.0, 0.0, 2.0, p), (1.0,), 0, 1, is_primary=i == primary)}
        for i, p in enumerate(p_values)
    }
    exploratory = sorted(p for i, p in enumerate(p_values) if i != primary and p == p)
    limits = [p for k, p in enumerate(exploratory, 1) if p <= 0.05 * k / len(exploratory)]
    expected = [p <= (0.05 if i == primary else max(limits, default=-1)) for i, p in enumerate(p_values)]
    assert [of["B"].has_star for of in with_stars(found).values()] == expected


def test_the_primary_difference_is_named_first(runs):
    items, *_ = runs
    costs = {"training": {"A": "1e+12 FLOP", "B": "2e+12 FLOP"}}
    section = comparison(items, "t", GROUPS, None, primary=("salmon/speaker_consistency", "B"), costs=costs)
    first, second = section.texts
    found = re.fullmatch(
        r"Primary difference: SALMon speaker consistency, 'B' against 'A': (.*) \(p = (.*), without .* p = (.*)\)\.",
        first,
    )
    assert f"{found[1]}, primary" in section.tables[1].rows[0][2] and 0 < float(found[2]) <= 1
    assert second == "3 exploratory differences; 0 have a star."
    assert section.tables[0].rows == [["training", "1e+12 FLOP", "2e+12 FLOP", ""]]
    assert "'B' against 'A': not available." in comparison(items, "t", GROUPS, None, primary=("bits/4", "B")).texts[0]


def test_a_primary_difference_has_p_values_with_and_without_pooling(tmp_path):
    values = dict(zip("abcdefghi", (1.0, 1.1, 0.9, 1.3, 1.35, 1.2, 1.0, 1.5, 0.6), strict=True))
    rows = [dict.fromkeys(COLUMNS, "") | {"system": run, "value": value} for run, value in values.items()]
    items = pd.DataFrame(rows).assign(measure="bits/4", is_reference=False, sample=0)
    groups = {"A": list("abc"), "B": list("def"), "C": list("ghi")}
    (text, _) = comparison(items, "t", groups, None, primary=("bits/4", "B")).texts
    of_each = [[values[run] for run in runs] for runs in groups.values()]
    a, b, pooled = of_each[0], of_each[1], pooled_run_variance(of_each)
    own = scipy.stats.ttest_ind(b, a, equal_var=False).pvalue
    with_pooling = crossed_interval(np.array([b]).T, np.array([a]).T, run_variance=pooled).p_value
    assert f"(p = {with_pooling:.2g}, without pooling of variances p = {own:.2g})" in text and own < 0.03 < with_pooling


def test_rules_of_salmon_have_one_row_if_all_parts_are_there(runs):
    items, *_ = runs
    part = items[items["measure"] == "salmon/speaker_consistency"]
    whole = [part.assign(measure=f"salmon/{name}{rule}") for name in SALMON_PARTS for rule in ("", ":level_0")]
    for parts, number in ((whole, 10), (whole[:6], 6)):
        (table, *_) = comparison(pd.concat(parts, ignore_index=True), "t", GROUPS, None).tables
        assert len(table.rows) == number
        assert any(row[0].startswith(measure_of("salmon/mean:level_0").heading) for row in table.rows) == (number == 10)


def test_plots_show_only_the_official_rules(runs, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparisons, "forest", lambda panels, *_, **__: drawn.append([*panels]) or b"")
    items, *_ = runs
    words = items[items["measure"] == "salmon/speaker_consistency"].assign(measure="sLM21/syntactic_dev")
    rules = [items, words, words.assign(measure="sLM21/syntactic_dev:all_levels", value=0.0)]
    items = pd.concat(rules, ignore_index=True).assign(data_kind="other")
    comparison(items, "t", GROUPS, "forest")
    summary(items, "t", "forest")
    names = ["SALMon speaker consistency", "sBLIMP", "speaker similarity"]
    assert drawn == [names, names]


def test_measures_without_a_common_item_are_named_and_conditions_are_not_mixed(tmp_path):
    generations_file(tmp_path, "a0", {"x": [1.0], "y": [None]})
    generations_file(tmp_path, "a1", {"x": [None], "y": [1.0]})
    for preset in ("official", "official-levels_0"):
        result_file(tmp_path, "a0", {"rir_consistency": [1, 0]}, preset=preset)
    section = comparison(read_results([tmp_path]), "t", {"A": ["a0", "a1"], "B": ["b"]}, None)
    assert section.texts == ["Measures without a row, because no item has values of all seeds: speaker similarity."]
    names = [row[0] for row in section.tables[0].rows]
    assert names == [f"SALMon rir consistency, {preset} (n = 2)" for preset in ("official-levels_0", "official")]


def test_a_model_that_was_trained_again_has_two_names(tmp_path):
    result_file(tmp_path, "m", {"rir_consistency": [1, 0]})
    result_file(tmp_path, "m", {"lexical_dev": [1, 0]}, benchmark="sLM21", model_sha256="0" * 64)
    path = result_file(tmp_path, "m", {}, benchmark="sStoryCloze")
    assert json.loads(path.read_text())["pairs"] == []  # all clips have secret answers
    assert set(read_results([tmp_path])["system"]) == {"m mmmmmmmm", "m 00000000"}


@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(comparisons, "forest", lambda *_, **__: b"a picture")
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
    assert f"The report shows {len(differences)} differences, and {stars} have a star" in page


def test_a_study_without_results_names_its_runs(tiny_study):
    study, lines = tiny_study
    lines[0] |= {"state": "failed", "failed": {"step": "salmon", "why": "no <disk>"}}
    lines[1] |= {"state": "unfinished"}
    text = write_report(study, lines).read_text()
    label = "flattened, Q = 4, weights uniform, 420 steps, seed"
    assert f"- {label} 0: salmon failed: no \\<disk\\>\n- {label} 1: not finished\n" in text
    # Bits have no items. Bits of different numbers of levels are not compared.
    found = {key[1]: cell for key, cell in cells(text, "Quantizers").items() if key[0].startswith("validation bits/s")}
    assert found == {
        "Q = 4": "288.3 (285.3 to 291.4)",
        "Q = 2": "103.9 (102.7 to 105.2)",
        "Q = 8": "680.5 (672.8 to 688.1)",
    }
    bits = cells(text, "Weight of level 0")["validation bits/s, Q = 4", "weights semantic:100"]
    assert bits == "367.2, +78.9 (+74.6 to +83.2) *"
