"""Continuations of a folder of prompts: each is written once, with the same bytes after any number of kills."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from test_generation import Ending, built, flattened

from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.generation import prompt_folder
from llama_mimi.generation.continuation import continue_codes, encode_prompts, read_prompt
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.generation.prompt_folder import Prompt, draw_samples, find_prompts, read_texts
from llama_mimi.generation.transcription import transcribe

OPTIONS = SamplingOptions(seconds=0.8, temperature=1.0, num_samples=2)


@pytest.fixture(scope="module")
def model(codec):
    torch.manual_seed(0)
    return Ending(flattened(codec, 4, n_layers=1), 2.5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Eleven prompts of several lengths; one is stereo and in a subfolder."""
    folder = tmp_path_factory.mktemp("prompts")
    samples, rate = soundfile.read(TINY / "prompt.wav", dtype="float32")
    for number in range(10):
        soundfile.write(folder / f"{number}.flac", samples[: rate * (4 + number) // 10], rate)
    (folder / "speaker").mkdir()
    soundfile.write(folder / "speaker" / "0.wav", np.stack([samples, samples * 0.5], axis=1)[::2], rate // 2)
    return folder


def run(model, prompts, output_dir, options=OPTIONS, num_rows=2, **made_by):
    found = find_prompts(prompts, output_dir)
    return draw_samples(model, found, output_dir, options, num_rows, DistributedContext(), made_by)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.wav")}


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(model, prompts, folder)


def test_each_prompt_is_continued(whole):
    folder, records = whole
    written = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(records)) and len(records) == 22 == len(content(folder))
    assert {path.name for path in folder.glob("[!0-9]*")} == {"results.jsonl", "settings.json", "speaker"}
    for record in records:
        info = soundfile.info(folder / record["file"])
        assert info.samplerate == 24_000 and info.frames == (record["prompt_frames"] + record["frames"]) * 1920
        assert (record["end"] == "cut") == (record["frames"] == 10)
    assert len({record["seed"] for record in records}) == 22
    assert {record["end"] for record in records} == {"cut", "ended"}


def test_killed_and_started_again_is_the_same_bytes(model, prompts, whole, tmp_path, monkeypatch, capsys):
    """Each run is interrupted in the middle of a group, after a different number of files."""
    write_wav, left = prompt_folder.write_wav, 0

    def failing(path, waveform):
        nonlocal left
        if not left:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        left -= 1
        write_wav(path, waveform)

    monkeypatch.setattr(prompt_folder, "write_wav", failing)
    kills = 0
    for number in (0, 3, 9, 8, 5, 100):
        left = number
        try:
            records = run(model, prompts, tmp_path)
        except KeyboardInterrupt:
            kills += 1
    assert kills == 5 and content(tmp_path) == content(whole[0])
    timeless = [[{**record, "seconds": 0} for record in each] for each in (records, json.loads(json.dumps(whole[1])))]
    assert json.loads(json.dumps(timeless[0])) == timeless[1]
    monkeypatch.setattr(prompt_folder, "decode_with_bar", None)  # a finished folder needs no decoding
    assert run(model, prompts, tmp_path) == json.loads(json.dumps(records))
    assert "22 of 22 samples were already finished" in capsys.readouterr().out


def test_a_prompt_that_was_replaced_is_continued_again(model, prompts, whole, tmp_path, monkeypatch):
    """The folder of prompts is a relative path and a link."""
    shutil.copytree(whole[0], tmp_path / "out")
    shutil.copytree(prompts, tmp_path / "in")
    shutil.copy(prompts / "9.flac", tmp_path / "in" / "3.flac")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    pairs = list(zip(run(model, Path("link"), Path("out")), whole[1], strict=True))
    assert all(new["file"] == old["file"] for new, old in pairs)
    other = {(new["prompt"], new["sample"]) for new, old in pairs if new["prompt_frames"] != old["prompt_frames"]}
    assert other == {("3.flac", 0), ("3.flac", 1)}
    (tmp_path / "out" / "results.jsonl").write_text("{")
    with pytest.raises(UserError, match="is not a readable results file"):
        run(model, Path("link"), Path("out"))


def test_other_settings_are_refused(model, prompts, whole):
    for changed, message in (
        ({"options": replace(OPTIONS, temperature=0.9)}, "temperature = 1.0, but the current value is 0.9"),
        ({"options": replace(OPTIONS, top_p=0.9)}, "top_p = 1.0, but the current value is 0.9"),
        ({"options": replace(OPTIONS, last_frame="pad")}, "last_frame = 'codec', but the current value is 'pad'"),
        ({"num_rows": 3}, "batch_size = 2, but the current value is 3"),
        ({"model_sha256": "a"}, "model_sha256 = not set, but the current value is 'a'"),
    ):
        with pytest.raises(UserError, match=message):
            run(model, prompts, whole[0], **changed)


def test_a_bad_prompt_is_named_and_the_others_go_on(model, prompts, tmp_path):
    folder, output_dir = tmp_path / "in", tmp_path / "out"
    shutil.copytree(prompts / "speaker", folder)
    (folder / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "long.wav", np.ones(61 * 8000, dtype="float32") / 10, 8000)
    (folder / ".hidden.wav").write_bytes(b"")
    longest = "x" * 249  # the file of a sample adds "_0"
    shutil.copy(prompts / "speaker" / "0.wav", folder / f"{longest}.wav")
    records = run(model, folder, output_dir)
    errors = {record["prompt"]: record["error"] for record in records if "error" in record}
    assert errors.keys() == {"broken.wav", "long.wav"} and "longer than 60 s" in errors["long.wav"]
    assert content(output_dir).keys() == {f"{name}_{number}.wav" for name in ("0", longest) for number in (0, 1)}
    shutil.copy(prompts / "1.flac", folder / "0.flac")
    for bad_prompts, bad_output, message in (
        (folder, output_dir, "'0.flac' and '0.wav' would have the same file name"),
        (folder, folder / "out", "overlap; choose separate"),
        (folder, tmp_path, "overlap; choose separate"),
        (tmp_path / "none", output_dir, "does not contain .wav"),
    ):
        with pytest.raises(UserError, match=message):
            run(model, bad_prompts, bad_output)


def test_a_name_that_is_not_utf_8_is_written_as_utf_8(model, prompts, tmp_path):
    """One prompt is continued, another cannot be read. The results are UTF-8, and the run can be resumed."""
    (tmp_path / "in").mkdir()
    for name, content in ((b"caf\xe9.flac", (prompts / "0.flac").read_bytes()), (b"\xff.wav", b"RIFF")):
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(content)
    options = replace(OPTIONS, num_samples=1)
    made, failed = run(model, tmp_path / "in", tmp_path / "out", options)
    assert (made["prompt"], made["file"]) == (r"caf\xe9.flac", r"caf\xe9_0.wav") and made["prompt_frames"] == 5
    assert failed["prompt"] == r"\xff.wav" and r"\xff.wav' is not readable audio" in failed["error"]
    assert (tmp_path / "out" / made["file"]).exists()
    assert run(model, tmp_path / "in", tmp_path / "out", options) == [made, failed]


def test_each_line_of_a_file_is_spoken_once(model, tmp_path):
    """Samples have the codes of `continue_codes`. After a line has changed, its sample is drawn again."""

    def speak(*lines):
        (tmp_path / "texts.txt").write_text("\n".join(lines))
        found = read_texts(tmp_path / "texts.txt")
        return draw_samples(model, found, tmp_path / "out", options, 2, DistributedContext(), {})

    options = replace(OPTIONS, temperature=0, min_seconds=0.8, num_samples=1)
    first = speak("one", "", "two three", "four")
    assert [(record["file"], record["text"]) for record in first] == [
        ("000001_0.wav", "one"),
        ("000003_0.wav", "two three"),
        ("000004_0.wav", "four"),
    ]
    for record in first:
        (codes_TQ,) = continue_codes(model, torch.zeros(0, 4, dtype=torch.long), options, record["text"])
        samples_S, _ = soundfile.read(tmp_path / "out" / record["file"])
        assert record["prompt_frames"] == 0 and np.abs(samples_S - model.codec.decode(codes_TQ).numpy()).max() < 1e-3
    second = speak("one", "", "two", "four")
    assert [record["text"] for record in second] == ["one", "two", "four"]
    assert [{**record, "seconds": 0} for record in second[::2]] == [{**record, "seconds": 0} for record in first[::2]]
    silent = draw_samples(
        Ending(model, 1e4), [Prompt("a", text="one")], tmp_path / "b", OPTIONS, 2, DistributedContext(), {}
    )
    assert [record["frames"] for record in silent] == [0, 0] and soundfile.info(tmp_path / "b" / "a_0.wav").frames == 0
    (tmp_path / "texts.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not a readable text file in UTF-8"):
        read_texts(tmp_path / "texts.txt")


def test_a_folder_is_transcribed_once(codec, prompts, tmp_path):
    """A missing transcript is written again, and the others are kept."""
    model = built(codec, "flattened", n_layers=1)
    model.decoder.config.update({"tasks": ["asr"]})

    def run_again(**made_by):
        settings = SamplingOptions(), 2, DistributedContext(), made_by
        return draw_samples(model, found, tmp_path / "out", *settings, transcribes=True)

    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    found = [*find_prompts(prompts, tmp_path / "out"), Prompt("bad.wav", tmp_path / "bad.wav")]
    records = run_again()
    written = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert written == records and len(records) == 12 and "is not readable audio" in records[-1]["error"]
    for prompt, record in zip(found[:-1], records, strict=False):
        codes = encode_prompts(model, [read_prompt(str(prompt.path), codec)], SamplingOptions())
        text, is_cut = transcribe(model, codes, 1)[0]
        assert (record["transcript"], record["end"]) == (text, "cut" if is_cut else "ended") and text
        assert (tmp_path / "out" / record["file"]).read_text() == f"{text}\n"
    (tmp_path / "out" / "speaker" / "0.txt").unlink()
    assert run_again() == records and (tmp_path / "out" / "speaker" / "0.txt").exists()
    with pytest.raises(UserError, match="model_sha256 = not set, but the current value is 'a'"):
        run_again(model_sha256="a")
    with pytest.raises(UserError, match="speech generation needs the task 'audio' or 'tts' or 'interleaved', but the"):
        run(model, prompts, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    model.decoder.config.tasks = ["asr", "tts"]
    for made in ({"transcribes": True}, {}):  # an older folder of continuations lacks the key
        settings = json.loads((tmp_path / "out" / "settings.json").read_text())
        (tmp_path / "out" / "settings.json").write_text(json.dumps({**settings, **made, "num_samples": 2}))
        arguments = model, [Prompt("1", text="one")], tmp_path / "out", SamplingOptions(num_samples=2), 2
        with pytest.raises(UserError, match="transcribes = True, but the current value is False; choose another"):
            draw_samples(*arguments, DistributedContext(), {})
