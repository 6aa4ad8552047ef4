"""Writing a tokenised corpus: its plan, its shards, and the manifest at the end."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from llama_mimi.audio.mimi import DEFAULT_CODEC, MimiCodec, Precision, codec_hash
from llama_mimi.audio.reading import RESAMPLER
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import PARTIAL, digest, file_system, read_json, sizes_in, write_atomically
from llama_mimi.common.resume import require_same
from llama_mimi.common.versions import versions
from llama_mimi.data.clip_readers import SkippedClip
from llama_mimi.data.clips import MAX_NAMED_CLIPS, is_too_many
from llama_mimi.data.code_store import (
    AUDIO_HASH,
    CLIPS_PER_GROUP,
    FORMAT,
    MANIFEST,
    NOTES,
    OPTIONAL_COLUMNS,
    PLAN,
    CodedClip,
    shard_bytes,
)
from llama_mimi.data.corpora import AudioCorpus
from llama_mimi.data.parquet_corpus import FOOTER_THREADS, read_footer
from llama_mimi.data.row_filter import RowFilter

# Clips of a shard by default (3 MB for clips of 14 s), and the fewest shards, so that a small corpus has work for all
# ranks.
READER = 2  # to be raised when other clips are skipped or filtered, so that a plan is not continued by other rules
CLIPS_PER_SHARD, MIN_SHARDS = 2048, 64


@dataclass
class TokenizationOptions:
    """Options of tokenising."""

    corpus: str
    """Named corpus; folder, path or glob of Parquet, tar or audio files or JSONL manifests; a folder of save_to_disk;
    or hf:owner/name"""

    output_dir: str
    """Folder of the shards, local or any fsspec path"""

    dataset_path: str | None = None
    """Local download of a named corpus"""

    split: str | None = None
    """Split to take, where a folder holds several (train-*, test-*)"""

    codec: str = DEFAULT_CODEC
    """Hub id or folder"""

    num_quantizers: int = 8
    """Levels to store; training takes any prefix"""

    dtype: Precision = "float32"
    """bfloat16 changes about 2 % of the codes"""

    codec_sliding_window: bool = True
    """Sliding window of the codec; see codec.sliding_window in the training settings"""

    audio_column: str = "audio"

    text_column: str = "text"
    """Stored where the corpus has it"""

    speaker_column: str = "speaker"
    """Stored where the corpus has it"""

    max_audio_seconds: float = 120.0
    """Longer clips are cut, and counted"""

    long_recordings: Literal["cut", "split"] = "cut"
    """Longer recordings are cut at --max_audio_seconds, or split at pauses into clips that are no longer and have no
    text"""

    min_seconds: float = 0.0
    """Shorter clips are left out, and counted"""

    max_seconds: float | None = None
    """Longer clips are left out, and counted"""

    where: str | None = None
    """Rows that are wanted, such as 'language == "en" and dnsmos >= 3'; others are left out, and counted"""

    clips_per_shard: int | None = None
    """Clips of a shard, at least; a kill loses the shards that are not whole. By default 2,048, or fewer, so that there
    are 64 shards"""

    batch_seconds: float | None = None
    """Seconds of audio encoded at once, padding included; by default what suits the device"""

    num_workers: int = 2
    """Processes of each rank that read and resample"""

    duplicates: Literal["keep", "drop"] = "keep"
    """Clips with the samples of an earlier one are kept, or left out; they are counted"""

    max_skip_fraction: float = 0.01
    """Stop when a larger share of the clips cannot be used"""

    @property
    def row_filter(self) -> RowFilter:
        return RowFilter(self.min_seconds, self.max_seconds, self.where)


def make_plan(options: TokenizationOptions, corpus: AudioCorpus, codec: MimiCodec) -> dict[str, Any]:
    """Return the plan of a tokenised corpus: its settings and shards. Every rank and every start has the same plan."""
    shards: list[dict[str, Any]] = []
    wanted = options.clips_per_shard or min(CLIPS_PER_SHARD, math.ceil(int(corpus.rows_per_group.sum()) / MIN_SHARDS))
    first, clips = 0, 0
    for group, size in enumerate(corpus.rows_per_group.tolist()):
        clips += size
        if clips >= wanted or group + 1 == len(corpus.rows_per_group):
            shards.append({"file": f"shard-{len(shards):06d}.parquet", "groups": [first, group + 1], "clips": clips})
            first, clips = group + 1, 0
    return {
        "format": FORMAT,
        "corpus": options.corpus,
        "corpus_sha256": corpus.fingerprint,
        "codec": {
            "name": options.codec,
            "sha256": codec_hash(options.codec),
            "num_quantizers": options.num_quantizers,
            "codebook_size": codec.codebook_size,
            "frame_rate_hz": codec.frame_rate_hz,
            "dtype": options.dtype,
            "sliding_window": codec.sliding_window,
        },
        "resampler": RESAMPLER,
        "reader": READER,
        "max_audio_seconds": options.max_audio_seconds,
        "long_recordings": options.long_recordings,
        "filter": vars(options.row_filter),
        "duplicates": options.duplicates,
        "columns_of_corpus": [options.audio_column, options.text_column, options.speaker_column],
        "columns": [
            *("id", "codes", "duration", "is_cut", AUDIO_HASH),
            *(c for c in OPTIONAL_COLUMNS if c in corpus.columns),
        ],
        "clips_per_group": CLIPS_PER_GROUP,
        "shards": shards,
    }


def begin(output_dir: str, plan: dict[str, Any]) -> list[int]:
    """Write or compare the plan, remove what was cut off, and list the shards that are missing."""
    earlier = read_json(output_dir, PLAN)
    if earlier is None:
        write_atomically(output_dir, PLAN, json.dumps(plan, indent=1).encode())
    else:
        remedy = "start again with the earlier options, or choose another --output_dir"
        require_same(_fixed(earlier), _fixed(plan), f"'{output_dir}'", remedy)
    fs, folder = file_system(output_dir)
    found = sizes_in(output_dir)
    for name in found:
        if name.endswith(PARTIAL):
            fs.rm_file(f"{folder}/{name}")
    return [index for index, shard in enumerate(plan["shards"]) if shard["file"] not in found]


def _fixed(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what must not change in a plan; the corpus and the codec may have other names."""
    fixed = {key: value for key, value in plan.items() if key not in ("corpus", "shards")}
    fixed["codec"] = {key: value for key, value in plan.get("codec", {}).items() if key != "name"}
    return fixed | {"shards_sha256 (--clips_per_shard)": digest(plan.get("shards"))}


def write_shard(
    output_dir: str,
    plan: dict[str, Any],
    shard: int,
    num_rows: int,
    clips: Sequence[CodedClip],
    skipped: Sequence[SkippedClip],
) -> None:
    """Write a shard of the clips, and of those that were left out, that ``num_rows`` rows of the corpus contain."""
    left_out = {
        "skipped": [{"reason": c.reason, "message": c.message} for c in skipped if not c.is_filtered],
        "filtered": Counter(clip.reason for clip in skipped if clip.is_filtered),
    }
    content = shard_of_clips(plan, num_rows, clips, left_out)
    write_atomically(output_dir, plan["shards"][shard]["file"], content)


def shard_of_clips(plan: dict[str, Any], num_rows: int, clips: Sequence[CodedClip], left_out: dict[str, Any]) -> bytes:
    """Return a shard with notes on its clips and on those left out (``skipped`` and ``filtered``)."""
    notes = {
        "columns": plan["columns"],
        "rows": num_rows,
        "clips": len(clips),
        "cut": sum(clip.is_cut for clip in clips),
        "audio_warnings": [
            [row, clip.name, warning] for row, clip in enumerate(clips) for warning in clip.audio_warnings
        ],
        "seconds": sum(clip.seconds for clip in clips),
        "by_second": by_second(clips),
        **left_out,
    }
    return shard_bytes(clips, plan["codec"]["num_quantizers"], notes)


def by_second(clips: Sequence[CodedClip]) -> list[list[float]]:
    """Number and seconds of the clips that last less than 1 s, less than 2 s, and so on."""
    totals = [[0, 0.0] for _ in range(max((int(clip.seconds) for clip in clips), default=0) + 1)]
    for clip in clips:
        totals[int(clip.seconds)][0] += 1
        totals[int(clip.seconds)][1] += clip.seconds
    return totals


def finish(options: TokenizationOptions, plan: dict[str, Any], num_duplicates: int) -> None:
    """Add up the notes of the shards, and write the manifest."""
    sizes = sizes_in(options.output_dir)
    paths = [f"{options.output_dir.rstrip('/')}/{shard['file']}" for shard in plan["shards"]]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(read_notes, paths))
    for shard, (num_rows, notes) in zip(plan["shards"], footers, strict=True):
        if notes["rows"] != shard["clips"] or num_rows != notes["clips"]:
            raise UserError(f"'{shard['file']}' does not hold its {shard['clips']} clips; delete it and start again")
    said = [notes for _, notes in footers]
    shards = [
        {"file": shard["file"], "clips": notes["clips"], "bytes": sizes[shard["file"]]}
        for shard, notes in zip(plan["shards"], said, strict=True)
    ]
    skipped = [clip for notes in said for clip in notes["skipped"]]
    messages = [clip["message"] for clip in skipped[:MAX_NAMED_CLIPS]]
    warned = [(name, warning) for notes in said for _, name, warning in notes["audio_warnings"]]
    for message in messages:
        print(f"skipped: {message}", flush=True)
    for name, warning in warned[:MAX_NAMED_CLIPS]:
        print(f"clip '{name}': {warning}", flush=True)
    filtered = sum((Counter(notes["filtered"]) for notes in said), Counter[str]())
    audio_warnings = Counter(warning for _, warning in warned)
    clips, cut = sum(notes["clips"] for notes in said), sum(notes["cut"] for notes in said)
    num_read = clips + len(skipped) + filtered.total()
    if is_too_many(len(skipped), num_read, options.max_skip_fraction, is_end=True, is_whole=True):
        raise too_many(len(skipped), num_read, options.max_skip_fraction, messages[-1])
    hours = sum(notes["seconds"] for notes in said) / 3600
    seconds = zip_longest(*(notes["by_second"] for notes in said), fillvalue=(0, 0.0))
    manifest = {
        **plan,
        "shards": shards,
        "clips": clips,
        "hours": hours,
        "by_second": [[sum(number for number, _ in of), sum(total for _, total in of)] for of in seconds],
        "cut": cut,
        "skipped": dict(Counter(clip["reason"] for clip in skipped)),
        "skipped_first": messages,
        "filtered": dict(filtered),
        "duplicates_kept": num_duplicates,
        "audio_warnings": dict(audio_warnings),
        "versions": versions(),
    }
    write_atomically(options.output_dir, MANIFEST, json.dumps(manifest, indent=1).encode())
    print(
        f"{options.output_dir}: {clips:,} clips, {hours:.2f} h, {len(shards)} shards, "
        f"{sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB; {cut} cut, {len(skipped)} skipped"
        + "".join(f", {number} left out: {reason}" for reason, number in filtered.items())
        + "".join(f", {number} {warning}" for warning, number in audio_warnings.items())
        + (f", {num_duplicates} duplicates kept" if num_duplicates else "")
    )


def read_notes(path: str) -> tuple[int, dict[str, Any]]:
    """Return the number of rows of a shard, and its notes."""
    footer = read_footer(path)
    return footer.num_rows, json.loads(footer.schema.to_arrow_schema().metadata[NOTES])


def too_many(num_skipped: int, num_read: int, allowed: float, last: str) -> UserError:
    return UserError(
        f"{num_skipped} of {num_read} clips could not be used, more than --max_skip_fraction {allowed:g} (the last: "
        f"{last}); repair the corpus or raise --max_skip_fraction"
    )
