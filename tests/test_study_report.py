"""The report of a study: its numbers are those of the result files."""

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import study_results
from conftest import ROOT
from scipy.stats import t as student
from study_report import write_report
from study_results import Results
from test_study import Played, in_the_repository, whole, written  # noqa: F401

from llama_mimi.study.config import Run, read_study

BITS = "validation bits/s over admissible tokens"


def test_rows_without_a_common_prompt_are_named(tmp_path):
    class Wordless(Played):
        def write(self, name, model, out):
            super().write(name, model, out)
            if name == "eval/generation.py":
                report = json.loads((out / f"{model}.json").read_text())
                for sample in report["samples"]:
                    if sample["prompt"] != f"p{int(model[-1]) % 2 + len(model) % 2}":
                        sample["similarity"] = None
                (out / f"{model}.json").write_text(json.dumps(report))

    _, report = whole(Wordless(read_study(written(tmp_path))))
    assert "so that there is no row of: speaker similarity." in report


def test_numbers_of_the_report_are_the_plainest(tmp_path):
    place = Played(read_study(written(tmp_path)))
    lines, report = whole(place)

    def accuracy(run):
        path = place.study.output_dir / "results" / "salmon" / run.name / "official.json"
        return json.loads(path.read_text())["parts"]["speaker_consistency"]["accuracy"]

    a, b = place.study.variants[0], place.study.variants[2]
    values = {arm: [100 * accuracy(Run(arm, seed)) for seed in (3, 5)] for arm in (a, b)}
    row = next(line for line in report.splitlines() if line.startswith("| SALMon speaker consistency (n = 20) |"))
    found = row.split("|")[2]  # of the first arm
    mean, low, high, spread = map(float, re.match(r" (\S+) \((\S+) to (\S+)\) ± (\S+) ", found).groups())
    assert mean == pytest.approx(statistics.mean(values[a]), abs=0.05) and low <= mean <= high
    assert spread == pytest.approx(student.ppf(0.975, 1) * statistics.stdev(values[a]) / 2**0.5, abs=0.05)
    for seed in (3, 5):
        link = re.search(rf"\[{seed}\]\(([^)]+)\)", found)[1]
        assert link == f"results/salmon/{Run(a, seed).name}/official.json"
        assert (place.study.output_dir / link).is_file()
    by_seed = [y - x for x, y in zip(values[a], values[b], strict=True)]
    row = report.split("| difference from flattened, 40 steps |")[1].split("| SALMon speaker consistency |")[1]
    assert row.split("|")[1].startswith(f" {statistics.mean(by_seed):+.1f} (")  # behind 20 steps
    # A sample without a value leaves its prompt to the others, and all rows have the same prompts.
    measured = Results(place.study, lines).measured(place.study.tables[0].variants, "distillmos")
    assert {len(parts[0]) for one in measured.values() for parts in one.parts_of_seeds.values()} == {6}
    # Published rows stand beside the arms that they would be, and all of them at the end.
    first, second, end = (part.split("\n## ")[0] for part in report.split("\n## ")[1:4])
    similarity = next(line for line in first.splitlines() if line.startswith("| speaker similarity (n = 6) |"))
    by_a_digest = r"\[arXiv 2509.14882, by a digest\]"
    wanted = f" Llama-Mimi-1.3B, Q = 4 {by_a_digest}: 0.346; CSM-1.3B, Q = 4 {by_a_digest}: 0.320 "
    # A reference is of the prompts of the row: 0.50 to 0.55.
    assert similarity.split("|")[-2] == wanted + "[recording 0.525](generations/recording.json) "
    # Bits at the end of training, by seed; those of other levels are not compared.
    (bits,) = (line for line in second.splitlines() if line.startswith(f"| {BITS} |"))
    width = float(student.ppf(0.975, 1)) * statistics.stdev([143, 145]) / 2**0.5
    cells = [f"{mean} ± {width:.1f} [index](index.jsonl)" for mean in ("144.0", "184.0")]
    assert bits == f"| {BITS} | {cells[0]} | {cells[1]} |  |"
    (bits,) = (line for line in first.splitlines() if line.startswith(f"| {BITS} | +0.0"))
    assert bits == f"| {BITS} | +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert "Llama-Mimi-1.3B, Q = 8" in second and "CSM" not in second
    assert "weighs 100" in end and "CSM" in end and "weighs" not in first + second
    assert (place.study.output_dir / "tradeoff-1.png").stat().st_size > 10_000
    # Bits of a log of an earlier version, over the whole vocabulary, are in no row.
    old = lines[0].pop("admissible_bits_per_audio_second")
    report = write_report(place.study, [lines[0] | {"bits_per_audio_second": old}, *lines[1:]]).read_text()
    assert f"There are no {BITS} of {lines[0]['run']}: earlier versions" in report
    assert f"| {BITS} | {lines[1]['admissible_bits_per_audio_second']['all']:.1f} [index]" in report


def test_one_seed_has_no_spread():
    assert study_results.half_width([1.0]) is None
    assert study_results.half_width([1.0, 3.0]) == pytest.approx(12.706, abs=1e-3)
    one = study_results.Measured({0: 0.5}, {0: [{"a": 0.0, "b": 1.0}]})
    assert one.half_over_seeds is None and one.interval[0] <= 0.5 <= one.interval[1]


def test_a_difference_is_of_the_seeds_that_both_have():
    a = study_results.Measured(
        {0: 0.5, 1: 0.9}, {0: [{"x": 0.0, "y": 1.0}], 1: [{"x": 0.8, "y": 1.0}]}, study_results.percent
    )
    b = study_results.Measured({0: 0.25}, {0: [{"x": 0.0, "y": 0.5}]}, study_results.percent)
    difference = a.minus(b)
    assert difference.mean == 25.0 and difference.half_over_seeds is None and difference.interval == (0.0, 50.0)
    assert a.mean == 70.0 and a.interval == (40.0, 100.0)
    perplexity = study_results.Measured({0: math.log(3)}, {0: [{"x": math.log(3), "y": 0.0}]}, math.exp)
    half = study_results.Measured({0: math.log(6)}, {0: [{"x": math.log(6), "y": math.log(2)}]}, math.exp)
    assert half.minus(perplexity).mean == pytest.approx(2.0)
    assert half.minus(perplexity).interval == pytest.approx((2.0, 2.0))


def test_a_star_is_where_neither_interval_holds_zero():
    def difference(*by_pair_of_seeds, shown=float):
        parts = {seed: [{str(i): x for i, x in enumerate(xs)}] for seed, xs in enumerate(by_pair_of_seeds)}
        return study_results.Measured({s: statistics.mean(p[0].values()) for s, p in parts.items()}, parts, shown)

    close = difference((0.2, 0.3), (0.22, 0.31)).text(2, is_difference=True)
    assert close == "+0.26 (+0.21 to +0.30) ± 0.10 *"
    assert not difference((0.2, 0.3), (0.2, 0.9)).text(2, is_difference=True).endswith("*")  # seeds differ
    assert not difference((-1.0, 2.0), (-1.0, 2.0)).stands_out  # pairs differ
    assert not difference((0.2, 0.3)).stands_out and difference((0.2, 0.3)).text(1) == "0.2 (0.2 to 0.3)"
    assert difference((0.2,), (0.2,)).interval is None and not difference((0.2,), (0.2,)).stands_out  # one pair
    ratio = difference((0.2, 0.21), (0.2, 0.22), shown=math.exp)
    assert ratio.text(2, is_difference=True) == "1.23 (1.22 to 1.24) ± a factor of 1.03 *"
    # Neither do equal seeds, or seeds that differ by rounding, nor equal pairs.
    assert difference((0.2, 0.3), (0.2, 0.3)).text(2, is_difference=True) == "+0.25 (+0.20 to +0.30) ± 0.00"
    assert not difference((0.1, 0.2 + 0.1), (0.3 - 0.2, 0.3), (0.1, 0.3)).stands_out
    assert not difference((0.25, 0.25), (0.26, 0.26)).stands_out
    # Whichever is first, as logarithms have the interval.
    apart = [difference(*((sign * x, sign * x) for x in (2.0, 3.0, 1.0)), shown=math.exp) for sign in (1, -1)]
    assert [one.stands_out for one in apart] == [False, False]
    assert study_results.Measured({0: 1.0, 1: 1.1}, {}).stands_out  # of bits there are no pairs
    assert not study_results.Measured({0: 1.0, 1: 1.0, 2: 1.0}, {}).stands_out
    assert not difference((0.0, 0.0), (0.0, 0.0), shown=math.exp).stands_out


def test_the_committed_study_says_what_its_results_do(tmp_path):
    """Its report follows from the results beside it, and the README's table from the report."""
    shipped = ROOT / "config" / "studies" / "tiny"
    shutil.copytree(shipped, tmp_path / "tiny")
    study = replace(read_study(Path("config/studies/tiny.toml")), output_dir=tmp_path / "tiny")
    lines = [json.loads(line) for line in (shipped / "index.jsonl").read_text().splitlines()]
    report = write_report(study, lines).read_text()
    assert report == (shipped / "report.md").read_text()
    assert {line["state"] for line in lines} == {"done"} and len(lines) == len(study.runs)
    for text in (report, (shipped / "page.html").read_text()):
        links = re.findall(r'(?:\]\(|href=")((?!data:)[^)"]+)', text)
        assert len(links) > 300 and all((shipped / unquote(link)).is_file() for link in links)
    assert (shipped / "page.html").stat().st_size < 3_000_000
    page = (shipped / "page.html").read_text()
    text = (ROOT / "README.md").read_text().split("## The study")[1].split("\n## ")[0]
    in_report, in_readme = cells_of(report), cells_of(text)
    flattened, quantizers, weights = (table.title for table in study.tables)
    from_first = "difference from flattened, 420 steps"
    same = {
        "flattened, Q = 4": (flattened, "measure", "flattened, 420 steps"),
        "hierarchical": (flattened, from_first, "hierarchical, 420 steps"),
        "half the steps": (flattened, from_first, "flattened, 210 steps"),
        "Q = 2": (quantizers, "difference from Q = 4", "Q = 2"),
        "Q = 8": (quantizers, "difference from Q = 4", "Q = 8"),
        "level 0 weighs 100": (weights, "difference from weights uniform", "weights semantic:100"),
    }
    assert len(in_readme) == 6 * 7
    for (_, _, column, measure), cell in in_readme.items():
        assert cell == in_report.get((*same[column], measure), "") or (not cell and column == "flattened, Q = 4")
    of_differences = [cell for (_, kind, _, _), cell in in_report.items() if kind.startswith("diff") and cell]
    stars = [cell.endswith("*") for cell in of_differences]
    assert f"{len(stars)} differences" in text and f"{sum(stars)} have a star" in text
    for cell in of_differences:
        assert f">{cell.replace(chr(92), '')}</td>" in page


def cells_of(markdown):
    """Cells without links, by title of the section, first heading, heading and measure."""
    found, title = {}, ""
    for block in markdown.split("\n\n"):
        title = block.removeprefix("## ") if block.startswith("## ") else title
        rows = [
            [re.sub(r" \[[^]]*\]\([^)]*\)", "", c).strip() for c in row.split("|")[1:-1]] for row in block.splitlines()
        ]
        if block.startswith("| ") and len(rows) > 2:
            for measure, *cells in rows[2:]:
                for heading, cell in zip(rows[0][1:], cells, strict=True):
                    found[title, rows[0][0], heading, re.sub(r" \(n = .*", "", measure)] = cell
    return found
