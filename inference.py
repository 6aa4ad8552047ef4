"""Continue speech: one prompt, or all prompts in a folder.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import Waveform, wav_writer, write_wav
from llama_mimi.audio.streaming import DecodingStream, decode_long
from llama_mimi.common.command_line import print_next, run_command
from llama_mimi.common.distributed import broadcast_from_rank0, distributed_context
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import as_utf8, is_synthetic
from llama_mimi.generation.continuation import (
    SamplingOptions,
    checkpoint_note,
    continue_codes,
    encode_prompts,
    read_prompt,
    with_progress,
)
from llama_mimi.generation.decoding import Drawn, Request, decode
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.prompt_folder import RESULTS, continue_folder, describe_model, without_new_audio
from llama_mimi.generation.speech_model import DecoderPrecision, SpeechModel


@dataclass(frozen=True)
class Options:
    """Model, prompts and files."""

    model_name: str = "llm-jp/Llama-Mimi-1.3B"  # hub id or folder of the model
    prompt: str | None = None  # WAV, FLAC, MP3 or OGG file; M4A, AAC, WebM and WMA need FFmpeg
    prompts: Path | None = None  # folder of prompts, for --output_dir; the same command resumes a killed run
    text: str | None = None  # text to speak, for models of the task tts; begins with the transcript of --prompt
    output_file: Path = Path("continuation.wav")  # WAV file; several samples get numbers in their names
    output_dir: Path | None = None  # folder for the continuations of --prompts
    stream: bool = False  # write the sample to disk during generation
    batch_size: int | None = None  # number of samples of --prompts that are drawn at once; default: 8, on GPUs 64
    codec: str | None = None  # hub id or folder of the codec; default: the codec in the config of the model
    codec_sliding_window: bool | None = None  # sliding window of the codec; default: as for the training codes
    device: str | None = None  # torch device; default: the accelerator if there is one
    dtype: DecoderPrecision = "float32"  # precision of the decoder


def continue_speech(options: Options, sampling: SamplingOptions) -> None:
    """Continue speech; raise a `UserError` if the prompt, the model or an option cannot be used."""
    file, num_samples, num_rows = options.output_file, sampling.num_samples, options.batch_size
    is_folder, text = options.prompts is not None, options.text or ""
    is_batch_wrong = num_rows is not None and (num_rows < 1 or not is_folder)
    problems = {
        "set --prompt, --text or both, or else --prompts": is_folder == bool(options.prompt or text),
        "--prompts and --output_dir go together; set both or none": is_folder != (options.output_dir is not None),
        f"--batch_size is {num_rows}; it needs --prompts and a value of at least 1": is_batch_wrong,
        "--stream writes one sample of one prompt; remove --stream": options.stream and (is_folder or num_samples > 1),
        f"--text '{as_utf8(text)}' is not UTF-8; type it in a UTF-8 terminal": as_utf8(text) != text,
        f"--output_file is '{file}'; choose a name that ends in .wav": file.suffix.lower() != ".wav",
    }
    if wrong := [problem for problem, is_wrong in problems.items() if is_wrong]:
        raise UserError(wrong[0])
    files = [file.with_stem(f"{file.stem}_{number}") for number in range(num_samples)] if num_samples > 1 else [file]
    if options.prompt is not None:  # check the prompt before the model is loaded
        for warning in read_prompt(options.prompt).audio_warnings:
            print(f"note: '{options.prompt}' is {warning}")
        if any(path.exists() and path.samefile(options.prompt) for path in files):
            raise UserError(f"--output_file would replace the --prompt '{options.prompt}'; choose another file")

    with distributed_context(options.device) as ranks:
        name, device, dtype, window = options.model_name, str(ranks.device), options.dtype, options.codec_sliding_window
        model = load_speech_model(name, codec_name=options.codec, sliding_window=window, device=device, dtype=dtype)
        if ranks.rank == 0 and (note := checkpoint_note(model, sampling)):
            print(note, flush=True)
        if options.prompts is None or options.output_dir is None:
            if ranks.rank == 0:
                _continue_prompt(model, options, sampling, files)
                data_dir = "assets/tiny/benchmarks/salmon" if is_synthetic(model.codec.name) else None
                flags = {"codec": options.codec, "dtype": dtype if dtype != "float32" else None}
                print_next("python eval/salmon.py", model_name=name, data_dir=data_dir, **flags)
            return
        made_by = broadcast_from_rank0(lambda: describe_model(name, model, dtype))
        num_rows = num_rows or (64 if ranks.device.type == "cuda" else 8)
        records = continue_folder(model, options.prompts, options.output_dir, sampling, num_rows, ranks, made_by)
    if ranks.rank == 0:
        failed = [record["error"] for record in records if "error" in record]
        samples = f"{len(records) - len(failed):,} samples in {options.output_dir}{without_new_audio(records)}"
        print(f"{samples}; see {options.output_dir / RESULTS}")
        if failed:
            raise UserError(f"{len(failed):,} samples failed; the first: {failed[0]}")


def _continue_prompt(model: SpeechModel, options: Options, sampling: SamplingOptions, files: list[Path]) -> None:
    codec = model.codec
    prompt_TQ = torch.zeros(0, codec.num_quantizers, dtype=torch.long)
    if options.prompt is not None:
        (prompt_TQ,) = encode_prompts(model, [read_prompt(options.prompt, codec)], sampling)
    if options.stream:
        own = sampling.for_model(model)
        drawn = decode(model, [Request(prompt_TQ, sampling.seed, options.text)], own, 1)
        drawn = with_progress(drawn, 1, own.max_frames, codec.frame_rate_hz)
        samples = [_stream(codec, prompt_TQ, drawn, files[0])]
    else:
        samples = continue_codes(model, prompt_TQ, sampling, options.text)
    for path, codes_TQ in zip(files, samples, strict=True):
        if len(codes_TQ) and not options.stream:
            write_wav(path, Waveform(decode_long(codec, codes_TQ), codec.sample_rate_hz))
        seconds, new_seconds = (len(c) / codec.frame_rate_hz for c in (prompt_TQ, codes_TQ[len(prompt_TQ) :]))
        written = path if len(codes_TQ) else "no audio"
        print(f"{written}: {seconds:.2f} s of prompt, {new_seconds:.2f} s of continuation")
        if not new_seconds:
            print("the model ended the speech at once; set --min_seconds, or end the prompt in mid-sentence")


def _stream(codec: MimiCodec, prompt_TQ: torch.Tensor, drawn: Drawn, path: Path) -> torch.Tensor:
    """Write a sample frame by frame, so that the file can be played while it grows; return its codes_TQ."""
    decoding, written = DecodingStream(codec), []
    with wav_writer(path, codec.sample_rate_hz) as file:
        for codes_TQ in chain([prompt_TQ], (new[None] for _, new in drawn if isinstance(new, torch.Tensor))):
            if len(codes_TQ):
                file.write(decoding.decode(codes_TQ).clamp(-1, 1).numpy())
                file.flush()
            written.append(codes_TQ)
    return torch.cat(written)


if __name__ == "__main__":
    run_command(continue_speech, __doc__)
