"""Tokenised corpora: folders with a manifest and Parquet shards of codes, for training without the codec."""

import io
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest, file_system, read_json, sizes_in
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.clips import CodedClip, SkippedClip
from llama_mimi.corpora.source import Row, reading

MANIFEST = "manifest.json"
PLAN = "tokenization.json"
NOTES = b"llama_mimi"  # key of a shard's notes (JSON) in its Parquet metadata
FORMAT = 2
CLIPS_PER_GROUP = 256  # rows in a row group: 0.7 MB for clips of 14 s at 8 levels
# Fields of `CodedClip` that are stored as columns if a shard's notes name them.
OPTIONAL_COLUMNS = {
    "text": pa.string(),
    "speaker": pa.string(),
    "audio_hash": pa.binary(),
    "audio_warnings": pa.list_(pa.string()),
}


def encode_clips(codec: MimiCodec, clips: Sequence[Any]) -> list[Any]:
    """Replace the audio of each `CodedClip` by codes; items without audio are returned unchanged."""
    encoded = list(clips)
    places = [place for place, clip in enumerate(clips) if isinstance(clip, CodedClip) and len(clip.samples_S)]
    codes = codec.encode_many([torch.from_numpy(clips[place].samples_S) for place in places])
    for place, codes_TQ in zip(places, codes, strict=True):
        no_samples = np.empty(0, np.float32)
        encoded[place] = replace(clips[place], codes_TQ=codes_TQ.numpy().astype(np.uint16), samples_S=no_samples)
    return encoded


@dataclass
class CodeCorpus:
    """Reader of a tokenised corpus; a unit is a row group of a shard."""

    name: str  # folder
    codec: str  # hub id or folder; must have the weights that encoded the corpus
    num_quantizers: int  # number of levels to read (Q), at most the stored number
    sliding_window: bool = True  # setting of the codec; must equal the stored setting
    _: KW_ONLY
    with_text: bool = False  # skip rows without a transcript
    max_frames: int | None = None  # longer clips are cut

    def __post_init__(self) -> None:
        self.manifest = read_manifest(self.name)
        self._check()
        self._columns = ["id", "codes", "is_cut", *(["text"] if self.with_text else [])]
        size, shards = self.manifest["clips_per_group"], self.manifest["shards"]
        units = [
            (number, first // size, min(size, shard["clips"] - first))
            for number, shard in enumerate(shards)
            for first in range(0, shard["clips"], size)
        ]
        if not units:
            raise UserError(f"the tokenised corpus '{self.name}' contains 0 clips; tokenise another corpus")
        self.fingerprint = digest([[shard["file"], shard["clips"], shard["bytes"]] for shard in shards])
        # Shard, row group and number of rows of each unit, each (U,).
        self._shard_U, self._group_U, self.rows_per_unit = np.array(units, dtype=np.int64).T

    def mean_seconds(self, max_audio_seconds: float) -> float:
        """Return the mean length of the clips if they are cut at ``max_audio_seconds`` (exact for a whole number)."""
        total = sum(n * min(seconds / n, max_audio_seconds) for n, seconds in self.manifest["by_second"] if n)
        return total / self.manifest["clips"]

    def read(self, unit: int) -> list[Row]:
        """Return the rows of a unit; raise a `UserError` if the shard is damaged."""
        path = f"{self.name.rstrip('/')}/{self.manifest['shards'][self._shard_U[unit]]['file']}"
        table, size = read_shard(path, self._columns, int(self._group_U[unit])), self.manifest["codec"]["codebook_size"]
        if (highest := pc.max(pc.list_flatten(pc.list_flatten(table["codes"]))).as_py() or 0) >= size:
            problem = f"'{path}' contains the code {highest}, outside the codebook of {size} codes"
            raise UserError(f"{problem}; the shard is damaged: tokenise the corpus again")
        return coded_rows(table, self.num_quantizers)

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Convert a row, as returned by `read`, to a list of one clip."""
        text = row.get("text")
        if self.with_text and not text:
            return [SkippedClip("no text", f"'{row['id']}' has no text", is_filtered=True)]
        codes_TQ = row["codes"][: self.max_frames].copy()  # a view would keep the unit in memory
        is_cut = row["is_cut"] or len(codes_TQ) < len(row["codes"])
        return [CodedClip(row["id"], codes_TQ, 0.0, is_cut, text)]

    def _check(self) -> None:
        made_by, what = self.manifest["codec"], f"the tokenised corpus '{self.name}'"
        if made_by["num_quantizers"] < self.num_quantizers:
            problem = f"{what} has {made_by['num_quantizers']} levels, fewer than codec.num_quantizers"
            remedy = "lower codec.num_quantizers, or tokenise the corpus again with more levels"
            raise UserError(f"{problem} = {self.num_quantizers}; {remedy}")
        remedy = f"use the codec '{made_by['name']}' and the earlier codec.sliding_window, or tokenise the corpus again"
        own = {"sha256": codec_hash(self.codec), "sliding_window": self.sliding_window}
        if made_by["sliding_window"] == "unknown":  # imported codes
            del own["sliding_window"]
        require_same({"codec": made_by}, {"codec": own}, what, remedy)
        if self.with_text and "text" not in self.manifest["columns"]:
            raise UserError(f"{what} does not contain text; remove the tasks that need text from data.tasks")
        sizes = sizes_in(self.name)
        for shard in self.manifest["shards"]:
            if (size := sizes.get(shard["file"])) != shard["bytes"]:
                problem = "is missing" if size is None else f"has {size:,} bytes, not {shard['bytes']:,}"
                remedy = "copy the shard again, or delete the shard and re-run scripts/tokenize_corpus.py"
                raise UserError(f"the shard '{shard['file']}' of '{self.name}' {problem}; {remedy}")


def coded_rows(table: pa.Table, num_quantizers: int | None = None) -> list[Row]:
    """Return the rows of a shard's table, with codes as arrays (T, Q)."""
    codes = table["codes"].combine_chunks()
    frames_NQ = codes.flatten().flatten().to_numpy().reshape(-1, codes.type.value_type.list_size)[:, :num_quantizers]
    bounds = (codes.offsets.to_numpy() - codes.offsets[0].as_py()).tolist()
    rows = table.drop_columns(["codes"]).to_pylist()
    return [row | {"codes": frames_NQ[start:end]} for row, (start, end) in zip(rows, pairwise(bounds), strict=True)]


def read_shard(path: str, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
    """Read a shard, or one row group of it, and verify checksums; the table's metadata contains the notes."""
    fs, bare = file_system(path)
    with reading(path, "Parquet file"), fs.open(bare) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        table = file.read(columns) if group is None else file.read_row_group(group, columns)
        return table if columns is None else table.select(columns)


def is_store(path: str) -> bool:
    """Return True for the folder of a tokenised corpus, even if the tokenisation is unfinished."""
    fs, folder = file_system(path)
    if fs.exists(f"{folder.rstrip('/')}/{PLAN}"):
        return True
    try:
        return "codec" in (read_json(path, MANIFEST) or ())
    except UserError:  # a file of another program
        return False


def read_manifest(path: str) -> dict[str, Any]:
    """Return the manifest of a tokenised corpus; raise a `UserError` if the file is missing or has another format."""
    manifest = read_json(path, MANIFEST)
    if manifest is None:
        problem = f"'{path}/{MANIFEST}' is missing, because the tokenisation is not finished"
        raise UserError(f"{problem}; re-run scripts/tokenize_corpus.py")
    if (found := manifest.get("format")) != FORMAT:
        raise UserError(f"'{path}/{MANIFEST}' has format {found!r}, not {FORMAT}; tokenise the corpus again")
    return manifest


def shard_bytes(clips: Sequence[CodedClip], num_quantizers: int, notes: dict[str, Any]) -> bytes:
    """Return a shard as the bytes of a Parquet file; ``notes["columns"]`` names the columns."""
    codes = np.concatenate([clip.codes_TQ for clip in clips] or [np.empty((0, num_quantizers), np.uint16)])
    offsets = np.cumsum([0, *(len(clip.codes_TQ) for clip in clips)], dtype=np.int32)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).reshape(-1)), num_quantizers)
    columns = {
        "id": pa.array([clip.name for clip in clips], pa.string()),
        "codes": pa.ListArray.from_arrays(pa.array(offsets), frames),
        "duration": pa.array([clip.seconds for clip in clips], pa.float64()),
        "is_cut": pa.array([clip.is_cut for clip in clips], pa.bool_()),
    }
    for name, kind in OPTIONAL_COLUMNS.items():
        if name in notes["columns"]:
            columns[name] = pa.array([getattr(clip, name) for clip in clips], kind)
    return table_bytes(pa.table(columns), notes)


def table_bytes(table: pa.Table, notes: dict[str, Any]) -> bytes:
    """Return a shard's table as the bytes of a Parquet file."""
    stream = io.BytesIO()
    table = table.replace_schema_metadata({NOTES: json.dumps(notes)})
    pq.write_table(table, stream, row_group_size=CLIPS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def by_second(seconds_N: np.ndarray) -> list[list[float]]:
    """For each range of clip lengths (0 to 1 s, 1 to 2 s, ...), return the number and total length of the clips."""
    whole_N = seconds_N.astype(np.int64)
    return np.stack([np.bincount(whole_N), np.bincount(whole_N, seconds_N)], axis=1).tolist()
