"""A page on a tokenised corpus: clips to listen to, lengths, the use of codes, and speakers.

uv run python scripts/inspect_codes.py --codes data/codes/tiny --page outputs/codes_tiny.html
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import entropy

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import file_system
from llama_mimi.data.code_store import CodeCorpus, read_manifest
from llama_mimi.report.document import Clip, Picture, Section, Table, pyplot, save_picture, write_html
from llama_mimi.report.pages import make_clip

MAX_GROUPS = 1000  # row groups whose codes are counted, spread over the corpus: 256,000 clips
NUM_SPEAKERS = 10
CLIP_SECONDS = 10.0


def inspect_codes(codes: str, page: Path, codec: str | None = None, num_clips: int = 10, seed: int = 0) -> None:
    """Write the page.

    Args:
        codes: output folder of scripts/tokenize_corpus.py
        page: HTML file to write
        codec: Hub id or folder of the codec that made the codes, if it is not where the manifest says
        num_clips: number of clips to listen to
        seed: seed of the choice of clips
    """
    if num_clips < 0:
        raise UserError(f"--num_clips is {num_clips}; it must be 0 or more")
    manifest = read_manifest(codes)
    made_by, has_text = manifest["codec"], "text" in manifest["columns"]
    name, num_quantizers = codec or made_by["name"], made_by["num_quantizers"]
    sliding_window = made_by["sliding_window"]
    corpus = CodeCorpus(codes, name, num_quantizers, sliding_window, with_text=has_text)
    sections = [overview(manifest), code_use(corpus)]
    sections += [speakers(codes, manifest)] if "speaker" in manifest["columns"] else []
    if num_clips:
        clips = decoded_clips(corpus, MimiCodec(name, num_quantizers, sliding_window=sliding_window), num_clips, seed)
        sections.insert(0, Section(f"{len(clips)} of {manifest['clips']:,} clips, decoded", clips=clips))
    write_html(f"Codes in {codes}", sections, page)


def overview(manifest: dict[str, Any]) -> Section:
    codec, clips, hours = manifest["codec"], manifest["clips"], manifest["hours"]
    rows = [
        ("corpus", manifest["corpus"]),
        ("audio", f"{hours:,.2f} hours"),
        ("clips", f"{clips:,}, {3600 * hours / max(clips, 1):.1f} s on average"),
        ("cut off at", f"{manifest['max_audio_seconds']:g} s: {manifest['cut']:,} clips"),
        ("duplicates", f"{manifest.get('duplicates_kept', 0):,} kept"),
        ("shards", f"{len(manifest['shards']):,}, {sum(s['bytes'] for s in manifest['shards']) / 1e6:,.1f} MB"),
        ("codec", f"{codec['name']}, weights {codec['sha256'][:12]}, {codec['num_quantizers']} levels"),
    ]
    for key, title in {"skipped": "could not be used", "filtered": "filtered", "audio_warnings": "used, but"}.items():
        rows += [(f"{title}: {reason}", f"{number:,} clips") for reason, number in manifest.get(key, {}).items()]
    print("\n".join(map(": ".join, rows)))
    figure, axes = pyplot().subplots(figsize=(4.5, 2.2), layout="constrained")
    lengths = [seconds / 3600 for _, seconds in manifest["by_second"]]
    axes.bar(np.arange(len(lengths)) + 0.5, lengths, 1.0, edgecolor="white")
    axes.set(xlabel="clip length (s)", ylabel="hours of audio")
    picture = Picture("lengths.png", save_picture(figure), "Hours of audio by the length of clips")
    return Section("Overview", (), [picture], [Table(("property", "value"), rows)])


def code_use(corpus: CodeCorpus) -> Section:
    groups = np.unique(np.linspace(0, len(corpus.rows_per_group) - 1, MAX_GROUPS).round().astype(int))
    Q, size = (corpus.manifest["codec"][key] for key in ("num_quantizers", "codebook_size"))
    counts_QK = np.zeros((Q, size), dtype=np.int64)
    for group in groups.tolist():
        frames_NQ = corpus.read_group(group).frames_NQ
        counts_QK += [np.bincount(level_N, minlength=size) for level_N in frames_NQ.T]
    fractions_QK = counts_QK / np.maximum(counts_QK.sum(axis=1, keepdims=True), 1)
    figure, axes = pyplot().subplots(figsize=(4.5, 3), layout="constrained")
    axes.set_prop_cycle(color=pyplot().get_cmap("viridis")(np.linspace(0, 0.9, Q)))
    axes.axhline(1 / size, color="gray", linewidth=0.8, linestyle=":", label="uniform")
    rows = []
    for level, fractions_K in enumerate(fractions_QK):
        used, top = np.count_nonzero(fractions_K), fractions_K.argmax()
        bits = f"{entropy(fractions_K, base=2):.2f} of {np.log2(size):.2f} bits"
        rows.append((str(level), f"{used:,} of {size:,}", bits, str(top), f"{fractions_K[top]:.1%}"))
        axes.plot(np.arange(used) + 1, np.sort(fractions_K)[::-1][:used], label=f"level {level}")
    axes.set(xscale="log", yscale="log", xlabel="rank of the code", ylabel="fraction of frames")
    axes.legend(fontsize=8, ncols=2)
    alt = "Fraction of frames by the rank of a code, for each level"
    about = f"Counted on {corpus.rows_per_group[groups].sum():,} of {corpus.manifest['clips']:,} clips."
    table = Table(("level", "codes used", "entropy", "most frequent code", "its fraction"), rows)
    return Section("Use of codes", [about], [Picture("code_use.png", save_picture(figure), alt)], [table])


def speakers(codes: str, manifest: dict[str, Any]) -> Section:
    fs, folder = file_system(codes)
    files = [f"{folder.rstrip('/')}/{shard['file']}" for shard in manifest["shards"]]
    table = pq.read_table(files, columns=["speaker", "duration"], filesystem=fs)
    seconds = table.to_pandas().groupby("speaker")["duration"].agg(["sum", "count"]).sort_values("sum", ascending=False)
    rows = [(name, f"{s / 3600:,.2f}", f"{n:,}") for name, s, n in seconds.head(NUM_SPEAKERS).itertuples()]
    without = manifest["clips"] - seconds["count"].sum()
    about = f"{len(seconds):,} speakers; {without:,} clips without one. Those with the most hours:"
    return Section("Speakers", [about], tables=[Table(("speaker", "hours", "clips"), rows)])


def decoded_clips(corpus: CodeCorpus, codec: MimiCodec, num_clips: int, seed: int) -> list[Clip]:
    """Decode the beginning of random clips, each clip of the corpus with the same probability."""
    ends_G = np.cumsum(corpus.rows_per_group)
    clips = []
    for number in np.sort(np.random.default_rng(seed).choice(ends_G[-1], min(num_clips, ends_G[-1]), replace=False)):
        group = int(np.searchsorted(ends_G, number, side="right"))
        found, row = corpus.read_group(group), int(number - ends_G[group] + corpus.rows_per_group[group])
        codes_TQ = torch.from_numpy(found.codes(row).astype(np.int64))
        seconds = len(codes_TQ) / codec.frame_rate_hz
        lines = [f"{seconds:.1f} s" + f", the first {CLIP_SECONDS:g} s decoded" * (seconds > CLIP_SECONDS)]
        lines += [f"text: {text}" for text in found.columns.get("text", [])[row : row + 1] if text]
        samples_S = codec.decode(codes_TQ[: round(CLIP_SECONDS * codec.frame_rate_hz)])
        clips.append(make_clip(found.columns["id"][row], samples_S, codec.sample_rate_hz, lines))
    return clips


if __name__ == "__main__":
    run_command(inspect_codes, __doc__)
