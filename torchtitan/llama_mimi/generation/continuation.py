"""Read and encode prompts, convert sampling options from seconds to frames, and continue one prompt."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import AudioError, Waveform, read_audio
from llama_mimi.common.command_line import is_first_rank
from llama_mimi.common.errors import UserError
from llama_mimi.generation.decoding import Drawn, FinishReason, Request, Sampling, decode
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.generation.speech_model import SpeechModel

ROWS = 16  # maximum number of samples of one prompt in a batch
MAX_PROMPT_SECONDS = 60.0  # three times the longest training clip of the paper


def for_model(options: SamplingOptions, model: SpeechModel) -> Sampling:
    """Convert options from seconds to frames and add the model's defaults; raise a `UserError` for an invalid top_p."""
    top_p, rate_hz = model.top_p if options.top_p is None else options.top_p, model.codec.frame_rate_hz
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        problem = f"top_p in the model's generation_config.json is {top_p!r}; expected a number above 0 and at most 1"
        raise UserError(f"{problem}. Edit this value in the file, or set --top_p")
    # 20 s is the paper's limit; the config of a released checkpoint has no limit.
    window_seconds = options.window_seconds or float(getattr(model.decoder.config, "max_audio_seconds", 20.0))
    window_frames = max(int(window_seconds * rate_hz + 1e-6), 4)
    min_frames = math.ceil(options.min_seconds * rate_hz - 1e-6)
    max_frames = max(round(options.seconds * rate_hz), min_frames)
    return Sampling(max_frames, min_frames, window_frames, options.temperature, options.top_k, top_p)


def settings_note(model: SpeechModel, options: SamplingOptions) -> str:
    """Return a line with the precision and the device of the decoder, and with unusual defaults of the checkpoint."""
    used = []
    if options.top_p is None and model.top_p != 1:
        used.append(f"--top_p {model.top_p} (its generation config)")
    if options.last_frame is None and model.last_frame != "pad":
        used.append(f"--last_frame {model.last_frame} (a released checkpoint)")
    defaults = f"; defaults of this checkpoint: {', '.join(used)}" if used else ""
    return f"the decoder runs in {model.dtype} on {model.device}{defaults}"


def read_prompt(path: str, codec: MimiCodec | None = None) -> Waveform:
    """Read a prompt of up to `MAX_PROMPT_SECONDS`; with a codec, resample the prompt and require at least one frame."""
    rate_hz, min_samples = (codec.sample_rate_hz, codec.frame_size) if codec else (None, 1)
    prompt = read_audio(path, rate_hz, max_seconds=MAX_PROMPT_SECONDS, min_samples=min_samples)
    if prompt.is_cut and prompt.seconds >= MAX_PROMPT_SECONDS:
        raise AudioError("too long", f"the prompt '{path}' is longer than {MAX_PROMPT_SECONDS:g} s; shorten the file")
    return prompt


def encode_prompts(model: SpeechModel, prompts: Sequence[Waveform], options: SamplingOptions) -> list[torch.Tensor]:
    """Return the codes_TQ of prompts that have the codec's sample rate. See `SamplingOptions.last_frame`."""
    samples = [prompt.samples_S for prompt in prompts]
    if (options.last_frame or model.last_frame) == "codec":
        return [model.codec.encode_as_released(samples_S) for samples_S in samples]
    return model.codec.encode_many(samples)


def continue_codes(
    model: SpeechModel, prompt_TQ: torch.Tensor, options: SamplingOptions, text: str | None = None
) -> list[torch.Tensor]:
    """Continue a prompt ``options.num_samples`` times; return the codes_TQ of each sample, including the prompt."""
    requests = [Request(prompt_TQ, options.seed + number, text) for number in range(options.num_samples)]
    drawn = decode_with_bar(model, requests, options, min(ROWS, options.num_samples))
    new = {number: new_TQ for number, new_TQ, *_ in finished(drawn, model.codec.num_quantizers)}
    return [torch.cat([prompt_TQ, new[number]]) for number in range(options.num_samples)]


def decode_with_bar(model: SpeechModel, requests: Sequence[Request], options: SamplingOptions, num_rows: int) -> Drawn:
    """Yield the items of `decode`, and show the seconds of new audio and the time left.

    The time left assumes the maximum length for every sample. When a sample ends earlier, the shown total decreases.
    """
    sampling, num_new = for_model(options, model), [0] * len(requests)
    window, rate_hz = sampling.window_frames, model.codec.frame_rate_hz
    if number := sum(len(request.prompt_TQ) >= window for request in requests):
        seen = f"the first {window // 4 / rate_hz:.1f} s and the last {window // 2 / rate_hz:.1f} s"
        problem = f"prompts that fill the model's context of {window / rate_hz:.1f} s: {number:,}"
        print(f"{problem}; the model sees only {seen} of each of these prompts", flush=True)
    shown: dict[str, Any] = {"desc": "new audio", "unit_scale": 1 / rate_hz, "leave": None}
    shown["bar_format"] = "{desc}: {n:.1f} of {total:.1f} s [{elapsed}, left: {remaining}]"
    total = len(requests) * sampling.max_frames
    with tqdm(total=total, disable=not is_first_rank(), delay=1, mininterval=1, **shown) as progress:
        for number, new in decode(model, requests, sampling, num_rows):
            if isinstance(new, FinishReason):
                progress.total -= sampling.max_frames - num_new[number]
            else:
                num_new[number] += 1
                progress.update()
            yield number, new


def finished(drawn: Drawn, num_quantizers: int) -> Iterator[tuple[int, torch.Tensor, FinishReason, float]]:
    """When a sample of `decode` ends, yield its index, its new frames (T, Q), its finish reason and its start time."""
    samples: dict[int, tuple[float, list[torch.Tensor]]] = {}
    for number, new in drawn:
        began, frames = samples.setdefault(number, (time.perf_counter(), [torch.zeros(0, num_quantizers).long()]))
        if isinstance(new, FinishReason):
            yield number, torch.cat(frames), new, began
            del samples[number]
        else:
            frames.append(new[None])
