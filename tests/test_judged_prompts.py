"""Prompts from a corpus, and the systems that continue them."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import TINY

from llama_mimi.audio.reading import Waveform, read_audio
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.judging.options import PROMPTS, RECORDINGS, PromptOptions
from llama_mimi.judging.prompts import cut_seconds, make_prompts
from llama_mimi.judging.systems import RECORDING, SHUFFLED, references, wavs

VALIDATION = str(TINY / "corpus" / "validation-*.parquet")
RATE = 16_000


def options(**changes):
    return PromptOptions(
        **{"corpus": VALIDATION, "prompt_seconds": 1.6, "recording_seconds": 2.6, "limit": 6, **changes}
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_prompts(tmp_path_factory.mktemp("judged"), options())


@pytest.mark.parametrize(
    ("start", "length", "gain", "expected"),
    [
        (2.6, 0.2, 1e-3, 2.72),
        (3.16, 0.08, 0.5, 3.2),
        (1.0, 0.5, 1e-3, None),  # too far from 3 s
        (0.0, 8.0, 0.0, 3.0),  # the nearest of equally quiet borders
    ],
)
def test_a_prompt_ends_at_the_quietest_frame_border(start, length, gain, expected):
    samples_S = torch.randn(8 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    samples_S[round(start * RATE) : round((start + length) * RATE)] *= gain
    found = cut_seconds(Waveform(samples_S, RATE), 3.0)
    assert found == pytest.approx(expected, abs=0.05) if expected else 2.5 <= found <= 3.52


def test_prompts_are_the_beginnings_of_recordings(prompts):
    assert len(prompts.prompts) == 6 and len({prompt.speaker for prompt in prompts.prompts}) > 1
    for prompt in prompts.prompts:
        whole, beginning = (read_audio(prompts.file(part, prompt), None) for part in (RECORDINGS, PROMPTS))
        assert whole.seconds >= 2.6 and beginning.seconds == pytest.approx(prompt.seconds, abs=1e-4)
        frames = prompt.seconds / 0.08
        assert abs(prompt.seconds - 1.6) <= 1.6 / 6 + 0.08 and frames == pytest.approx(round(frames))
        assert torch.equal(whole.samples_S[: len(beginning.samples_S)], beginning.samples_S)


def test_equal_options_give_equal_prompts(prompts, tmp_path):
    assert make_prompts(prompts.folder, options()) == prompts
    again = make_prompts(tmp_path / "again", options())
    assert again.prompts == prompts.prompts and again.sha256 == prompts.sha256
    fewer = make_prompts(tmp_path / "fewer", options(limit=3))
    assert set(fewer.prompts) < set(prompts.prompts) and len(list(fewer.folder.glob("*/*.wav"))) == 6
    with pytest.raises(UserError, match="limit = 6, but the current value is 7; choose another --output_dir"):
        make_prompts(prompts.folder, options(limit=7))


@pytest.mark.parametrize("change", ["changed", "missing", "added", "format"])
def test_a_folder_with_other_files_is_refused(prompts, tmp_path, change):
    folder = shutil.copytree(prompts.folder, tmp_path / "copy")
    file, message = folder / PROMPTS / f"{prompts.prompts[0].name}.wav", "do not match the hash in"
    if change == "missing":
        file.unlink()
    elif change == "format":
        manifest, message = folder / "prompts.json", "was made with format = 1, but the current value is 2"
        manifest.write_text(manifest.read_text().replace('"format": 2,', ""))
    else:
        file.with_stem(file.stem if change == "changed" else "mine").write_bytes(b"other")
    with pytest.raises(UserError, match=message):
        make_prompts(folder, options())


def test_a_run_that_was_killed_while_cutting_leaves_nothing_behind(tmp_path):
    left = tmp_path / "prompts.partial" / "prompts" / "old.wav"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another corpus")
    make_prompts(tmp_path, options())
    assert not (tmp_path / "prompts.partial").exists() and len(list((tmp_path / "prompts").iterdir())) == 6
    (tmp_path / "prompts.json").unlink()
    with pytest.raises(UserError, match="prompts' exists without prompts.json; remove the folder"):
        make_prompts(tmp_path, options())


def corpus(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def audio_row(number, seconds, **more):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(number).normal(size=round(seconds * RATE)) / 10, RATE, format="WAV")
    return {"audio": {"bytes": buffer.getvalue(), "path": f"{number}.wav"}, **more}


def test_skipped_recordings_are_counted_and_few_may_be_unreadable(tmp_path, capsys):
    damaged = {"audio": {"bytes": b"no audio", "path": None}}
    rows = [audio_row(0, 8), audio_row(1, 2), damaged, *(audio_row(number, 7) for number in range(2, 9))]
    prompts = make_prompts(tmp_path / "out", PromptOptions(corpus=corpus(tmp_path / "c.parquet", rows)))
    assert [prompt.name for prompt in prompts.prompts] == [f"row-{number:06d}" for number in (0, *range(3, 10))]
    assert "8 prompts; skipped recordings: too short 1, unreadable 1" in capsys.readouterr().out
    path = corpus(tmp_path / "odd.parquet", [*rows, damaged])
    with pytest.raises(UserError, match=r"2 of 11 recordings of .* cannot be read, more than 10 %; replace or remove"):
        make_prompts(tmp_path / "odd", PromptOptions(corpus=path))


def test_wrong_options_of_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="--recording_seconds is 70; set .* from 2 to 60"):
        options(recording_seconds=70)
    with pytest.raises(UserError, match="lacks a readable recording of 50 to 60 s; reduce"):
        make_prompts(tmp_path, options(recording_seconds=50))


def test_any_id_has_a_file_name_of_its_own(tmp_path):
    ids = ["a-b", "a/b", "日本", "你好1", ".", "x" * 300, "1089-134686-0000"]
    path = corpus(tmp_path / "c.parquet", [audio_row(number, 7, id=name) for number, name in enumerate(ids)])
    names = [prompt.name for prompt in make_prompts(tmp_path / "out", PromptOptions(corpus=path)).prompts]
    assert len(set(names)) == 7
    assert names[0] == "a-b" and names[-1] == "1089-134686-0000" and names[1].startswith("a-b-")
    assert all(name[0].isalnum() and name.isascii() and len(name) < 101 for name in names)
    same = corpus(tmp_path / "same.parquet", [audio_row(number, 7, id="a") for number in range(2)])
    with pytest.raises(UserError, match="has two rows with the id 'a'; give one row another id"):
        make_prompts(tmp_path / "two", PromptOptions(corpus=same))


def test_references_continue_the_same_prompts(prompts, codec, tmp_path):
    systems = references(prompts, codec, 0.5, DistributedContext())
    assert list(systems) == [RECORDING, SHUFFLED, "reconstruction_q4"]
    for sample, other in zip(systems[RECORDING], systems[SHUFFLED], strict=True):
        assert sample.number is None and sample.clip.read(RATE).seconds == pytest.approx(0.5, abs=0.01)
        stranger = next(p for p in prompts.prompts if p.name == other.clip.path.stem)
        assert stranger.speaker != other.prompt.speaker and other.clip.start_seconds == stranger.seconds
    prompt, clip = prompts.prompts[0], systems["reconstruction_q4"][0].clip
    whole_S = read_audio(prompts.file(RECORDINGS, prompt), 24_000).samples_S
    start = round(prompt.seconds * 24_000)
    plain_S = codec.decode(codec.encode([whole_S])[0])[start : start + 12_000]
    assert torch.allclose(clip.read(24_000).samples_S, plain_S, atol=1e-3)  # rounded to 16 bits
    before = clip.path.stat().st_mtime_ns
    longer = references(prompts, codec, 0.9, DistributedContext())["reconstruction_q4"][0].clip
    assert clip.path.stat().st_mtime_ns == before and longer.read(24_000).seconds == pytest.approx(0.9, abs=0.01)
    (clip.path.parent / "settings.json").write_text('{"codec_sha256": "another"}')
    with pytest.raises(UserError, match="was made with codec_sha256 = 'another'"):
        references(prompts, codec, 0.5, DistributedContext())
    with pytest.raises(UserError, match="only one prompt, so prompts cannot be shuffled"):
        references(make_prompts(tmp_path / "one", options(limit=1)), codec, 0.5, DistributedContext())


@pytest.fixture
def others(prompts, tmp_path):
    """Write files of another system: stereo, 16 kHz, in two folders, with two samples of the first prompt."""
    stereo = np.random.default_rng(0).normal(size=(RATE, 2)).astype(np.float32) * 0.1
    for number, prompt in enumerate(prompts.prompts):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        for sample in range(2 if number == 0 else 1):
            name = f"{prompt.name}_{sample}.flac" if number % 2 == 0 else f"{prompt.name}.wav"
            soundfile.write(tmp_path / str(number % 2) / name, stereo, RATE)
    return tmp_path


def test_files_of_another_system_are_continuations(prompts, others):
    (others / "1" / f"{prompts.prompts[1].name}.wav").write_bytes(b"")  # the system generated nothing
    soundfile.write(others / "1" / f"{prompts.prompts[3].name}.wav", np.zeros(0), RATE)
    samples = wavs(prompts, others, contain_prompt=False, max_seconds=0.6)
    assert len(samples) == 7 and (prompts.prompts[0].name, 1) in {(s.prompt.name, s.number) for s in samples}
    lengths = {sample.prompt.name: len(sample.clip.read(24_000).samples_S) for sample in samples}
    assert [lengths[prompt.name] for prompt in prompts.prompts[:4]] == [14_400, 0, 14_400, 0]
    path = others / "1" / f"{prompts.prompts[1].name}.wav"  # file with its prompt
    soundfile.write(path, np.zeros(round((prompts.prompts[1].seconds + 0.3) * RATE)), RATE)
    sample = next(s for s in wavs(prompts, others, contain_prompt=True, max_seconds=9) if s.clip.path == path)
    assert sample.clip.read(RATE).seconds == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("missing", "lacks files for 1 of 6 prompts, such as '{}'; add the files"),
        ("{}_0.wav", "are both sample 0 of '{}'; remove one of the two files"),
        ("notes_7.wav", "notes_7.wav' does not have the name of a prompt; rename"),
        ("1/{}.wav", "{}.wav' is not readable audio"),
    ],
)
def test_wrong_files_are_refused(prompts, others, mistake, message):
    name = prompts.prompts[1].name
    if mistake == "missing":
        (others / "1" / f"{name}.wav").unlink()
    else:
        (others / mistake.format(name)).write_bytes(b"RIFF and nothing more")
    with pytest.raises(UserError, match=message.format(name)):
        for sample in wavs(prompts, others, contain_prompt=False, max_seconds=9):
            sample.clip.read(RATE)
