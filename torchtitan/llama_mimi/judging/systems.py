"""What stands in a table: a model's samples, somebody's WAVs, and references to read both by."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import AUDIO_ENDINGS, AudioError, Waveform, read_audio, write_wav
from llama_mimi.audio.streaming import decode_long
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import find_files
from llama_mimi.common.ranks import Ranks
from llama_mimi.judging.prompts import Prompt, PromptSet, file_sha256

RECORDING, SHUFFLED = "recording", "shuffled"
# A voice cannot be told from less, and a recogniser hears words in anything that is so short.
MIN_SECONDS = 0.4
ROUNDING_SECONDS = 0.1  # that a file may be shorter than its prompt, as frames of codecs are


@dataclass(frozen=True)
class Clip:
    """A part of an audio file, read when it is needed.

    Args:
        start_seconds, end_seconds: of the part; None is the end of the file.
    """

    path: Path
    start_seconds: float = 0.0
    end_seconds: float | None = None

    def read(self, sample_rate_hz: int) -> Waveform:
        """The part at a rate, which may be without samples.

        Raises:
            AudioError: it cannot be read.
        """
        try:
            samples_S = read_audio(self.path, sample_rate_hz, max_seconds=self.end_seconds).samples_S
        except AudioError as error:
            if error.reason != "empty":
                raise
            samples_S = torch.zeros(0)
        return Waveform(samples_S[round(self.start_seconds * sample_rate_hz) :], sample_rate_hz)

    @cached_property
    def key(self) -> str:
        """Hash of all that a measure of it depends on."""
        return f"{file_sha256(self.path)}@{self.start_seconds:.4f}-{self.end_seconds or 0:.4f}"


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt.

    Args:
        number: among those of the prompt; None where a system has one continuation and no chance in it.
        clip: the continuation alone.
        known: measures that come with it.
    """

    prompt: Prompt
    number: int | None
    clip: Clip
    known: Mapping[str, float | None] = field(default_factory=dict)


def recordings(prompts: PromptSet, max_seconds: float) -> list[Sample]:
    """How the recordings themselves go on, for as long as a model may."""
    return [
        Sample(prompt, None, Clip(prompts.recording_path(prompt), prompt.seconds, prompt.seconds + max_seconds))
        for prompt in prompts.prompts
    ]


def shuffled(prompts: PromptSet, max_seconds: float) -> list[Sample]:
    """Each prompt with how another recording goes on, of another speaker where the corpus says who speaks.

    Raises:
        UserError: there is one prompt alone.
    """
    if len(prompts.prompts) < 2:
        raise UserError("one prompt cannot be shuffled; raise --limit")
    samples = []
    for prompt in prompts.prompts:
        others = [other for other in prompts.prompts if other.name != prompt.name]
        strangers = [other for other in others if other.speaker != prompt.speaker]
        other = random.Random(prompt.sha256).choice(strangers or others)
        clip = Clip(prompts.recording_path(other), other.seconds, other.seconds + max_seconds)
        samples.append(Sample(prompt, None, clip))
    return samples


def reconstructions(
    prompts: PromptSet, codec: MimiCodec, folder: Path, max_seconds: float, ranks: Ranks
) -> list[Sample]:
    """The recordings as the codec gives them back at its depth, written below ``folder``.

    Args:
        folder: of this codec at this depth; what is there is kept.
    """
    mine = [
        prompt
        for prompt in prompts.prompts[ranks.rank :: ranks.world_size]
        if not (folder / f"{prompt.name}.wav").exists()
    ]
    for prompt in tqdm(mine, unit="recording", desc=folder.name, disable=ranks.rank > 0 or not mine):
        path = folder / f"{prompt.name}.wav"
        whole = Clip(prompts.recording_path(prompt)).read(codec.sample_rate_hz)
        (codes_TQ,) = codec.encode([whole.samples_S])
        decoded_S = decode_long(codec, codes_TQ)[: len(whole.samples_S)]
        write_wav(path, Waveform(decoded_S, codec.sample_rate_hz))
    ranks.wait()
    return [
        Sample(prompt, None, Clip(folder / f"{prompt.name}.wav", prompt.seconds, prompt.seconds + max_seconds))
        for prompt in prompts.prompts
    ]


def continuations(
    prompts: PromptSet, folder: Path, records: Sequence[Mapping[str, Any]], frame_rate_hz: float
) -> list[Sample]:
    """A model's samples, as `generation.prompt_folder.continue_folder` reports them.

    Raises:
        UserError: a prompt could not be continued.
    """
    if failed := [record["error"] for record in records if "error" in record]:
        raise UserError(f"{len(failed):,} prompts could not be continued; the first: {failed[0]}")
    by_name = {prompt.name: prompt for prompt in prompts.prompts}
    samples = []
    for record in records:
        seconds = record["frames"] / frame_rate_hz
        known = {
            "ended": float(record["end"] == "ended"),
            "distinct_frames": record["distinct_frames"] / record["frames"] if record["frames"] else None,
            "real_time_factor": record["seconds"] / seconds if seconds else None,
        }
        clip = Clip(folder / record["file"], record["prompt_frames"] / frame_rate_hz)
        samples.append(Sample(by_name[Path(record["prompt"]).stem], record["sample"], clip, known))
    return samples


def wavs(prompts: PromptSet, folder: Path, *, hold_prompt: bool, max_seconds: float) -> list[Sample]:
    """Continuations that others have made: ``<prompt>.wav``, or ``<prompt>_0.wav``, ``<prompt>_1.wav`` and so on.

    Args:
        folder: of WAV, FLAC, OGG or MP3 files of any rate, at any depth.
        hold_prompt: each file begins with its prompt.
        max_seconds: what comes later is left out.

    Raises:
        UserError: no folder, a prompt without a file, two files for one sample, files of no prompt, or one that cannot
            be read or is shorter than the prompt that it should hold.
    """
    if not folder.is_dir():
        raise UserError(f"--wavs is '{folder}', which is no folder; name one of WAV files")
    by_name = {prompt.name: prompt for prompt in prompts.prompts}
    found: dict[tuple[str, int], Path] = {}
    strangers = []
    for path in map(Path, find_files(str(folder), AUDIO_ENDINGS)):
        key = _sample_of(path.stem, by_name)
        if key is None:
            strangers.append(path)
        elif key in found:
            raise UserError(f"'{found[key]}' and '{path}' are both sample {key[1]} of '{key[0]}'; remove one of them")
        else:
            found[key] = path
    if strangers:
        raise UserError(
            f"{len(strangers):,} files of '{folder}' are of no prompt, the first is '{strangers[0]}'; call them "
            "<prompt>.wav or <prompt>_<number>.wav, or move them out"
        )
    if missing := [name for name in by_name if name not in {name for name, _ in found}]:
        raise UserError(
            f"'{folder}' has no continuation of {len(missing):,} of {len(by_name):,} prompts, the first is "
            f"'{missing[0]}'; add its file, or an empty one where the system says nothing"
        )
    return [
        Sample(by_name[name], number, _clip_of(found[name, number], by_name[name], hold_prompt, max_seconds))
        for name, number in sorted(found)
    ]


def _sample_of(stem: str, by_name: Mapping[str, Prompt]) -> tuple[str, int] | None:
    if stem in by_name:
        return stem, 0
    match = re.fullmatch(r"(.+)_(\d+)", stem)
    return (match[1], int(match[2])) if match and match[1] in by_name else None


def _clip_of(path: Path, prompt: Prompt, hold_prompt: bool, max_seconds: float) -> Clip:
    start = prompt.seconds if hold_prompt else 0.0
    clip = Clip(path, start, start + max_seconds)
    if hold_prompt and Clip(path).read(8_000).seconds < prompt.seconds - ROUNDING_SECONDS:
        raise UserError(
            f"'{path}' is shorter than its prompt of {prompt.seconds:g} s; leave out --wavs_hold_prompt if files hold "
            "the continuation alone"
        )
    return clip
