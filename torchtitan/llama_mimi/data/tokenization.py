"""Tokenising a corpus: audio -> shards of codes, by the ranks of torchrun.

The plan, which row groups make which shard, depends on the corpus alone. Ranks share the shards that are missing, and
a shard appears when it is whole: a run that was killed is started again, on any number of ranks, and finishes with
every clip once. The manifest is written last.
"""

import math
import os
import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_mimi.audio.mimi import DTYPES, MimiCodec, whole_frames
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, distributed_context
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, file_system, is_local, locked
from llama_mimi.data.clip_readers import AudioClip, AudioReader, SkippedClip
from llama_mimi.data.clips import Chunk, ClipStream, is_too_many
from llama_mimi.data.code_store import CodedClip
from llama_mimi.data.code_writer import TokenizationOptions, begin, finish, make_plan, too_many, write_shard
from llama_mimi.data.corpora import AudioCorpus, open_corpus
from llama_mimi.data.corpus_files import CORPORA
from llama_mimi.data.duplicates import settle_duplicates
from llama_mimi.data.order import ClipRef, RowsInOrder

# Clips that a worker reads at once and that are sorted by length before they are batched: a row group as `datasets`
# writes audio, so that mostly no two workers read the same.
CLIPS_PER_CHUNK = 100
SECONDS_PER_REPORT = 10.0


def tokenize_corpus(options: TokenizationOptions) -> None:
    """Tokenise a corpus, or what is missing of it.

    Raises:
        UserError: an option, the corpus or earlier output cannot be used, or too many clips are bad.
    """
    _check(options)
    with distributed_context() as ranks:
        run(options, ranks)


def _check(options: TokenizationOptions) -> None:
    shortest, longest, limit = options.min_seconds, options.max_seconds, options.max_audio_seconds
    for name in ("max_audio_seconds", "clips_per_shard", "batch_seconds"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be a positive number")
    if options.num_workers < 0 or not 0 <= options.max_skip_fraction <= 1:
        raise UserError("--num_workers is 0 or more, and --max_skip_fraction a share between 0 and 1")
    for name, value, lowest in (("min_seconds", shortest, 0), ("max_seconds", longest, shortest)):
        if value is not None and not lowest <= value <= limit:
            raise UserError(f"--{name} is {value:g}; it lies between {lowest:g} and --max_audio_seconds {limit:g}")
    if longest is not None and options.long_recordings == "split":
        raise UserError("--max_seconds leaves long recordings out, and --long_recordings split keeps them; choose one")


def run(options: TokenizationOptions, ranks: DistributedContext) -> None:
    if options.corpus not in CORPORA and lies_inside(options.output_dir, options.corpus):
        raise UserError(
            f"--output_dir '{options.output_dir}' lies inside the corpus '{options.corpus}', so that shards would be "
            "taken for audio; choose another"
        )
    row_filter = options.row_filter
    extra_columns = {"text": options.text_column, "speaker": options.speaker_column, **row_filter.columns}
    named = options.corpus, options.dataset_path, options.audio_column, None, extra_columns, options.split
    broadcast_from_rank0(
        lambda: bool(open_corpus(*named))
    )  # keeps an index of tars, so that the others do not make it, too
    corpus = open_corpus(*named)
    if missing := [column for role, column in row_filter.columns.items() if role not in corpus.columns]:
        raise UserError(f"--where is {options.where!r}, but '{options.corpus}' has no column '{missing[0]}'")
    codec = MimiCodec(
        options.codec, options.num_quantizers, ranks.device, DTYPES[options.dtype], options.codec_sliding_window
    )
    max_frames = whole_frames(options.max_audio_seconds, codec.config, "--max_audio_seconds")
    plan = make_plan(options, corpus, codec)
    with ExitStack() as held:

        def begin_alone() -> list[int]:
            fs, folder = file_system(options.output_dir)
            if is_local(fs):  # elsewhere two runs would do the same work twice, but every shard would still be whole
                held.enter_context(locked(Path(folder) / LOCK, "--output_dir"))  # to the end
            return begin(options.output_dir, plan)

        todo = broadcast_from_rank0(begin_alone)
        if ranks.rank == 0:
            there = len(plan["shards"]) - len(todo)
            columns = ", ".join(plan["columns"])
            print(f"finished shards: {there} of {len(plan['shards'])}; columns: {columns}", flush=True)
        tokenize(options, ranks, corpus, codec, max_frames, plan, todo)
        if ranks.rank == 0 and ranks.world_size > 1:
            print("this rank is done, waiting for the others", flush=True)
        ranks.wait()
        if ranks.rank == 0:
            finish(options, plan, settle_duplicates(options.output_dir, plan))


def lies_inside(output_dir: str, corpus: str) -> bool:
    """Return True where the folder or glob of a corpus would come to contain the shards."""
    folder = os.path.join(os.path.abspath(corpus.partition("**")[0]), "")
    return os.path.join(os.path.abspath(output_dir), "").startswith(folder)


def tokenize(
    options: TokenizationOptions,
    ranks: DistributedContext,
    corpus: AudioCorpus,
    codec: MimiCodec,
    max_frames: int,
    plan: dict[str, Any],
    todo: list[int],
) -> None:
    """Make this rank's part of the missing shards."""
    mine = todo[ranks.rank :: ranks.world_size]
    total = sum(plan["shards"][index]["clips"] for index in todo)
    shard_of_group = {group: index for index in mine for group in range(*plan["shards"][index]["groups"])}
    reader = AudioReader(
        corpus,
        sample_rate_hz=codec.sample_rate_hz,
        frame_size=codec.frame_size,
        max_frames=max_frames,
        row_filter=options.row_filter,
        splits=options.long_recordings == "split",
        hashes=True,
    )
    at_once = 1 if options.long_recordings == "split" else CLIPS_PER_CHUNK  # each may be an hour
    stream = ClipStream([reader], RowsInOrder(corpus.rows_per_group, list(shard_of_group)), at_once)
    # Clips of the shard that is being made, and of no other: rows come in the order of the shards.
    shard = mine[0] if mine else -1
    stored: list[CodedClip] = []
    skipped: list[SkippedClip] = []
    rows: set[tuple[int, int]] = set()
    num_read = num_skipped = 0
    start = last_report = time.monotonic()
    prefetch = {"prefetch_factor": 1} if at_once == 1 and options.num_workers else {}
    chunks = stream.load(num_workers=options.num_workers, **prefetch)
    for refs, clips, seconds in map(partial(encode, codec, options.batch_seconds), chunks):
        for ref, clip in zip(refs, clips, strict=True):
            if shard_of_group[ref.group] != shard:
                write_shard(options.output_dir, plan, shard, len(rows), stored, skipped)
                shard, stored, skipped, rows = shard_of_group[ref.group], [], [], set()
            rows.add((ref.group, ref.row))
            num_read += 1
            if isinstance(clip, SkippedClip):
                skipped.append(clip)
                num_skipped += not clip.is_filtered
                share = options.max_skip_fraction
                if not clip.is_filtered and is_too_many(num_skipped, num_read, share, is_end=False, is_whole=False):
                    raise too_many(num_skipped, num_read, options.max_skip_fraction, clip.message)
            else:
                stored.append(clip)
        rows_done = ranks.add("rows", len(set(refs)))
        hours_done = ranks.add("milliseconds", round(1000 * seconds)) / 3.6e6
        now = time.monotonic()
        if ranks.rank == 0 and (now - last_report > SECONDS_PER_REPORT or rows_done == total):
            last_report = now
            left_s = (now - start) / rows_done * (total - rows_done)
            print(
                f"{rows_done:,}/{total:,} rows  {hours_done:.2f} h  {3600 * hours_done / (now - start):,.1f} "
                f"audio-s/s  left: {timedelta(seconds=round(left_s))}",
                flush=True,
            )
    if mine:
        write_shard(options.output_dir, plan, shard, len(rows), stored, skipped)


def encode(
    codec: MimiCodec, batch_seconds: float | None, chunk: Chunk
) -> tuple[list[ClipRef], list[CodedClip | SkippedClip], float]:
    """Return the places of clips, their codes, and the seconds of audio. The samples, which are large, are not kept."""
    waveforms = [clip.samples_S for clip in chunk.clips if isinstance(clip, AudioClip)]
    codes = iter(codec.encode_many(waveforms, batch_seconds))
    clips: list[CodedClip | SkippedClip] = []
    for clip in chunk.clips:
        if isinstance(clip, AudioClip):
            codes_TQ, seconds = next(codes).numpy().astype(np.uint16), len(clip.samples_S) / codec.sample_rate_hz
            of_row = clip.text, clip.speaker, clip.audio_warnings, clip.audio_hash
            clips.append(CodedClip(clip.name, codes_TQ, seconds, clip.is_cut, *of_row))
        else:
            assert isinstance(clip, SkippedClip)
            clips.append(clip)
    return chunk.refs, clips, sum(map(len, waveforms)) / codec.sample_rate_hz
