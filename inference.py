"""Continue speech: one prompt, or all in a folder.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

import time
from dataclasses import replace
from pathlib import Path

import torch

from llama_mimi.audio.mimi import CodecAttention
from llama_mimi.audio.reading import Waveform, wav_writer, write_wav
from llama_mimi.audio.silence import silences
from llama_mimi.audio.streaming import DecodingStream, decode_long
from llama_mimi.common.command_line import run_command
from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import from_first, torchrun_ranks
from llama_mimi.generation.continuation import (
    SamplingOptions,
    check_text,
    checkpoint_note,
    continue_codes,
    encode_prompts,
    read_prompt,
)
from llama_mimi.generation.decoding import End, Request, decode
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.prompt_folder import LONG_SILENCE_SECONDS, RESULTS, continue_folder, describe_model
from llama_mimi.generation.speech_model import DecoderPrecision, SpeechModel


def continue_speech(
    sampling: SamplingOptions,
    model_name: str = "llm-jp/Llama-Mimi-1.3B",
    prompt: str | None = None,
    prompts: Path | None = None,
    text: str | None = None,
    output_file: Path = Path("continuation.wav"),
    output_dir: Path | None = None,
    stream: bool = False,
    batch_size: int | None = None,
    codec: str | None = None,
    codec_attention: CodecAttention | None = None,
    device: str | None = None,
    dtype: DecoderPrecision = "float32",
) -> None:
    """Continue speech.

    Args:
        sampling: sampling of tokens
        model_name: hub id or folder
        prompt: WAV, FLAC, MP3 or OGG file; other formats with FFmpeg
        prompts: folder of such files, all continued into --output_dir; the same command resumes a killed run
        text: text to speak, for models of the task tts; with --prompt as the voice, it begins with the prompt's words
        output_file: WAV file; several samples add their number to its name
        output_dir: output folder of --prompts
        stream: write the sample while it is generated
        batch_size: number of samples in a batch of --prompts; default: 8, on a GPU 64
        codec: hub id or folder; default: the codec that the model names
        codec_attention: default: the attention that encoded the model's training data
        device: default: the accelerator if there is one
        dtype: precision of the decoder

    Raises:
        UserError: the prompt, the model or an option cannot be used.
    """
    if (prompts is None) == (prompt is None and text is None):
        raise UserError("give a spoken --prompt, a --text, or both, or else a folder of --prompts")
    if (prompts is None) != (output_dir is None):
        raise UserError("--prompts and --output_dir go together; one prompt goes into --output_file")
    if prompts is not None and stream:
        raise UserError("--stream is for one prompt; leave it out, or --prompts")
    if batch_size is not None and (batch_size < 1 or prompts is None):
        raise UserError(f"--batch_size is {batch_size}; it must be 1 or more, and is for --prompts")
    if stream and sampling.num_samples > 1:
        raise UserError(f"--stream makes one sample, not {sampling.num_samples}; leave out --num_samples")
    if output_file.suffix.lower() != ".wav" or output_file.is_dir():
        raise UserError(f"--output_file is '{output_file}'; name a .wav file")
    output_files = [output_file]
    if sampling.num_samples > 1:
        numbers = range(sampling.num_samples)
        output_files = [output_file.with_stem(f"{output_file.stem}_{number}") for number in numbers]
    if prompt is not None:  # checked before the model is loaded
        for remark in read_prompt(prompt).remarks:
            print(f"note: '{prompt}' is {remark}")
        for path in output_files:
            if path.exists() and path.samefile(prompt):
                raise UserError(f"--output_file would replace the --prompt '{prompt}'; name another file")

    with torchrun_ranks(device) as ranks:
        if ranks.world_size > 1 and prompts is None:
            raise UserError(f"{ranks.world_size} ranks cannot share one prompt; leave torchrun out, or name --prompts")
        model = load_speech_model(
            model_name, codec_name=codec, attention=codec_attention, device=str(ranks.device), dtype=dtype
        )
        if ranks.rank == 0 and (note := checkpoint_note(model, sampling)):
            print(note, flush=True)
        if prompts is not None and output_dir is not None:
            made_by = from_first(lambda: describe_model(model_name, model, dtype))
            num_rows = batch_size or (64 if ranks.device.type == "cuda" else 8)
            records = continue_folder(model, prompts, output_dir, sampling, num_rows, ranks, made_by)
            if ranks.rank == 0:
                _report(records, output_dir)
            return
        check_text(model, text)
        prompt_TQ = torch.zeros(0, model.codec.num_quantizers, dtype=torch.long)
        began = time.perf_counter()
        if prompt is not None:
            (prompt_TQ,) = encode_prompts(model, [read_prompt(prompt, model.codec)], sampling)
        if stream:
            _stream(model, Request(prompt_TQ, sampling.seed, text), sampling, output_file, began)
            return
        for path, codes_TQ in zip(output_files, continue_codes(model, prompt_TQ, sampling, text), strict=True):
            waveform = Waveform(torch.zeros(0), model.codec.sample_rate_hz)
            if len(codes_TQ):
                waveform = replace(waveform, samples_S=decode_long(model.codec, codes_TQ))
                write_wav(path, waveform)
            _describe(path, len(prompt_TQ), len(codes_TQ) - len(prompt_TQ), model)
            for start, length in silences(waveform, LONG_SILENCE_SECONDS):
                print(f"note: {path} is silent for {length:.1f} s from {start:.1f} s on")


def _stream(model: SpeechModel, request: Request, options: SamplingOptions, path: Path, began: float) -> None:
    """Write a sample frame by frame; the file can be played before it is complete."""
    codec, decoding = model.codec, DecodingStream(model.codec)
    drawn = decode(model, [request], options.for_model(model), 1)  # refuses before a file is there
    num_new, first = 0, 0.0
    with wav_writer(path, codec.sample_rate_hz) as file:
        if len(request.prompt_TQ):
            file.write(decoding.decode(request.prompt_TQ).clamp(-1, 1).numpy())
        for _, new in drawn:
            if isinstance(new, End):
                continue
            file.write(decoding.decode(new[None]).clamp(-1, 1).numpy())
            file.flush()
            num_new += 1
            first = first or time.perf_counter() - began
    spent = time.perf_counter() - began
    _describe(path, len(request.prompt_TQ), num_new, model)
    if num_new:
        print(f"first new audio after {first:.2f} s; {num_new / codec.frame_rate_hz / spent:.2f} times real time")


def _describe(path: Path, prompt_frames: int, new_frames: int, model: SpeechModel) -> None:
    rate_hz = model.codec.frame_rate_hz
    print(f"{path}: {prompt_frames / rate_hz:.2f} s of prompt, {new_frames / rate_hz:.2f} s of continuation")
    if not new_frames and not prompt_frames:
        print("no audio was generated for this text; set --min_seconds, or try another --seed")
    elif not new_frames:
        print(
            f"{path} contains the prompt only: for the model the speech ends with it; cut the prompt in mid-sentence, "
            "set --min_seconds, or try another --seed"
        )


def _report(records: list[dict], output_dir: Path) -> None:
    made = [record for record in records if "error" not in record]
    ended = sum(record["end"] == End.BY_MODEL.value for record in made)
    silent = sum(bool(record["silences"]) for record in made)
    print(
        f"{len(made):,} samples in {output_dir}, {ended:,} ended by the model and {len(made) - ended:,} cut; "
        f"{silent:,} with {LONG_SILENCE_SECONDS:g} s or more of silence; see {output_dir / RESULTS}"
    )
    failed = [record["error"] for record in records if "error" in record]
    if failed:
        raise UserError(f"{len(failed):,} samples failed; the first: {failed[0]}")


if __name__ == "__main__":
    run_command(continue_speech, __doc__)
