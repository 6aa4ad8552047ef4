"""Serve a web page on which a model continues recorded speech. The audio plays during generation.

    uv run --extra demo python scripts/demo.py --model_name models/tiny

gradio needs the program ffmpeg to stream audio. Everyone who can reach the address --host can use the page. By
default, only this machine can reach the page.
"""

import io
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llama_mimi.common.choices import GenerationPrecision
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.generation.options import SamplingOptions
from llama_mimi.report.document import import_extra

CHUNK_SECONDS = 0.4  # minimum length of a chunk of new audio


def demo(
    model_name: str = "models/tiny",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    dtype: GenerationPrecision | None = None,
) -> None:
    """Serve the page until it is stopped.

    Args:
        model_name: hub id or folder of the model
        host: address to listen on; 0.0.0.0 means all addresses of this machine
        port: port of the page
        device: torch device; default: the GPU, or the CPU of a machine without a GPU
        dtype: precision of the decoder; 'int8' is for CPUs; default: bfloat16 on a GPU, float32 on a CPU
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
    gradio = import_extra("gradio", "the demo", "run `uv sync --inexact --extra demo`")
    if shutil.which("ffmpeg") is None:
        raise UserError("the demo needs the program ffmpeg to stream audio; install ffmpeg")
    from llama_mimi.generation.loading import load_speech_model

    model = load_speech_model(model_name, device=device, dtype=dtype)
    app = build_app(gradio, model).queue(max_size=8, default_concurrency_limit=1)
    # Use the browser's fonts, because gradio would download fonts.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"share": False, "theme": theme, "footer_links": [], "max_file_size": "50mb"}
    try:
        app.launch(server_name=host, server_port=port, **options)
    except OSError as error:  # gradio raises OSError for every port that it cannot bind
        raise UserError(f"port {port} of {host} cannot be opened; choose another --port or --host") from error


def build_app(gradio: Any, model: Any) -> Any:
    """Return the gradio page. After a click on the button, the page shows the values that `continued` yields."""
    worker = ThreadPoolExecutor(1)

    def answer(prompt: str | None, *settings: float | None) -> Iterator[Any]:
        if prompt is None or None in settings:
            raise gradio.Error("record or upload a prompt, and enter a number for each setting")
        options: dict[str, Any] = dict(zip(sliders, settings, strict=True))
        options |= {"top_k": int(options["top_k"]), "seed": int(options["seed"]), "top_p": options["top_p"] or None}
        try:
            values = continued(model, prompt, SamplingOptions(**options))
            # gradio calls `answer` in changing threads, but a model has to be compiled and run in one thread.
            while shown := worker.submit(next, values, None).result():
                yield shown
        except UserError as error:
            # Hide this machine's folders from visitors.
            raise gradio.Error(str(error).replace(prompt, os.path.basename(prompt))) from error

    prompt = gradio.Audio(sources=["upload", "microphone"], type="filepath", label="Prompt", buttons=[])
    sliders = {
        "seconds": gradio.Slider(0.5, 30, value=4, step=0.5, label="Maximum length (s)"),
        "temperature": gradio.Slider(0.1, 1.5, value=0.8, step=0.05, label="Temperature"),
        "top_k": gradio.Slider(1, 200, value=30, step=1, label="Top k"),
        "top_p": gradio.Slider(0, 1, value=0, step=0.05, label="Top p (0: the model's default)"),
        "seed": gradio.Number(value=0, precision=0, label="Seed"),
    }
    sound = gradio.Audio(streaming=True, autoplay=True, label="Continuation", buttons=["download"])
    state = gradio.Textbox(label="State", lines=2, elem_id="state")
    text = {"title": "Llama-Mimi", "description": "Record a prompt; the model continues it in the same voice."}
    options = {"submit_btn": "Continue", "flagging_mode": "never", "delete_cache": (600, 3600)}  # in seconds
    return gradio.Interface(answer, [prompt, *sliders.values()], [sound, state], **text, **options)


def continued(model: Any, prompt: str, options: SamplingOptions) -> Iterator[tuple[Any, ...]]:
    """Continue a prompt. After each chunk of new audio, yield the chunk as WAV, and a progress message."""
    import soundfile
    import torch

    from llama_mimi.audio.streaming import DecodingStream
    from llama_mimi.generation.continuation import encode_prompts, for_model, read_prompt, settings_note
    from llama_mimi.generation.decoding import FinishReason, Request, decode

    codec, began, first_spent = model.codec, time.perf_counter(), 0.0
    (prompt_TQ,) = encode_prompts(model, [read_prompt(prompt, codec)], options)
    decoding = DecodingStream(codec)
    audio, num_sent = [decoding.decode(prompt_TQ)], 0  # audio of the prompt, then of each new frame
    for _, new in decode(model, [Request(prompt_TQ, options.seed)], for_model(options, model), 1):
        if not isinstance(new, FinishReason):
            audio.append(decoding.decode(new[None]))
            if sum(map(len, audio[num_sent:])) < CHUNK_SECONDS * codec.sample_rate_hz:
                continue
        sound = None
        if num_sent < len(audio):
            stream, samples_S = io.BytesIO(), torch.cat(audio[num_sent:]).clamp(-1, 1).numpy()
            soundfile.write(stream, samples_S, codec.sample_rate_hz, format="WAV", subtype="PCM_16")
            sound = stream.getvalue()
        num_sent, spent, new_seconds = len(audio), time.perf_counter() - began, (len(audio) - 1) / codec.frame_rate_hz
        first_spent = first_spent or spent
        state = f"{new_seconds:.1f} s of new audio after {spent:.1f} s; first audio after {first_spent:.1f} s"
        if isinstance(new, FinishReason):
            state += f". Generation stopped at {'</audio>' if new is FinishReason.EOS else 'the maximum length'}"
            state += f"; {settings_note(model, options)}"
        yield sound, state


if __name__ == "__main__":
    run_command(demo, __doc__)
