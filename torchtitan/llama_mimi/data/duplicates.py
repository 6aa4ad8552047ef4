"""Clips of a tokenised corpus that have the samples of an earlier one."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.common.files import file_system, write_atomically
from llama_mimi.data.clip_readers import HASH_BYTES
from llama_mimi.data.code_store import AUDIO_HASH, OPTIONAL_COLUMNS, CodedClip, read_codes
from llama_mimi.data.code_writer import read_notes, shard_of_clips
from llama_mimi.data.parquet_corpus import FOOTER_THREADS, unreadable


def settle_duplicates(output_dir: str, plan: dict[str, Any]) -> int:
    """Remove duplicates from the shards if that is wanted, all but the first; return how many stay.

    Each shard counts its removed clips, so that a run that is killed here continues. The hashes of all clips are in
    memory, some 60 bytes for each.

    Raises:
        UserError: a shard is damaged.
    """
    paths = [f"{output_dir.rstrip('/')}/{shard['file']}" for shard in plan["shards"]]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        hashes = list(pool.map(_hashes, paths))
    duplicates_N = _later_of_equals(np.concatenate(hashes))
    if plan["duplicates"] == "keep":
        return len(duplicates_N)
    starts = np.cumsum([0, *map(len, hashes)])
    shard_N = np.searchsorted(starts, duplicates_N, side="right") - 1
    for shard in np.unique(shard_N):
        rows = set((duplicates_N[shard_N == shard] - starts[shard]).tolist())
        write_atomically(output_dir, plan["shards"][shard]["file"], _without(paths[shard], plan, rows))
    return 0


def _later_of_equals(hashes_N: np.ndarray) -> np.ndarray:
    """Which are not the first of their value, in order."""
    order_N = np.argsort(hashes_N, kind="stable")
    in_order_N = hashes_N[order_N]
    return np.sort(order_N[1:][in_order_N[1:] == in_order_N[:-1]])


def _hashes(path: str) -> np.ndarray:
    fs, bare = file_system(path)
    try:
        with fs.open(bare) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            column = file.read([AUDIO_HASH])[AUDIO_HASH]
        return np.array(column.to_pylist(), dtype=f"S{HASH_BYTES}")
    except (OSError, pa.ArrowException, KeyError) as error:
        raise unreadable(path, error) from error


def _without(path: str, plan: dict[str, Any], rows: set[int]) -> bytes:
    """A shard anew, without some of its rows."""
    _, notes = read_notes(path)
    stored = ["id", "duration", "is_cut", AUDIO_HASH]
    optional = [name for name in OPTIONAL_COLUMNS if name in plan["columns"]]
    shard = read_codes(path, ["codes", *stored, *optional], plan["codec"]["num_quantizers"])
    audio_warnings: dict[int, list[str]] = {}
    for row, _, warning in notes["audio_warnings"]:
        audio_warnings.setdefault(row, []).append(warning)
    clips = []
    for row in range(len(shard.starts) - 1):
        if row not in rows:
            name, seconds, is_cut, audio_hash = (shard.columns[column][row] for column in stored)
            said = {column: shard.columns[column][row] for column in optional}
            of_row = tuple(audio_warnings.get(row, ()))
            codes_TQ = shard.codes(row)
            clips.append(
                CodedClip(name, codes_TQ, seconds, is_cut, audio_warnings=of_row, audio_hash=audio_hash, **said)
            )
    filtered = Counter(notes["filtered"]) + Counter({"duplicate": len(rows)})
    return shard_of_clips(plan, notes["rows"], clips, {"skipped": notes["skipped"], "filtered": filtered})
