"""Implementation of inference.py: continue, speak or transcribe one input, or many inputs."""

import sys
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.audio.reading import Waveform, wav_writer, write_wav
from llama_mimi.audio.streaming import DecodingStream, decode_long
from llama_mimi.common.command_line import print_next
from llama_mimi.common.distributed import broadcast_from_rank0, distributed_context
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import is_synthetic
from llama_mimi.generation.continuation import (
    continue_codes,
    decode_with_bar,
    encode_prompts,
    read_prompt,
    settings_note,
)
from llama_mimi.generation.decoding import Drawn, Request
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.options import InferenceOptions
from llama_mimi.generation.prompt_folder import RESULTS, describe_model, draw_samples, find_prompts, read_texts
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.generation.transcription import transcribe


def run_inference(options: InferenceOptions) -> None:
    """Continue, speak or transcribe; raise a `UserError` if an input or the model cannot be used."""
    file, num_samples, sampling = options.output_file, options.sampling.num_samples, options.sampling
    files = [file.with_stem(f"{file.stem}_{number}") for number in range(num_samples)] if num_samples > 1 else [file]
    if options.output_dir is None and (speech := options.prompt or options.transcribe) is not None:
        for warning in read_prompt(str(speech)).audio_warnings:  # check the file before the model is loaded
            print(f"note: '{speech}' is {warning}", file=sys.stderr)
    if options.prompt is not None and any(path.exists() and path.samefile(options.prompt) for path in files):
        raise UserError(f"--output_file and --prompt are the same file '{options.prompt}'; set another --output_file")

    with distributed_context(options.device) as ranks:
        name, codec, window = options.model_name, options.codec, options.codec_sliding_window
        device, dtype = str(ranks.device), options.dtype
        model = load_speech_model(name, codec_name=codec, sliding_window=window, device=device, dtype=dtype)
        if ranks.rank == 0:
            print(settings_note(model, sampling), file=sys.stderr if options.transcribe else None, flush=True)
        if (output_dir := options.output_dir) is None:
            if ranks.rank == 0 and options.transcribe is not None:
                waveform = read_prompt(str(options.transcribe), model.codec)
                ((text, is_cut),) = transcribe(model, encode_prompts(model, [waveform], sampling), 1)
                if is_cut:
                    print("the transcript is incomplete, because it reached its maximum length", file=sys.stderr)
                print(text)
            elif ranks.rank == 0:
                _continue_prompt(model, options, files)
                data_dir = "assets/tiny/benchmarks/salmon" if is_synthetic(model.codec.name) else None
                flags = {"codec": options.codec, "dtype": "bfloat16" if dtype == "int8" else dtype}
                print_next("python eval/salmon.py", model_name=name, data_dir=data_dir, **flags)
            return
        made_by = broadcast_from_rank0(lambda: describe_model(name, model))
        num_rows = options.batch_size or (64 if ranks.device.type == "cuda" else 8)
        folder, transcribes = options.prompts or options.transcribe, options.transcribe is not None
        find = partial(find_prompts, folder, output_dir) if folder else partial(read_texts, Path(str(options.texts)))
        prompts = broadcast_from_rank0(find)
        records = draw_samples(model, prompts, output_dir, sampling, num_rows, ranks, made_by, transcribes)
    if ranks.rank == 0:
        failed = [record["error"] for record in records if "error" in record]
        empty = sum(record.get("frames") == 0 for record in records)
        without = f", {empty:,} of them without new audio, because the model ended at once" if empty else ""
        print(f"{len(records) - len(failed):,} results are in {output_dir}{without}; see {output_dir / RESULTS}")
        if failed:
            raise UserError(f"{len(failed):,} inputs failed; the first error: {failed[0]}")


def _continue_prompt(model: SpeechModel, options: InferenceOptions, files: list[Path]) -> None:
    codec, sampling = model.codec, options.sampling
    prompt_TQ = torch.zeros(0, codec.num_quantizers, dtype=torch.long)
    if options.prompt is not None:
        (prompt_TQ,) = encode_prompts(model, [read_prompt(options.prompt, codec)], sampling)
    if options.stream:
        drawn = decode_with_bar(model, [Request(prompt_TQ, sampling.seed, options.text)], sampling, 1)
        samples = [_stream(codec, prompt_TQ, drawn, files[0])]
    else:
        samples = continue_codes(model, prompt_TQ, sampling, options.text)
    for path, codes_TQ in zip(files, samples, strict=True):
        if len(codes_TQ) and not options.stream:
            write_wav(path, Waveform(decode_long(codec, codes_TQ), codec.sample_rate_hz))
        seconds, new_seconds = (len(c) / codec.frame_rate_hz for c in (prompt_TQ, codes_TQ[len(prompt_TQ) :]))
        written = path if len(codes_TQ) else "no audio"
        print(f"{written}: {seconds:.2f} s of prompt, {new_seconds:.2f} s of continuation")
        if new_seconds < 0.5 <= sampling.seconds:
            print("the model ended the speech early; set --min_seconds, or use a prompt that ends within a sentence")


def _stream(codec: MimiCodec, prompt_TQ: torch.Tensor, drawn: Drawn, path: Path) -> torch.Tensor:
    """Write a sample frame by frame, so that a player can play the growing file; return the codes_TQ of the sample."""
    decoding, written = DecodingStream(codec), []
    with wav_writer(path, codec.sample_rate_hz) as file:
        for codes_TQ in chain([prompt_TQ], (new[None] for _, new in drawn if isinstance(new, torch.Tensor))):
            if len(codes_TQ):
                file.write(decoding.decode(codes_TQ).clamp(-1, 1).numpy())
                file.flush()
            written.append(codes_TQ)
    return torch.cat(written)
