"""Tokenised corpora: folders of Parquet shards of codes and a manifest, which training reads in place of audio."""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.audio.mimi import MimiCodec, codec_hash
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.common.files import digest, file_system, read_json, sizes_in
from llama_mimi.common.resume import require_same
from llama_mimi.corpora.clips import AudioClip, SkippedClip
from llama_mimi.corpora.source import Row

MANIFEST = "manifest.json"
PLAN = "tokenization.json"
NOTES = b"llama_mimi"  # key of a shard's JSON notes in its Parquet metadata
FORMAT = 2
CLIPS_PER_GROUP = 256  # rows of a row group, which is read at once: 0.7 MB of codes for clips of 14 s at 8 levels
# Columns that are written if a shard's notes name them, each from the field of `CodedClip` of the same name.
OPTIONAL_COLUMNS = {
    "text": pa.string(),
    "speaker": pa.string(),
    "audio_hash": pa.binary(),
    "audio_warnings": pa.list_(pa.string()),
}


@dataclass(frozen=True)
class CodedClip:
    """A clip as codes, one row of a shard; ``audio_warnings`` as `llama_mimi.audio.reading.Waveform`."""

    name: str  # id or path
    codes_TQ: np.ndarray  # uint16
    seconds: float  # of the audio; 0 for a clip that was read from codes
    is_cut: bool  # the recording is longer
    text: str | None = None
    speaker: str | None = None
    audio_warnings: tuple[str, ...] = ()
    audio_hash: bytes | None = None  # of the samples, 16 bytes


def encode_clips(
    codec: MimiCodec, clips: Sequence[AudioClip | CodedClip | SkippedClip]
) -> tuple[list[CodedClip | SkippedClip], float]:
    """Return the clips with codes in place of audio, and the seconds that encoding took."""
    start = time.perf_counter()
    codes = iter(codec.encode_many([clip.samples_S for clip in clips if isinstance(clip, AudioClip)]))
    encoded: list[CodedClip | SkippedClip] = []
    for clip in clips:
        if isinstance(clip, AudioClip):
            codes_TQ, seconds = next(codes).numpy().astype(np.uint16), len(clip.samples_S) / codec.sample_rate_hz
            labels = clip.text, clip.speaker, clip.audio_warnings, clip.audio_hash
            encoded.append(CodedClip(clip.name, codes_TQ, seconds, clip.is_cut, *labels))
        else:
            encoded.append(clip)
    return encoded, time.perf_counter() - start


class CodeCorpus:
    """A finished tokenised corpus; a unit is a row group of a shard.

    Args:
        codec, sliding_window: of training; both must be those that made the codes.
        num_quantizers: Q of training, at most the stored number.
        with_text: skip rows without a transcript.
        max_frames: longer clips are cut.

    Raises:
        UserError: unfinished, damaged, incomplete, of another codec, too few levels, or without the text wanted.
    """

    def __init__(
        self,
        path: str,
        codec: str,
        num_quantizers: int,
        sliding_window: bool = True,
        *,
        with_text: bool = False,
        max_frames: int | None = None,
    ) -> None:
        self.name, self._num_quantizers = path, num_quantizers
        self._with_text, self._max_frames = with_text, max_frames
        self.manifest = read_manifest(path)
        self._check(codec, sliding_window)
        self._columns = ["id", "codes", "is_cut", *(["text"] if with_text else [])]
        size, shards = self.manifest["clips_per_group"], self.manifest["shards"]
        units = [
            (number, first // size, min(size, shard["clips"] - first))
            for number, shard in enumerate(shards)
            for first in range(0, shard["clips"], size)
        ]
        if not units:
            raise UserError(f"the tokenised corpus '{path}' has no clips; tokenise another corpus")
        self.fingerprint = digest([[shard["file"], shard["clips"], shard["bytes"]] for shard in shards])
        # The shard of each unit, the number of its row group there, and its rows, each (U,).
        self._shard_U, self._group_U, self.rows_per_unit = np.array(units, dtype=np.int64).T

    def mean_seconds(self, max_audio_seconds: float) -> float:
        """Mean duration of a clip cut at ``max_audio_seconds`` (exact for whole seconds)."""
        total = sum(n * min(seconds / n, max_audio_seconds) for n, seconds in self.manifest["by_second"] if n)
        return total / self.manifest["clips"]

    def read(self, unit: int) -> "CodedRows":
        """Read a unit; raise a `UserError` if its shard is damaged."""
        path = f"{self.name.rstrip('/')}/{self.manifest['shards'][self._shard_U[unit]]['file']}"
        rows = CodedRows(read_shard(path, self._columns, int(self._group_U[unit])), self._num_quantizers)
        size = self.manifest["codec"]["codebook_size"]
        if (highest := rows.frames_NQ.max(initial=0)) >= size:
            problem = f"'{path}' contains the code {highest}, outside the codebook of {size}"
            raise UserError(f"{problem}; the shard is damaged; tokenise it again")
        return rows

    def clips(self, row: Row) -> list[CodedClip | SkippedClip]:
        """Return the clip of a row that `read` returned."""
        text = row.get("text")
        if self._with_text and not text:
            return [SkippedClip("no text", f"'{row['id']}' has no text")]
        codes_TQ = row["codes"][: self._max_frames].copy()  # a view would keep the unit in memory
        is_cut = row["is_cut"] or len(codes_TQ) < len(row["codes"])
        return [CodedClip(row["id"], codes_TQ, 0.0, is_cut, text)]

    def _check(self, codec: str, sliding_window: bool) -> None:
        made_by, what = self.manifest["codec"], f"the tokenised corpus '{self.name}'"
        if made_by["num_quantizers"] < self._num_quantizers:
            problem = f"{what} has {made_by['num_quantizers']} levels, fewer than codec.num_quantizers"
            raise UserError(f"{problem} = {self._num_quantizers}; lower that, or tokenise with more levels")
        remedy = f"set codec.name to '{made_by['name']}' and codec.sliding_window as before, or tokenise again"
        own = {"sha256": codec_hash(codec), "sliding_window": sliding_window}
        require_same({"codec": made_by}, {"codec": own}, what, remedy)
        if self._with_text and "text" not in self.manifest["columns"]:
            raise UserError(f"{what} has no text, which data.task = 'tts' needs; use 'a2a'")
        sizes = sizes_in(self.name)
        for shard in self.manifest["shards"]:
            if (size := sizes.get(shard["file"])) != shard["bytes"]:
                problem = "is missing" if size is None else f"has {size:,} bytes, not {shard['bytes']:,}"
                remedy = "copy it again, or delete it and start scripts/tokenize_corpus.py again"
                raise UserError(f"the shard '{shard['file']}' of '{self.name}' {problem}; {remedy}")


class CodedRows(Sequence[Row]):
    """Rows of a table of a shard, each made when it is indexed; ``frames_NQ`` are the frames of all rows."""

    def __init__(self, table: pa.Table, num_quantizers: int | None = None) -> None:
        codes = table["codes"].combine_chunks()
        frames_NQ = codes.flatten().flatten().to_numpy().reshape(-1, codes.type.value_type.list_size)
        self.frames_NQ = frames_NQ[:, :num_quantizers]
        self._starts = (codes.offsets.to_numpy() - codes.offsets[0].as_py()).tolist()
        self._columns = {name: table[name].to_pylist() for name in table.column_names if name != "codes"}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        values = {name: column[row] for name, column in self._columns.items()}
        return values | {"codes": self.frames_NQ[self._starts[row] : self._starts[row + 1]]}


def read_shard(path: str, columns: Sequence[str] | None = None, group: int | None = None) -> pa.Table:
    """Read a row group of a shard, or all rows, with its notes in the metadata; pages are compared with checksums.

    Raises:
        UserError: the shard is damaged, or a column is missing.
    """
    try:
        fs, bare = file_system(path)
        with fs.open(bare) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            table = file.read(columns) if group is None else file.read_row_group(group, columns)
        return table if columns is None else table.select(columns)
    except (OSError, pa.ArrowException, KeyError) as error:
        problem = f"'{path}' is not a readable Parquet file ({first_line(error)})"
        raise UserError(f"{problem}; copy it again, or delete it and tokenise again") from error


def is_store(path: str) -> bool:
    """Return True for a folder that tokenisation has written to, finished or not."""
    fs, folder = file_system(path)
    if fs.exists(f"{folder.rstrip('/')}/{PLAN}"):
        return True
    try:
        return "codec" in (read_json(path, MANIFEST) or ())
    except UserError:  # another program's
        return False


def read_manifest(path: str) -> dict[str, Any]:
    """Return the manifest of a tokenised corpus; raise a `UserError` if it is unfinished or of another format."""
    manifest = read_json(path, MANIFEST)
    if manifest is None:
        problem = f"'{path}' has no {MANIFEST}: its tokenisation is not finished"
        raise UserError(f"{problem}; start scripts/tokenize_corpus.py again")
    if (found := manifest.get("format")) != FORMAT:
        raise UserError(f"'{path}/{MANIFEST}' has format {found!r}, not {FORMAT}; tokenise the corpus again")
    return manifest


def shard_bytes(clips: Sequence[CodedClip], num_quantizers: int, notes: dict[str, Any]) -> bytes:
    """Return a shard as a Parquet file; ``notes`` (JSON) contain its columns."""
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
    """Return the table of a shard as a Parquet file."""
    stream = io.BytesIO()
    table = table.replace_schema_metadata({NOTES: json.dumps(notes)})
    pq.write_table(table, stream, row_group_size=CLIPS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def by_second(seconds_N: np.ndarray) -> list[list[float]]:
    """Return the number and the total seconds of clips that last less than 1 s, less than 2 s, and so on."""
    whole_N = seconds_N.astype(np.int64)
    return np.stack([np.bincount(whole_N), np.bincount(whole_N, seconds_N)], axis=1).tolist()
