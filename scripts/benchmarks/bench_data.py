"""Measure the data pipeline: reading, encoding, loading, a baseline, padding, and a mixture of tasks.

    uv run python scripts/benchmarks/bench_data.py
    uv run python scripts/benchmarks/bench_data.py --corpus my_speech/train.parquet --codec kyutai/mimi

Each rate is the speed of one process with --num_threads threads, in audio-seconds per second. Each rate is the median
of --repeats runs. The methods alternate. The baseline is the training loop of the first release of Llama-Mimi. For each
clip, the baseline writes the codes as text, calls the tokenizer, and pads to the sequence length.
"""

import contextlib
import io
import itertools
import math
import statistics
import tempfile
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring import DEVICE, alternate, machine, median_and_range
from simulated import STORED_LEVELS, random_clips, speech_lengths, text_from_codes, write_codes

from llama_mimi.audio.mimi import DTYPES, MimiCodec, load_codec_config, whole_frames
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import AudioReader, CodedClip, TextCorpus
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.corpora.formats import open_source
from llama_mimi.corpora.options import TokenizationOptions
from llama_mimi.corpora.tokenize import tokenize_corpus
from llama_mimi.corpora.utterances import UtteranceCorpus
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.order import ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, SpeechTokenizer, load_speech_tokenizer

GPU_TOKENS_PER_S = 60_000  # useful tokens per second that a 1B training step should reach on one GPU
WORDS = "the doctor and a farmer of this quiet village walked slowly behind their wonderful horses yesterday"
BASELINE, CODES, LONG_CODES = "baseline", "shard loader (pack)", "shard loader (pack), simulated lengths of 14 s"


@dataclass(frozen=True)
class DataFlags:
    """Corpus, codec and tokenizer to measure."""

    corpus: str = "assets/tiny/corpus/train-*.parquet"
    codec: str = "assets/tiny/mimi"
    tokenizer: str = "assets/tiny/llama"
    num_quantizers: int = 4
    seq_len: int = 1024
    clips: int = 64  # number of clips to measure rates on
    repeats: int = 3
    num_threads: int = 1

    def speech_tokenizer(self) -> SpeechTokenizer:
        return load_speech_tokenizer(self.tokenizer, self.codec, self.num_quantizers)


def bench_data(flags: DataFlags) -> None:
    torch.set_num_threads(flags.num_threads)
    pa.set_cpu_count(flags.num_threads)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        print_rates(flags, Path(folder))
        print_useful_fractions(flags, Path(folder))
        print_mixture(flags, Path(folder))


def audio_reader(corpus: str, codec: MimiCodec) -> AudioReader:
    return AudioReader(
        open_source(corpus, None, "audio", None),
        sample_rate_hz=codec.sample_rate_hz,
        frame_size=codec.frame_size,
        max_frames=whole_frames(20, codec.config),
    )


def read_clips(reader: AudioReader, limit: int) -> Iterator[CodedClip]:
    """Yield the first ``limit`` clips of a corpus."""
    rows = (row for unit in range(len(reader.source.units)) for row in reader.source.rows(unit))
    for row in itertools.islice(rows, limit):
        (clip,) = reader.clips(row)
        if not isinstance(clip, CodedClip):
            raise UserError(f"{clip.message}; set --corpus to a corpus of valid clips")
        yield clip


def code_reader(flags: DataFlags, corpus: str) -> CodeCorpus:
    max_frames = whole_frames(20, load_codec_config(flags.codec, flags.num_quantizers))
    return CodeCorpus(corpus, flags.codec, flags.num_quantizers, max_frames=max_frames)


def loader(
    flags: DataFlags,
    reader: AudioReader | CodeCorpus,
    batch_size: int,
    codec: MimiCodec | None = None,
    *,
    is_packed: bool = True,
) -> SpeechDataLoader:
    tokenizer = flags.speech_tokenizer()
    streams = [Stream("audio", reader)]
    return SpeechDataLoader(
        streams,
        ShuffledOrder(streams, [1.0], dp_rank=0, dp_world_size=1, shuffle_window=4096, seed=0),
        BatchPacker(tokenizer, batch_size, flags.seq_len, is_packed=is_packed, has_positions=is_packed),
        codec,
        workers={},
    )


def rate_of(work: Callable[[], Iterable[Any]], seconds: float) -> float:
    """Process ``seconds`` of audio by iterating over ``work()``; return the speed in audio-seconds per second."""
    return seconds / timeit.timeit(lambda: deque(work(), maxlen=0), number=1)


def print_rates(flags: DataFlags, folder: Path) -> None:
    codec = MimiCodec(flags.codec, flags.num_quantizers, DEVICE)
    reader = audio_reader(flags.corpus, codec)
    clips = list(read_clips(reader, flags.clips))
    seconds = sum(len(clip.samples_S) for clip in clips) / codec.sample_rate_hz
    frames = np.array([math.ceil(len(clip.samples_S) / codec.frame_size) for clip in clips])
    methods = {"reading and resampling": partial(rate_of, partial(read_clips, reader, flags.clips), seconds)}
    for dtype in DTYPES:
        model = MimiCodec(flags.codec, flags.num_quantizers, DEVICE, DTYPES[dtype])
        for batch_size in (1, 4, 16):
            methods[f"encoding, {dtype}, {batch_size} clips at once"] = partial(encode, model, clips, batch_size)
    methods[BASELINE] = partial(rate_of, partial(baseline, flags, codec, reader), seconds)
    num_rows = max(1, round(frames.sum() * flags.num_quantizers / flags.seq_len))  # number of rows that the clips fill
    methods["online loader (pack)"] = partial(token_rate, loader(flags, reader, 1, codec), codec, num_rows)
    for name, lengths in ((CODES, np.resize(frames, 4096)), (LONG_CODES, speech_lengths(4096))):
        corpus = write_codes(folder / name.replace(" ", "-"), flags.codec, [random_clips(lengths, codec.config)])
        batches = iter(loader(flags, code_reader(flags, corpus), 32))
        next(batches)  # the start-up is not measured
        methods[name] = partial(token_rate, batches, codec, 30)
    results = alternate(methods, flags.repeats)
    print("| | audio-seconds per second |\n|---|---|")
    for name, values in results.items():
        print(f"| {name} | {median_and_range(values)} |")
    rate = {name: statistics.median(values) for name, values in results.items()}
    needed = GPU_TOKENS_PER_S / (codec.frame_rate_hz * flags.num_quantizers)
    print(f"\nThe shard loader is {rate[CODES] / rate[BASELINE]:,.0f} times as fast as the baseline.")
    print(f"At {GPU_TOKENS_PER_S:,} tokens/s, the shard loader takes this fraction of the time of a training step:")
    percents = [f"{100 * needed / rate[name]:.2f} %" for name in (LONG_CODES, CODES)]
    print(f"{percents[0]} with simulated lengths, {percents[1]} with the lengths of the corpus\n")


def encode(codec: MimiCodec, clips: list[CodedClip], batch_size: int) -> float:
    samples = sorted((torch.from_numpy(clip.samples_S) for clip in clips), key=len)
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    return rate_of(partial(map, codec.encode, batches), sum(map(len, samples)) / codec.sample_rate_hz)


def token_rate(batches: Iterable[Any], codec: MimiCodec, limit: int) -> float:
    """Load the next ``limit`` batches; return the speed in audio-seconds per second."""
    start = time.perf_counter()
    num_tokens = sum(int((labels_BL != IGNORE_INDEX).sum()) for _, labels_BL in itertools.islice(batches, limit))
    return num_tokens / codec.num_quantizers / codec.frame_rate_hz / (time.perf_counter() - start)


def baseline(flags: DataFlags, codec: MimiCodec, reader: AudioReader) -> Iterator[torch.Tensor]:
    tokenizer = flags.speech_tokenizer().text_tokenizer
    for clip in read_clips(reader, flags.clips):
        text = tokenizer.bos_token + text_from_codes(codec.encode([torch.from_numpy(clip.samples_S)])[0])
        padding = {"max_length": flags.seq_len + 1, "padding": "max_length", "truncation": True}
        yield tokenizer(text, add_special_tokens=False, return_tensors="pt", **padding).input_ids


def tokenize(flags: DataFlags, corpus: str, folder: Path, numbers: Iterator[int], num_workers: int = 1) -> float:
    """Tokenise a corpus; return the speed from the last progress line, which excludes the start-up."""
    options = TokenizationOptions(corpus=corpus, output_dir=str(folder / f"codes-{next(numbers)}"), codec=flags.codec)
    options.num_workers = num_workers
    options.num_quantizers, options.clips_per_shard = flags.num_quantizers, 10**6
    with contextlib.redirect_stderr(io.StringIO()) as output:
        tokenize_corpus(options)
    return float(output.getvalue().split("audio-s/s")[-2].split()[-1].replace(",", ""))


def print_useful_fractions(flags: DataFlags, folder: Path) -> None:
    codec = MimiCodec(flags.codec, flags.num_quantizers)
    clips = read_clips(audio_reader(flags.corpus, codec), 10**9)
    lengths = {flags.corpus: np.array([math.ceil(len(clip.samples_S) / codec.frame_size) for clip in clips])}
    lengths["simulated, like The People's Speech"] = speech_lengths(2000)
    print("| useful fraction of tokens | clips | mean | pad | pack |\n|---|---|---|---|---|")
    for number, (name, frames) in enumerate(lengths.items()):
        corpus = write_codes(folder / f"lengths-{number}", flags.codec, [random_clips(frames, codec.config)])
        cells = []
        for is_packed in (False, True):
            batches = loader(flags, code_reader(flags, corpus), max(1, len(frames) // 40), is_packed=is_packed)
            useful = [float((labels != IGNORE_INDEX).float().mean()) for _, labels in itertools.islice(batches, 10)]
            cells.append(f"{100 * statistics.mean(useful):.1f} %")
        print(f"| {name} | {len(frames):,} | {frames.mean() / 12.5:.1f} s | {' | '.join(cells)} |")
    print()


def print_mixture(flags: DataFlags, folder: Path) -> None:
    """Measure the loader on all tasks, with the weights and the batches of config/llama3_2_1b_text_speech.toml.

    Clips have random codes, 14 s on average, and 2.5 random words per second. Documents have 700 words.
    """
    config, words = load_codec_config(flags.codec, STORED_LEVELS), np.array(WORDS.split())
    generator, clips = np.random.default_rng(0), []
    for number, clip in enumerate(random_clips(speech_lengths(4096), config)):
        text = " ".join(generator.choice(words, max(1, round(2.5 * clip.seconds))))
        clips.append(replace(clip, text=text, speaker=str(number // 20)))
    corpus = write_codes(folder / "mixture", flags.codec, [clips], ["text", "speaker"])
    documents = "\n".join(" ".join(generator.choice(words, 700)) for _ in range(2000))
    (folder / "documents.txt").write_text(documents)
    options: Any = {"max_frames": whole_frames(20, config), "with_text": True}
    codes = CodeCorpus(corpus, flags.codec, flags.num_quantizers, **options)
    utterances = UtteranceCorpus(corpus, flags.codec, flags.num_quantizers, **options)
    texts = TextCorpus(str(folder / "documents.txt"), "text")
    readers = {"audio": codes, "asr": codes, "tts": codes, "interleaved": utterances, "text": texts}
    streams = [Stream(task, reader) for task, reader in readers.items()]  # type: ignore[arg-type]
    packer = BatchPacker(flags.speech_tokenizer(), 16, 2048, is_packed=True, has_positions=True)
    order = ShuffledOrder(streams, [6, 2, 2, 1, 1], dp_rank=0, dp_world_size=1, shuffle_window=4096, seed=0)
    batches = iter(SpeechDataLoader(streams, order, packer, tasks=list(readers), workers={"num_workers": 2}))
    next(batches)
    rates, used = [], []
    pop = packer.pop

    def counted() -> Any:
        used.append(packer.num_used)
        return pop()

    packer.pop = counted  # type: ignore[method-assign]
    for _ in range(flags.repeats):
        start, first = time.perf_counter(), len(used)
        for _ in itertools.islice(batches, 30):
            pass
        rates.append(sum(used[first:]) / (time.perf_counter() - start))
    percent = 100 * statistics.mean(used) / (16 * 2048)
    print(f"mixture of five tasks: {median_and_range(rates)} positions/s, {percent:.1f} % of the positions are used")


if __name__ == "__main__":
    run_command(bench_data, __doc__)
