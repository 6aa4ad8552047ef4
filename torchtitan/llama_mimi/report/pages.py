"""Contents of pages: audio clips, continuations of several systems, and clips of a tokenised corpus."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from scipy.stats import entropy
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import AudioError, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, visible_files
from llama_mimi.corpora.code_shards import CodeCorpus, read_manifest
from llama_mimi.report.document import Clip, Section, Table, import_extra
from llama_mimi.report.results import DAMAGE, KIND, in_order, measure_of, system_label

RATE_HZ, ROUNDING_SECONDS = 24_000, 0.1
WINDOW, HOP = 1024, 240  # 43 ms and 10 ms at 24 kHz
TOP_DB, RANGE_DB = 40.0, 80.0  # white is 40 dB and more (full scale is about 48 dB); black is -40 dB and less
SPECTROGRAM_ROWS, MAX_COLUMNS = 96, 480
MARK_COLUMNS, MARK_COLOR = 2, (90, 220, 255)
MP3_QUALITY = 0.6  # compression level of soundfile, 0 to 1; 5 kB per second at 24 kHz
ABOUT = (
    "Each clip begins with its prompt; a blue line in the spectrogram shows the end of the prompt. An ASR model has "
    "transcribed the speech after the prompt. If a system has several continuations, the first is shown."
)
SHOWN = ("similarity", "distillmos", "words_per_minute")  # measures below a clip; the judge's scores follow
MAX_GROUPS = 1000  # row groups (256,000 clips) in which codes are counted, spread over the corpus
CLIP_SECONDS = 10.0


def make_clip(
    title: str,
    samples_S: torch.Tensor,
    sample_rate_hz: int,
    lines: Sequence[str] = (),
    mark_seconds: float | None = None,
) -> Clip:
    """Return a clip with MP3 audio and a spectrogram; see `spectrogram` for the arguments."""
    mp3, webp = io.BytesIO(), io.BytesIO()
    samples = samples_S.clamp(-1, 1).numpy()
    soundfile.write(mp3, samples, sample_rate_hz, format="MP3", subtype="MPEG_LAYER_III", compression_level=MP3_QUALITY)
    colors = spectrogram(samples_S, sample_rate_hz, mark_seconds)
    import_extra("PIL.Image").fromarray(colors).save(webp, "WEBP", quality=60)
    return Clip(title, len(samples_S) / sample_rate_hz, mp3.getvalue(), webp.getvalue(), lines)


def spectrogram(samples_S: torch.Tensor, sample_rate_hz: int, mark_seconds: float | None = None) -> np.ndarray:
    """Return a spectrogram up to half the sample rate, as uint8 colours (rows, columns, 3).

    ``samples_S`` is mono audio in [-1, 1]; ``mark_seconds`` is the time of a vertical line, such as a prompt's end.
    """
    padded_S = torch.nn.functional.pad(samples_S, (0, max(0, WINDOW - len(samples_S))))
    magnitude_FT = torchaudio.transforms.Spectrogram(WINDOW, hop_length=HOP, power=1.0)(padded_S)
    level_FT = 20 * magnitude_FT.clamp(min=1e-6).log10()
    fraction_FT = ((level_FT - TOP_DB + RANGE_DB) / RANGE_DB).clamp(0, 1).flip(0).numpy()
    Image = import_extra("PIL.Image")
    image = Image.fromarray(import_extra("matplotlib").colormaps["magma"](fraction_FT, bytes=True)[..., :3])
    colors = np.array(image.resize((min(image.width, MAX_COLUMNS), SPECTROGRAM_ROWS), Image.Resampling.BOX))
    if mark_seconds is not None:
        column = round(mark_seconds * sample_rate_hz / len(padded_S) * colors.shape[1])
        colors[:, column : column + MARK_COLUMNS] = MARK_COLOR
    return colors


def continuations(folder: Path, num_prompts: int, labels: Mapping[str, str] | None = None) -> list[Section]:
    """Return an introduction and ``num_prompts`` sections. A section contains one clip of each system for one prompt.

    ``folder`` is the --output_dir of eval/generation.py. Prompts are chosen by the hash of their names. The keys
    of ``labels`` are the systems to show, and the values are their displayed names; default: all systems. Missing or
    damaged files raise a `UserError`.
    """
    if (manifest := read_json(str(folder), "prompts.json")) is None:
        raise UserError(f"'{folder}' does not contain prompts.json; choose the --output_dir of eval/generation.py")
    found = [read_json(str(folder), file.name) or {} for file in visible_files(folder, "*.json")]
    results = {str(result.get("system")): result for result in found if result.get("kind") == KIND}
    reconstructions = {name: label for name in sorted(results) if (label := system_label(name)) != name}
    models = sorted(results.keys() - reconstructions.keys() - {"recording", "shuffled"})
    shown = {"recording": "recording"} | reconstructions | dict(labels or {name: name for name in models})
    try:
        prompts = sorted(manifest["prompts"], key=lambda prompt: hashlib.sha256(prompt["name"].encode()).digest())
        kind = " of synthetic speech" if results["recording"]["data_kind"] == "synthetic" else ""
        sections = [Section(f"{min(num_prompts, len(prompts))} of {len(prompts)} prompts{kind}", [ABOUT])]
        for prompt in prompts[:num_prompts]:
            clips, texts = [], []
            for system, label in shown.items():
                samples = [sample for sample in results[system]["samples"] if sample["prompt"] == prompt["name"]]
                for sample in sorted(samples, key=lambda sample: sample["sample"] or 0)[:1]:
                    clips.append(_clip(label, folder, sample, prompt["seconds"]))
                    texts += [f"Prompt, transcribed: {text}"] if (text := sample.get("prompt_text")) else []
            speaker = f", speaker {prompt['speaker']}" if prompt["speaker"] else ""
            sections.append(Section(prompt["name"] + speaker, texts[:1], clips=clips))
    except DAMAGE as error:
        raise UserError(f"a file in '{folder}' is missing or damaged ({error!r}); re-run eval/generation.py") from error
    return sections


def _clip(label: str, folder: Path, sample: Mapping[str, Any], prompt_seconds: float) -> Clip:
    """Return a continuation with its transcript and measures."""
    names = [*SHOWN, *in_order(name for name in sample if name.startswith("judge/"))]
    measures = [(measure_of(name), sample[name]) for name in names if sample.get(name) is not None]
    values = ", ".join(f"{measure.heading} {measure.text(value)}" for measure, value in measures)
    end = prompt_seconds + sample["seconds"]
    try:
        audio = read_audio(folder / sample["file"], RATE_HZ, max_seconds=end + ROUNDING_SECONDS)
    except AudioError as error:
        if error.reason == "empty":
            return Clip(label, lines=["no audio"])
        raise UserError(f"a continuation of '{label}' cannot be played: {error}") from error
    mark_seconds = prompt_seconds if audio.seconds > end - ROUNDING_SECONDS else None  # the clip may lack its prompt
    lines = [line for line in (sample.get("text"), values) if line]
    return make_clip(label, audio.samples_S, RATE_HZ, lines, mark_seconds)


def code_sections(codes: str, num_clips: int) -> list[Section]:
    """Return ``num_clips`` decoded clips of a tokenised corpus, and the use of codes at each level.

    ``codes`` is the --output_dir of scripts/tokenize_corpus.py. The clips are decoded with the codec in the manifest.
    """
    manifest = read_manifest(codes)
    name, levels, sliding_window = (manifest["codec"][key] for key in ("name", "num_quantizers", "sliding_window"))
    corpus = CodeCorpus(codes, name, levels, sliding_window, with_text="text" in manifest["columns"])
    clips = decoded_clips(corpus, MimiCodec(name, levels, sliding_window=sliding_window), num_clips)
    return [Section(f"{len(clips)} of {manifest['clips']:,} clips, decoded", clips=clips), code_use(corpus)]


def code_use(corpus: CodeCorpus) -> Section:
    Q, size = (corpus.manifest["codec"][name] for name in ("num_quantizers", "codebook_size"))
    units = np.unique(np.linspace(0, len(corpus.rows_per_unit) - 1, MAX_GROUPS).round().astype(int))
    counts_QK = np.zeros((Q, size), dtype=np.int64)
    for unit in tqdm(units.tolist(), "counting codes", unit="row group", delay=2):
        frames_NQ = np.concatenate([row["codes"] for row in corpus.read(unit)])
        counts_QK += [np.bincount(level_N, minlength=size) for level_N in frames_NQ.T]
    rows = []
    for level, counts_K in enumerate(counts_QK):
        used, top, fraction = np.count_nonzero(counts_K), counts_K.argmax(), counts_K.max() / counts_K.sum()
        bits = f"{entropy(counts_K, base=2):.2f} of {np.log2(size):.2f} bits"
        rows.append((str(level), f"{used:,} of {size:,}", bits, str(top), f"{fraction:.1%}"))
    about = f"Counted in {corpus.rows_per_unit[units].sum():,} of {corpus.manifest['clips']:,} clips."
    table = Table(("level", "codes used", "entropy", "most frequent code", "its fraction"), rows)
    return Section("Use of codes", [about], tables=[table])


def decoded_clips(corpus: CodeCorpus, codec: MimiCodec, num_clips: int) -> list[Clip]:
    """Decode the beginning of randomly chosen clips."""
    ends_U, max_frames = np.cumsum(corpus.rows_per_unit), round(CLIP_SECONDS * codec.frame_rate_hz)
    clips = []
    for number in np.sort(np.random.default_rng(0).choice(ends_U[-1], min(num_clips, ends_U[-1]), replace=False)):
        unit = int(np.searchsorted(ends_U, number, side="right"))
        row = corpus.read(unit)[int(number - ends_U[unit] + corpus.rows_per_unit[unit])]
        seconds = len(row["codes"]) / codec.frame_rate_hz
        lines = [f"{seconds:.1f} s" + f", the first {CLIP_SECONDS:g} s decoded" * (seconds > CLIP_SECONDS)]
        lines += [f"text: {row['text']}"] if row.get("text") else []
        samples_S = codec.decode(torch.from_numpy(row["codes"][:max_frames].astype(np.int64)))
        clips.append(make_clip(row["id"], samples_S, codec.sample_rate_hz, lines))
    return clips
