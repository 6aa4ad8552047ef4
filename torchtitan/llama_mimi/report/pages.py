"""Clips of audio for pages, and the continuations that systems made of the same prompts."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from llama_mimi.audio.reading import AudioError, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, visible_files
from llama_mimi.report.document import Clip, Section, import_extra

RATE_HZ, ROUNDING_SECONDS = 24_000, 0.1
WINDOW, HOP = 1024, 240  # 43 ms every 10 ms at 24 kHz
TOP_DB, RANGE_DB = 40.0, 80.0  # full scale is about 48 dB; -40 dB and less is black
SPECTROGRAM_ROWS, MAX_COLUMNS = 96, 480
MARK_COLUMNS, MARK_COLOR = 2, (90, 220, 255)
# The colour map magma in nine equal steps, so that the demo needs no matplotlib.
MAGMA = np.array([*bytes.fromhex("0000041c10444f127b812581b5367ae55064fb8761fec287fcfdbf")]).reshape(9, 3)
MP3_QUALITY = 0.6  # of soundfile, 0 is the best; 5 kB for a second at 24 kHz
# Measures of one continuation, as its card shows them; criteria of a judge follow.
SHOWN = {
    "similarity": "speaker similarity {:.3f}",
    "distillmos": "DistillMOS {:.2f}",
    "words_per_minute": "{:.0f} words/min",
}


def make_clip(
    title: str,
    samples_S: torch.Tensor,
    sample_rate_hz: int,
    lines: Sequence[str] = (),
    mark_seconds: float | None = None,
) -> Clip:
    """Return a clip with MP3 audio, which every browser plays, and its spectrogram.

    Args:
        samples_S: mono samples in [-1, 1].
        lines: short texts below.
        mark_seconds: time of a line in the spectrogram, such as the end of a prompt.
    """
    mp3, webp = io.BytesIO(), io.BytesIO()
    samples = samples_S.clamp(-1, 1).numpy()
    soundfile.write(mp3, samples, sample_rate_hz, format="MP3", subtype="MPEG_LAYER_III", compression_level=MP3_QUALITY)
    colors = spectrogram(samples_S, sample_rate_hz, mark_seconds)
    import_extra("PIL.Image").fromarray(colors).save(webp, "WEBP", quality=60)
    return Clip(title, len(samples_S) / sample_rate_hz, mp3.getvalue(), webp.getvalue(), lines)


def spectrogram(samples_S: torch.Tensor, sample_rate_hz: int, mark_seconds: float | None = None) -> np.ndarray:
    """Return a spectrogram up to half the sample rate as uint8 colours (rows, columns, 3), on one scale for all clips.

    Args:
        samples_S: mono samples in [-1, 1].
        mark_seconds: time of a line, such as the end of a prompt.
    """
    padded_S = torch.nn.functional.pad(samples_S, (0, max(0, WINDOW - len(samples_S))))
    magnitude_FT = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)(padded_S)
    level_FT = 20 * magnitude_FT.clamp(min=1e-6).log10()
    fraction_FT = ((level_FT - TOP_DB + RANGE_DB) / RANGE_DB).clamp(0, 1).flip(0).numpy()
    channels = [np.interp(fraction_FT, np.linspace(0, 1, len(MAGMA)), channel) for channel in MAGMA.T]
    colors = np.stack(channels, axis=-1).astype(np.uint8)
    size = min(colors.shape[1], MAX_COLUMNS), SPECTROGRAM_ROWS
    Image = import_extra("PIL.Image")
    colors = np.array(Image.fromarray(colors).resize(size, Image.Resampling.BOX))
    if mark_seconds is not None:
        column = round(mark_seconds * sample_rate_hz / len(padded_S) * colors.shape[1])
        colors[:, column : column + MARK_COLUMNS] = MARK_COLOR
    return colors


@dataclass(frozen=True)
class _Sample:
    """A system's first continuation of a prompt, or a reference: the recording and its reconstructions."""

    file: Path
    seconds: float
    lines: list[str]
    prompt_text: str | None
    is_reference: bool
    is_synthetic: bool


def continuations(folder: Path, num_prompts: int, labels: Mapping[str, str] | None = None) -> list[Section]:
    """Return a section for each of a few prompts: the recording, its reconstructions, and the systems' continuations.

    Args:
        folder: the --output_dir of eval/generation.py.
        num_prompts: number of prompts, chosen by the hash of their names.
        labels: names for readers, by system; the systems without one are left out. None shows all.

    Raises:
        UserError: a file is missing or damaged, or a system has no result.
    """
    manifest = read_json(str(folder), "prompts.json")
    if manifest is None:
        raise UserError(f"'{folder}' has no prompts.json; name the --output_dir of eval/generation.py")
    systems = _read_systems(folder)
    if missing := [name for name in ("recording", *(labels or ())) if name not in systems]:
        raise UserError(f"'{folder}' has no result of '{missing[0]}', only of {', '.join(systems) or 'none'}")
    is_reference = {name: all(sample.is_reference for sample in of.values()) for name, of in systems.items()}
    order = sorted(systems.keys() - {"shuffled"}, key=lambda name: (name != "recording", not is_reference[name], name))
    shown = {name: re.sub(r"^reconstruction_q(\d+)$", r"codec, Q = \1", name) for name in order}
    if labels is not None:
        shown = {**{name: label for name, label in shown.items() if is_reference[name]}, **labels}
    prompts = sorted(manifest["prompts"], key=lambda prompt: hashlib.sha256(prompt["name"].encode()).digest())
    kind = " of synthetic speech" if any(sample.is_synthetic for sample in systems["recording"].values()) else ""
    about = (
        "Each clip begins with its prompt, up to the blue line in the spectrogram. The transcript, by an ASR model, is "
        "of the speech after it. A system with several continuations is shown with the first."
    )
    sections = [Section(f"{min(num_prompts, len(prompts))} of {len(prompts)} prompts{kind}", [about])]
    for prompt in prompts[:num_prompts]:
        name = prompt["name"]
        found = [(label, systems[system][name]) for system, label in shown.items() if name in systems[system]]
        clips = [_clip(label, sample, prompt["seconds"]) for label, sample in found]
        texts = [sample.prompt_text for _, sample in found if sample.prompt_text]
        title = name + (f", speaker {prompt['speaker']}" if prompt["speaker"] else "")
        sections.append(Section(title, [f"Prompt, transcribed: {text}" for text in texts[:1]], clips=clips))
    return sections


def _read_systems(folder: Path) -> dict[str, dict[str, _Sample]]:
    """Return the first sample of each prompt, by system and by the prompt's name."""
    systems: dict[str, dict[str, _Sample]] = {}
    for path in visible_files(folder, "*.json"):
        result = read_json(str(folder), path.name) or {}
        if result.get("kind") != "generations":
            continue
        try:
            samples = systems[result["system"]] = {}
            for sample in sorted(result["samples"], key=lambda sample: sample["sample"] or 0):
                values = [form.format(sample[name]) for name, form in SHOWN.items() if sample.get(name) is not None]
                judged = {name[6:]: value for name, value in sample.items() if name.startswith("judge/")}
                values += [f"judged {name} {value:.2f}" for name, value in sorted(judged.items()) if value is not None]
                found = _Sample(
                    folder / sample["file"],
                    float(sample["seconds"]),
                    [line for line in (sample.get("text"), ", ".join(values)) if line],
                    sample.get("prompt_text"),
                    is_reference=sample["sample"] is None,
                    is_synthetic=result.get("data_kind") == "synthetic",
                )
                samples.setdefault(sample["prompt"], found)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"'{path}' is a damaged result ({error!r}); move it, or run eval/ again") from error
    return systems


def _clip(label: str, sample: _Sample, prompt_seconds: float) -> Clip:
    end = prompt_seconds + sample.seconds
    try:
        audio = read_audio(sample.file, RATE_HZ, max_seconds=end + ROUNDING_SECONDS)
    except AudioError as error:
        if error.reason == "empty":
            return Clip(label, lines=["no audio"])
        raise UserError(f"a continuation of '{label}' cannot be played: {error}") from error
    has_prompt = audio.seconds > end - ROUNDING_SECONDS
    return make_clip(label, audio.samples_S, RATE_HZ, sample.lines, prompt_seconds if has_prompt else None)
