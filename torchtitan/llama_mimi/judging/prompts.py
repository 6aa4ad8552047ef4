"""Recordings for all systems, and their prompts: the first seconds of a recording, or a voice prompt."""

import bisect
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from llama_mimi.audio.reading import AudioError, Waveform, read_audio, write_wav
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest, read_json, visible_files, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.clips import read_row
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.source import Row, Source
from llama_mimi.judging.options import (
    MAX_RECORDING_SECONDS,
    MIN_SECONDS,
    PROMPTS,
    RECORDINGS,
    CorpusOptions,
    PromptOptions,
    TextOptions,
    VoiceOptions,
)

MANIFEST, FORMAT = "prompts.json", 2
MAX_UNREADABLE = 0.1  # maximum fraction of unreadable recordings
FRAME_SECONDS = 0.08  # length of a Mimi frame; prompts have whole frames and need no padding
SEARCH_FRACTION = 1 / 6  # prompts of about 3 s end between 2.5 and 3.5 s
CUT_SECONDS = 0.04  # power is measured in this length of audio around a frame border
UTTERANCES = "utterances"  # temporary folder of recordings without their voice prompts
NEW_FOLDER = "choose another --output_dir"


@dataclass(frozen=True)
class Prompt:
    """A recording and its prompt: the first seconds of the recording.

    In a set for text-to-speech, the recording begins with the voice prompt, and the speech of ``text`` follows.
    """

    name: str
    speaker: str  # empty if the corpus has no speakers
    # length of the prompt; 0 without a voice prompt: the folder `PROMPTS` then lacks a file for the recording
    seconds: float
    text: str = ""  # transcript of the recording without its voice prompt; empty in a set for eval/generation.py
    prompt_text: str = ""  # transcript of the voice prompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a folder, and a hash of all files ``prompts/<name>.wav`` and ``recordings/<name>.wav``."""

    folder: Path
    sha256: str
    prompts: tuple[Prompt, ...]

    def file(self, part: str, prompt: Prompt) -> Path:
        """Return the path of a prompt (part `PROMPTS`) or its whole recording (part `RECORDINGS`)."""
        return self.folder / part / f"{prompt.name}.wav"


def make_prompts(folder: Path, options: CorpusOptions, max_seconds: float = MAX_RECORDING_SECONDS) -> PromptSet:
    """Return the prompts of a folder, or make them in a new folder. Changed options or files raise a `UserError`.

    Recordings longer than ``max_seconds`` are cut or, with `TextOptions`, skipped.
    """
    settings = {"text_column": None, "voice_seconds": None, **asdict(options)}  # None: a folder of another command
    settings |= {"max_seconds": max_seconds} if isinstance(options, TextOptions) else {}
    manifest = read_json(str(folder), MANIFEST)
    if manifest is None:
        prompts, skipped, hash_of_files = _write_prompts(folder, options, max_seconds)
        manifest = {"format": FORMAT, "settings": settings, "skipped": skipped, "sha256": hash_of_files}
        manifest["prompts"] = [asdict(prompt) for prompt in prompts]
        write_atomically(str(folder), MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    require_same({"format": 1, **manifest}, {"format": FORMAT, "settings": settings}, f"'{folder}'", NEW_FOLDER)
    if _files_sha256(folder) != manifest["sha256"]:
        raise UserError(f"files in '{folder}' do not match the hash in {MANIFEST}; {NEW_FOLDER}")
    return PromptSet(folder, manifest["sha256"], tuple(Prompt(**prompt) for prompt in manifest["prompts"]))


def cut_seconds(waveform: Waveform, wanted_seconds: float) -> float:
    """Return the time (s) of the quietest frame border near ``wanted_seconds``; on a tie, of the nearest border."""
    rate_hz, half = waveform.sample_rate_hz, round(CUT_SECONDS / 2 * waveform.sample_rate_hz)

    def power(border: int) -> float:
        middle = round(border * FRAME_SECONDS * rate_hz)
        return float(waveform.samples_S[middle - half : middle + half].double().square().mean())

    first, last = (round((1 + sign * SEARCH_FRACTION) * wanted_seconds / FRAME_SECONDS) for sign in (-1, 1))
    borders = range(first, last + 1)
    quietest = min(borders, key=lambda border: (power(border), abs(border * FRAME_SECONDS - wanted_seconds)))
    return round(quietest * FRAME_SECONDS, 2)


def _files_sha256(folder: Path) -> str:
    files = [path for part in (PROMPTS, RECORDINGS) for path in visible_files(folder, f"{part}/**/*") if path.is_file()]
    return digest({path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files})


def _write_prompts(folder: Path, options: CorpusOptions, max_seconds: float) -> tuple[list[Prompt], Counter[str], str]:
    """Write prompts and recordings; return prompts in corpus order, counts of skipped rows, and a hash of the files."""
    text_column = options.text_column if isinstance(options, TextOptions) else None
    min_seconds = options.min_seconds if isinstance(options, PromptOptions) else MIN_SECONDS
    for part in (PROMPTS, RECORDINGS):
        if (folder / part).exists():
            raise UserError(f"'{folder / part}' exists without {MANIFEST}; remove the folder, or {NEW_FOLDER}")
    partial = PromptSet(folder / f"{PROMPTS}.partial", "", ())
    shutil.rmtree(partial.folder, ignore_errors=True)  # left by a killed run
    columns = {"speaker": options.speaker_column}
    source = open_source(
        options.corpus, options.dataset_path, options.audio_column, text_column, columns, options.split
    )
    skipped: Counter[str] = Counter()
    num_read = num_unreadable = 0
    drawn: list[tuple[bytes, int, Prompt]] = []  # (hash, row number, prompt), sorted by hash
    names: set[str] = set()
    sizes = [unit.num_rows or 0 for unit in source.units]  # 0 if unknown, for a tar
    total = sum(sizes) if all(sizes) else None
    for number, (name, row) in enumerate(tqdm(_rows(source), "prompts", total, unit="recording")):
        if name in names:
            raise UserError(f"'{source.name}' has two rows with the id '{row['id']}'; give one row another id")
        names.add(name)
        rank = sha256(name.encode()).digest()
        if len(drawn) == options.limit and rank > drawn[-1][0]:
            skipped["beyond --limit"] += 1
            continue
        if text_column and not row.get("text"):
            skipped["no text"] += 1
            continue
        num_read += 1
        try:
            waveform = read_row(row, None, max_seconds=max_seconds)
        except AudioError as error:
            print(f"skipped: {error}", flush=True)
            skipped[error.reason] += 1
            num_unreadable += error.reason != "too short"
            continue
        if waveform.seconds < min_seconds:
            skipped["too short"] += 1
            continue
        speaker = "" if row.get("speaker") is None else str(row["speaker"])
        if text_column and waveform.is_cut:  # the text would not fit
            skipped["too long"] += 1
            continue
        prompt = Prompt(name, speaker, waveform.seconds, row["text"] if text_column else "")
        if isinstance(options, PromptOptions):
            prompt = replace(prompt, seconds=cut_seconds(waveform, options.prompt_seconds))
            prompt_S = waveform.samples_S[: round(prompt.seconds * waveform.sample_rate_hz)]
            write_wav(partial.file(PROMPTS, prompt), Waveform(prompt_S, waveform.sample_rate_hz))
        write_wav(partial.file(RECORDINGS, prompt), waveform)
        bisect.insort(drawn, (rank, number, prompt))
        if options.limit is not None and len(drawn) > options.limit:
            *_, last = drawn.pop()
            for part in (PROMPTS, RECORDINGS):
                partial.file(part, last).unlink(missing_ok=True)
            skipped["beyond --limit"] += 1
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.items())
    print(f"{len(drawn):,} prompts; skipped recordings: {reasons or 'none'}", flush=True)
    if num_unreadable > MAX_UNREADABLE * num_read:
        problem = f"{num_unreadable:,} of {num_read:,} recordings of '{options.corpus}' cannot be read"
        raise UserError(f"{problem}, more than {100 * MAX_UNREADABLE:g} %; replace or remove the unreadable files")
    if not drawn:
        if skipped["no text"] and not num_read:
            raise UserError(f"the column '{text_column}' of '{options.corpus}' is empty; set another --text_column")
        problem = f"'{options.corpus}' lacks a readable recording of {min_seconds:g} to {max_seconds:g} s"
        remedy = "reduce --recording_seconds and --prompt_seconds, or " * isinstance(options, PromptOptions)
        raise UserError(f"{problem}; {remedy}add recordings of this length")
    prompts = [prompt for _, _, prompt in sorted(drawn, key=lambda one: one[1])]
    if text_column:
        voice_seconds = options.voice_seconds if isinstance(options, VoiceOptions) else 0.0
        prompts = _add_voice_prompts(partial, prompts, voice_seconds)
    hash_of_files = _files_sha256(partial.folder)  # before the rename, because hashing is slow
    for part in (RECORDINGS, PROMPTS):
        (partial.folder / part).mkdir(exist_ok=True)
        (partial.folder / part).rename(folder / part)
    partial.folder.rmdir()
    return prompts, skipped, hash_of_files


def _add_voice_prompts(partial: PromptSet, prompts: Sequence[Prompt], voice_seconds: float) -> list[Prompt]:
    """Insert a voice prompt before each recording; return the prompts, whose lengths are now those of voice prompts.

    The voice prompt is the other recording of the same speaker whose length is nearest to ``voice_seconds``, padded
    with zeros to whole frames. The recording is unchanged if ``voice_seconds`` is 0, or if the speaker has only one
    recording.
    """
    utterances, changed = partial.folder / UTTERANCES, []
    (partial.folder / RECORDINGS).rename(utterances)
    (partial.folder / RECORDINGS).mkdir()
    for prompt in tqdm(prompts, "voice prompts", unit="recording"):
        path, seconds, text = utterances / f"{prompt.name}.wav", 0.0, ""
        others = [one for one in prompts if voice_seconds and one.speaker == prompt.speaker != "" and one is not prompt]
        if others:
            voice = min(others, key=lambda other: (abs(other.seconds - voice_seconds), other.name))
            text, seconds = voice.text, round(math.ceil(voice.seconds / FRAME_SECONDS - 1e-6) * FRAME_SECONDS, 2)
            waveform = read_audio(path, None)
            voice_S = read_audio(utterances / f"{voice.name}.wav", waveform.sample_rate_hz).samples_S
            voice_S = F.pad(voice_S, (0, round(seconds * waveform.sample_rate_hz) - len(voice_S)))
            write_wav(partial.file(PROMPTS, prompt), replace(waveform, samples_S=voice_S))
            whole_S = torch.cat([voice_S, waveform.samples_S])
            write_wav(partial.file(RECORDINGS, prompt), replace(waveform, samples_S=whole_S))
        else:
            shutil.copy(path, partial.file(RECORDINGS, prompt))
        changed.append(replace(prompt, seconds=seconds, prompt_text=text))
    shutil.rmtree(utterances)
    return changed


def _rows(source: Source) -> Iterator[tuple[str, Row]]:
    """For each row of a corpus, yield a file name and the row."""
    rows = (row for unit in range(len(source.units)) for row in source.rows(unit))
    for number, row in enumerate(rows):
        name = row.get("id") or f"row-{number:06d}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,99}", name):  # not a valid file name on all systems
            cleaned = re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:60].strip("-.")
            name = f"{cleaned}-{sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
        yield name, row
