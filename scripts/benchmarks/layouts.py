"""Write the same clips as several corpora, one in each supported format and published layout."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Dataset

from llama_mimi.audio.reading import read_audio
from llama_mimi.common.files import find_files

RATE_HZ = 24_000
Row = dict[str, Any]
Rows = list[Row]


def lossless_rows(corpus: str, limit: int, max_seconds: float) -> Rows:
    """Return the labels and FLAC audio of the first clips of a Parquet corpus. All layouts use the same FLAC audio."""
    rows: Rows = []
    for path in find_files(corpus, (".parquet",)):
        for row in pq.read_table(path).slice(0, limit - len(rows)).to_pylist():
            samples_S = read_audio(row["audio"]["bytes"], RATE_HZ, max_seconds=max_seconds).samples_S.numpy()
            stream = io.BytesIO()
            soundfile.write(stream, (samples_S * 32767).astype(np.int16), RATE_HZ, format="FLAC")
            name = f"{len(rows)}-{len(rows)}-{len(rows):04d}"
            rows.append({"name": name, "bytes": stream.getvalue(), **labels_of(row)})
    return rows


def labels_of(row: Row) -> Row:
    """Return the text and the speaker of a row."""
    return {key: row[key] for key in ("text", "speaker")}


def in_parquet(folder: Path, rows: Rows) -> Path:
    table = [{"id": r["name"], "audio": {"bytes": r["bytes"], "path": None}, **labels_of(r)} for r in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "train.parquet")
    return folder


def in_tar(folder: Path, rows: Rows, shards: int = 2) -> Path:
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]:
                add(tar, f"{row['name']}.flac", row["bytes"])
                add(tar, f"{row['name']}.json", json.dumps({"id": row["name"], **labels_of(row)}).encode())
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def in_metadata(folder: Path, rows: Rows) -> Path:
    lines = []
    for row in rows:
        name = f"{row['speaker']}/{row['name']}.flac"
        (folder / row["speaker"]).mkdir(exist_ok=True)
        (folder / name).write_bytes(row["bytes"])
        lines.append(json.dumps({"file_name": name, **labels_of(row)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def in_librispeech(folder: Path, rows: Rows) -> Path:
    for row in rows:
        speaker, chapter, _ = row["name"].split("-")
        chapter_folder = folder / speaker / chapter
        chapter_folder.mkdir(parents=True, exist_ok=True)
        (chapter_folder / f"{row['name']}.flac").write_bytes(row["bytes"])
        with (chapter_folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
            file.write(f"{row['name']} {row['text']}\n")
    return folder


def in_json_files(folder: Path, rows: Rows) -> Path:
    for row in rows:
        (folder / f"{row['name']}.flac").write_bytes(row["bytes"])
        (folder / f"{row['name']}.json").write_text(json.dumps(labels_of(row)))
    return folder


def in_manifest(folder: Path, rows: Rows) -> Path:
    lines = []
    for row in rows:
        (folder / f"{row['name']}.flac").write_bytes(row["bytes"])
        lines.append(json.dumps({"audio_filepath": f"{row['name']}.flac", "id": row["name"], **labels_of(row)}))
    (folder / "train.jsonl").write_text("\n\n".join(lines) + "\n")
    return folder / "train.jsonl"


def in_parts_of_one_recording(folder: Path, rows: Rows) -> Path:
    """Write one long recording, and a manifest in which each clip is a part of the recording."""
    lines, parts, offset = [], [], 0.0
    for row in rows:
        parts.append(soundfile.read(io.BytesIO(row["bytes"]), dtype="int16")[0])
        seconds = len(parts[-1]) / RATE_HZ
        values = {"audio_filepath": "long.wav", "offset": offset, "duration": seconds, "id": row["name"]}
        lines.append(json.dumps(values | labels_of(row)))
        offset += seconds
    soundfile.write(folder / "long.wav", np.concatenate(parts), RATE_HZ)
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def in_arrow(folder: Path, rows: Rows) -> Path:
    dataset(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def dataset(rows: Rows) -> Dataset:
    table = [{"id": r["name"], "audio": {"bytes": r["bytes"], "path": None}, **labels_of(r)} for r in rows]
    return Dataset.from_list(table).cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())


LAYOUTS: dict[str, Callable[[Path, Rows], Path]] = {
    "parquet": in_parquet,
    "tar": in_tar,
    "folder with metadata": in_metadata,
    "LibriSpeech": in_librispeech,
    "folder with JSON": in_json_files,
    "manifest": in_manifest,
    "manifest of parts": in_parts_of_one_recording,
    "Arrow": in_arrow,
}
