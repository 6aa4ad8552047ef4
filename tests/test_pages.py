"""Pages: one file each, with what was measured on them, and nothing from elsewhere."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from build_page import build_page
from conftest import ROOT, TINY
from inspect_codes import InspectionOptions, entropy_bits, inspect_codes
from layouts import in_json_files, lossless_rows
from pages import MARK_COLOR, card, page, spectrogram, table
from test_code_store import tokenize
from test_study import JUDGED, Played, whole, written

from llama_mimi.audio.reading import Waveform, read_audio, write_wav
from llama_mimi.common.errors import UserError
from llama_mimi.study.config import read_study

VOID = {"meta", "link", "img", "br"}


class Outline(HTMLParser):
    """Tags that are open, and what was asked for from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.cells, self.kinds = [], [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.kinds[tag] += 1
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        assert tag != "img" or values["alt"]
        assert tag != "audio" or values["aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "p", "h3", "h4", "li"):
            self.cells.append(data)


def outline(content):
    found = Outline()
    found.feed(content)
    found.close()
    assert not found.open
    return found


def test_what_is_said_is_text_and_nothing_comes_from_elsewhere():
    odd = '<script>alert("x")</script> & "quotes"'
    found = outline(
        page(odd, [table([[odd, "-1.5"]], [odd, "n"], label=odd), card(odd, torch.zeros(4000), 8000, [odd])])
    )
    assert found.cells == [odd, "n", odd, "-1.5", odd, odd] and "script" not in found.kinds
    assert all(source.startswith("data:") for source in found.sources)


@pytest.mark.distributed
def test_a_store_as_a_page(tmp_path, capsys):
    rows = lossless_rows(str(TINY / "corpus" / "validation-*.parquet"), 6, 2.0)
    (tmp_path / "in").mkdir()
    in_json_files(tmp_path / "in", [*rows, rows[0] | {"name": "again", "speaker": "<b>"}])
    (tmp_path / "in" / "empty.wav").write_bytes(b"")
    done = tokenize(tmp_path / "in", tmp_path / "codes", "--max_bad_share", 0.5, "--max_audio_seconds", 1.6)
    assert done.returncode == 0, done.output[-2000:]
    options = {"codes": str(tmp_path / "codes"), "num_clips": 4}
    inspect_codes(InspectionOptions(page=tmp_path / "a.html", **options))
    said = capsys.readouterr().out
    assert "clips: 7, 1.6 s on average" in said and "could not be used: empty: 1 clips" in said
    assert "cut off at: 1.6 s: 7 clips" in said and "duplicates: 1 kept" in said
    content = (tmp_path / "a.html").read_text()
    found = outline(content)
    assert found.kinds["audio"] == 4 and all(source.startswith("data:") for source in found.sources)
    speakers = {row["speaker"] for row in rows} | {"<b>"}
    assert f"{len(speakers)} speakers; 0 clips without one. Those with the most hours:" in found.cells
    stored = pq.read_table(sorted((tmp_path / "codes").glob("shard-*.parquet")))
    frames_NQ = np.concatenate([np.array(codes) for codes in stored["codes"].to_pylist()])
    for level in range(8):
        counts = Counter(frames_NQ[:, level].tolist())
        plain = -sum(n / len(frames_NQ) * math.log2(n / len(frames_NQ)) for n in counts.values())
        top = max(counts.values())
        first = found.cells.index("its share") + 1 + 6 * level
        said = found.cells[first : first + 6]
        assert said[:4] == [str(level), str(len(counts)), "256", f"{plain:.2f} of 8.00 bits"]
        assert counts[int(said[4])] == top and said[5] == f"{top / len(frames_NQ):.1%}"
    inspect_codes(InspectionOptions(page=tmp_path / "b.html", **options))
    assert (tmp_path / "b.html").read_text() == content
    with pytest.raises(UserError, match="could not be written"):
        inspect_codes(InspectionOptions(page=tmp_path / "a.html" / "b.html", **options))
    with pytest.raises(UserError, match="--num_clips is -1"):
        inspect_codes(InspectionOptions(codes="x", page=tmp_path / "a.html", num_clips=-1))


def test_entropy():
    assert entropy_bits(np.array([5, 5, 0, 5, 5])) == 2.0 and entropy_bits(np.array([7, 0])) == 0.0


# Continuations side by side.


def generations(folder):
    """Results of two systems and two references on three prompts, as eval/generation.py leaves them."""
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S
    prompts = [{"name": f"p{number}", "speaker": "<b>", "seconds": 1.0} for number in range(3)]
    (folder / "prompts.json").parent.mkdir()
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "settings": {}}))
    for system in ("recording", "shuffled", "reconstruction_q4", "mine", "theirs"):
        samples = []
        for prompt in prompts:
            for number in (1, 0) if system in ("mine", "theirs") else (None,):
                file = f"{system}/{prompt['name']}_{number}.wav"
                heard = {"recording": samples_S[:40_000], "theirs": samples_S[24_000:36_000]}.get(
                    system, samples_S[:36_000]
                )
                write_wav(folder / file, Waveform(heard, 24_000))
                values = {
                    "similarity": 0.25 if number == 0 else 0.5,
                    "distillmos": None,
                    "text": f"{system} & {number}",
                }
                samples.append({"prompt": prompt["name"], "sample": number, "file": file, "seconds": 0.5, **values})
        report = JUDGED | {"system": system, "samples": samples}
        (folder / f"{system}.json").write_text(json.dumps(report))
    return folder


def test_continuations_stand_beside_their_recording(tmp_path):
    folder = generations(tmp_path / "g")
    build_page(page=tmp_path / "a.html", generations=folder, num_prompts=2)
    found = outline((tmp_path / "a.html").read_text())
    assert found.kinds["audio"] == 2 * 4 == found.kinds["img"]
    first = found.cells[found.cells.index("recording") :][:12]
    assert first == [
        *("recording", "recording & None", "speaker similarity 0.500"),
        *("reconstruction_q4", "reconstruction_q4 & None", "speaker similarity 0.500"),
        *("mine", "mine & 0", "speaker similarity 0.250"),
        *("theirs", "theirs & 0", "speaker similarity 0.250"),
    ]
    build_page(page=tmp_path / "b.html", generations=folder, systems=("theirs",), num_prompts=9)
    assert outline((tmp_path / "b.html").read_text()).kinds["audio"] == 3 * 3
    (folder / "theirs" / "p1_0.wav").write_bytes(b"")
    build_page(page=tmp_path / "c.html", generations=folder, num_prompts=3)
    assert outline((tmp_path / "c.html").read_text()).cells.count("says nothing") == 1
    (folder / "mine" / "p1_0.wav").unlink()
    for mistake, message in (
        ({"generations": folder}, "a continuation of 'mine' cannot be heard: .*does not exist"),
        ({"generations": folder, "systems": ("nobody",)}, "has no result of 'nobody', only of mine, reconst"),
        ({"generations": tmp_path}, "holds no prompts.json"),
        ({}, "name either a --study or the folder of --generations"),
        ({"generations": folder, "num_prompts": -1}, "--num_prompts is -1"),
    ):
        with pytest.raises(UserError, match=message):
            build_page(page=tmp_path / "d.html", **mistake)
    (folder / "mine.json").write_text(json.dumps(JUDGED | {"system": "mine", "samples": [{}]}))
    with pytest.raises(UserError, match="mine.json' is an incomplete result: 'samples'"):
        build_page(page=tmp_path / "d.html", generations=folder)


def test_a_study_as_a_page(tmp_path, monkeypatch):
    """The tables of its report; links lead from where the page lies to results that are there."""
    monkeypatch.chdir(ROOT)
    study = read_study(written(tmp_path, a=('/out"', '/my <out>"')))
    why = "it `broke` | at <b>"
    _, report = whole(Played(study, [("train", "q8-uniform-40-seed3")], why))
    assert r"- flattened-tiny-q8-uniform-40-seed3: train failed: it \`broke\` \| at \<b\>" in report
    page = study.output_dir / "pages" / "a.html"
    build_page(page=page, study=study.path, num_prompts=3)
    found = outline(page.read_text())
    links = [source for source in found.sources if not source.startswith("data:")]
    assert found.kinds["audio"] == 3 * (1 + 4) and found.kinds["h4"] == 15  # recording and arms of the first seed
    assert len(links) > 40 and all((page.parent / unquote(link)).is_file() for link in links)
    assert f"flattened-tiny-q8-uniform-40-seed3: train failed: {why}" in found.cells and "b" not in found.kinds
    assert found.kinds["li"] == 1 and found.kinds["code"] == 3 and found.kinds["img"] == 2 + 15
    in_report = re.findall(r"\]\(((?:results|generations|index)[^)]+)\)", report)
    assert len(in_report) == len(links) and all((study.output_dir / unquote(link)).is_file() for link in in_report)


def test_the_line_is_where_a_prompt_ends():
    colors = spectrogram(torch.zeros(24_000), 24_000, mark_seconds=0.5)
    marked = [column for column in range(colors.shape[1]) if (colors[:, column] == MARK_COLOR).all()]
    assert marked == [50, 51]  # 0.5 s at 10 ms a column
    tone = torch.sin(2 * math.pi * 6_000 * torch.arange(24_000) / 24_000)
    brightest = spectrogram(tone, 24_000)[:, 50].sum(axis=1).argmax()
    assert abs(brightest - 256) <= 2  # half of 12 kHz, of 513 rows
