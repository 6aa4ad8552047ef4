"""Speak, and hear a model go on while it speaks: a page in the browser.

    uv run --extra demo python scripts/demo.py --model_name models/tiny

It needs the program ffmpeg, by which gradio sends sound while it is made. Who can reach --host can use it; by default
that is this machine alone.
"""

import functools
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pages
import soundfile
import torch

from llama_mimi.audio.streaming import DecodingStream
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.generation.continuation import SamplingOptions, checkpoint_note, encode_prompts, read_prompt
from llama_mimi.generation.decoding import End, Request, decode
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.speech_model import DecoderPrecision, SpeechModel

SECONDS_AT_ONCE = 0.4  # of new audio that is sent together
SHOWN_FRAMES = 24  # of tokens, the newest
MAX_UPLOAD = "50mb"  # of a prompt
MAX_WAITING = 8  # requests; one more is refused
DELETE_AFTER = (600, 3600)  # seconds: how often uploads are looked at, and the age at which they are deleted


def demo(
    model_name: tuple[str, ...] = ("models/tiny",),
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    dtype: DecoderPrecision = "float32",
) -> None:
    """Serve the page until it is stopped.

    Args:
        model_name: hub ids or folders, to choose from
        host: address to listen at; 0.0.0.0 is all of this machine's
        port: of the page
        device: by default the accelerator where there is one
        dtype: precision of the decoder

    Raises:
        UserError: gradio, ffmpeg or a model is not there.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs gradio; install it with `uv sync --extra demo`") from error
    if shutil.which("ffmpeg") is None:
        raise UserError("the demo needs the program ffmpeg to send sound while it is made; install it")
    if not model_name:
        raise UserError("no model is named; give one or several as --model_name")

    @functools.lru_cache(maxsize=1)
    def load(name: str) -> SpeechModel:
        return load_speech_model(name, device=device, dtype=dtype)

    load(model_name[0])  # what is wrong with it is said now
    app = build_app(gradio, load, model_name).queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=theme(gradio),
            footer_links=[],
            max_file_size=MAX_UPLOAD,
        )
    except OSError as error:  # gradio says so of any port that it cannot bind
        raise UserError(f"port {port} of {host} is taken or cannot be used; choose another --port") from error


def theme(gradio: Any) -> Any:
    """Fonts of the browser's own; gradio's would come from elsewhere."""
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_app(gradio: Any, load: Any, model_names: tuple[str, ...]) -> Any:
    """The page."""

    def answer(
        prompt: str | None, name: str, seconds: float, temperature: float, top_k: int, top_p: float, seed: int | None
    ) -> Any:
        try:
            if prompt is None:
                raise UserError("record or upload a prompt first")
            if seed is None:
                raise UserError("the seed is empty; type a whole number")
            options = SamplingOptions(
                seconds=seconds, temperature=temperature, top_k=int(top_k), top_p=top_p or None, seed=int(seed)
            )
            yield from continued(load(name), prompt, options)
        except UserError as error:
            raise gradio.Error(without_folders(str(error))) from error

    with gradio.Blocks(title="Llama-Mimi", delete_cache=DELETE_AFTER) as app:
        gradio.Markdown("# Llama-Mimi\nSay how it begins; the model goes on in the voice that it heard.")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Audio(sources=["upload", "microphone"], type="filepath", label="Prompt", buttons=[])
                name = gradio.Dropdown(list(model_names), value=model_names[0], label="Model")
                seconds = gradio.Slider(0.5, 30, value=4, step=0.5, label="Seconds, at most")
                temperature = gradio.Slider(0.1, 1.5, value=0.8, step=0.05, label="Temperature")
                top_k = gradio.Slider(1, 200, value=30, step=1, label="Top k")
                top_p = gradio.Slider(0, 1, value=0, step=0.05, label="Top p (0: the model's own)")
                seed = gradio.Number(value=0, precision=0, label="Seed")
                button = gradio.Button("Continue", variant="primary")
            with gradio.Column():
                sound = gradio.Audio(
                    streaming=True, autoplay=True, label="Continuation, while it is made", buttons=["download"]
                )
                status = gradio.Textbox(label="State", lines=2, elem_id="state")
                picture = gradio.Image(label="Spectrogram; the line is the end of the prompt", type="numpy", buttons=[])
                tokens = gradio.Textbox(
                    label=f"Tokens of the last {SHOWN_FRAMES} frames, the newest first", lines=8, elem_id="tokens"
                )
        inputs = [prompt, name, seconds, temperature, top_k, top_p, seed]
        button.click(answer, inputs, [sound, status, picture, tokens])
    return app


def continued(
    model: SpeechModel, prompt: str, options: SamplingOptions
) -> Iterator[tuple[bytes | None, str, np.ndarray, str]]:
    """New sound as WAV, what to say of it, the spectrogram and the newest tokens, as often as there is something new.

    Raises:
        UserError: the prompt or an option cannot be used.
    """
    codec, began = model.codec, time.perf_counter()
    (prompt_TQ,) = encode_prompts(model, [read_prompt(prompt, codec)], options)
    decoding = DecodingStream(codec)
    heard = [decoding.decode(prompt_TQ)]
    end_seconds = len(prompt_TQ) / codec.frame_rate_hz
    frames, waiting, first = list(prompt_TQ), [heard[0]], 0.0
    end = None
    drawn = decode(model, [Request(prompt_TQ, options.seed, None)], options.for_model(model), 1)
    for _, new in drawn:
        if isinstance(new, End):
            end = new
        else:
            waiting.append(decoding.decode(new[None]))
            heard.append(waiting[-1])
            frames.append(new)
        ready = sum(map(len, waiting)) >= SECONDS_AT_ONCE * codec.sample_rate_hz
        if ready or end is not None:
            sound = wav(torch.cat(waiting), codec.sample_rate_hz) if waiting else None
            waiting = []
            spent = time.perf_counter() - began
            first = first or spent
            new_seconds = len(frames) / codec.frame_rate_hz - end_seconds
            state = (
                f"{new_seconds:.1f} s new after {spent:.1f} s; the prompt and the first new frame were sent after "
                f"{first:.1f} s"
            )
            if end is not None:
                state += f". The end: {'the model stopped' if end is End.BY_MODEL else 'as long as asked for'}"
                if note := checkpoint_note(model, options):
                    state += f"; {note}"
            colors = pages.resized(pages.spectrogram(torch.cat(heard), codec.sample_rate_hz, end_seconds))
            yield sound, state, colors, "\n".join(map(tokens_of, reversed(frames[-SHOWN_FRAMES:])))


def without_folders(message: str) -> str:
    """Return an error with the name alone of each absolute path: visitors see no folders of this machine.

    In quotes a path may have spaces. Quotes stand behind a space or a bracket.
    """
    quoted = r"""(?<![^\s(\[])(['"])/(?:(?!\1).)*?([^/'"]*)/*\1"""
    message = re.sub(quoted, r"\1\2\1", message)
    return re.sub(r"""(?<![^\s(\[=])/[^\s'"]*?([^\s/'",;:)\]]+)/*(?=[\s,;:)\]]|$)""", r"\1", message)


def tokens_of(frame_Q: torch.Tensor) -> str:
    return "".join(f"<{code}_{level}>" for level, code in enumerate(frame_Q.tolist()))


def wav(samples_S: torch.Tensor, sample_rate_hz: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples_S.clamp(-1, 1).numpy(), sample_rate_hz, format="WAV", subtype="PCM_16")
    return stream.getvalue()


if __name__ == "__main__":
    run_command(demo, __doc__)
