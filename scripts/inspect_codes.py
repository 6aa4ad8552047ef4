"""A page on a tokenised corpus: clips to listen to, lengths, the use of codes, and speakers.

uv run python scripts/inspect_codes.py --codes data/codes/tiny --page outputs/codes_tiny.html
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import entropy

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodeCorpus, read_manifest, read_shard
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
    made_by, columns = manifest["codec"], manifest["columns"]
    name, levels, sliding_window = codec or made_by["name"], made_by["num_quantizers"], made_by["sliding_window"]
    corpus = CodeCorpus(codes, name, levels, sliding_window, with_text="text" in columns)
    clips = decoded_clips(corpus, MimiCodec(name, levels, sliding_window=sliding_window), num_clips, seed)
    sections = [Section(f"{len(clips)} of {manifest['clips']:,} clips, decoded", clips=clips)]
    sections += [overview(manifest), code_use(corpus)] + ([speakers(corpus)] if "speaker" in columns else [])
    write_html(f"Codes in {codes}", sections, page)


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
    for key, title in {"skipped": "could not be used", "filtered": "filtered", "audio_warnings": "used, but"}.items():
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
    for unit in units.tolist():
        counts_QK += [np.bincount(level_N, minlength=size) for level_N in corpus.read(unit).frames_NQ.T]
    fractions_QK = counts_QK / counts_QK.sum(axis=1, keepdims=True)
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
    about = f"Counted on {corpus.rows_per_unit[units].sum():,} of {corpus.manifest['clips']:,} clips."
    table = Table(("level", "codes used", "entropy", "most frequent code", "its fraction"), rows)
    return Section("Use of codes", [about], [Picture("code_use.png", save_picture(figure), alt)], [table])


def speakers(corpus: CodeCorpus) -> Section:
    paths = [f"{corpus.name}/{shard['file']}" for shard in corpus.manifest["shards"]]
    clips = pa.concat_tables([read_shard(path, ["speaker", "duration"]) for path in paths]).to_pandas()
    hours = clips.groupby("speaker")["duration"].agg(["sum", "count"]).sort_values("sum", ascending=False)
    rows = [(name, f"{seconds / 3600:,.2f}", f"{n:,}") for name, seconds, n in hours.head(NUM_SPEAKERS).itertuples()]
    about = f"{len(hours):,} speakers; {clips['speaker'].isna().sum():,} clips without one. Those with the most hours:"
    return Section("Speakers", [about], tables=[Table(("speaker", "hours", "clips"), rows)])


def decoded_clips(corpus: CodeCorpus, codec: MimiCodec, num_clips: int, seed: int) -> list[Clip]:
    """Decode the beginning of random clips, each clip of the corpus with the same probability."""
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
