"""Continuing speech: what a user chooses, and the samples of one prompt."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llama_mimi.audio.mimi import LastFrame, MimiCodec, whole_frames
from llama_mimi.audio.reading import AudioError, Waveform, read_audio
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import as_utf8
from llama_mimi.generation.decoding import End, Request, Sampling, decode
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.units import has_text

MIN_WINDOW_FRAMES = 4  # one of the anchor, two of the last, and one to grow by
ROWS = 16  # samples of one prompt that are drawn at once
MAX_PROMPT_SECONDS = 60.0  # three times the longest clip of the paper's training


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling of tokens.

    Args:
        seconds: maximum length of the continuation, in seconds; generation stops earlier at ``</audio>``.
        min_seconds: minimum length of the continuation, in seconds; ``</audio>`` is not sampled before.
        temperature: 0 selects the most likely token.
        top_k: sample from the k most likely tokens (among those valid at this position).
        top_p: then sample from the fewest tokens with this total probability; default: the value in the model's
            generation config, or 1 if it has none.
        window_seconds: maximum length of prompt and new audio in the model's context, in seconds; default: the length
            of its training clips. When the context is full, keep the start of the prompt and the last half of the
            window.
        seed: the same seed gives the same samples.
        num_samples: number of continuations of a prompt.
        last_frame: encoding of a partial last frame of a prompt: pad fills it with zeros, codec leaves it to the codec,
            as the first release does; default: codec for released checkpoints, else pad.

    Raises:
        UserError: a value out of range.
    """

    seconds: float = 10.0
    min_seconds: float = 0.0
    temperature: float = 0.8
    top_k: int = 30
    top_p: float | None = None
    window_seconds: float | None = None
    seed: int = 0
    num_samples: int = 1
    last_frame: LastFrame | None = None

    def __post_init__(self) -> None:
        for name, is_valid in {
            "seconds": 0.08 <= self.seconds < float("inf"),
            "min_seconds": 0 <= self.min_seconds < float("inf"),
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 1,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
            "window_seconds": self.window_seconds is None or 0 < self.window_seconds < float("inf"),
            "seed": 0 <= self.seed < 2**63,
            "num_samples": self.num_samples >= 1,
        }.items():
            if not is_valid:
                raise UserError(f"--{name} is {getattr(self, name)}, which is out of range; see --help")
        if self.min_seconds > self.seconds:
            raise UserError(f"--min_seconds is {self.min_seconds:g}, more than --seconds {self.seconds:g}; raise that")

    def for_model(self, model: SpeechModel) -> Sampling:
        """The same in frames of the model's codec.

        Raises:
            UserError: too short a window, or a ``top_p`` out of range in the model's generation config.
        """
        top_p = model.top_p if self.top_p is None else self.top_p
        if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
            raise UserError(
                f"top_p is {top_p!r} in the model's generation config; expected a number above 0, up to 1. Fix its "
                "generation_config.json, or set --top_p"
            )
        min_frames = math.ceil(self.min_seconds * model.codec.frame_rate_hz - 1e-6)
        window_seconds = self.window_seconds or model.trained_seconds
        window_frames = whole_frames(window_seconds, model.codec.config, "--window_seconds")
        if window_frames < MIN_WINDOW_FRAMES:
            raise UserError(
                f"--window_seconds is {window_seconds:g}, {window_frames} frames; it holds {MIN_WINDOW_FRAMES} or more"
            )
        return Sampling(
            max_frames=max(round(self.seconds * model.codec.frame_rate_hz), min_frames),
            min_frames=min_frames,
            window_frames=window_frames,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=top_p,
        )


def read_prompt(path: str, codec: MimiCodec | None = None) -> Waveform:
    """A spoken prompt, at its own rate or, with a codec, at that one's and of a frame or more.

    Raises:
        AudioError: it cannot be used, or is longer than `MAX_PROMPT_SECONDS`.
    """
    rate_hz, min_samples = (codec.sample_rate_hz, codec.frame_size) if codec else (None, 1)
    prompt = read_audio(path, rate_hz, max_seconds=MAX_PROMPT_SECONDS, min_samples=min_samples)
    if prompt.is_cut and prompt.seconds >= MAX_PROMPT_SECONDS:
        message = f"the prompt '{path}' is longer than {MAX_PROMPT_SECONDS:g} s; give a shorter one"
        raise AudioError("too long", message)
    return prompt


def checkpoint_note(model: SpeechModel, options: SamplingOptions) -> str | None:
    """Return one line about the settings in which this checkpoint's defaults differ from ours, or None."""
    taken = []
    if options.top_p is None and model.top_p != 1:
        taken.append(f"--top_p {model.top_p} (its generation config)")
    if options.last_frame is None and model.last_frame != "pad":
        taken.append(f"--last_frame {model.last_frame} (a released checkpoint)")
    return f"defaults of this checkpoint: {', '.join(taken)}" if taken else None


def encode_prompts(model: SpeechModel, prompts: Sequence[Waveform], options: SamplingOptions) -> list[torch.Tensor]:
    """Encode prompts, at the codec's rate, as `SamplingOptions.last_frame` says: for each its codes_TQ."""
    samples = [prompt.samples_S for prompt in prompts]
    if (options.last_frame or model.last_frame) == "codec":
        return [model.codec.encode_as_released(samples_S) for samples_S in samples]
    return model.codec.encode_many(samples)


def check_text(model: SpeechModel, text: str | None) -> None:
    """Refuse a text that the model cannot read.

    Raises:
        UserError: its vocabulary holds no text, or it was trained without.
    """
    if text is None:
        return
    if as_utf8(text) != text:
        raise UserError(f"--text '{as_utf8(text)}' is not UTF-8; type it in a UTF-8 terminal")
    task = getattr(model.decoder.config, "task", "tts")  # a checkpoint that does not say may have been
    if task != "tts" or not has_text(model.sequences.tokenizer):
        raise UserError("--text is given, but the model was trained without text; take one of the task 'tts'")


def continue_codes(
    model: SpeechModel, prompt_TQ: torch.Tensor, options: SamplingOptions, text: str | None = None
) -> list[torch.Tensor]:
    """Continuations of a prompt.

    Args:
        prompt_TQ: codes of the prompt, which stay as they are; none (0, Q) where there is only text.
        text: of prompt and continuation, for models of the task "tts".

    Returns:
        For each sample its codes_TQ, the prompt's frames first.

    Raises:
        UserError: the options do not fit the model.
    """
    requests = [Request(prompt_TQ, options.seed + number, text) for number in range(options.num_samples)]
    drawn = decode(model, requests, options.for_model(model), min(ROWS, options.num_samples))
    samples: list[torch.Tensor] = [prompt_TQ] * options.num_samples
    for number, new_TQ, _ in finished(drawn, model.codec.num_quantizers):
        samples[number] = torch.cat([prompt_TQ, new_TQ])
    return samples


def finished(
    drawn: Iterator[tuple[int, torch.Tensor | End]], num_quantizers: int
) -> Iterator[tuple[int, torch.Tensor, End]]:
    """Samples of `decode` as they end: their number, new frames (T, Q), and why there are no more."""
    frames: dict[int, list[torch.Tensor]] = {}
    for number, new in drawn:
        if isinstance(new, End):
            done = frames.pop(number, [])
            yield number, torch.stack(done) if done else torch.zeros(0, num_quantizers, dtype=torch.long), new
        else:
            frames.setdefault(number, []).append(new)
