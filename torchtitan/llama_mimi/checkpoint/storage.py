"""Distributed checkpoints (DCP) with checksums. Code in a checkpoint is never executed.

The index of DCP contains the CRC-32 of each entry. The CRC-32 of the index is appended to the index file; pickle
ignores appended bytes, so unmodified DCP can read these checkpoints.
"""

import io
import os
import pickle
import zlib
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _FileSystemWriter, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from tqdm import tqdm

from llama_mimi.common.command_line import is_first_rank
from llama_mimi.common.errors import UserError, first_line

METADATA = ".metadata"
_SEAL = b"crc32:%08x"
_BLOCK_BYTES = 1 << 20
_DCP = "torch.distributed.checkpoint"
# Classes and functions in an index of DCP, besides dtypes.
_RECORDS = {"torch.Size", "pathlib.PosixPath", "torch.serialization._get_layout", f"{_DCP}.filesystem._StorageInfo"}
_RECORDS |= {f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")}
_RECORDS |= {f"{_DCP}.metadata.{kind}StorageMetadata" for kind in ("Bytes", "Chunk", "Tensor")}
_RECORDS.add(f"{_DCP}.metadata._MEM_FORMAT_ENCODING")


class CheckedWriter(_FileSystemWriter):
    """DCP's file writer, with checksums."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        self.fs = _SealingFileSystem()
        self.transforms: _ChecksumStreams = _ChecksumStreams()

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        (self.path / METADATA).unlink(missing_ok=True)  # while a step is saved again, it is incomplete
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # on a full disk torch.save raises a second error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        for result in written.value():
            result.storage_data.crc32 = self.transforms.of_entry[result.index].crc32
        return written


class _ChecksumStreams(_StorageWriterTransforms):
    def __init__(self) -> None:
        super().__init__()
        self.of_entry: dict[Any, _ChecksumStream] = {}

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> tuple[IO[bytes], list[str]]:
        stream = self.of_entry[write_item.index] = _ChecksumStream(raw_stream)
        return super().transform_save_stream(write_item, stream)


class _ChecksumStream:
    """Stream that writes an entry to its file and updates the checksum."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.flush, self.crc32 = stream, stream.flush, 0

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        return self._stream.write(content)


class _SealingFileSystem(FileSystem):
    """File system that appends a checksum to a file before DCP renames the file. DCP renames only the index."""

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        with Path(path).open("rb+", buffering=0) as file:
            file.write(_SEAL % zlib.crc32(file.read()))
            os.fsync(file.fileno())
        super().rename(path, new_path)


class CheckedReader(FileSystemReader):
    """DCP's file reader, changed to not execute code in the index. ``verify``: verify the checksums of entries."""

    def __init__(self, path: str | os.PathLike, verify: bool = True) -> None:
        super().__init__(path)
        self._verify = verify

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index; raise a `UserError` if the index is damaged or has objects that DCP does not write."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            content = path.read_bytes()
            metadata: Metadata = _IndexUnpickler(io.BytesIO(content)).load()
            pickled, seal = content[: -len(_SEAL % 0)], content[-len(_SEAL % 0) :]
            has_checksums = any(hasattr(info, "crc32") for info in (metadata.storage_data or {}).values())
            if (has_checksums or seal.startswith(_SEAL[:6])) and seal != _SEAL % zlib.crc32(pickled):
                raise ValueError("its checksum does not match")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
        except Exception as error:  # a damaged pickle can raise any error
            raise UserError(f"'{path}' is missing or damaged ({first_line(error)})") from error
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        num_bytes = sum(self.storage_data[item.storage_index].length for item in plan.items)
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 2, "desc": f"reading {self.path}"}
        with tqdm(total=num_bytes, disable=not is_first_rank(), **options) as self._progress:
            return super().read_data(plan, planner)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        if self._verify:
            _check_entry(file, sinfo)
        self._progress.update(sinfo.length)
        return super()._slice_file(file, sinfo)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # name in Python 3.13
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or f"{module}.{name}" in _RECORDS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a DCP index")


class PlainLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner, changed to not execute code in entries that are not tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"the entry '{name}' contains objects other than numbers, text and tensors") from error
        set_element(self.original_state_dict, self.mappings[name], loaded)


def check_step(step: Path, verify: bool) -> Metadata:
    """Return the index of a step; raise a `UserError` if a file is missing, truncated or, with ``verify``, damaged."""
    metadata = CheckedReader(step).read_metadata()
    entries = defaultdict(list)
    for info in (metadata.storage_data or {}).values():
        entries[step / info.relative_path].append(info)
    for path, infos in entries.items():
        num_bytes = max(info.offset + info.length for info in infos)
        if (found := path.stat().st_size if path.is_file() else 0) < num_bytes:
            raise UserError(f"'{path}' is missing or truncated: it has {found:,} of {num_bytes:,} bytes")
        if verify:
            try:
                with path.open("rb") as file:
                    for info in infos:
                        _check_entry(file, info)
            except OSError as error:
                raise UserError(f"'{path}' cannot be read ({error.strerror})") from error
    return metadata


def first_failure(error: CheckpointException) -> BaseException:
    """Return the first `UserError` among the errors of all ranks, else the first error."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if isinstance(failure, UserError)), failures[0])


def _check_entry(file: IO[bytes], info: Any) -> None:
    if not hasattr(info, "crc32"):
        return
    crc32, left = 0, info.length
    file.seek(info.offset)
    while left and (block := file.read(min(left, _BLOCK_BYTES))):
        crc32, left = zlib.crc32(block, crc32), left - len(block)
    if crc32 != info.crc32:
        raise UserError(f"'{file.name}' is damaged: a checksum does not match")
