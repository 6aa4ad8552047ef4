"""Tokenised corpora: shards of codes that training reads in place of audio.

A tokenised corpus is a folder (any fsspec path) of Parquet shards ``shard-*.parquet`` with one row a clip, which
`datasets` opens as they are, and a manifest that is written last. Columns: ``id``, ``codes`` (uint16, T x Q),
``duration`` in seconds, ``is_cut`` (the recording went on), ``audio_hash`` of the samples, and ``text`` and ``speaker``
where the corpus has them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama_mimi.audio.mimi import codec_hash, load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest, file_system, parse_json, read_json, sizes_in
from llama_mimi.common.resume import require_same
from llama_mimi.data.parquet_corpus import unreadable

MANIFEST = "manifest.json"
PLAN = "tokenization.json"
# Key of what a shard says about itself, in its Parquet metadata.
NOTES = b"llama_mimi"
FORMAT = 2
# Rows of a row group, the smallest unit that is read: 0.7 MB of codes for clips of 14 s at 8 levels.
CLIPS_PER_GROUP = 256
REQUIRED_KEYS = {"codec", "columns", "clips", "by_second", "clips_per_group", "shards"}
OPTIONAL_COLUMNS = ("text", "speaker")
AUDIO_HASH = "audio_hash"


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


class CodeCorpus:
    """A finished store, read by row group.

    Args:
        codec, sliding_window: of training; both must be those that made the codes.
        num_quantizers: Q of training, at most the stored number.
        with_text: rows need transcripts.

    Raises:
        UserError: unfinished, damaged, incomplete, of another codec, too few levels, or without the text wanted.
    """

    def __init__(
        self, path: str, codec: str, num_quantizers: int, sliding_window: bool = True, *, with_text: bool
    ) -> None:
        self.name, self._num_quantizers = path, num_quantizers
        self.manifest = read_manifest(path)
        self._check(codec, sliding_window, with_text)
        self._codebook_size: int = self.manifest["codec"]["codebook_size"]
        self._columns = ["id", "codes", "is_cut", *(["text"] if with_text else [])]
        clips = [shard["clips"] for shard in self.manifest["shards"]]
        per_group = self.manifest["clips_per_group"]
        groups = [
            (shard, group, min(per_group, n - group * per_group))
            for shard, n in enumerate(clips)
            for group in range(-(-n // per_group))
        ]
        if not groups:
            raise UserError(f"the tokenised corpus '{path}' has no clips; tokenise another corpus")
        self.fingerprint = digest(
            [[shard["file"], shard["clips"], shard["bytes"]] for shard in self.manifest["shards"]]
        )
        self._shard_G, self._number_G, self.rows_per_group = np.array(groups, dtype=np.int64).reshape(-1, 3).T

    def mean_seconds(self, max_audio_seconds: float) -> float:
        """Mean duration of a clip cut at ``max_audio_seconds`` (exact for whole seconds)."""
        total = sum(n * min(seconds / n, max_audio_seconds) for n, seconds in self.manifest["by_second"] if n)
        return total / self.manifest["clips"]

    def read_group(self, group: int) -> "CodeGroup":
        """One row group.

        Raises:
            UserError: the shard is damaged, or holds what no codec gives.
        """
        path = f"{self.name.rstrip('/')}/{self.manifest['shards'][self._shard_G[group]]['file']}"
        found = read_codes(path, self._columns, self.manifest["codec"]["num_quantizers"], int(self._number_G[group]))
        if len(found.starts) - 1 != self.rows_per_group[group]:
            raise UserError(f"'{path}' does not hold the clips that {MANIFEST} says; copy or make it anew")
        if len(found.frames_NQ) and (highest := int(found.frames_NQ.max())) >= self._codebook_size:
            raise UserError(
                f"'{path}' holds the code {highest}, outside the codebook of {self._codebook_size}; "
                "the shard is damaged; tokenise it again"
            )
        return CodeGroup(found.columns, found.starts, found.frames_NQ[:, : self._num_quantizers])

    def _check(self, codec: str, sliding_window: bool, with_text: bool) -> None:
        made_by = self.manifest["codec"]
        if made_by["num_quantizers"] < self._num_quantizers:
            raise UserError(
                f"the tokenised corpus '{self.name}' has {made_by['num_quantizers']} levels, fewer than "
                f"codec.num_quantizers = {self._num_quantizers}; lower that, or tokenise with more levels"
            )
        load_codec_config(codec, self._num_quantizers)
        require_same(
            {"codec.sha256": made_by["sha256"], "codec.sliding_window": made_by["sliding_window"]},
            {"codec.sha256": codec_hash(codec), "codec.sliding_window": sliding_window},
            f"the tokenised corpus '{self.name}'",
            f"set codec.name to '{made_by['name']}' and codec.sliding_window as before, or tokenise again",
        )
        if with_text and "text" not in self.manifest["columns"]:
            raise UserError(f"the tokenised corpus '{self.name}' has no text, which data.task = 'tts' needs; use 'a2a'")
        sizes = sizes_in(self.name)
        for shard in self.manifest["shards"]:
            if (size := sizes.get(shard["file"])) != shard["bytes"]:
                raise UserError(
                    f"the shard '{shard['file']}' of '{self.name}' "
                    + ("is missing" if size is None else f"has {size:,} bytes, not {shard['bytes']:,}")
                    + "; copy it again, or delete it and start scripts/tokenize_corpus.py again"
                )


@dataclass(frozen=True)
class CodeGroup:
    """One row group in memory: its other columns, the frames (N, Q) of all rows, and where each row's frames start."""

    columns: dict[str, list[Any]]
    starts: list[int]
    frames_NQ: np.ndarray

    def codes(self, row: int) -> np.ndarray:
        """codes_TQ of one clip."""
        return self.frames_NQ[self.starts[row] : self.starts[row + 1]]


def read_codes(path: str, columns: Sequence[str], num_quantizers: int, group: int | None = None) -> CodeGroup:
    """Read a row group of a shard, or all rows; ``columns`` contain "codes", and ``num_quantizers`` are stored.

    Raises:
        UserError: the shard is damaged.
    """
    try:
        fs, bare = file_system(path)
        with fs.open(bare) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            table = file.read(columns) if group is None else file.read_row_group(group, columns=columns)
        codes = table["codes"].combine_chunks()
        if codes.null_count:
            raise ValueError("rows without codes")
        frames_NQ = codes.flatten().flatten().to_numpy().reshape(-1, num_quantizers)
        starts = codes.offsets.to_numpy() - codes.offsets[0].as_py()
        others = {name: table[name].to_pylist() for name in columns if name != "codes"}
    except (OSError, pa.ArrowException, ValueError, AttributeError, KeyError) as error:  # damage takes many forms
        raise unreadable(path, error) from error
    return CodeGroup(others, starts.tolist(), frames_NQ)


def is_store(path: str) -> bool:
    """Return True for a folder that tokenisation has written to, finished or not."""
    fs, folder = file_system(path)
    if fs.exists(f"{folder.rstrip('/')}/{PLAN}"):
        return True
    try:
        return "codec" in parse_json(fs.cat_file(f"{folder.rstrip('/')}/{MANIFEST}"))
    except (OSError, ValueError, TypeError):  # no such file, or another program's
        return False


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a finished tokenised corpus.

    Raises:
        UserError: there is none yet, or it is of another format.
    """
    manifest = read_json(path, MANIFEST)
    if manifest is None:
        raise UserError(
            f"'{path}' has no {MANIFEST}: its tokenisation is not finished; start scripts/tokenize_corpus.py again"
        )
    if manifest.get("format") != FORMAT or not manifest.keys() >= REQUIRED_KEYS:
        raise UserError(
            f"'{path}/{MANIFEST}' has format {manifest.get('format')!r}, not {FORMAT}; tokenise the corpus anew"
        )
    return manifest


def shard_bytes(clips: Sequence[CodedClip], num_quantizers: int, notes: dict[str, Any]) -> bytes:
    """A shard as a Parquet file, with ``notes`` (JSON) in its metadata."""
    codes = np.concatenate([clip.codes_TQ for clip in clips] or [np.empty((0, num_quantizers), np.uint16)])
    offsets = np.cumsum([0, *(len(clip.codes_TQ) for clip in clips)], dtype=np.int32)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(codes.astype(np.uint16).reshape(-1)), num_quantizers)
    columns = {
        "id": pa.array([clip.name for clip in clips], pa.string()),
        "codes": pa.ListArray.from_arrays(pa.array(offsets), frames),
        "duration": pa.array([clip.seconds for clip in clips], pa.float32()),
        "is_cut": pa.array([clip.is_cut for clip in clips], pa.bool_()),
    }
    for name in notes["columns"]:
        if name in OPTIONAL_COLUMNS:
            columns[name] = pa.array([getattr(clip, name) for clip in clips], pa.string())
    if AUDIO_HASH in notes["columns"]:
        columns[AUDIO_HASH] = pa.array([clip.audio_hash for clip in clips], pa.binary())
    table = pa.table(columns).replace_schema_metadata({NOTES: json.dumps(notes)})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=CLIPS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return stream.getvalue()
