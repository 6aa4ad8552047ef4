"""Documents and pages: texts are escaped, and a page is a single file."""

import json
import math
import sys
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from build_page import build_page
from conftest import TINY
from layouts import in_json_files, lossless_rows
from test_code_store import tokenize

from llama_mimi.audio.reading import Waveform, read_audio, write_wav
from llama_mimi.common.errors import UserError
from llama_mimi.report.document import Clip, Picture, Section, Table, to_markdown, write_html, write_markdown
from llama_mimi.report.pages import MARK_COLOR, continuations, make_clip, spectrogram

VOID = {"meta", "link", "img", "br"}
ODD = '<script>alert("x")</script> & "quotes" | `a|<b>` *c* `d'


class Outline(HTMLParser):
    """Tag counts, sources and texts of a page."""

    def __init__(self, path):
        super().__init__()
        self.open, self.sources, self.texts, self.styles, self.tags = [], [], [], [], Counter()
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        self.styles += [values["style"]] if tag == "img" and "style" in values else []
        assert tag != "img" or values["alt"]
        assert tag != "audio" or values["aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data] if self.open and not data.isspace() else []


def test_text_is_not_markup(tmp_path):
    picture = Picture("a.png", b"png", ODD)
    section = Section(ODD, [ODD], [picture], [Table([ODD, "n"], [[ODD, "-1.5"]])], [ODD], [Clip(ODD, lines=[ODD])])
    write_html(ODD, [Section("First"), section], tmp_path / "a.html")
    found = Outline(tmp_path / "a.html")
    assert found.tags["code"] == 4 and found.texts.count("a|<b>") == 4 and "script" not in found.tags
    assert found.tags["a"] == 0 and all(source.startswith("data:") for source in found.sources)
    (tmp_path / "folder").mkdir()
    write_markdown([Section("First"), section], tmp_path / "folder" / "report.md")
    inert = r'\<script\>alert("x")\</script\> \& "quotes" \| `a\|<b>` \*c\* \`d'
    assert (tmp_path / "folder" / "report.md").read_text() == (
        f"# First\n\n## {inert}\n\n{inert}\n\n![{inert}](a.png)\n\n"
        f"| {inert} | n |\n| --- | --- |\n| {inert} | -1.5 |\n\n- {inert}\n"
    )
    assert (tmp_path / "folder" / "a.png").read_bytes() == b"png"
    assert to_markdown([Section("lines\n  of a message")]) == "# lines of a message\n"


def test_clips_share_a_time_axis_and_other_sections_are_linked(tmp_path):
    clips = [make_clip(f"{seconds}", torch.zeros(8000 * seconds), 8000) for seconds in (1, 4)]
    sections = [Section("b", clips=[*clips, Clip("no audio")]), Section("c"), Section("d")]
    write_html("a", sections, tmp_path / "a.html")
    found = Outline(tmp_path / "a.html")
    assert found.styles == ["width: 25.00%", "width: 100.00%"] and found.tags["audio"] == 2
    assert [text for text in found.texts if text.endswith(" s")] == ["0 s", "1 s", "2 s", "3 s", "4 s"] * 2
    assert [source for source in found.sources if not source.startswith("data:")] == ["#1", "#2"]
    colors = spectrogram(torch.zeros(24_000), 24_000, mark_seconds=0.5)
    marked = [column for column in range(colors.shape[1]) if (colors[:, column] == MARK_COLOR).all()]
    assert marked == [50, 51]  # 0.5 s with 10 ms per column
    tone = torch.sin(2 * math.pi * 6_000 * torch.arange(24_000) / 24_000)
    assert abs(spectrogram(tone, 24_000)[:, 50].sum(axis=1).argmax() - 48) <= 1  # 6 of 12 kHz is row 48 of 96


def test_a_tokenised_corpus(tmp_path):
    rows = lossless_rows(str(TINY / "corpus" / "validation-*.parquet"), 6, 2.0)
    (tmp_path / "in").mkdir()
    in_json_files(tmp_path / "in", [*rows, rows[0] | {"name": "again", "speaker": "<b>"}])
    (tmp_path / "in" / "empty.wav").write_bytes(b"")
    done = tokenize(tmp_path / "in", tmp_path / "codes", "--max_skip_fraction", 0.5, "--max_audio_seconds", 1.6)
    assert done.returncode == 0, done.output[-2000:]
    build_page(page=tmp_path / "a.html", codes=tmp_path / "codes", num_prompts=4)
    found = Outline(tmp_path / "a.html")
    assert found.tags["audio"] == 4 and all(source.startswith(("data:", "#")) for source in found.sources)
    stored = pq.read_table(sorted((tmp_path / "codes").glob("shard-*.parquet")))
    frames_NQ = np.concatenate([np.array(codes) for codes in stored["codes"].to_pylist()])
    for level in range(8):
        counts = Counter(frames_NQ[:, level].tolist())
        entropy = -sum(n / len(frames_NQ) * math.log2(n / len(frames_NQ)) for n in counts.values())
        first = found.texts.index("its fraction") + 1 + 5 * level
        *others, top, fraction = found.texts[first : first + 5]
        assert others == [str(level), f"{len(counts)} of 256", f"{entropy:.2f} of 8.00 bits"]
        assert counts[int(top)] == max(counts.values()) and fraction == f"{counts[int(top)] / len(frames_NQ):.1%}"


@pytest.fixture
def generations(tmp_path):
    """Write results of two systems and three references on three prompts, like eval/generation.py."""
    folder = tmp_path / "generations"
    samples_S = read_audio(TINY / "prompt.wav", 24_000).samples_S
    lengths = {"recording": 40_000, "theirs": 12_000}
    prompts = [{"name": f"p{number}", "speaker": "<b>", "seconds": 1.0} for number in range(3)]
    folder.mkdir()
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "settings": {}}))
    for system in ("recording", "shuffled", "reconstruction_q4", "mine", "theirs"):
        samples = []
        for prompt in prompts:
            for number in (1, 0) if system in ("mine", "theirs") else (None,):
                file = f"{system}/{prompt['name']}_{number}.wav"
                write_wav(folder / file, Waveform(samples_S[: lengths.get(system, 36_000)], 24_000))
                values = {"distillmos": None, "text": f"{system} & {number}", "similarity": 0.5 - 0.25 * (number == 0)}
                samples.append({"prompt": prompt["name"], "sample": number, "file": file, "seconds": 0.5, **values})
        result = {"format": 3, "kind": "generations", "data_kind": "synthetic", "system": system, "samples": samples}
        (folder / f"{system}.json").write_text(json.dumps(result))
    return folder


def test_continuations_are_beside_their_recording(tmp_path, generations):
    build_page(page=tmp_path / "a.html", generations=generations, num_prompts=2)
    found = Outline(tmp_path / "a.html")
    assert found.tags["audio"] == 2 * 4 == found.tags["img"] and "2 of 3 prompts of synthetic speech" in found.texts
    texts = [text for text in found.texts if not text.endswith(" s")]
    first = texts[texts.index("recording") :][:12]
    assert first == [
        *("recording", "recording & None", "speaker similarity 0.500"),
        *("codec, Q = 4", "reconstruction_q4 & None", "speaker similarity 0.500"),
        *("mine", "mine & 0", "speaker similarity 0.250"),
        *("theirs", "theirs & 0", "speaker similarity 0.250"),
    ]
    chosen = continuations(generations, 9, {"theirs": "another name"})
    assert [clip.title for clip in chosen[1].clips] == ["recording", "codec, Q = 4", "another name"]
    assert len(chosen) == 4
    (generations / "theirs" / "p1_0.wav").write_bytes(b"")
    build_page(page=tmp_path / "c.html", generations=generations, num_prompts=3)
    assert Outline(tmp_path / "c.html").texts.count("no audio") == 1


def test_a_page_that_cannot_be_made(tmp_path, generations):
    (generations / "mine" / "p1_0.wav").unlink()
    for mistake, message in (
        ({"generations": generations}, "a continuation of 'mine' cannot be played: .*does not exist"),
        ({"generations": tmp_path}, "does not contain prompts.json"),
        ({}, "set one of the flags --generations, --study and --codes"),
    ):
        with pytest.raises(UserError, match=message):
            build_page(page=tmp_path / "d.html", **mistake)
    result = json.loads((generations / "mine.json").read_text())
    for name in ("mine", "prompts"):
        (generations / f"{name}.json").write_text(json.dumps(result | {"samples": 3, "prompts": [3]}))
        with pytest.raises(UserError, match="is missing or damaged"):
            build_page(page=tmp_path / "d.html", generations=generations)


def test_a_study_begins_with_audio(tmp_path, generations, monkeypatch):
    lines = [{"run": name, "label": f"{name}, seed 0", "seed": 0} for name in ("mine", "theirs", "failed")]
    study = SimpleNamespace(output_dir=tmp_path, seeds=[0])
    report = [Section("Study a", ["b"]), Section("Quantizers", pictures=[Picture("a.png", b"png", "forest plot")])]
    for name, functions in {
        "config": {"read_study": lambda path: study},
        "run": {"write_index": lambda study: lines},
        "report": {"sections": lambda study, lines: report},
    }.items():
        monkeypatch.setitem(sys.modules, f"llama_mimi.study.{name}", SimpleNamespace(**functions))
    build_page(page=tmp_path / "a.html", study=tmp_path / "a.toml", num_prompts=1)
    found = Outline(tmp_path / "a.html")
    titles = [text for text in found.texts if text in {"mine, seed 0", "theirs, seed 0", "Report", "Quantizers"}]
    assert titles == ["Report", "Quantizers", "mine, seed 0", "theirs, seed 0", "Report", "Quantizers"]
    assert found.tags["audio"] == 4 and found.tags["img"] == 5
