"""Prompts cut from a corpus, and continuations that stand beside them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import TINY

from llama_mimi.audio.reading import Waveform, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import Ranks
from llama_mimi.judging.prompts import PAUSE, QUIETEST, WORD_END, PromptOptions, cut_seconds, make_prompts
from llama_mimi.judging.systems import Clip, reconstructions, recordings, shuffled, wavs

VALIDATION = str(TINY / "corpus" / "validation-*.parquet")
RATE = 16_000


def options(**changes):
    return PromptOptions(
        **{"corpus": VALIDATION, "prompt_seconds": 1.6, "recording_seconds": 2.6, "limit": 6, **changes}
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_prompts(tmp_path_factory.mktemp("judged"), options())


def speech(pauses, seconds=8.0):
    """Noise with silences at (start, length)."""
    samples_S = torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    for start, length in pauses:
        samples_S[round(start * RATE) : round((start + length) * RATE)] *= 1e-3
    return Waveform(samples_S, RATE)


@pytest.mark.parametrize(
    ("pauses", "words", "expected"),
    [
        ([(2.6, 0.2)], None, (2.72, PAUSE)),
        ([(1.0, 0.5), (3.2, 0.1)], None, (3.28, PAUSE)),  # the first is too far from 3 s
        ([(2.6, 0.2)], [0.4, 2.55, 2.93, 3.4], (2.93, WORD_END)),
        ([(2.6, 0.2)], [0.4, 5.0], (2.72, PAUSE)),
        ([(0, 8)], None, (3.0, PAUSE)),  # of equally quiet moments the nearest
    ],
)
def test_a_prompt_ends_at_a_word_or_a_pause(pauses, words, expected):
    waveform = speech(pauses)
    if pauses == [(0, 8)]:
        waveform = Waveform(waveform.samples_S * 0, RATE)
    seconds, cut = cut_seconds(waveform, 3.0, words)
    assert (seconds, cut) == (pytest.approx(expected[0], abs=0.05), expected[1])


def test_without_a_pause_the_quietest_moment_is_taken():
    waveform = speech([])
    waveform.samples_S[round(3.16 * RATE) : round(3.24 * RATE)] *= 0.5
    assert cut_seconds(waveform, 3.0) == (3.2, QUIETEST)


def test_prompts_are_the_beginnings_of_recordings(prompts):
    assert len(prompts.prompts) == 6 and len({prompt.speaker for prompt in prompts.prompts}) > 1
    for prompt in prompts.prompts:
        whole, beginning = (read_audio(path, None) for path in (prompts.recording_path(prompt), prompts.path(prompt)))
        assert whole.seconds >= 2.6 and beginning.seconds == pytest.approx(prompt.seconds, abs=1e-4)
        assert abs(prompt.seconds - 1.6) <= 1.6 / 6 + 0.08 and prompt.seconds / 0.08 == pytest.approx(
            round(prompt.seconds / 0.08)
        )
        assert torch.equal(whole.samples_S[: len(beginning.samples_S)], beginning.samples_S)


def test_the_same_prompts_again(prompts, tmp_path):
    assert make_prompts(prompts.folder, options()) == prompts
    anew = make_prompts(tmp_path, options())
    assert anew.prompts == prompts.prompts and anew.sha256 == prompts.sha256
    fewer = make_prompts(tmp_path / "fewer", options(limit=3))
    assert set(fewer.prompts) < set(prompts.prompts)  # a smaller limit draws a part of the same
    with pytest.raises(UserError, match="holds prompts with limit 6, not 7; name another --output_dir"):
        make_prompts(prompts.folder, options(limit=7))
    anew.path(anew.prompts[2]).write_bytes(b"other")
    with pytest.raises(UserError, match=f"{anew.prompts[2].name}.wav' is missing or not what prompts.json says"):
        make_prompts(tmp_path, options())


def corpus(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def audio_row(number, seconds, **more):
    path = f"{number}.wav"
    samples = np.random.default_rng(number).normal(size=round(seconds * RATE)).astype(np.float32) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV")
    return {"audio": {"bytes": buffer.getvalue(), "path": path}, **more}


def test_a_corpus_with_an_alignment_without_ids_and_with_damage(tmp_path, capsys):
    rows = [audio_row(number, 8, words=[{"word": "a", "end": 3.11}, {"word": "b", "end": 5.0}]) for number in range(3)]
    rows += [audio_row(3, 2, words=[{"word": "a", "end": 1.0}])]
    rows += [{"audio": {"bytes": b"no audio", "path": None}, "words": None}]
    path = corpus(tmp_path / "c.parquet", rows)
    prompts = make_prompts(tmp_path / "out", PromptOptions(corpus=path, alignment_column="words"))
    assert [(prompt.seconds, prompt.cut) for prompt in prompts.prompts] == [(3.11, WORD_END)] * 3
    assert prompts.prompts[1].source == f"row 1 of row group 0 of {path}"
    said = capsys.readouterr().out
    assert "3 prompts, cut at: word end 3; left out: too short 1, unreadable 1" in said
    assert json.loads((tmp_path / "out/prompts.json").read_text())["left_out"] == {"too short": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_seconds": 0.1}, "--prompt_seconds is 0.1; it must be 0.5 or more"),
        ({"recording_seconds": 1.7}, "--recording_seconds is 1.7; recordings must go on"),
        ({"limit": 0}, "--limit is 0"),
        ({"recording_seconds": 70}, "recordings of 70 s are asked for; 60 s are read"),
        ({"recording_seconds": 50}, "no recording of .* is 50 s long \\(too short 47\\); lower"),
        (
            {"corpus": "nowhere/*.parquet"},
            "no Parquet, tar or audio file and no JSONL manifest matches the dataset 'nowhere",
        ),
        ({"audio_column": "sound"}, "has no column 'sound' for the audio"),
    ],
)
def test_mistakes_of_prompts_get_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_prompts(tmp_path, options(**changes))


def test_any_id_makes_a_name_of_its_own(tmp_path):
    ids = ["a-b", "a/b", "日本", "你好1", ".", "x" * 300, "1089-134686-0000"]
    path = corpus(tmp_path / "c.parquet", [audio_row(number, 7, id=name) for number, name in enumerate(ids)])
    prompts = make_prompts(tmp_path / "out", PromptOptions(corpus=path))
    names = [prompt.name for prompt in prompts.prompts]
    assert [prompt.source for prompt in prompts.prompts] == ids and len(set(names)) == 7
    assert names[0] == "a-b" and names[-1] == "1089-134686-0000" and names[1].startswith("a-b-")
    assert all(name[0].isalnum() and name.isascii() and len(name) < 101 for name in names)
    same = corpus(tmp_path / "same.parquet", [audio_row(number, 7, id="a") for number in range(2)])
    with pytest.raises(UserError, match="has two rows with the id 'a'; give each its own"):
        make_prompts(tmp_path / "two", PromptOptions(corpus=same))


def test_a_run_that_was_killed_while_cutting_leaves_nothing_behind(tmp_path):
    left = tmp_path / "prompts.partial" / "old.wav"
    left.parent.mkdir()
    left.write_bytes(b"of another corpus")
    prompts = make_prompts(tmp_path, options())
    assert not left.parent.exists() and len(list((tmp_path / "prompts").iterdir())) == 6
    (tmp_path / "prompts" / "mine.wav").write_bytes(b"")
    with pytest.raises(UserError, match="holds 'mine', which prompts.json does not list"):
        make_prompts(tmp_path, options())
    (prompts.folder / "prompts.json").unlink()
    with pytest.raises(UserError, match="prompts' is of a folder without prompts.json; remove it"):
        make_prompts(tmp_path, options())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([{"word": "a", "end": 3110.0}], "ends at 3110 s, and the recording at 8 s; give .* in seconds"),
        ("a b", "which is no alignment"),
        ([{"word": "a", "stop": 3.0}], "which is no alignment"),
        ([{"word": "a", "end": "3.0"}], "which is no alignment"),
        (None, "has no column 'words'; leave out --alignment_column"),
    ],
)
def test_an_alignment_that_is_none(tmp_path, words, message):
    path = corpus(tmp_path / "c.parquet", [audio_row(0, 8, **({} if words is None else {"words": words}))])
    with pytest.raises(UserError, match=message):
        make_prompts(tmp_path / "out", PromptOptions(corpus=path, alignment_column="words"))


def test_a_corpus_that_is_mostly_damaged_is_refused(tmp_path):
    rows = [audio_row(0, 8), *({"audio": {"bytes": b"no audio", "path": None}} for _ in range(2))]
    with pytest.raises(UserError, match="2 of 3 recordings of .* cannot be read, which is more than 10 %"):
        make_prompts(tmp_path / "out", PromptOptions(corpus=corpus(tmp_path / "c.parquet", rows)))


def test_a_speaker_of_number_0_is_one(tmp_path):
    path = corpus(tmp_path / "c.parquet", [audio_row(number, 7, speaker=number // 2) for number in range(4)])
    prompts = make_prompts(tmp_path / "out", PromptOptions(corpus=path))
    assert [prompt.speaker for prompt in prompts.prompts] == ["0", "0", "1", "1"]
    by_name = {prompt.name: prompt.speaker for prompt in prompts.prompts}
    assert all(by_name[s.clip.path.stem] != s.prompt.speaker for s in shuffled(prompts, 1.0))


def test_references_continue_the_same_prompts(prompts, codec, tmp_path):
    own = recordings(prompts, 0.5)
    others = shuffled(prompts, 0.5)
    for sample, other in zip(own, others, strict=True):
        assert sample.number is None and sample.clip.read(RATE).seconds == pytest.approx(0.5, abs=0.01)
        stranger = next(p for p in prompts.prompts if p.name == other.clip.path.stem)
        assert stranger.speaker != other.prompt.speaker and other.clip.start_seconds == stranger.seconds
    decoded = reconstructions(prompts, codec, tmp_path, 0.5, Ranks())
    prompt, clip = prompts.prompts[0], decoded[0].clip
    whole_S = read_audio(prompts.recording_path(prompt), 24_000).samples_S
    start = round(prompt.seconds * 24_000)
    plain_S = codec.decode(codec.encode([whole_S])[0])[start : start + 12_000]
    assert torch.allclose(clip.read(24_000).samples_S, plain_S, atol=1e-3)  # 16 bits
    before = clip.path.stat().st_mtime_ns
    reconstructions(prompts, codec, tmp_path, 0.5, Ranks())
    assert clip.path.stat().st_mtime_ns == before
    longer = reconstructions(prompts, codec, tmp_path, 0.9, Ranks())[0].clip  # of what is there
    assert longer.read(24_000).seconds == pytest.approx(0.9, abs=0.01)
    with pytest.raises(UserError, match="one prompt cannot be shuffled"):
        shuffled(make_prompts(tmp_path / "one", options(limit=1)), 0.5)


@pytest.fixture
def others(prompts, tmp_path):
    """What some other system might give: stereo at 16 kHz, in folders, two samples of the first prompt."""
    stereo = np.random.default_rng(0).normal(size=(RATE, 2)).astype(np.float32) * 0.1
    for number, prompt in enumerate(prompts.prompts):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        for sample in range(2 if number == 0 else 1):
            name = f"{prompt.name}_{sample}.flac" if number % 2 == 0 else f"{prompt.name}.wav"
            soundfile.write(tmp_path / str(number % 2) / name, stereo, RATE)
    return tmp_path


def test_somebodys_wavs_are_taken(prompts, others):
    samples = wavs(prompts, others, hold_prompt=False, max_seconds=0.6)
    assert len(samples) == 7 and {(s.prompt.name, s.number) for s in samples} >= {(prompts.prompts[0].name, 1)}
    read = samples[0].clip.read(24_000)
    assert read.seconds == pytest.approx(0.6, abs=0.01) and samples[0].clip.start_seconds == 0


def test_wavs_that_begin_with_their_prompt(prompts, tmp_path):
    for prompt in prompts.prompts:
        soundfile.write(tmp_path / f"{prompt.name}.wav", np.zeros(round((prompt.seconds + 0.3) * RATE)), RATE)
    samples = wavs(prompts, tmp_path, hold_prompt=True, max_seconds=9)
    assert all(sample.clip.read(RATE).seconds == pytest.approx(0.3, abs=0.01) for sample in samples)
    path = tmp_path / f"{prompts.prompts[3].name}.wav"
    soundfile.write(path, np.zeros(round(prompts.prompts[3].seconds * RATE) - 100), RATE)  # says nothing
    (silent,) = [s for s in wavs(prompts, tmp_path, hold_prompt=True, max_seconds=9) if s.clip.path == path]
    assert not len(silent.clip.read(RATE).samples_S)
    soundfile.write(path, np.zeros(RATE), RATE)
    with pytest.raises(UserError, match="is shorter than its prompt of .* leave out --wavs_hold_prompt"):
        wavs(prompts, tmp_path, hold_prompt=True, max_seconds=9)


def test_an_empty_file_says_nothing(prompts, others):
    empty, silent = others / "1" / f"{prompts.prompts[1].name}.wav", others / "1" / f"{prompts.prompts[3].name}.wav"
    empty.write_bytes(b"")
    soundfile.write(silent, np.zeros(0), RATE)
    samples = {sample.prompt.name: sample for sample in wavs(prompts, others, hold_prompt=False, max_seconds=9)}
    for path in (empty, silent):
        assert len(samples[path.stem].clip.read(RATE).samples_S) == 0


@pytest.mark.parametrize("mistake", ["missing", "twice", "stranger", "no folder", "damaged"])
def test_mistakes_of_wavs_get_one_sentence(prompts, others, mistake):
    name = prompts.prompts[1].name
    folder, path = others, others / "1" / f"{name}.wav"
    message = f"has no continuation of 1 of 6 prompts, the first is '{name}'; add its file"
    if mistake == "missing":
        path.unlink()
    elif mistake == "twice":
        (others / f"{name}_0.wav").write_bytes(path.read_bytes())
        message = f"are both sample 0 of '{name}'; remove one of them"
    elif mistake == "stranger":
        (others / "notes_7.wav").write_bytes(path.read_bytes())
        message = "1 files of .* are of no prompt, the first is .*notes_7.wav'; call them"
    elif mistake == "no folder":
        folder, message = others / "typo", "--wavs is '.*typo', which is no folder"
    else:
        path.write_bytes(b"RIFF and nothing more")
        message = f"{name}.wav' is no readable audio"
    with pytest.raises(UserError, match=message):
        for sample in wavs(prompts, folder, hold_prompt=False, max_seconds=9):
            sample.clip.read(RATE)


def test_a_clip_is_called_by_its_sound(tmp_path):
    for name, value in (("a", 0.1), ("b", 0.1), ("c", 0.2)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(RATE, value), RATE)
    a, b, c = (Clip(tmp_path / f"{name}.wav") for name in "abc")
    assert a.key == b.key != c.key and Clip(a.path, 0.5).key != a.key
