"""Write an HTML page about a tokenised corpus: decoded clips, clip lengths, and code usage.

uv run python scripts/inspect_codes.py --codes data/codes/tiny --page outputs/codes_tiny.html
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus, read_manifest
from llama_mimi.report.document import Clip, Picture, Section, Table, pyplot, save_picture, write_html
from llama_mimi.report.pages import make_clip

MAX_GROUPS = 1000  # row groups (256,000 clips) in which codes are counted, spread over the corpus
CLIP_SECONDS = 10.0


def inspect_codes(codes: str, page: Path, codec: str | None = None, num_clips: int = 10, seed: int = 0) -> None:
    """Write the page.

    Args:
        codes: output folder of scripts/tokenize_corpus.py
        page: HTML file to write
        codec: Hub id or folder of the codec; default: the name in the manifest
        num_clips: number of clips to decode
        seed: random seed for the choice of clips
    """
    if num_clips < 0:
        raise UserError(f"--num_clips is {num_clips}; set 0 or more")
    manifest = read_manifest(codes)
    made_by = manifest["codec"]
    name, levels, sliding_window = codec or made_by["name"], made_by["num_quantizers"], made_by["sliding_window"]
    corpus = CodeCorpus(codes, name, levels, sliding_window, with_text="text" in manifest["columns"])
    clips = decoded_clips(corpus, MimiCodec(name, levels, sliding_window=sliding_window), num_clips, seed)
    samples = Section(f"{len(clips)} of {manifest['clips']:,} clips, decoded", clips=clips)
    write_html(f"Codes in {codes}", [samples, overview(manifest), code_use(corpus)], page)


def overview(manifest: dict[str, Any]) -> Section:
    codec, clips, hours = manifest["codec"], manifest["clips"], manifest["hours"]
    rows = [
        ("corpus", manifest["corpus"]),
        ("audio", f"{hours:,.2f} hours"),
        ("clips", f"{clips:,}, {3600 * hours / clips:.1f} s on average"),
        ("cut off at", f"{manifest['max_audio_seconds']:g} s: {manifest['cut']:,} clips"),
        ("duplicates", f"{manifest['duplicates_kept']:,} kept"),
        ("shards", f"{len(manifest['shards']):,}, {sum(s['bytes'] for s in manifest['shards']) / 1e6:,.1f} MB"),
        ("codec", f"{codec['name']}, weights {codec['sha256'][:12]}, {codec['num_quantizers']} levels"),
    ]
    for key, title in {"skipped": "could not be used", "filtered": "filtered", "audio_warnings": "warning"}.items():
        rows += [(f"{title}: {reason}", f"{number:,} clips") for reason, number in manifest[key].items()]
    print("\n".join(map(": ".join, rows)))
    lengths = [seconds / 3600 for _, seconds in manifest["by_second"]]
    figure, axes = pyplot().subplots(figsize=(4.5, 2.2), layout="constrained")
    axes.bar(np.arange(len(lengths)) + 0.5, lengths, 1.0, edgecolor="white")
    axes.set(xlabel="clip length (s)", ylabel="hours of audio")
    picture = Picture("lengths.png", save_picture(figure), "Hours of audio by the length of clips")
    return Section("Overview", (), [picture], [Table(("property", "value"), rows)])


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


def decoded_clips(corpus: CodeCorpus, codec: MimiCodec, num_clips: int, seed: int) -> list[Clip]:
    """Decode the beginning of randomly chosen clips."""
    ends_U, max_frames = np.cumsum(corpus.rows_per_unit), round(CLIP_SECONDS * codec.frame_rate_hz)
    clips = []
    for number in np.sort(np.random.default_rng(seed).choice(ends_U[-1], min(num_clips, ends_U[-1]), replace=False)):
        unit = int(np.searchsorted(ends_U, number, side="right"))
        row = corpus.read(unit)[int(number - ends_U[unit] + corpus.rows_per_unit[unit])]
        seconds = len(row["codes"]) / codec.frame_rate_hz
        lines = [f"{seconds:.1f} s" + f", the first {CLIP_SECONDS:g} s decoded" * (seconds > CLIP_SECONDS)]
        lines += [f"text: {row['text']}"] if row.get("text") else []
        samples_S = codec.decode(torch.from_numpy(row["codes"][:max_frames].astype(np.int64)))
        clips.append(make_clip(row["id"], samples_S, codec.sample_rate_hz, lines))
    return clips


if __name__ == "__main__":
    run_command(inspect_codes, __doc__)
