"""What a new token costs: this loop beside stock ``generate``, the body alone, and the first release's way.

    uv run python scripts/benchmarks/bench_generation.py

A random model with Llama 3's vocabulary extended by 4 levels, and a random codec in Mimi's shape. All ways continue the
same prompt of 3 s by as many frames, all in turn, the prompt's own pass included. The last line is JSON.
On a GPU: ``--shape 1B --batch_sizes 8 64 --dtype bfloat16 --new_frames 125``.
"""

import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import DEVICE, in_turn, machine, measured, median_and_range, peak_mb
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MimiConfig,
    MimiModel,
)

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.streaming import DecodingStream
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import LLAMA_3_VOCABULARY, write_tokenizer
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.generation.decoding import FinishReason, Request, Sampling, decode
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.speech_model import DECODER_DTYPES, DecoderPrecision
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import load_speech_tokenizer
from llama_mimi.tokens.vocabulary import text_from_codes

Q, PROMPT_FRAMES, TEMPERATURE, TOP_K = 4, 38, 0.8, 30
TINY_CODEC = str(Path(__file__).parents[2] / "assets" / "tiny" / "mimi")
SHAPES = {
    "tiny": FLAVORS["tiny"],
    "180M": LlamaMimiArgs(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=4, multiple_of=256, rope_theta=500000, enable_weight_tying=True
    ),
    "1B": FLAVORS["1B"],
}
Shape = Literal["tiny", "180M", "1B"]


def bench_generation(
    shape: Shape = "180M",
    new_frames: int = 25,
    repeats: int = 5,
    batch_sizes: tuple[int, ...] = (8,),
    dtype: DecoderPrecision = "float32",
    stream_seconds: tuple[float, ...] = (10.0, 60.0),
    prompts: tuple[int, ...] = (32, 256),
    num_threads: int = os.cpu_count() or 1,
) -> None:
    """Print the table.

    Args:
        shape: of the model
        new_frames: that a sample gets
        batch_sizes: of this loop, besides 1
        dtype: of the model
        stream_seconds: of streams of the tiny shape, whose peaks of memory are compared
        prompts: numbers of them, continued in groups of 32, whose peaks of memory are compared
    """
    torch.set_num_threads(num_threads)
    print(machine())
    model = random_model(shape, dtype)
    ways: dict[str, Callable[[], float]] = {
        "stock `generate` and a mask": partial(stock, model, new_frames),
        "the release's way: text, `generate`, text": partial(as_released, model, new_frames),
        "body alone": partial(body_alone, model, new_frames),
        "this loop": partial(ours, model, new_frames, 1),
    }
    for batch_size in batch_sizes:
        ways[f"this loop, batch of {batch_size}"] = partial(ours, model, new_frames, batch_size)
    firsts: list[float] = []
    ways["this loop, streamed through the codec"] = partial(streamed, model, new_frames, firsts)
    for way in ways.values():  # allocations, and compilation on a GPU
        way()
    firsts.clear()
    rates = in_turn(ways, repeats)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first, *_ = medians
    print("| way | tokens/s | times `generate` | of the body alone | times real time |")
    print("|---|---|---|---|---|")
    for name, values in rates.items():
        row = [name, median_and_range(values, 1), f"{medians[name] / medians[first]:.2f}"]
        row += [f"{100 * medians[name] / medians['body alone']:.0f} %"]
        row += [f"{medians[name] / (Q * model.codec.frame_rate_hz):.2f}"]
        print("|", " | ".join(row), "|")
    num_bytes = sum(p.numel() * p.element_size() for p in model.backbone.layers.parameters())
    print(f"\nA token reads {num_bytes / 1e9:.2f} GB of layers; {bandwidth(num_bytes, medians['this loop'])}")
    for seconds in stream_seconds:
        print(f"peak memory of a stream of {seconds:g} s, tiny shape: {_peak(stream_memory, seconds=seconds)}")
    for num_prompts in prompts:
        print(f"peak memory of {num_prompts} prompts, tiny shape: {_peak(prompts_memory, num_prompts=num_prompts)}")
    report = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} CPU cores",
        "shape": shape,
        "dtype": dtype,
        "tokens_per_s": medians["this loop"],
        "hf_generate_tokens_per_s": medians[first],
        "ratio": medians["this loop"] / medians[first],
        "real_time_factor": medians["this loop, streamed through the codec"] / (Q * model.codec.frame_rate_hz),
        "seconds_to_first_audio": statistics.median(firsts),
    }
    print(json.dumps(report))


def random_model(shape: Shape, dtype: DecoderPrecision = "float32") -> FlattenedModel:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        codec_name = TINY_CODEC
        if shape != "tiny":
            codec_name = f"{folder}/codec"
            MimiModel(MimiConfig()).save_pretrained(codec_name)
        write_tokenizer(Path(folder) / "tokenizer", LLAMA_3_VOCABULARY)
        tokenizer = load_speech_tokenizer(f"{folder}/tokenizer", codec_name, Q)
        codec = MimiCodec(codec_name, Q, DEVICE)
    args = copy(SHAPES[shape])
    args.vocab_size = tokenizer.vocabulary.size
    decoder = LlamaForCausalLM(hf_config(args)).to(DEVICE, DECODER_DTYPES[dtype]).eval()
    decoder.generation_config = GenerationConfig()
    return FlattenedModel(decoder, tokenizer, codec)


def prompt_of(model: FlattenedModel) -> torch.Tensor:
    return torch.randint(model.codec.codebook_size, (PROMPT_FRAMES, Q), generator=torch.Generator().manual_seed(0))


def sampling_of(new_frames: int) -> Sampling:
    """Nothing ends before, so that all ways draw as many tokens."""
    return Sampling(new_frames, new_frames, 10**6, TEMPERATURE, TOP_K, 1.0)


class LevelMask(LogitsProcessor):
    """Leaves the codes of the level that comes next, among logits of the whole vocabulary."""

    def __init__(self, model: FlattenedModel, num_head_tokens: int) -> None:
        self._vocabulary, self._num_head_tokens = model.tokenizer.vocabulary, num_head_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        level = (input_ids.shape[1] - self._num_head_tokens) % Q
        units = slice(self._vocabulary.base + level, self._vocabulary.audio_start_id, Q)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, units] = scores[:, units]
        return allowed


def generate(model: FlattenedModel, ids_1L: torch.Tensor, num_new: int, processors: list[LogitsProcessor]) -> Any:
    config = GenerationConfig(
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        pad_token_id=0,
    )
    return model.decoder.generate(
        ids_1L.to(DEVICE),
        attention_mask=torch.ones_like(ids_1L, device=DEVICE),
        generation_config=config,
        logits_processor=LogitsProcessorList(processors),
    )


def timed(call: Callable[[], Any], num_tokens: int) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return num_tokens / (time.perf_counter() - start)


def stock(model: FlattenedModel, new_frames: int) -> float:
    ids_1L = model.tokenizer.encode(prompt_of(model), is_cut=True)[None]
    mask = LevelMask(model, len(model.tokenizer.prefix_ids()))
    return timed(lambda: generate(model, ids_1L, new_frames * Q, [mask]), new_frames * Q)


def as_released(model: FlattenedModel, new_frames: int) -> float:
    """Codes to text to ids, ``generate`` without a mask, ids to text to codes to audio."""

    def call() -> None:
        prompt_TQ = prompt_of(model)
        text = text_from_codes(prompt_TQ).removesuffix("</audio>")
        ids_1L = model.tokenizer.text_tokenizer(text, return_tensors="pt").input_ids
        drawn_1L = generate(model, ids_1L, new_frames * Q, [])
        model.tokenizer.text_tokenizer.decode(drawn_1L[0])
        # What a random model says without a mask is no audio; as many codes are parsed and decoded in its place.
        text = text_from_codes(prompt_TQ.repeat(9, 1)[: PROMPT_FRAMES + new_frames])
        codes = [int(code) for code, _ in re.findall(r"<(\d+)_(\d+)>", text)]
        model.codec.decode(torch.tensor(codes).view(-1, Q))

    return timed(call, new_frames * Q)


@torch.inference_mode()
def body_alone(model: FlattenedModel, new_frames: int) -> float:
    """The Transformer without output layer, choice or grammar: the least that a token costs here."""
    ids_1L = model.tokenizer.encode(prompt_of(model), is_cut=True)[None].to(DEVICE)

    def call() -> None:
        cache = DynamicCache(config=model.backbone.config)
        inputs_1L = ids_1L
        for _ in range(new_frames * Q):
            model.backbone(inputs_1L, past_key_values=cache, use_cache=True)
            inputs_1L = ids_1L[:, -1:]

    return timed(call, new_frames * Q)


def ours(model: FlattenedModel, new_frames: int, batch_size: int) -> float:
    requests = [Request(prompt_of(model), seed) for seed in range(batch_size)]

    def call() -> None:
        for _ in decode(model, requests, sampling_of(new_frames), batch_size):
            pass

    return timed(call, batch_size * new_frames * Q)


def streamed(model: FlattenedModel, new_frames: int, firsts: list[float]) -> float:
    """From the prompt's codes to audio, a frame at a time; notes when the first new audio was there."""

    def call() -> None:
        start = time.perf_counter()
        stream = DecodingStream(model.codec)
        stream.decode(prompt_of(model))
        is_first = True
        for _, new in decode(model, [Request(prompt_of(model), 0)], sampling_of(new_frames), 1):
            if not isinstance(new, FinishReason):
                stream.decode(new[None])
                if is_first:
                    firsts.append(time.perf_counter() - start)
                is_first = False

    return timed(call, new_frames * Q)


def bandwidth(num_bytes: int, tokens_per_s: float) -> str:
    """How fast memory is read, beside how fast it can be."""
    block = torch.ones(2**28, device=DEVICE)  # 1 GiB
    start = time.perf_counter()
    for _ in range(5):
        block.sum()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    possible = 5 * block.numel() * block.element_size() / (time.perf_counter() - start)
    read = num_bytes * tokens_per_s
    return f"that is {read / 1e9:,.1f} GB/s of {possible / 1e9:,.0f} ({100 * read / possible:.0f} %)"


def stream_memory(seconds: float) -> float:
    """MB at the peak of a stream that goes on past its window."""
    model = random_model("tiny")
    sampling = replace(sampling_of(round(seconds * model.codec.frame_rate_hz)), window_frames=62)
    stream = DecodingStream(model.codec)
    for _, new in decode(model, [Request(prompt_of(model), 0)], sampling, 1):
        if not isinstance(new, FinishReason):
            stream.decode(new[None])
    return peak_mb()


def prompts_memory(num_prompts: int) -> float:
    """MB at the peak of so many prompts, each continued by a second, in groups as those of a folder."""
    model = random_model("tiny")
    for start in range(0, num_prompts, 32):
        requests = [Request(prompt_of(model), seed) for seed in range(start, start + 32)]
        for _ in decode(model, requests, sampling_of(12), 8):
            pass
    return peak_mb()


def _peak(function: Callable[..., float], **arguments: float) -> str:
    found, done = measured(function, **arguments)
    if found is None:
        raise UserError(f"'{function.__name__}' failed: {done.stderr[-600:]}")
    return f"{found:,.0f} MB"


if __name__ == "__main__":
    run_command(bench_generation, __doc__)
