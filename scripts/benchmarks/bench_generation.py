"""Compare the generation speed of this project with ``generate``, and with the backbone alone.

    uv run python scripts/benchmarks/bench_generation.py

The model has random weights, the vocabulary of Llama 3, and 4 levels. The codec has random weights and the shape of
Mimi. All methods continue the same prompt of 3 s by the same number of frames. The methods alternate. The measured time
includes the forward pass of the prompt. The last line of the output is JSON.
On a GPU, use ``--shape 1B --batch_sizes 8 64 --dtype bfloat16 --new_frames 125``.
"""

import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import DEVICE, alternate, device_name, machine, median_and_range
from transformers import DynamicCache, GenerationConfig, MimiConfig, MimiModel

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.streaming import DecodingStream
from llama_mimi.checkpoint.csm import csm_config
from llama_mimi.checkpoint.huggingface import hf_config
from llama_mimi.checkpoint.stand_ins import LLAMA_3_VOCABULARY, write_tokenizer
from llama_mimi.common.choices import Architecture, GenerationPrecision
from llama_mimi.common.command_line import run_command
from llama_mimi.generation.decoding import FinishReason, Request, Sampling, decode
from llama_mimi.generation.loading import MODELS
from llama_mimi.generation.speech_model import DECODER_DTYPES, SpeechModel
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import load_speech_tokenizer

Q, PROMPT_FRAMES, TEMPERATURE, TOP_K = 4, 38, 0.8, 30
TINY_CODEC = str(Path(__file__).parents[2] / "assets" / "tiny" / "mimi")
LAYERS: dict[str, Any] = {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 2048}
SHAPES = {"180M": LlamaMimiArgs(**LAYERS, rope_theta=500000, enable_weight_tying=True)}
SHAPES |= {name: FLAVORS[name] for name in ("tiny", "1B")}
Shape = Literal["tiny", "180M", "1B"]
STOCK, BACKBONE, OURS, STREAMED = "stock `generate` and a mask", "backbone alone", "this loop", "this loop, streamed"


def bench_generation(
    shape: Shape = "180M",
    new_frames: int = 25,
    repeats: int = 5,
    batch_sizes: tuple[int, ...] = (8,),
    dtype: GenerationPrecision = "float32",
    num_threads: int = os.cpu_count() or 1,
) -> None:
    """Measure all methods, and print a table.

    Args:
        new_frames: number of new frames per sample
        batch_sizes: batch sizes to measure with this project's loop, in addition to 1
    """
    torch.set_num_threads(num_threads)
    print(machine())
    model = random_model(shape, dtype)
    first_audio: list[float] = []
    batches = {f"{OURS}, batch of {size}": size for size in batch_sizes}
    methods: dict[str, Callable[[], Any]] = {
        STOCK: partial(stock, model, new_frames),
        BACKBONE: partial(backbone_alone, model, new_frames),
        OURS: partial(ours, model, new_frames, 1),
        **{name: partial(ours, model, new_frames, size) for name, size in batches.items()},
        STREAMED: partial(streamed, model, new_frames, first_audio),
    }
    timed = {name: partial(rate, call, Q * new_frames * batches.get(name, 1)) for name, call in methods.items()}
    alternate(timed, 1)  # warm-up: allocations, and compilation on a GPU
    first_audio.clear()
    rates = alternate(timed, repeats)
    median = {name: statistics.median(values) for name, values in rates.items()}
    real_time = Q * model.codec.frame_rate_hz
    print("| method | tokens/s | times `generate` | of the backbone alone | times real time |\n|---|---|---|---|---|")
    for name, values in rates.items():
        ratios = f"{median[name] / median[STOCK]:.2f} | {100 * median[name] / median[BACKBONE]:.0f} %"
        print(f"| {name} | {median_and_range(values, 1)} | {ratios} | {median[name] / real_time:.2f} |")
    num_bytes = layer_bytes(model)
    times = [ours(model, new_frames, 1) for _ in range(repeats)]
    decoding = Q * (new_frames - 1) / statistics.median(total_s - first_s for first_s, total_s in times)
    used, possible = num_bytes * decoding, bandwidth()
    print(f"\nAfter the first frame, this loop generates {decoding:.1f} tokens/s.")
    print(f"This loop reads {num_bytes / 1e9:.2f} GB of layer weights for each token ({used / 1e9:,.1f} GB/s).")
    print(f"This speed is {100 * used / possible:.0f} % of the memory bandwidth ({possible / 1e9:,.0f} GB/s).")
    report = {"device": device_name(), "shape": shape, "dtype": dtype, "tokens_per_s": median[OURS]}
    report["tokens_per_s_after_the_first_frame"] = decoding
    report |= {"hf_generate_tokens_per_s": median[STOCK], "ratio": median[OURS] / median[STOCK]}
    report["real_time_factor"] = median[STREAMED] / real_time
    print(json.dumps(report | {"seconds_to_first_audio": statistics.median(first_audio)}))


def random_model(
    shape: Shape, dtype: GenerationPrecision = "float32", architecture: Architecture = "flattened", num_layers: int = 0
) -> SpeechModel:
    """Return a model with random weights and the vocabulary of Llama 3; ``num_layers`` replaces that of the shape."""
    torch.manual_seed(0)
    args = copy(SHAPES[shape])
    args.n_layers = num_layers or args.n_layers
    with tempfile.TemporaryDirectory() as folder:
        codec_name = TINY_CODEC
        if shape != "tiny":
            codec_name = f"{folder}/codec"
            MimiModel(MimiConfig()).save_pretrained(codec_name)
        write_tokenizer(Path(folder) / "tokenizer", LLAMA_3_VOCABULARY)
        tokenizer = load_speech_tokenizer(f"{folder}/tokenizer", codec_name, Q, architecture=architecture)
        codec = MimiCodec(codec_name, Q, DEVICE)
        args.vocab_size, args.num_quantizers, args.codebook_size = tokenizer.vocabulary.size, Q, codec.codebook_size
        config = hf_config(args) if architecture == "flattened" else csm_config(args, codec=codec_name)
    stock_class, model_class, _ = MODELS[config.model_type]
    decoder = stock_class(config).to(DEVICE, DECODER_DTYPES[dtype]).eval()
    decoder.generation_config = GenerationConfig()
    return model_class(decoder, tokenizer, codec, is_int8=dtype == "int8")


def layer_bytes(model: SpeechModel) -> int:
    """Return the size of the backbone's layers, which each step of the backbone reads."""
    return sum(p.numel() * (1 if model.is_int8 else p.element_size()) for p in model.backbone.layers.parameters())


def prompt_of(model: SpeechModel) -> torch.Tensor:
    return torch.randint(model.codec.codebook_size, (PROMPT_FRAMES, Q), generator=torch.Generator().manual_seed(0))


def sampling_of(new_frames: int) -> Sampling:
    """Return sampling settings with a fixed number of new frames, so that all methods draw equally many tokens."""
    return Sampling(new_frames, new_frames, 10**6, TEMPERATURE, TOP_K, 1.0)


def rate(call: Callable[[], Any], num_tokens: int) -> float:
    """Return the speed of ``call()``, in tokens per second."""
    start = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return num_tokens / (time.perf_counter() - start)


def generate(model: SpeechModel, ids_1L: torch.Tensor, num_new: int, processors: list[Any]) -> torch.Tensor:
    length = {"max_new_tokens": num_new, "min_new_tokens": num_new, "pad_token_id": 0}
    config = GenerationConfig(**length, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
    mask_1L = torch.ones_like(ids_1L, device=DEVICE)
    inputs = {"attention_mask": mask_1L, "generation_config": config, "logits_processor": processors}
    return model.decoder.generate(ids_1L.to(DEVICE), **inputs)


def stock(model: SpeechModel, new_frames: int) -> None:
    ids_1L = model.tokenizer.encode(prompt_of(model), is_cut=True)[None]
    vocabulary, num_prefix = model.tokenizer.vocabulary, len(model.tokenizer.prefix_ids())

    def mask_levels(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the logits of all tokens that are not codes of the next level."""
        level = (input_ids.shape[1] - num_prefix) % Q
        codes = slice(vocabulary.base + level, vocabulary.audio_start_id, Q)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, codes] = scores[:, codes]
        return allowed

    generate(model, ids_1L, new_frames * Q, [mask_levels])


@torch.inference_mode()
def backbone_alone(model: SpeechModel, new_frames: int) -> None:
    """Run the Transformer without the output layer, sampling and grammar: the maximum speed of `transformers`."""
    inputs_1L = model.tokenizer.encode(prompt_of(model), is_cut=True)[None].to(DEVICE)
    cache = DynamicCache(config=model.backbone.config)
    for _ in range(new_frames * Q):
        model.backbone(inputs_1L, past_key_values=cache, use_cache=True)
        inputs_1L = inputs_1L[:, -1:]


def ours(model: SpeechModel, new_frames: int, batch_size: int) -> tuple[float, float]:
    """Return the seconds until all samples of a batch have their first frame, and until they have all frames."""
    requests = [Request(prompt_of(model), seed) for seed in range(batch_size)]
    start = time.perf_counter()
    drawn = decode(model, requests, sampling_of(new_frames), batch_size)
    next(drawn)  # the loop draws a frame of all samples at once
    first_s = time.perf_counter() - start
    deque(drawn, maxlen=0)
    return first_s, time.perf_counter() - start


def streamed(model: SpeechModel, new_frames: int, first_audio: list[float]) -> None:
    """Generate and decode frame by frame; append the time to the first new audio (s) to ``first_audio``."""
    start = time.perf_counter()
    stream = DecodingStream(model.codec)
    stream.decode(prompt_of(model))
    for number, (_, new) in enumerate(decode(model, [Request(prompt_of(model), 0)], sampling_of(new_frames), 1)):
        if not isinstance(new, FinishReason):
            stream.decode(new[None])
            if number == 0:
                first_audio.append(time.perf_counter() - start)


def bandwidth() -> float:
    """Return the memory bandwidth of reads, in bytes per second."""
    block = torch.ones(2**28, device=DEVICE)  # 1 GiB
    # The first run loads kernels.
    return [rate(lambda: [block.sum() for _ in range(5)], 5 * block.nbytes) for _ in range(2)][1]


if __name__ == "__main__":
    run_command(bench_generation, __doc__)
