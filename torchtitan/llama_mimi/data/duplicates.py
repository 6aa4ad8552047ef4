"""Clips of a tokenised corpus that have the samples of an earlier one."""

import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.common.files import file_system, write_atomically
from llama_mimi.data.clip_readers import HASH_BYTES
from llama_mimi.data.code_store import AUDIO_HASH, NOTES, StoredClip
from llama_mimi.data.code_writer import shard_of_clips
from llama_mimi.data.parquet_corpus import FOOTER_THREADS, unreadable


def settle_duplicates(output_dir: str, plan: dict[str, Any]) -> int:
    """Take duplicates out of the shards, all of which are there, if that is wanted; the first in order stays.

    What is taken out is counted in its shard, so that a run that is killed here goes on from what it has done. The
    hashes of all clips are in memory, 40 bytes for each.

    Returns:
        How many stay in.

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
        fs, bare = file_system(paths[shard])
        write_atomically(output_dir, plan["shards"][shard]["file"], _without(fs.cat_file(bare), plan, rows))
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
            column = pq.ParquetFile(stream).read([AUDIO_HASH])[AUDIO_HASH]
        return np.array(column.to_pylist(), dtype=f"S{HASH_BYTES}")
    except (OSError, pa.ArrowException, KeyError) as error:
        raise unreadable(path, error) from error


def _without(content: bytes, plan: dict[str, Any], rows: set[int]) -> bytes:
    """A shard anew, without some of its rows."""
    table = pq.read_table(io.BytesIO(content))
    notes = json.loads(table.schema.metadata[NOTES])
    remarks: dict[int, list[str]] = {}
    for row, _, remark in notes["remarks"]:
        remarks.setdefault(row, []).append(remark)
    clips = [
        StoredClip(
            values["id"],
            np.array(values["codes"], np.uint16).reshape(-1, plan["codec"]["num_quantizers"]),
            values["duration"],
            values["is_cut"],
            values.get("text"),
            values.get("speaker"),
            tuple(remarks.get(row, ())),
            values[AUDIO_HASH],
        )
        for row, values in enumerate(table.to_pylist())
        if row not in rows
    ]
    filtered = Counter(notes["filtered"]) + Counter({"duplicate": len(rows)})
    return shard_of_clips(plan, notes["rows"], clips, {"skipped": notes["skipped"], "filtered": filtered})
