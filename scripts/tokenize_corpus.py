"""Tokenise a corpus once: audio -> shards of Mimi codes that training reads.

    uv run torchrun --nproc_per_node=2 scripts/tokenize_corpus.py --corpus "assets/tiny/corpus/train-*.parquet" \
        --codec assets/tiny/mimi --output_dir data/codes/tiny

The plan, which row groups make which shard, depends on the corpus alone. Ranks share the shards that are missing, and
a shard appears when it is whole: a run that was killed is started again, on any number of ranks, and finishes with
every clip once. The manifest is written last.
"""

import argparse
import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
from token_writer import CLIPS_PER_SHARD, MIN_SHARDS, begin, finish, make_plan, too_many, write_shard

from llama_mimi.clips import AudioClip, AudioReader, ClipStream, SkippedClip, is_too_many
from llama_mimi.codec import DEFAULT_CODEC, DTYPES, CodecAttention, MimiCodec, whole_frames
from llama_mimi.corpora import AudioCorpus, open_corpus
from llama_mimi.corpus_files import CORPORA
from llama_mimi.errors import UserError, run_cli
from llama_mimi.files import file_system, is_local
from llama_mimi.order import RowsInOrder
from llama_mimi.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.token_store import StoredClip

# Clips that a worker reads at once and that are sorted by length before they are batched: a row group as `datasets`
# writes audio, so that mostly no two workers read the same.
CLIPS_PER_CHUNK = 100
SECONDS_PER_REPORT = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="named corpus, folder, or Parquet path or glob")
    parser.add_argument("--dataset_path", help="local download of a named corpus")
    parser.add_argument("--split", help="of a folder that holds several, such as train-*, test-*")
    parser.add_argument("--output_dir", required=True, help="folder of the shards, local or any fsspec path")
    parser.add_argument("--codec", default=DEFAULT_CODEC, help="hub id or folder")
    parser.add_argument("--num_quantizers", type=int, default=8, help="levels to store; training takes any prefix")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 changes about 2 %% of the codes")
    parser.add_argument(
        "--codec_attention",
        choices=get_args(CodecAttention),
        default="windowed",
        help="of the codec; see codec.attention",
    )
    parser.add_argument("--audio_column", default="audio")
    parser.add_argument("--text_column", default="text", help="stored where the corpus has it")
    parser.add_argument("--speaker_column", default="speaker", help="stored where the corpus has it")
    parser.add_argument("--max_audio_seconds", type=float, default=120.0, help="longer clips are cut, and counted")
    parser.add_argument(
        "--clips_per_shard",
        type=int,
        help=f"at least; lost by a kill (default {CLIPS_PER_SHARD:,}, or fewer to have {MIN_SHARDS} shards)",
    )
    parser.add_argument("--batch_seconds", type=float, help="audio encoded at once, padded; default by device")
    parser.add_argument("--num_workers", type=int, default=2, help="processes a rank that read and resample")
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="stop when more clips cannot be used")
    flags = parser.parse_args()
    for name in ("max_audio_seconds", "clips_per_shard", "batch_seconds"):
        if getattr(flags, name) is not None and not 0 < getattr(flags, name) < math.inf:
            raise UserError(f"--{name} is {getattr(flags, name)}; it must be a positive number")
    if flags.num_workers < 0 or not 0 <= flags.max_bad_share <= 1:
        raise UserError("--num_workers is 0 or more, and --max_bad_share a share between 0 and 1")
    with torchrun_ranks() as ranks:
        run(flags, ranks)


def run(flags: argparse.Namespace, ranks: Ranks) -> None:
    if flags.corpus not in CORPORA and lies_inside(flags.output_dir, flags.corpus):
        raise UserError(
            f"--output_dir '{flags.output_dir}' lies inside the corpus '{flags.corpus}', so that shards would be taken "
            "for audio; choose another"
        )
    extra_columns = {"text": flags.text_column, "speaker": flags.speaker_column}
    corpus = open_corpus(flags.corpus, flags.dataset_path, flags.audio_column, None, extra_columns, flags.split)
    codec = MimiCodec(flags.codec, flags.num_quantizers, ranks.device, DTYPES[flags.dtype], flags.codec_attention)
    if not whole_frames(flags.max_audio_seconds, codec.config):
        raise UserError(f"--max_audio_seconds is {flags.max_audio_seconds}, less than a frame of the codec; raise it")
    plan = make_plan(flags, corpus, codec)
    with ExitStack() as held:

        def begin_alone() -> list[int]:
            held.enter_context(alone(flags.output_dir))  # to the end
            return begin(flags.output_dir, plan)

        todo = from_first(begin_alone)
        if ranks.rank == 0:
            there = len(plan["shards"]) - len(todo)
            columns = ", ".join(plan["columns"])
            print(f"{there} of {len(plan['shards'])} shards are there; columns: {columns}", flush=True)
        tokenize(flags, ranks, corpus, codec, plan, todo)
        if ranks.rank == 0 and ranks.world_size > 1:
            print("this rank is done, waiting for the others", flush=True)
        ranks.wait()
        if ranks.rank == 0:
            finish(flags, plan)


def lies_inside(output_dir: str, corpus: str) -> bool:
    """Whether the files of a folder or glob would come to hold the shards."""
    if "**" in corpus:
        corpus = corpus[: corpus.index("**")]
    folder = os.path.join(os.path.abspath(corpus), "")
    return os.path.join(os.path.abspath(output_dir), "").startswith(folder)


@contextmanager
def alone(output_dir: str) -> Iterator[None]:
    """Hold a lock on a local output folder, which ends with this process, however that ends.

    On other file systems two runs make the same shards twice and each appears whole.

    Raises:
        UserError: another process holds it.
    """
    fs, folder = file_system(output_dir)
    if not is_local(fs):
        yield
        return
    try:
        fs.makedirs(folder, exist_ok=True)
        lock = open(Path(folder) / ".lock", "w")  # noqa: SIM115  (held until the process ends)
    except OSError as error:
        raise UserError(f"--output_dir '{output_dir}' cannot be written ({error.strerror}); choose another") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader workers
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another run is writing to '{output_dir}'; wait for it, stop it, or choose another --output_dir"
            ) from error
        except OSError as error:
            print(f"'{output_dir}' cannot be locked ({error.strerror}): start only one run on it", flush=True)
        yield


def tokenize(
    flags: argparse.Namespace,
    ranks: Ranks,
    corpus: AudioCorpus,
    codec: MimiCodec,
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
        max_frames=whole_frames(flags.max_audio_seconds, codec.config),
    )
    stream = ClipStream([reader], RowsInOrder(corpus.sizes_G, list(shard_of_group)), CLIPS_PER_CHUNK)
    # Clips of the shard that is being made, and of no other: rows come in the order of the shards.
    shard = mine[0] if mine else -1
    stored: list[StoredClip] = []
    skipped: list[dict[str, str]] = []
    num_read = num_skipped = 0
    start = last_report = time.monotonic()
    for chunk in stream.load(num_workers=flags.num_workers):
        encoded = encode(codec, [clip for clip in chunk.clips if isinstance(clip, AudioClip)], flags.batch_seconds)
        for ref, clip in zip(chunk.refs, chunk.clips, strict=True):
            if shard_of_group[ref.group] != shard:
                write_shard(flags.output_dir, plan, shard, stored, skipped)
                shard, stored, skipped = shard_of_group[ref.group], [], []
            num_read += 1
            if isinstance(clip, SkippedClip):
                skipped.append({"reason": clip.reason, "message": clip.message})
                num_skipped += 1
                if is_too_many(num_skipped, num_read, flags.max_bad_share):
                    raise too_many(num_skipped, num_read, flags.max_bad_share, clip.message)
            else:
                stored.append(next(encoded))
        seconds = sum(len(clip.samples_S) for clip in chunk.clips if isinstance(clip, AudioClip)) / codec.sample_rate_hz
        clips_done = ranks.add("clips", len(chunk.refs))
        hours_done = ranks.add("milliseconds", round(1000 * seconds)) / 3.6e6
        now = time.monotonic()
        if ranks.rank == 0 and (now - last_report > SECONDS_PER_REPORT or clips_done == total):
            last_report = now
            left_s = (now - start) / clips_done * (total - clips_done)
            print(
                f"{clips_done:,}/{total:,} clips  {hours_done:.2f} h  {3600 * hours_done / (now - start):,.1f} "
                f"audio-s/s  left: {timedelta(seconds=round(left_s))}",
                flush=True,
            )
    if mine:
        write_shard(flags.output_dir, plan, shard, stored, skipped)


def encode(codec: MimiCodec, clips: list[AudioClip], batch_seconds: float | None) -> Iterator[StoredClip]:
    codes = codec.encode_many([clip.samples_S for clip in clips], batch_seconds)
    for clip, codes_TQ in zip(clips, codes, strict=True):
        seconds = len(clip.samples_S) / codec.sample_rate_hz
        yield StoredClip(
            clip.name, codes_TQ.numpy().astype(np.uint16), seconds, clip.is_cut, clip.text, clip.speaker, clip.remarks
        )


if __name__ == "__main__":
    run_cli(main)
