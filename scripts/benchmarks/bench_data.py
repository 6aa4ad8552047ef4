"""What the data path costs: reading, encoding, the reference way, the online loader, the shard loader, and each format.

    uv run python scripts/benchmarks/bench_data.py
    uv run python scripts/benchmarks/bench_data.py --corpus my_speech/train.parquet --codec kyutai/mimi

Rates are audio-seconds per second of one process (with --num_threads threads), the median of --repeats runs in turn.
The reference way is what the first release of Llama-Mimi does in its training loop: clip by clip, codes as text, a
tokenizer call, padding to the sequence length. It is written here only.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from layouts import LAYOUTS, lossless_rows
from measuring import DEVICE, in_turn, machine, measured, median_and_range, peak_mb
from simulated import STORED_LEVELS, random_clips, speech_lengths, write_codes

from llama_mimi.audio.mimi import DTYPES, MimiCodec, load_codec_config, whole_frames
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.data.clip_readers import AudioClip, AudioReader, CodeReader
from llama_mimi.data.clips import ClipStream
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.data.code_writer import TokenizationOptions
from llama_mimi.data.corpora import open_corpus
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.order import RowsInOrder, ShuffledOrder
from llama_mimi.data.packing import BatchPacker
from llama_mimi.data.tokenization import tokenize_corpus
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, SpeechTokenizer, load_speech_tokenizer
from llama_mimi.tokens.vocabulary import text_from_codes

# Useful tokens a second that a 1B training step is meant to reach on one GPU, so what a loader must keep up with.
GPU_TOKENS_PER_S = 60_000
CLIPS_PER_SHARD = 2048
CLIPS_HANDED_OVER = 136
SECONDS_OF_A_STEP = 5.0
SHARDS, LONG_SHARDS = "shard loader (pack)", "shard loader (pack), simulated lengths of 14 s"


@dataclass(frozen=True)
class DataFlags:
    """What is measured, and how.

    Args:
        clips: clips of the corpus that the rates are measured on
    """

    corpus: str = "assets/tiny/corpus/train-*.parquet"
    codec: str = "assets/tiny/mimi"
    tokenizer: str = "assets/tiny/llama"
    num_quantizers: int = 4
    seq_len: int = 1024
    clips: int = 64
    repeats: int = 3
    num_threads: int = 1


def bench_data(flags: DataFlags) -> None:
    torch.set_num_threads(flags.num_threads)
    pa.set_cpu_count(flags.num_threads)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        rates(flags, Path(folder))
        formats(flags, Path(folder))
        handing_over(flags)
        useful_shares(flags, Path(folder))
        sizes(flags, Path(folder))


def audio_reader(corpus: str, codec: MimiCodec) -> AudioReader:
    return AudioReader(
        open_corpus(corpus, None, "audio", None),
        sample_rate_hz=codec.sample_rate_hz,
        frame_size=codec.frame_size,
        max_frames=whole_frames(20, codec.config),
    )


def read_clips(reader: AudioReader, limit: int) -> Iterator[AudioClip]:
    """The first clips of the corpus, each row group read once."""
    rows_per_group = reader.corpus.rows_per_group
    stream = ClipStream([reader], RowsInOrder(rows_per_group, range(len(rows_per_group))), 1)
    for (clip,) in (chunk.clips for chunk in itertools.islice(stream.load(), limit)):
        if not isinstance(clip, AudioClip):
            raise UserError(f"a clip of '{reader.corpus.name}' cannot be used; name a corpus without bad clips")
        yield clip


def handing_over(flags: DataFlags) -> None:
    """Print the time that the training process spends on a chunk that a worker has read."""
    codec = MimiCodec(flags.codec, flags.num_quantizers)
    reader = audio_reader(flags.corpus, codec)
    taken = []
    for _ in range(flags.repeats):
        chunks = iter(ClipStream([reader], shuffled(reader), CLIPS_HANDED_OVER).load(num_workers=1))
        first = next(chunks)
        time.sleep(SECONDS_OF_A_STEP)  # the next is read meanwhile
        start = time.perf_counter()
        next(chunks)
        taken.append(1000 * (time.perf_counter() - start))
    seconds = sum(len(clip.samples_S) for clip in first.clips if isinstance(clip, AudioClip)) / codec.sample_rate_hz
    print(f"handing over a chunk of {CLIPS_HANDED_OVER} clips, {seconds:,.0f} s: {median_and_range(taken, 1)} ms\n")


def code_reader(flags: DataFlags, store: str) -> CodeReader:
    corpus = CodeCorpus(store, flags.codec, flags.num_quantizers, with_text=False)
    max_frames = whole_frames(20, load_codec_config(flags.codec, flags.num_quantizers))
    return CodeReader(corpus, max_frames=max_frames, with_text=False)


def shuffled(reader: AudioReader | CodeReader) -> ShuffledOrder:
    return ShuffledOrder([reader.corpus], [1.0], dp_rank=0, dp_world_size=1, shuffle_window=4096, seed=0)


def loader(
    flags: DataFlags,
    reader: AudioReader | CodeReader,
    tokenizer: SpeechTokenizer,
    codec: MimiCodec | None,
    *,
    batch_size: int,
    is_packed: bool = True,
    chunk_size: int = 32,
) -> SpeechDataLoader:
    packer = BatchPacker(tokenizer, batch_size, flags.seq_len, is_packed=is_packed, has_positions=is_packed)
    return SpeechDataLoader(
        [reader],
        shuffled(reader),
        packer,
        codec,
        dp_rank=0,
        dp_world_size=1,
        dataset=flags.corpus,
        chunk_size=chunk_size,
        max_skip_fraction=0.0,
        workers={},
    )


def rates(flags: DataFlags, folder: Path) -> None:
    codec = MimiCodec(flags.codec, flags.num_quantizers, DEVICE)
    reader = audio_reader(flags.corpus, codec)
    tokenizer = load_speech_tokenizer(flags.tokenizer, flags.codec, flags.num_quantizers)
    clips = list(read_clips(reader, flags.clips))
    seconds = sum(len(clip.samples_S) for clip in clips) / codec.sample_rate_hz
    frames = np.array([codec.num_frames(len(clip.samples_S)) for clip in clips])
    same = write_codes(folder / "same", flags.codec, [random_clips(np.resize(frames, 4096), codec.config)])
    longer = write_codes(folder / "longer", flags.codec, [random_clips(speech_lengths(4096), codec.config)])
    ways: dict[str, Callable[[], float]] = {
        "reading and resampling": lambda: consume(read_clips(reader, flags.clips), seconds)
    }
    for dtype in DTYPES:
        model = MimiCodec(flags.codec, flags.num_quantizers, DEVICE, DTYPES[dtype])
        for batch_size in (1, 4, 16):
            ways[f"encoding, {dtype}, {batch_size} clips at once"] = encoding(model, clips, batch_size, seconds)
    ways["the reference way"] = lambda: consume(reference(flags, codec, tokenizer, reader), seconds)
    ways["online loader (pack)"] = lambda: online(flags, reader, tokenizer, codec)
    for name, store in ((SHARDS, same), (LONG_SHARDS, longer)):
        ways[name] = batches_of(loader(flags, code_reader(flags, store), tokenizer, None, batch_size=32), 30, codec)
    found = in_turn(ways, flags.repeats)
    print("| | audio-seconds per second |\n|---|---|")
    rate = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"| {name} | {median_and_range(values)} |")
    fast, slow = rate[SHARDS], rate["the reference way"]
    needed = GPU_TOKENS_PER_S / (codec.frame_rate_hz * flags.num_quantizers)
    print(f"\nshard loader / reference way: {fast / slow:,.0f} times (codes are made once, at the rate of encoding)")
    print(
        f"share of a step of {GPU_TOKENS_PER_S:,} tokens/s that the shard loader takes: "
        f"{100 * needed / rate[LONG_SHARDS]:.2f} % ({100 * needed / fast:.2f} % with the clips of the corpus)\n"
    )


def formats(flags: DataFlags, folder: Path) -> None:
    """The same clips, lossless, in each layout: fetched, read, and made codes by a tokeniser on one rank."""
    codec = MimiCodec(flags.codec, flags.num_quantizers)
    rows = lossless_rows(flags.corpus, flags.clips, 20.0)
    fetching: dict[str, Callable[[], float]] = {}
    reading: dict[str, Callable[[], float]] = {}
    tokenizing: dict[str, Callable[[], float]] = {}
    num_made = itertools.count()
    seconds = 0.0
    for name, write in LAYOUTS.items():
        place = folder / f"format-{name}"
        place.mkdir()
        corpus = str(write(place, rows))
        reader = audio_reader(corpus, codec)
        seconds = sum(len(clip.samples_S) for clip in read_clips(reader, flags.clips)) / codec.sample_rate_hz
        fetching[name] = partial(fetched, reader, seconds)
        reading[name] = partial(read, reader, seconds)
        tokenizing[name] = partial(tokenized, flags, corpus, folder, num_made)
    columns = [in_turn(ways, flags.repeats) for ways in (fetching, reading, tokenizing)]
    megabytes = sum(len(row["bytes"]) for row in rows) / 1e6
    print(f"| {len(rows)} clips, {seconds:,.0f} s, {megabytes:.1f} MB of FLAC | fetched | and decoded | and encoded |")
    print("|---|---|---|---|")
    for name in LAYOUTS:
        print(f"| {name} | " + " | ".join(median_and_range(column[name]) for column in columns) + " |")
    print()


def fetched(reader: AudioReader, seconds: float) -> float:
    """The bytes of all rows; files that rows name are read, too."""
    start = time.perf_counter()
    for group in range(len(reader.corpus.rows_per_group)):
        for row in reader.corpus.read_group(group).to_pylist():
            source = row["audio"]["bytes"] or reader.corpus.open_path(row["audio"]["path"], group)
            if isinstance(source, str):
                Path(source).read_bytes()
    return seconds / (time.perf_counter() - start)


def read(reader: AudioReader, seconds: float) -> float:
    return consume(read_clips(reader, 10**9), seconds)


def tokenized(flags: DataFlags, corpus: str, folder: Path, number: Iterator[int]) -> float:
    """With one worker; loading the codec is not counted."""
    options = TokenizationOptions(
        corpus,
        str(folder / f"made-{next(number)}"),
        codec=flags.codec,
        num_quantizers=flags.num_quantizers,
        num_workers=1,
        clips_per_shard=10**6,
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        tokenize_corpus(options)
    # Of the last line of progress, as a user sees it.
    return float(said.getvalue().split("audio-s/s")[-2].split()[-1].replace(",", ""))


def consume(items: Iterator[Any], seconds: float) -> float:
    start = time.perf_counter()
    for _ in items:
        pass
    return seconds / (time.perf_counter() - start)


def encoding(codec: MimiCodec, clips: list[AudioClip], batch_size: int, seconds: float) -> Callable[[], float]:
    samples = sorted((clip.samples_S for clip in clips), key=len)
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return lambda: consume((codec.encode(batch) for batch in batches), seconds)


def online(flags: DataFlags, reader: AudioReader, tokenizer: SpeechTokenizer, codec: MimiCodec) -> float:
    """From a fresh start until so many clips are in batches; at most a chunk of eight is encoded besides."""
    start = time.perf_counter()
    batches = loader(flags, reader, tokenizer, codec, batch_size=1, chunk_size=8)
    units = 0
    for _, labels_BL in batches:
        units += int((labels_BL != IGNORE_INDEX).sum())
        if batches.num_read >= min(flags.clips, int(reader.corpus.rows_per_group.sum())):
            break
    return units / codec.num_quantizers / codec.frame_rate_hz / (time.perf_counter() - start)


def reference(
    flags: DataFlags, codec: MimiCodec, tokenizer: SpeechTokenizer, reader: AudioReader
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Clip by clip, as text, through the tokenizer, padded to the sequence length."""
    text_tokenizer = tokenizer.text_tokenizer
    for clip in read_clips(reader, flags.clips):
        text = text_tokenizer.bos_token + text_from_codes(codec.encode([clip.samples_S])[0])
        tokens = text_tokenizer(
            text,
            add_special_tokens=False,
            max_length=flags.seq_len + 1,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        yield tokens.input_ids[:, :-1], tokens.input_ids[:, 1:]


def batches_of(loader: SpeechDataLoader, number: int, codec: MimiCodec) -> Callable[[], float]:
    batches = iter(loader)
    next(batches)

    def run() -> float:
        start, units = time.perf_counter(), 0
        for _ in range(number):
            _, labels_BL = next(batches)
            units += int((labels_BL != IGNORE_INDEX).sum())
        return units / codec.num_quantizers / codec.frame_rate_hz / (time.perf_counter() - start)

    return run


def useful_shares(flags: DataFlags, folder: Path) -> None:
    codec = MimiCodec(flags.codec, flags.num_quantizers)
    reader = audio_reader(flags.corpus, codec)
    lengths = [codec.num_frames(len(clip.samples_S)) for clip in read_clips(reader, 10**9)]
    distributions = {flags.corpus: np.array(lengths), "simulated, like The People's Speech": speech_lengths(2000)}
    tokenizer = load_speech_tokenizer(flags.tokenizer, flags.codec, flags.num_quantizers)
    print("| useful share of tokens | clips | mean | pad | pack |\n|---|---|---|---|---|")
    for number, (name, frames) in enumerate(distributions.items()):
        clips = random_clips(frames, codec.config)
        store = write_codes(folder / f"lengths-{number}", flags.codec, [clips])
        shares = []
        for is_packed in (False, True):
            batch_size = max(1, len(frames) // 40)
            batches = loader(
                flags, code_reader(flags, store), tokenizer, None, batch_size=batch_size, is_packed=is_packed
            )
            useful = [
                float((labels != IGNORE_INDEX).float().mean())
                for (_, labels), _ in zip(batches, range(10), strict=False)
            ]
            shares.append(100 * statistics.mean(useful))
        print(f"| {name} | {len(frames):,} | {frames.mean() / 12.5:.1f} s | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    print()


def sizes(flags: DataFlags, folder: Path) -> None:
    """Memory, start-up and state from a thousand clips to a million (a shard of 2,048 clips under many names)."""
    print("| clips | start-up to the first batch | peak memory | state |\n|---|---|---|---|")
    clips = random_clips(speech_lengths(CLIPS_PER_SHARD), load_codec_config(flags.codec, STORED_LEVELS))
    for number in (1000, 10_000, 100_000, 1_000_000):
        num_shards = max(1, round(number / CLIPS_PER_SHARD))
        store = write_codes(folder / f"store-{number}", flags.codec, [clips[:number]] * num_shards)
        found, done = measured(probe, store=store, **vars(flags))
        if found is None:
            raise UserError(f"the probe of {number:,} clips failed: {done.stderr[-2000:]}")
        print(
            f"| {found['clips']:,} | {found['start_s']:.2f} s | {found['peak_mb']:,.0f} MB (before the loader "
            f"{found['before_mb']:,.0f} MB) | {found['state_bytes']:,} bytes a rank |"
        )


def probe(store: str, **values: Any) -> dict[str, float]:
    """Memory, start-up and state of a loader of a store."""
    flags = DataFlags(**values)
    tokenizer = load_speech_tokenizer(flags.tokenizer, flags.codec, flags.num_quantizers)
    before_mb = peak_mb()
    start = time.perf_counter()
    reader = code_reader(flags, store)
    batches = loader(flags, reader, tokenizer, None, batch_size=32)
    iterator = iter(batches)
    next(iterator)
    start_s = time.perf_counter() - start
    for _ in range(300):
        next(iterator)
    return {
        "clips": int(reader.corpus.rows_per_group.sum()),
        "start_s": start_s,
        "before_mb": before_mb,
        "peak_mb": peak_mb(),
        "state_bytes": len(batches.state_dict()["position"]),
    }


if __name__ == "__main__":
    run_command(bench_data, __doc__)
