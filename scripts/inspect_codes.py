"""What a tokenised corpus holds, as a page to open: lengths, the use of codes, speakers, and clips to listen to.

uv run python scripts/inspect_codes.py --codes data/codes/tiny --page outputs/codes_tiny.html
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pages import card, cards, chart, table, write_page

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import file_system
from llama_mimi.data.code_store import CodeCorpus, read_codes, read_manifest
from llama_mimi.data.parquet_corpus import unreadable

# Codes are counted on so many row groups (256,000 clips) at most, spread over the corpus; lengths and speakers on all.
MAX_GROUPS = 1000
READ_THREADS = 16
NUM_SPEAKERS = 10  # that are named
LISTENED_SECONDS = 10.0


@dataclass(frozen=True)
class InspectionOptions:
    """Which store, and where its page goes."""

    codes: str
    """Folder of scripts/tokenize_corpus.py"""

    page: Path
    """HTML file to write"""

    codec: str | None = None
    """Hub id or folder of the codec that made the codes, where it is not the one that the manifest names"""

    num_clips: int = 10
    """Clips to listen to"""

    seed: int = 0
    """Which clips these are"""


@dataclass(frozen=True)
class CodeUse:
    """How often each code was seen, on so many clips."""

    counts_QK: np.ndarray
    num_clips: int


def inspect_codes(options: InspectionOptions) -> None:
    """Write the page.

    Raises:
        UserError: no finished store, or another codec than its own.
    """
    if options.num_clips < 0:
        raise UserError(f"--num_clips is {options.num_clips}; it must be 0 or more")
    manifest = read_manifest(options.codes)
    made_by = manifest["codec"]
    codec_name = options.codec or made_by["name"]
    corpus = CodeCorpus(
        options.codes, codec_name, made_by["num_quantizers"], attention=made_by["attention"], with_text=False
    )
    use = count_codes(corpus, made_by["num_quantizers"], made_by["codebook_size"])
    summary = [*overview(manifest), *left_out(manifest)]
    for name, value in summary:
        print(f"{name}: {value}")
    parts = [table(summary, ("", ""), label="What the corpus holds")]
    parts += ["<h2>Lengths</h2>", lengths_chart(manifest["by_second"])]
    parts += ["<h2>Use of codes</h2>", f"<p>Counted on {use.num_clips:,} of {manifest['clips']:,} clips.</p>"]
    parts += [table(use_rows(use), USE_HEADER, label="Use of codes by level"), use_chart(use)]
    if "speaker" in manifest["columns"]:
        parts += ["<h2>Speakers</h2>", *speakers(options.codes, manifest)]
    if options.num_clips:
        codec = MimiCodec(codec_name, made_by["num_quantizers"], attention=made_by["attention"])
        parts += [
            f"<h2>{min(options.num_clips, manifest['clips'])} clips, decoded</h2>",
            listened(options, manifest, codec),
        ]
    write_page(options.page, f"Codes in {options.codes}", parts)


def overview(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    codec, clips = manifest["codec"], manifest["clips"]
    num_bytes = sum(shard["bytes"] for shard in manifest["shards"])
    return [
        ("corpus", manifest["corpus"]),
        ("hours", f"{manifest['hours']:,.2f}"),
        ("clips", f"{clips:,}, {3600 * manifest['hours'] / max(clips, 1):.1f} s on average"),
        ("cut off at", f"{manifest['max_audio_seconds']:g} s: {manifest['cut']:,} clips"),
        *([("duplicates", f"{manifest['duplicates_kept']:,} kept")] if "duplicates_kept" in manifest else []),
        ("shards", f"{len(manifest['shards']):,}, {num_bytes / 1e6:,.1f} MB"),
        ("codec", f"{codec['name']}, weights {codec['sha256'][:12]}, {codec['num_quantizers']} levels"),
    ]


def left_out(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Each reason for which clips are not there, or not as they were."""
    kinds = (("skipped", "could not be used"), ("filtered", "left out"), ("remarks", "used, but"))
    return [
        (f"{title}: {reason}", f"{number:,} clips")
        for key, title in kinds
        for reason, number in manifest.get(key, {}).items()
    ]


def count_codes(corpus: CodeCorpus, num_quantizers: int, codebook_size: int) -> CodeUse:
    num_groups = len(corpus.sizes_G)
    groups = np.unique(np.linspace(0, num_groups - 1, min(MAX_GROUPS, num_groups)).round().astype(int))

    def count(group: int) -> np.ndarray:
        frames_NQ = corpus.read_group(int(group)).frames_NQ
        return np.stack([np.bincount(level_N, minlength=codebook_size) for level_N in frames_NQ.T])

    counts_QK = np.zeros((num_quantizers, codebook_size), np.int64)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for counted_QK in pool.map(count, groups):
            counts_QK += counted_QK
    return CodeUse(counts_QK, int(corpus.sizes_G[groups].sum()))


USE_HEADER = ("level", "codes used", "of", "entropy", "most frequent code", "its share")


def use_rows(use: CodeUse) -> list[list[str]]:
    rows = []
    for level, counts_K in enumerate(use.counts_QK):
        top = int(counts_K.argmax())
        share = counts_K[top] / max(counts_K.sum(), 1)
        rows.append(
            [
                *(str(level), f"{int((counts_K > 0).sum()):,}", f"{len(counts_K):,}"),
                *(f"{entropy_bits(counts_K):.2f} of {math.log2(len(counts_K)):.2f} bits", str(top), f"{share:.1%}"),
            ]
        )
    return rows


def entropy_bits(counts_K: np.ndarray) -> float:
    """Entropy of the distribution that counts are of, as they are: few counts make it too small."""
    share_K = counts_K[counts_K > 0] / counts_K.sum()
    return float(-(share_K * np.log2(share_K)).sum())


def lengths_chart(by_second: list[list[float]]) -> str:
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    seconds = np.arange(len(by_second))
    axes.bar(seconds + 0.5, [total / 3600 for _, total in by_second], width=1.0, edgecolor="white", linewidth=0.3)
    axes.set_xlabel("seconds of a clip")
    axes.set_ylabel("hours")
    axes.spines[["top", "right"]].set_visible(False)
    longest = max((second + 1 for second, (number, _) in enumerate(by_second) if number), default=0)
    return chart(figure, f"Hours by the length of clips, which is below {longest} s")


def use_chart(use: CodeUse) -> str:
    """Shares of the codes of each level, from the most to the least frequent."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(use.counts_QK)))
    for level, counts_K in enumerate(use.counts_QK):
        share_K = np.sort(counts_K)[::-1] / max(counts_K.sum(), 1)
        axes.plot(np.arange(1, len(share_K) + 1), np.where(share_K > 0, share_K, np.nan), color=colors[level])
        axes.plot([], [], color=colors[level], label=f"level {level}")
    axes.axhline(1 / use.counts_QK.shape[1], color="gray", linewidth=0.8, linestyle=":", label="all alike")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("codes, from the most frequent on")
    axes.set_ylabel("share")
    axes.legend(fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return chart(figure, "Shares of codes by level, from the most to the least frequent")


def speakers(folder: str, manifest: dict[str, Any]) -> list[str]:
    """How many there are, and those with the most hours."""

    def read(shard: dict[str, Any]) -> list[dict[str, Any]]:
        path = f"{folder.rstrip('/')}/{shard['file']}"
        fs, bare = file_system(path)
        try:
            with fs.open(bare) as stream:
                found = pq.ParquetFile(stream).read(["speaker", "duration"])
        except (OSError, pa.ArrowException) as error:
            raise unreadable(path, error) from error
        found = found.set_column(1, "duration", pc.cast(found["duration"], "double"))
        return found.group_by("speaker").aggregate([("duration", "sum"), ("duration", "count")]).to_pylist()

    seconds: Counter[str | None] = Counter()
    clips: Counter[str | None] = Counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for rows in pool.map(read, manifest["shards"]):
            for row in rows:
                seconds[row["speaker"]] += row["duration_sum"]
                clips[row["speaker"]] += row["duration_count"]
    unknown = clips.pop(None, 0)
    seconds.pop(None, None)
    first = [
        [str(name), f"{total / 3600:,.2f}", f"{clips[name]:,}"] for name, total in seconds.most_common(NUM_SPEAKERS)
    ]
    return [
        f"<p>{len(seconds):,} speakers; {unknown:,} clips without one. Those with the most hours:</p>",
        table(first, ("speaker", "hours", "clips"), label="Speakers with the most hours"),
    ]


def listened(options: InspectionOptions, manifest: dict[str, Any], codec: MimiCodec) -> str:
    """Clips by chance, each as likely as any other, as the codec decodes them."""
    generator = np.random.default_rng(options.seed)
    starts = np.cumsum([0, *(shard["clips"] for shard in manifest["shards"])])
    chosen = np.sort(generator.choice(starts[-1], min(options.num_clips, int(starts[-1])), replace=False))
    columns = ["id", "codes", "duration", *(name for name in ("text", "speaker") if name in manifest["columns"])]
    clips = []
    for number in chosen:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        path, row = f"{options.codes.rstrip('/')}/{manifest['shards'][shard]['file']}", int(number - starts[shard])
        found = read_codes(path, columns, codec.num_quantizers, row // manifest["clips_per_group"])
        row %= manifest["clips_per_group"]
        values = {name: found.columns[name][row] for name in columns if name != "codes"}
        codes_TQ = torch.from_numpy(found.codes(row)[: round(LISTENED_SECONDS * codec.frame_rate_hz)].astype(np.int64))
        samples_S = codec.decode(codes_TQ)
        heard = len(samples_S) / codec.sample_rate_hz
        length = f"{values['duration']:.1f} s" + (
            f", the first {heard:.0f}" if heard < values["duration"] - 0.1 else ""
        )
        said = [f"{name}: {values[name]}" for name in ("speaker", "text") if values.get(name)]
        clips.append(card(values["id"], samples_S, codec.sample_rate_hz, [length, *said]))
    return cards(clips)


if __name__ == "__main__":
    run_command(inspect_codes, __doc__)
