"""Tokenise a corpus once: audio -> shards of Mimi codes that training reads.

    uv run torchrun --nproc_per_node=2 scripts/tokenize_corpus.py --corpus "assets/tiny/corpus/train-*.parquet" \
        --codec assets/tiny/mimi --output_dir data/codes/tiny

The plan, which row groups make which shard, depends on the corpus alone. Ranks share the shards that are missing, and
a shard appears when it is whole: a run that was killed is started again, on any number of ranks, and finishes with
every clip once. The manifest is written last.
"""

import argparse
import fcntl
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llama_mimi.clips import MAX_NAMED_CLIPS, AudioClip, AudioReader, ClipStream, SkippedClip, is_too_many
from llama_mimi.codec import DEFAULT_CODEC, DTYPES, MimiCodec, codec_hash, whole_frames
from llama_mimi.corpora import CORPORA, FOOTER_THREADS, AudioCorpus, open_corpus, read_footer
from llama_mimi.errors import UserError, run_cli
from llama_mimi.evaluation import versions
from llama_mimi.files import PARTIAL, file_system, is_local, read_json, sizes_in, write_whole
from llama_mimi.order import RowsInOrder
from llama_mimi.token_store import (
    CLIPS_PER_GROUP,
    FORMAT,
    MANIFEST,
    NOTES,
    OPTIONAL_COLUMNS,
    PLAN,
    StoredClip,
    shard_bytes,
)

# Clips that a worker reads at once and that are sorted by length before they are batched: a row group as `datasets`
# writes audio, so that mostly no two workers read the same.
CLIPS_PER_CHUNK = 100
# By default shards are of so many clips, 3 MB for clips of 14 s, but a small corpus has so many shards for its ranks.
CLIPS_PER_SHARD, MIN_SHARDS = 2048, 64
SECONDS_PER_REPORT = 10.0
# Ranks wait for the slowest at the end.
TIMEOUT = timedelta(days=7)


class Ranks:
    """The processes of torchrun, or this one alone, and the counters that they share."""

    def __init__(self) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self._store: dist.Store = dist.HashStore()
        if self.world_size > 1:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT
            )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"there are {torch.cuda.device_count()} GPUs; lower torchrun's --nproc_per_node to that"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)

    def add(self, counter: str, number: int) -> int:
        """Add to a shared counter; returns its value."""
        return self._store.add(counter, number)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, which alone calls it.

        Raises:
            UserError: on every rank what it raised there, so that none waits for a rank that has gone.
        """
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [make()]
            except UserError as error:
                outcome = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def wait(self) -> None:
        if self.world_size > 1:
            try:
                dist.barrier()
            except RuntimeError:  # another rank has gone, and has said why
                sys.exit(1)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="named corpus, folder, or Parquet path or glob")
    parser.add_argument("--dataset_path", help="local download of a named corpus")
    parser.add_argument("--output_dir", required=True, help="folder of the shards, local or any fsspec path")
    parser.add_argument("--codec", default=DEFAULT_CODEC, help="hub id or folder")
    parser.add_argument("--num_quantizers", type=int, default=8, help="levels to store; training takes any prefix")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 changes about 2 %% of the codes")
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
    ranks = Ranks()
    try:
        run(flags, ranks)
    except UserError:
        if ranks.rank:  # all ranks find the same mistake; rank 0 reports it, and torchrun then ends the others
            time.sleep(10)
        raise
    ranks.close()


def run(flags: argparse.Namespace, ranks: Ranks) -> None:
    if flags.corpus not in CORPORA and lies_inside(flags.output_dir, flags.corpus):
        raise UserError(
            f"--output_dir '{flags.output_dir}' lies inside the corpus '{flags.corpus}', so that shards would be taken "
            "for audio; choose another"
        )
    extra_columns = {flags.text_column: "text", flags.speaker_column: "speaker"}
    corpus = open_corpus(flags.corpus, flags.dataset_path, flags.audio_column, None, extra_columns)
    codec = MimiCodec(flags.codec, flags.num_quantizers, ranks.device, DTYPES[flags.dtype])
    if not whole_frames(flags.max_audio_seconds, codec.config):
        raise UserError(f"--max_audio_seconds is {flags.max_audio_seconds}, less than a frame of the codec; raise it")
    plan = make_plan(flags, corpus, codec)
    with ExitStack() as held:

        def begin_alone() -> list[int]:
            held.enter_context(alone(flags.output_dir))  # to the end
            return begin(flags.output_dir, plan)

        todo = ranks.from_first(begin_alone)
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


def make_plan(flags: argparse.Namespace, corpus: AudioCorpus, codec: MimiCodec) -> dict[str, Any]:
    """What will be made of what; the same on every rank and at every start."""
    shards: list[dict[str, Any]] = []
    wanted = flags.clips_per_shard or min(CLIPS_PER_SHARD, math.ceil(int(corpus.sizes_G.sum()) / MIN_SHARDS))
    first, clips = 0, 0
    for group, size in enumerate(corpus.sizes_G.tolist()):
        clips += size
        if clips >= wanted or group + 1 == len(corpus.sizes_G):
            shards.append({"file": f"shard-{len(shards):06d}.parquet", "groups": [first, group + 1], "clips": clips})
            first, clips = group + 1, 0
    return {
        "format": FORMAT,
        "corpus": flags.corpus,
        "corpus_sha256": corpus.fingerprint,
        "codec": {
            "name": flags.codec,
            "sha256": codec_hash(flags.codec),
            "num_quantizers": flags.num_quantizers,
            "codebook_size": codec.codebook_size,
            "frame_rate_hz": codec.frame_rate_hz,
            "dtype": flags.dtype,
        },
        "max_audio_seconds": flags.max_audio_seconds,
        "columns": ["id", "codes", "duration", "is_cut", *(c for c in OPTIONAL_COLUMNS if c in corpus.columns)],
        "clips_per_group": CLIPS_PER_GROUP,
        "shards": shards,
    }


def begin(output_dir: str, plan: dict[str, Any]) -> list[int]:
    """Write or compare the plan, remove what was cut off, and list the shards that are missing."""
    earlier = read_json(output_dir, PLAN)
    if earlier is None:
        write_whole(output_dir, PLAN, json.dumps(plan, indent=1).encode())
    else:
        compare(output_dir, earlier, plan)
    fs, folder = file_system(output_dir)
    found = sizes_in(output_dir)
    for name in found:
        if name.endswith(PARTIAL):
            fs.rm_file(f"{folder}/{name}")
    return [index for index, shard in enumerate(plan["shards"]) if shard["file"] not in found]


def compare(output_dir: str, earlier: dict[str, Any], plan: dict[str, Any]) -> None:
    """Refuse to go on with what was begun in another way.

    Raises:
        UserError: what differs, and how it was.
    """
    remedy = "start again as it was begun, or choose another --output_dir"
    if earlier.get("corpus_sha256") != plan["corpus_sha256"]:
        raise UserError(
            f"'{output_dir}' was begun with the corpus '{earlier.get('corpus')}', which is not what "
            f"'{plan['corpus']}' holds now; {remedy}"
        )
    codec, codec_before = plan["codec"], earlier.get("codec", {})
    parts = {"--codec with the hash": (codec_before.get("sha256"), codec["sha256"])}  # it may be named in other ways
    parts |= {f"--{key}": (codec_before.get(key), codec[key]) for key in ("num_quantizers", "dtype")}
    parts |= {name: (earlier.get(name), plan[name]) for name in ("format", "columns")}
    parts["--max_audio_seconds"] = (earlier.get("max_audio_seconds"), plan["max_audio_seconds"])
    for name, (before, now) in parts.items():
        if before != now:
            raise UserError(f"'{output_dir}' was begun with {name} {before!r}, not {now!r}; {remedy}")
    if earlier.get("shards") != plan["shards"]:
        raise UserError(f"'{output_dir}' was begun with another --clips_per_shard; {remedy}")


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
        yield StoredClip(clip.name, codes_TQ.numpy().astype(np.uint16), seconds, clip.is_cut, clip.text, clip.speaker)


def write_shard(
    output_dir: str, plan: dict[str, Any], shard: int, clips: list[StoredClip], skipped: list[dict[str, str]]
) -> None:
    notes = {
        "columns": plan["columns"],
        "clips": len(clips),
        "cut": sum(clip.is_cut for clip in clips),
        "seconds": sum(clip.seconds for clip in clips),
        "by_second": by_second(clips),
        "skipped": skipped,
    }
    content = shard_bytes(clips, plan["codec"]["num_quantizers"], notes)
    write_whole(output_dir, plan["shards"][shard]["file"], content)


def by_second(clips: list[StoredClip]) -> list[list[float]]:
    """Number and seconds of the clips that last less than 1 s, less than 2 s, and so on."""
    totals = [[0, 0.0] for _ in range(max((int(clip.seconds) for clip in clips), default=0) + 1)]
    for clip in clips:
        totals[int(clip.seconds)][0] += 1
        totals[int(clip.seconds)][1] += clip.seconds
    return totals


def finish(flags: argparse.Namespace, plan: dict[str, Any]) -> None:
    """Add up what the shards say of themselves, and write the manifest."""
    sizes = sizes_in(flags.output_dir)
    paths = [f"{flags.output_dir.rstrip('/')}/{shard['file']}" for shard in plan["shards"]]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        said = list(pool.map(read_notes, paths))
    shards, seconds, cut = [], 0.0, 0
    reasons: Counter[str] = Counter()
    numbers: Counter[int] = Counter()
    totals: Counter[float] = Counter()
    messages: list[str] = []
    for shard, (num_rows, notes) in zip(plan["shards"], said, strict=True):
        if notes["clips"] + len(notes["skipped"]) != shard["clips"] or num_rows != notes["clips"]:
            raise UserError(f"'{shard['file']}' does not hold its {shard['clips']} clips; delete it and start again")
        shards.append({"file": shard["file"], "clips": notes["clips"], "bytes": sizes[shard["file"]]})
        seconds, cut = seconds + notes["seconds"], cut + notes["cut"]
        for second, (number, total) in enumerate(notes["by_second"]):
            numbers[second] += number
            totals[second] += total
        reasons.update(clip["reason"] for clip in notes["skipped"])
        messages += [clip["message"] for clip in notes["skipped"]][: MAX_NAMED_CLIPS - len(messages)]
    clips = sum(shard["clips"] for shard in shards)
    for message in messages:
        print(f"skipped: {message}", flush=True)
    if is_too_many(reasons.total(), clips + reasons.total(), flags.max_bad_share):
        raise too_many(reasons.total(), clips + reasons.total(), flags.max_bad_share, messages[-1])
    manifest = {
        **plan,
        "shards": shards,
        "clips": clips,
        "hours": seconds / 3600,
        "by_second": [[numbers[second], totals[second]] for second in range(max(numbers) + 1)],
        "cut": cut,
        "skipped": dict(reasons),
        "skipped_first": messages,
        "versions": versions(),
    }
    write_whole(flags.output_dir, MANIFEST, json.dumps(manifest, indent=1).encode())
    print(
        f"{flags.output_dir}: {clips:,} clips, {seconds / 3600:.2f} h, {len(shards)} shards, "
        f"{sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB; {cut} cut, {reasons.total()} skipped"
    )


def read_notes(path: str) -> tuple[int, dict[str, Any]]:
    """Rows of a shard, and what it says about itself."""
    footer = read_footer(path)
    return footer.num_rows, json.loads(footer.schema.to_arrow_schema().metadata[NOTES])


def too_many(num_skipped: int, num_read: int, allowed: float, last: str) -> UserError:
    return UserError(
        f"{num_skipped} of {num_read} clips could not be used, more than --max_bad_share {allowed:g} (the last: "
        f"{last}); repair the corpus or raise --max_bad_share"
    )


if __name__ == "__main__":
    run_cli(main)
