"""Systems to compare: a model, audio files of another system, and references."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.audio.reading import AUDIO_ENDINGS, AudioError, Waveform, read_audio, write_wav
from llama_mimi.audio.streaming import decode_long
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import find_files, read_json, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.generation.prompt_folder import SETTINGS
from llama_mimi.judging.options import PROMPTS, RECONSTRUCTION, RECORDING, RECORDINGS, SHUFFLED
from llama_mimi.judging.prompts import NEW_FOLDER, Prompt, PromptSet


@dataclass(frozen=True)
class Clip:
    """A part of an audio file. By default, the part ends at the end of the file."""

    path: Path
    start_seconds: float = 0.0
    end_seconds: float | None = None

    def read(self, sample_rate_hz: int) -> Waveform:
        """Read the part, which may be empty; raise an `AudioError` for an unreadable file."""
        try:
            samples_S = read_audio(self.path, sample_rate_hz, max_seconds=self.end_seconds).samples_S
        except AudioError as error:
            if error.reason != "empty":
                raise
            samples_S = torch.zeros(0)
        return Waveform(samples_S[round(self.start_seconds * sample_rate_hz) :], sample_rate_hz)

    @cached_property
    def key(self) -> str:
        """Hash of the file and of the start and end of the part."""
        return f"{sha256(self.path.read_bytes()).hexdigest()}@{self.start_seconds:.4f}-{self.end_seconds or 0:.4f}"


@dataclass(frozen=True)
class Sample:
    prompt: Prompt
    number: int | None  # number of the sample, from 0 for each prompt; None for a reference
    clip: Clip  # the continuation without its prompt
    known: Mapping[str, float | None] = field(default_factory=dict)  # measures that generation has recorded


def references(
    prompts: PromptSet, codec: MimiCodec | None, max_seconds: float, ranks: DistributedContext
) -> dict[str, list[Sample]]:
    """Return the references by name: the rest of each prompt's recording, and the rest of another speaker's recording.

    With a codec, a third reference is the codec's reconstruction of the rest of each prompt's recording.
    """
    if len(prompts.prompts) < 2:
        raise UserError("there is only one prompt, so prompts cannot be shuffled; increase --limit")

    def rest(prompt: Prompt, folder: str, begins_with: Prompt) -> Sample:
        start = begins_with.seconds
        return Sample(prompt, None, Clip(prompts.file(folder, begins_with), start, start + max_seconds))

    systems = {RECORDING: [rest(prompt, RECORDINGS, prompt) for prompt in prompts.prompts], SHUFFLED: []}
    for prompt in prompts.prompts:
        others = [other for other in prompts.prompts if other.name != prompt.name]
        strangers = [other for other in others if other.speaker != prompt.speaker]
        file = prompts.file(PROMPTS if prompt.seconds else RECORDINGS, prompt)
        seed = sha256(file.read_bytes()).hexdigest()
        other = random.Random(seed).choice(strangers or others)
        systems[SHUFFLED].append(rest(prompt, RECORDINGS, other))
    if codec is not None:
        name = f"{RECONSTRUCTION}_q{codec.num_quantizers}"
        _reconstruct(prompts, codec, name, ranks)
        systems[name] = [rest(prompt, name, prompt) for prompt in prompts.prompts]
    return systems


def _reconstruct(prompts: PromptSet, codec: MimiCodec, name: str, ranks: DistributedContext) -> None:
    """Write reconstructions of the recordings into the folder ``name``; existing files are not written again."""
    folder = str(prompts.folder / name)
    settings = {"codec_sha256": codec_hash(codec.name), "codec_sliding_window": codec.sliding_window}

    def check_settings() -> None:
        require_same(read_json(folder, SETTINGS) or settings, settings, f"'{folder}'", NEW_FOLDER)
        write_atomically(folder, SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())

    broadcast_from_rank0(check_settings)
    for prompt in tqdm(prompts.prompts[ranks.rank :: ranks.world_size], desc=name, disable=ranks.rank > 0):
        if not prompts.file(name, prompt).exists():
            whole_S = read_audio(prompts.file(RECORDINGS, prompt), codec.sample_rate_hz).samples_S
            (codes_TQ,) = codec.encode([whole_S])
            decoded_S = decode_long(codec, codes_TQ)[: len(whole_S)]
            write_wav(prompts.file(name, prompt), Waveform(decoded_S, codec.sample_rate_hz))
    ranks.wait()


def continuations(
    prompts: PromptSet, folder: Path, records: Sequence[Mapping[str, Any]], frame_rate_hz: float
) -> list[Sample]:
    """Convert the records of `draw_samples` to samples; raise a `UserError` if a record has an error."""
    if failed := [record["error"] for record in records if "error" in record]:
        raise UserError(f"{len(failed):,} samples could not be generated, for example: {failed[0]}")
    by_name = {prompt.name: prompt for prompt in prompts.prompts}
    samples = []
    for record in records:
        frames = record["frames"]
        known = {
            "ended": float(record["end"] == "ended"),
            "distinct_frames": record["distinct_frames"] / frames if frames else None,
            "real_time_factor": record["seconds"] / (frames / frame_rate_hz) if frames else None,
        }
        clip = Clip(folder / record["file"], record["prompt_frames"] / frame_rate_hz)
        samples.append(Sample(by_name[Path(record["prompt"]).stem], record["sample"], clip, known))
    return samples


def wavs(prompts: PromptSet, folder: Path, contain_prompt: bool, max_seconds: float) -> list[Sample]:
    """Return the samples of another system, read from files ``<prompt>.wav`` or ``<prompt>_<number>.wav``."""
    by_name = {prompt.name: prompt for prompt in prompts.prompts}
    found: dict[tuple[str, int], Path] = {}
    for path in map(Path, find_files(str(folder), AUDIO_ENDINGS)):
        numbered = re.fullmatch(r"(.+)_(\d+)", path.stem)
        name, number = (numbered[1], int(numbered[2])) if numbered and path.stem not in by_name else (path.stem, 0)
        if name not in by_name:
            problem = f"'{path}' does not have the name of a prompt"
            raise UserError(f"{problem}; rename the file to <prompt>.wav or <prompt>_<number>.wav")
        if (name, number) in found:
            problem = f"'{found[name, number]}' and '{path}' are both sample {number} of '{name}'"
            raise UserError(f"{problem}; remove one of the two files")
        found[name, number] = path
    if missing := by_name.keys() - {name for name, _ in found}:
        problem = f"'{folder}' lacks files for {len(missing):,} of {len(by_name):,} prompts, such as '{min(missing)}'"
        raise UserError(f"{problem}; add the files; if the system generated nothing for a prompt, add an empty file")
    samples = []
    for (name, number), path in sorted(found.items()):
        start = by_name[name].seconds if contain_prompt else 0.0
        samples.append(Sample(by_name[name], number, Clip(path, start, start + max_seconds)))
    return samples
