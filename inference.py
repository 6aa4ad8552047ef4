"""Continue a spoken prompt.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

import argparse
from pathlib import Path
from typing import get_args

from llama_mimi.audio.mimi import CodecAttention
from llama_mimi.audio.reading import Waveform, read_audio, write_wav
from llama_mimi.common.errors import UserError, run_cli
from llama_mimi.generation.continuation import SamplingOptions, continue_codes
from llama_mimi.generation.speech_model import DECODER_DTYPES, load_speech_model

MAX_PROMPT_SECONDS = 60.0  # three times the longest clip of the paper's training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="llm-jp/Llama-Mimi-1.3B", help="hub id or folder")
    parser.add_argument(
        "--prompt", default="assets/tiny/prompt.wav", help="WAV, FLAC, MP3 or OGG file; others with FFmpeg"
    )
    parser.add_argument("--output_file", type=Path, default=Path("continuation.wav"))
    parser.add_argument("--seconds", type=float, default=10.0, help="new audio at most")
    parser.add_argument(
        "--min_seconds", type=float, default=0.0, help="new audio at least: the model may not end before"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=1, help="more than one writes <output_file>_0.wav, ...")
    parser.add_argument("--codec", help="hub id or folder; by default what the model names")
    parser.add_argument(
        "--codec_attention", choices=get_args(CodecAttention), help="by default that of the model's training codes"
    )
    parser.add_argument("--device", help="by default the accelerator where there is one")
    parser.add_argument("--dtype", choices=DECODER_DTYPES, default="float32", help="precision of the decoder")
    flags = parser.parse_args()
    options = SamplingOptions(
        seconds=flags.seconds,
        min_seconds=flags.min_seconds,
        temperature=flags.temperature,
        top_k=flags.top_k,
        seed=flags.seed,
        num_samples=flags.num_samples,
    )
    if flags.output_file.suffix.lower() != ".wav" or flags.output_file.is_dir():
        raise UserError(f"--output_file is '{flags.output_file}'; name a .wav file")

    prompt = read_audio(flags.prompt, None, max_seconds=MAX_PROMPT_SECONDS)  # a bad one ends before the model is loaded
    for remark in prompt.remarks:
        print(f"note: '{flags.prompt}' is {remark}")
    if prompt.is_cut and prompt.seconds >= MAX_PROMPT_SECONDS:
        raise UserError(f"the prompt '{flags.prompt}' is longer than {MAX_PROMPT_SECONDS:g} s; give a shorter one")
    model = load_speech_model(
        flags.model_name,
        codec_name=flags.codec,
        attention=flags.codec_attention,
        device=flags.device,
        dtype=flags.dtype,
    )
    codec = model.codec
    prompt = read_audio(flags.prompt, codec.sample_rate_hz, min_samples=codec.frame_size)
    (prompt_TQ,) = codec.encode([prompt.samples_S])
    for index, codes_TQ in enumerate(continue_codes(model, prompt_TQ, options)):
        path = flags.output_file
        if flags.num_samples > 1:
            path = path.with_name(f"{path.stem}_{index}{path.suffix}")
        write_wav(path, Waveform(codec.decode(codes_TQ), codec.sample_rate_hz))
        new_s = (len(codes_TQ) - len(prompt_TQ)) / codec.frame_rate_hz
        print(f"{path}: {len(prompt_TQ) / codec.frame_rate_hz:.2f} s of prompt, {new_s:.2f} s of continuation")
        if len(codes_TQ) == len(prompt_TQ):
            print(
                f"{path} holds the prompt alone: to the model the speech ends with it; cut the prompt in mid-sentence, "
                "set --min_seconds, or try another --seed"
            )


if __name__ == "__main__":
    run_cli(main)
