"""Prompts that all systems continue: the beginnings of recordings, fixed by their hashes."""

import hashlib
import heapq
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_mimi.audio.reading import AudioError, Waveform, write_wav
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import parse_json, read_json, visible_files, write_atomically
from llama_mimi.data.clip_readers import read_row
from llama_mimi.data.corpora import AudioCorpus, open_corpus

MANIFEST = "prompts.json"
PROMPTS, RECORDINGS = "prompts", "recordings"
UNFINISHED = f"{PROMPTS}.partial"
MAX_UNREADABLE = 0.1  # of all recordings
GRID_SECONDS = 0.08  # a frame of Mimi: a prompt of whole frames is not filled up with silence
MAX_RECORDING_SECONDS = 60.0  # of which the rest is not read
SEARCH_SHARE = 1 / 6  # of the prompt's length, before and after: 3 s are cut between 2.5 and 3.5 s
PAUSE_SECONDS = 0.04  # around the cut, what its loudness is taken of
PAUSE_DB = 25.0  # a pause is this much quieter than the clip on average; speech is loud in most of its parts
WORD_END, PAUSE, QUIETEST = "word end", "pause", "quietest moment"


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Which recordings are continued, and from where on.

    Args:
        corpus: name, folder, or Parquet path or glob of recordings that the model has not seen.
        dataset_path: local download of a named corpus.
        split: of a folder that holds several.
        audio_column: of the recordings.
        speaker_column: shuffled pairs are of two speakers where the corpus has it.
        alignment_column: of words, each with its ``end`` in seconds: prompts then end with a word.
        prompt_seconds: of a prompt, about.
        recording_seconds: shorter recordings are left out; by default twice --prompt_seconds.
        limit: so many recordings, drawn by the hash of their names; by default all.

    Raises:
        UserError: a value out of range.
    """

    corpus: str
    dataset_path: str | None = None
    split: str | None = None
    audio_column: str = "audio"
    speaker_column: str = "speaker"
    alignment_column: str | None = None
    prompt_seconds: float = 3.0
    recording_seconds: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0.5 <= self.prompt_seconds < float("inf"):
            raise UserError(f"--prompt_seconds is {self.prompt_seconds}; it must be 0.5 or more")
        if self.min_seconds < 1.25 * self.prompt_seconds:
            raise UserError(
                f"--recording_seconds is {self.recording_seconds}; recordings must go on after a prompt of "
                f"{self.prompt_seconds:g} s, so make it {1.25 * self.prompt_seconds:g} or more"
            )
        if self.min_seconds > MAX_RECORDING_SECONDS:
            raise UserError(f"recordings of {self.min_seconds:g} s are asked for; {MAX_RECORDING_SECONDS:g} s are read")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be 1 or more")

    @property
    def min_seconds(self) -> float:
        return 2 * self.prompt_seconds if self.recording_seconds is None else self.recording_seconds


@dataclass(frozen=True)
class Prompt:
    """The beginning of a recording.

    Args:
        name: of its files.
        source: row of the corpus.
        speaker: empty where the corpus does not say.
        seconds: where the recording was cut.
        cut: at a `WORD_END`, a `PAUSE`, or the `QUIETEST` moment nearby.
        sha256, recording_sha256: of the two WAV files.
    """

    name: str
    source: str
    speaker: str
    seconds: float
    cut: str
    sha256: str
    recording_sha256: str


@dataclass(frozen=True)
class PromptSet:
    """All prompts, in a folder with ``prompts/<name>.wav`` and the whole ``recordings/<name>.wav``."""

    folder: Path
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Two systems with the same were given the same prompts, and their recordings are the same."""
        content = [(prompt.name, prompt.seconds, prompt.sha256, prompt.recording_sha256) for prompt in self.prompts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path(self, prompt: Prompt) -> Path:
        return self.folder / PROMPTS / f"{prompt.name}.wav"

    def recording_path(self, prompt: Prompt) -> Path:
        return self.folder / RECORDINGS / f"{prompt.name}.wav"


def make_prompts(folder: Path, options: PromptOptions) -> PromptSet:
    """Cut the prompts of a corpus, or take those that the folder has.

    Raises:
        UserError: the folder has prompts of other options or files that were changed; the corpus has none.
    """
    settings = asdict(options)
    earlier = read_json(str(folder), MANIFEST)
    if earlier is not None:
        for key, value in settings.items():
            if earlier["settings"].get(key) != value:
                raise UserError(
                    f"'{folder}' holds prompts with {key} {earlier['settings'].get(key)!r}, not {value!r}; name "
                    "another --output_dir"
                )
        prompts = PromptSet(folder, tuple(Prompt(**prompt) for prompt in earlier["prompts"]))
        _check_files(prompts)
        return prompts
    if (folder / PROMPTS).exists():
        raise UserError(
            f"'{folder / PROMPTS}' is of a folder without {MANIFEST}; remove it, or name another --output_dir"
        )
    columns = {"speaker": options.speaker_column}
    if options.alignment_column is not None:
        columns["alignment"] = options.alignment_column
    corpus = open_corpus(options.corpus, options.dataset_path, options.audio_column, None, columns, options.split)
    if options.alignment_column is not None and "alignment" not in corpus.columns:
        raise UserError(f"'{options.corpus}' has no column '{options.alignment_column}'; leave out --alignment_column")
    chosen, left_out = _choose(corpus, options)
    if not chosen:
        raise UserError(
            f"no recording of '{options.corpus}' is {options.min_seconds:g} s long ({_listed(left_out)}); lower "
            "--recording_seconds and --prompt_seconds"
        )
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a run that was killed
    made = tuple(
        _write(folder, row, corpus, options.prompt_seconds)
        for row in _rows(corpus)
        if (row.group, row.number) in chosen
    )
    (folder / UNFINISHED).rename(folder / PROMPTS)
    manifest = {"settings": settings, "left_out": dict(left_out), "prompts": [asdict(prompt) for prompt in made]}
    write_atomically(str(folder), MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    cuts = Counter(prompt.cut for prompt in made)
    print(f"{len(made):,} prompts, cut at: {_listed(cuts)}; left out: {_listed(left_out) or 'none'}", flush=True)
    return PromptSet(folder, made)


def cut_seconds(
    waveform: Waveform, wanted_seconds: float, word_ends: Sequence[float] | None = None
) -> tuple[float, str]:
    """Where a recording is cut, and what is there: the nearest word end, or the quietest moment nearby.

    Args:
        waveform: that goes on after the last possible cut.
        wanted_seconds: about.
        word_ends: of all words, in seconds; without, or with none nearby, a moment of `GRID_SECONDS` is chosen.
    """
    reach = SEARCH_SHARE * wanted_seconds
    near = [end for end in word_ends or () if abs(end - wanted_seconds) <= reach and end < waveform.seconds]
    if near:
        return min(near, key=lambda end: abs(end - wanted_seconds)), WORD_END
    rate_hz, half = waveform.sample_rate_hz, round(PAUSE_SECONDS / 2 * waveform.sample_rate_hz)
    first, last = (round((wanted_seconds + sign * reach) / GRID_SECONDS) for sign in (-1, 1))
    power = {}
    for step in range(first, last + 1):
        middle = round(step * GRID_SECONDS * rate_hz)
        around_S = waveform.samples_S[max(middle - half, 0) : middle + half]
        power[step] = float(around_S.double().square().mean()) if len(around_S) else float("inf")
    # Of moments that are equally quiet, such as digital silence, the one nearest to what was wanted.
    quietest = min(power, key=lambda step: (power[step], abs(step * GRID_SECONDS - wanted_seconds)))
    mean_power = float(waveform.samples_S.double().square().mean())
    is_pause = power[quietest] <= mean_power * 10 ** (-PAUSE_DB / 10)
    return round(quietest * GRID_SECONDS, 2), PAUSE if is_pause else QUIETEST


@dataclass(frozen=True)
class _Row:
    """A row of the corpus, its audio not yet read."""

    name: str
    source: str
    group: int
    number: int
    content: Mapping[str, Any]

    def read(self, corpus: AudioCorpus) -> Waveform:
        """At its own rate.

        Raises:
            AudioError: it cannot be used.
        """
        return read_row(corpus, self.group, self.content, self.source, None, max_seconds=MAX_RECORDING_SECONDS)


def _choose(corpus: AudioCorpus, options: PromptOptions) -> tuple[set[tuple[int, int]], Counter[str]]:
    """Group and row of recordings that are long enough, drawn by the hash of their names."""
    left_out: Counter[str] = Counter()
    drawn: list[tuple[int, int, int]] = []  # a heap with the one to give up first
    names: set[str] = set()
    unreadable = 0
    for row in tqdm(_rows(corpus), total=int(corpus.sizes_G.sum()), unit="recording", desc="prompts"):
        if row.name in names:
            raise UserError(f"'{corpus.name}' has two rows with the id '{row.source}'; give each its own")
        names.add(row.name)
        rank = -int.from_bytes(hashlib.sha256(row.name.encode()).digest()[:8])
        is_full = len(drawn) == options.limit
        if is_full and rank < drawn[0][0]:
            left_out["beyond --limit"] += 1
            continue
        try:
            seconds = row.read(corpus).seconds
        except AudioError as error:
            print(f"left out: {error}", flush=True)
            left_out[error.reason] += 1
            unreadable += 1
            continue
        if seconds < options.min_seconds:
            left_out["too short"] += 1
        elif is_full:
            heapq.heapreplace(drawn, (rank, row.group, row.number))
            left_out["beyond --limit"] += 1
        else:
            heapq.heappush(drawn, (rank, row.group, row.number))
    if unreadable > max(MAX_UNREADABLE * len(names), 1):
        raise UserError(
            f"{unreadable:,} of {len(names):,} recordings of '{corpus.name}' cannot be read, which is more than "
            f"{100 * MAX_UNREADABLE:g} %; mend the corpus"
        )
    return {(group, number) for _, group, number in drawn}, left_out


def _rows(corpus: AudioCorpus) -> Iterator[_Row]:
    number_read = 0
    for group in range(len(corpus.sizes_G)):
        table = corpus.read_group(group)
        for number in range(table.num_rows):
            content = table.slice(number, 1).to_pylist()[0]
            row_id = content.get("id")
            source = corpus.row_name(group, number) if row_id is None else str(row_id)
            name = f"row-{number_read:06d}" if row_id is None else source
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,99}", name):  # cannot be a file's, or not on every system
                cleaned = re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:60].strip("-.")
                name = f"{cleaned}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
            number_read += 1
            yield _Row(name, source, group, number, content)


def _write(folder: Path, row: _Row, corpus: AudioCorpus, prompt_seconds: float) -> Prompt:
    waveform = row.read(corpus)
    words = row.content.get("alignment") or ()
    try:
        words = parse_json(words) if isinstance(words, str) else words  # of formats that are JSON
        ends = [float(word["end"]) for word in words if word["end"] is not None]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the words of {row.source} have no 'end' in seconds; leave out --alignment_column") from error
    if ends and max(ends) > waveform.seconds + 1:
        raise UserError(
            f"a word of {row.source} ends at {max(ends):g} s, and the recording at {waveform.seconds:g} s; give the "
            "ends of --alignment_column in seconds"
        )
    seconds, cut = cut_seconds(waveform, prompt_seconds, ends)
    end = round(seconds * waveform.sample_rate_hz)
    hashes = []
    for part, samples_S in ((UNFINISHED, waveform.samples_S[:end]), (RECORDINGS, waveform.samples_S)):
        path = folder / part / f"{row.name}.wav"
        write_wav(path, Waveform(samples_S, waveform.sample_rate_hz))
        hashes.append(file_sha256(path))
    speaker = row.content.get("speaker")
    return Prompt(row.name, row.source, "" if speaker is None else str(speaker), seconds, cut, *hashes)


def _check_files(prompts: PromptSet) -> None:
    found = {path.stem for path in visible_files(prompts.folder / PROMPTS, "*")}
    if strangers := found - {prompt.name for prompt in prompts.prompts}:
        raise UserError(
            f"'{prompts.folder / PROMPTS}' holds '{min(strangers)}', which {MANIFEST} does not list; move it out"
        )
    for prompt in prompts.prompts:
        for path, sha256 in (
            (prompts.path(prompt), prompt.sha256),
            (prompts.recording_path(prompt), prompt.recording_sha256),
        ):
            if not path.is_file() or file_sha256(path) != sha256:
                raise UserError(
                    f"'{path}' is missing or not what {MANIFEST} says; name another --output_dir, or remove this one"
                )


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
