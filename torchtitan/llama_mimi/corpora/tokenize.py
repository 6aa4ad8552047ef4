"""Tokenise a corpus, or import its codes, into shards on any number of ranks. A re-run writes the missing shards."""

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from llama_mimi.audio.mimi import DTYPES, MimiCodec, codec_hash, whole_frames
from llama_mimi.audio.reading import RESAMPLER
from llama_mimi.common import files
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, distributed_context
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import require_same
from llama_mimi.common.versions import versions
from llama_mimi.corpora import code_shards as shards
from llama_mimi.corpora.clips import MAX_NAMED_CLIPS, AudioReader, CodedClip, SkippedClip, is_too_many, read_in_workers
from llama_mimi.corpora.formats import CORPORA, open_source
from llama_mimi.corpora.options import ImportOptions, TokenizationOptions
from llama_mimi.corpora.source import Source, Unit
from llama_mimi.corpora.text_codes import CodesReader
from llama_mimi.corpora.where import RowFilter

Options = TokenizationOptions | ImportOptions
Reader = AudioReader | CodesReader
Codec = MimiCodec | CodesReader  # the reader states the properties of the codec that computed the codes

READER = 3  # version of the rules that skip and filter clips; all shards of a folder must have the same version
CLIPS_PER_SHARD, MIN_SHARDS = 2048, 64  # defaults: 3 MB per shard for clips of 14 s, and enough shards for many ranks
ROWS_PER_CHUNK = 100  # rows that a worker reads, and the codec encodes, at once
SHARD_READERS = 16  # number of threads; a remote read is mostly waiting
# Options that do not change the shards.
FREE = "corpus dataset_path split output_dir codec num_workers max_skip_fraction".split()


@dataclass(frozen=True)
class Job:
    """Consecutive units that are written to one shard, or one tar file that is written to several shards.

    Jobs depend only on the corpus and on --clips_per_shard, and shards are written atomically. So a re-run on any
    number of ranks finds the missing rows by the names of the shards.
    """

    number: int
    units: range
    num_bytes: int
    rows_per_part: int | None  # rows in each shard of a tar, except the last
    first_part: int = 0  # first missing shard of a tar

    def shard(self, part: int, *, is_end: bool) -> str:
        return f"shard-{self.number:06d}-{part:04d}{'-end' * is_end}.parquet"

    def shards_in(self, names: Container[str]) -> tuple[list[str], bool]:
        """Return the shards that exist before the first missing shard, and True if the job is complete."""
        found: list[str] = []
        while (name := self.shard(len(found), is_end=False)) in names:
            found.append(name)
        end = self.shard(len(found), is_end=True)
        return ([*found, end], True) if end in names else (found, False)


def tokenize_corpus(options: Options) -> None:
    """Tokenise a corpus, import its codes, or write the shards that are missing."""
    corpus, output = os.path.abspath(options.corpus.partition("**")[0]), os.path.abspath(options.output_dir)
    if options.corpus not in CORPORA and os.path.join(output, "").startswith(os.path.join(corpus, "")):
        raise UserError(f"--output_dir '{options.output_dir}' is inside the corpus; choose a folder outside it")
    with distributed_context() as ranks, ExitStack() as resources:
        reader: Reader
        codec: Codec
        if isinstance(options, ImportOptions):
            reader = codec = CodesReader(options)
        else:
            row_filter = RowFilter(options.min_seconds, options.max_seconds, options.where)
            columns = {"text": options.text_column, "speaker": options.speaker_column, **row_filter.columns}
            place = options.corpus, options.dataset_path
            source = open_source(*place, options.audio_column, None, columns, options.split)
            if missing := [column for role, column in row_filter.columns.items() if role not in source.columns]:
                raise UserError(f"'{missing[0]}' in --where is not a column of '{options.corpus}'; correct this name")
            dtype, window = DTYPES[options.dtype], options.codec_sliding_window
            codec = MimiCodec(options.codec, options.num_quantizers, ranks.device, dtype, window)
            reader = AudioReader(
                source,
                sample_rate_hz=codec.sample_rate_hz,
                frame_size=codec.frame_size,
                max_frames=whole_frames(options.max_audio_seconds, codec.config, "--max_audio_seconds"),
                row_filter=row_filter,
                splits=options.long_recordings == "split",
            )
        source = reader.source
        plan, jobs = _plan(options, source, codec), make_jobs(source.units, options.clips_per_shard)

        def resume() -> list[Job]:
            fs, folder = files.file_system(options.output_dir)
            if files.is_local(fs):  # two runs on a remote folder would repeat work, but not damage shards
                resources.enter_context(files.locked(Path(folder) / files.LOCK, "--output_dir"))
            todo = unfinished(options.output_dir, plan, jobs)
            done = f"finished: {len(jobs) - len(todo)} of {len(jobs)} jobs"
            print(f"{done}; columns: {', '.join(plan['columns'])}", flush=True)
            if 0 < len(todo) < ranks.world_size:
                print(f"{ranks.world_size} ranks share {len(todo)} jobs, so some ranks are idle", flush=True)
            return todo

        write_shards(options, ranks, broadcast_from_rank0(resume), reader, codec, plan["columns"])
        ranks.wait()
        if ranks.rank == 0:
            write_manifest(options, plan, source.units, jobs)
            print(f"to use these codes, set --training.dataset or --validation.dataset {options.output_dir}")


def _plan(options: Options, source: Source, codec: Codec) -> dict[str, Any]:
    """Return all settings that change the shards."""
    optional = [name for name in shards.OPTIONAL_COLUMNS if name in source.columns or name.startswith("audio_")]
    return {
        "format": shards.FORMAT,
        "corpus_sha256": source.fingerprint,
        "codec": {
            "sha256": codec_hash(options.codec),
            "num_quantizers": options.num_quantizers,
            "codebook_size": codec.codebook_size,
            "sliding_window": codec.sliding_window,
        },
        "resampler": RESAMPLER if isinstance(codec, MimiCodec) else None,
        "reader": READER,
        **{name: value for name, value in vars(options).items() if name not in FREE},
        "columns": ["id", "codes", "duration", "is_cut", *optional],
        "clips_per_group": shards.CLIPS_PER_GROUP,
    }


def make_jobs(units: Sequence[Unit], clips_per_shard: int | None) -> list[Job]:
    """Divide the units of a corpus into jobs of at least ``clips_per_shard`` rows; a tar file is one job."""
    sizes = [unit.num_rows for unit in units]
    total = sum(size or 0 for size in sizes)
    wanted = clips_per_shard or (CLIPS_PER_SHARD if None in sizes else min(CLIPS_PER_SHARD, -(-total // MIN_SHARDS)))
    jobs: list[Job] = []
    first = num_rows = 0
    for unit, size in enumerate(sizes):
        num_rows += size or 0
        if num_rows >= wanted or unit + 1 == len(sizes) or None in sizes[unit : unit + 2]:
            own, first, num_rows = range(first, unit + 1), unit + 1, 0
            num_bytes = sum(units[number].num_bytes for number in own)
            jobs.append(Job(len(jobs), own, num_bytes, wanted if size is None else None))
    return jobs


def unfinished(output_dir: str, plan: dict[str, Any], jobs: Sequence[Job]) -> list[Job]:
    """Write the plan, or compare it with the earlier plan. Return the jobs with missing shards."""
    earlier = files.read_json(output_dir, shards.PLAN)
    if earlier is None:
        files.write_atomically(output_dir, shards.PLAN, json.dumps(plan, indent=1).encode())
    else:
        remedy = "re-run with the earlier options, or choose another --output_dir"
        require_same(earlier, plan, f"'{output_dir}'", remedy)
    fs, folder = files.file_system(output_dir)
    names = files.sizes_in(output_dir)
    for name in names:
        if name.endswith(files.PARTIAL):  # left by a killed run
            fs.rm_file(f"{folder}/{name}")
    existing = [(job, *job.shards_in(names)) for job in jobs]
    return [replace(job, first_part=len(found)) for job, found, is_done in existing if not is_done]


def read_chunks(
    reader: Reader, jobs: Sequence[Job], rows_per_chunk: int, worker: int, num_workers: int
) -> Iterator[tuple[str | None, int, int, list[Any]]]:
    """Yield every n-th chunk for one of n workers: (shard, number of rows, bytes, clips).

    In the last chunk of a shard, ``shard`` is the name of the shard; in other chunks it is None. In the last chunk of a
    job, ``clips`` is empty.
    """
    turns: Iterator[bool] = itertools.cycle(number == worker for number in range(num_workers))
    for job in jobs:
        rows_per_part, bytes_left = job.rows_per_part or sys.maxsize, job.num_bytes
        row = job.first_part * (job.rows_per_part or 0)
        for number in job.units:
            unit, own = reader.source.units[number], turns
            if unit.num_rows is not None:
                bytes_left -= unit.num_bytes
                turns_of_unit = [next(turns) for _ in range(0, unit.num_rows, rows_per_chunk)]
                if not any(turns_of_unit):
                    continue  # other workers read the unit
                own = iter(turns_of_unit)
            rows = reader.source.rows(number, row if unit.num_rows is None else 0)
            num_bytes = unit.num_bytes  # counted with the unit's first chunk; in a tar, each chunk is counted
            while chunk := list(itertools.islice(rows, min(rows_per_chunk, rows_per_part - row % rows_per_part))):
                row += len(chunk)
                if unit.num_rows is None:
                    num_bytes = sum(len(one.get("audio") or b"") for one in chunk)
                    bytes_left -= num_bytes
                if next(own, False):
                    part, rest = divmod(row, rows_per_part)
                    shard = None if rest else job.shard(part - 1, is_end=False)
                    yield shard, len(chunk), num_bytes, [clip for one in chunk for clip in reader.clips(one)]
                num_bytes = 0
        if next(turns):
            yield job.shard(row // rows_per_part, is_end=True), 0, bytes_left, []


def write_shards(
    options: Options,
    ranks: DistributedContext,
    todo: Sequence[Job],
    reader: Reader,
    codec: Codec,
    columns: Sequence[str],
) -> None:
    """Encode the clips of this rank's jobs and write the shards. Rank 0 shows the progress of its jobs."""
    splits = reader.splits  # a row may be hours of audio
    own = sorted(todo, key=lambda job: -job.num_bytes)[ranks.rank :: ranks.world_size]
    read = partial(read_chunks, reader, own, 1 if splits else ROWS_PER_CHUNK)
    workers = {"num_workers": options.num_workers} | ({"prefetch_factor": 1} if splits and options.num_workers else {})
    shown = {"unit": "B", "unit_scale": True, "mininterval": 10.0, "disable": ranks.rank > 0}
    progress = tqdm(total=sum(job.num_bytes for job in own), desc=f"rank 0 of {ranks.world_size}", **shown)
    start, seconds = time.monotonic(), 0.0
    of_shard: list[Any] = []  # clips and skipped clips of the current shard, from ``shard_rows`` rows
    shard_rows = num_read = num_skipped = 0
    for shard, num_rows, num_bytes, audio in read_in_workers(read, **workers):
        clips = shards.encode_clips(codec, audio) if isinstance(codec, MimiCodec) else audio
        of_shard += clips
        bad = [clip for clip in clips if isinstance(clip, SkippedClip) and not clip.is_filtered]
        shard_rows, num_read, num_skipped = shard_rows + num_rows, num_read + len(clips), num_skipped + len(bad)
        if bad:
            _judge(num_skipped, num_read, options.max_skip_fraction, bad[-1].message, is_end=False)
        if shard is not None:
            skipped = [clip for clip in of_shard if isinstance(clip, SkippedClip)]
            notes = {
                "columns": columns,
                "rows": shard_rows,
                "filtered": Counter(clip.reason for clip in skipped if clip.is_filtered),
                "skipped": [(clip.reason, clip.message) for clip in skipped if not clip.is_filtered],
            }
            stored = [clip for clip in of_shard if isinstance(clip, CodedClip)]
            content = shards.shard_bytes(stored, codec.num_quantizers, notes)
            files.write_atomically(options.output_dir, shard, content)
            of_shard, shard_rows = [], 0
        seconds += sum(clip.seconds for clip in clips if isinstance(clip, CodedClip))
        speed = seconds / (time.monotonic() - start)
        progress.set_postfix_str(f"{num_read:,} clips, {seconds / 3600:.2f} h, {speed:,.1f} audio-s/s", refresh=False)
        progress.update(num_bytes)
    progress.close()


def _judge(num_skipped: int, num_read: int, limit: float, last: str, *, is_end: bool) -> None:
    if is_too_many(num_skipped, num_read, limit, is_end=is_end, is_whole=is_end):
        problem = f"{num_skipped} of {num_read} clips could not be used, more than --max_skip_fraction {limit:g}"
        raise UserError(f"{problem} (last clip: {last}); repair or remove these clips, or raise --max_skip_fraction")


def write_manifest(options: Options, plan: Mapping[str, Any], units: Sequence[Unit], jobs: Sequence[Job]) -> None:
    """Count or drop duplicates, and write the manifest of the shards."""
    output_dir, found = options.output_dir, files.sizes_in(options.output_dir)
    names = [name for job in jobs for name in job.shards_in(found)[0]]
    tables, notes = _read_shards(output_dir, names)
    rows = {name: note["rows"] for name, note in zip(names, notes, strict=True)}
    for job in jobs:
        of_job, is_done = job.shards_in(found)
        *full, last = [rows[name] for name in of_job] or [0]
        num_rows = sum(units[unit].num_rows or 0 for unit in job.units)
        if not is_done or set(full) - {job.rows_per_part} or (last != num_rows and not job.rows_per_part):
            raise UserError(f"the shards {of_job} are incomplete; delete these shards, and re-run the command")
    duplicates = _duplicates(tables)
    if options.duplicates == "drop":  # the notes count dropped clips, so this step can be repeated after a kill
        for name, note, is_dropped_N in zip(names, notes, duplicates, strict=True):
            if is_dropped_N.any():
                note["filtered"] = Counter(note["filtered"]) + Counter(duplicate=int(is_dropped_N.sum()))
                table = shards.read_shard(f"{output_dir}/{name}").filter(pa.array(~is_dropped_N))
                files.write_atomically(output_dir, name, shards.table_bytes(table, note))
        tables, notes = _read_shards(output_dir, names)
        duplicates = _duplicates(tables)
    clips = pa.concat_tables(tables)
    skipped = [clip for note in notes for clip in note["skipped"]]
    for _, message in skipped[:MAX_NAMED_CLIPS]:
        print(f"skipped: {message}", flush=True)
    filtered = sum((Counter(note["filtered"]) for note in notes), Counter[str]())
    num_read = len(clips) + len(skipped) + filtered.total()
    _judge(len(skipped), num_read, options.max_skip_fraction, skipped[-1][1] if skipped else "", is_end=True)
    seconds_N, sizes = clips["duration"].to_numpy(), files.sizes_in(output_dir)
    manifest = {
        **plan,
        "corpus": options.corpus,
        "codec": {**plan["codec"], "name": options.codec},
        "shards": [
            {"file": name, "clips": len(table), "bytes": sizes[name]} for name, table in zip(names, tables, strict=True)
        ],
        "clips": len(clips),
        "hours": float(seconds_N.sum()) / 3600,
        "by_second": shards.by_second(seconds_N),
        "cut": int(clips["is_cut"].to_numpy().sum()),
        "skipped": Counter(reason for reason, _ in skipped),
        "filtered": filtered,
        "audio_warnings": Counter(pc.list_flatten(clips["audio_warnings"]).to_pylist()),
        "duplicates_kept": int(sum(is_duplicate_N.sum() for is_duplicate_N in duplicates)),
        "versions": versions(),
    }
    files.write_atomically(output_dir, shards.MANIFEST, json.dumps(manifest, indent=1).encode())
    counts = {key: manifest[key] for key in ("cut", "skipped", "filtered", "audio_warnings", "duplicates_kept")}
    minutes = float(seconds_N.sum()) / 60
    length = f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:,.2f} h"
    print(f"{output_dir}: {length}, {len(clips):,} clips, {len(names):,} shards; {json.dumps(counts)}")


def _read_shards(output_dir: str, names: Sequence[str]) -> tuple[list[pa.Table], list[dict[str, Any]]]:
    """Return a table of the clips (without codes) for each shard, and the notes of each shard."""
    columns = ["duration", "is_cut", "audio_hash", "audio_warnings"]
    with ThreadPoolExecutor(SHARD_READERS) as pool:
        read = pool.map(lambda name: shards.read_shard(f"{output_dir}/{name}", columns), names)
        tables = list(tqdm(read, "reading shards", len(names), unit="shard", delay=2))
    return tables, [json.loads(table.schema.metadata[shards.NOTES]) for table in tables]


def _duplicates(tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """For each shard, return a mask (N,) of the clips; True if an earlier clip has the same samples."""
    is_duplicate_N = pa.concat_tables(tables)["audio_hash"].to_pandas().duplicated().to_numpy()
    return np.split(is_duplicate_N, np.cumsum([len(table) for table in tables])[:-1])
