"""Continue a spoken prompt.

uv run python inference.py --model_name models/tiny --prompt assets/tiny/prompt.wav --output_file continuation.wav
"""

from pathlib import Path

from llama_mimi.audio.mimi import CodecAttention
from llama_mimi.audio.reading import Waveform, read_audio, write_wav
from llama_mimi.common.errors import UserError, run_command
from llama_mimi.generation.continuation import SamplingOptions, continue_codes
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.speech_model import DecoderPrecision

MAX_PROMPT_SECONDS = 60.0  # three times the longest clip of the paper's training


def continue_prompt(
    sampling: SamplingOptions,
    model_name: str = "llm-jp/Llama-Mimi-1.3B",
    prompt: str = "assets/tiny/prompt.wav",
    output_file: Path = Path("continuation.wav"),
    codec: str | None = None,
    codec_attention: CodecAttention | None = None,
    device: str | None = None,
    dtype: DecoderPrecision = "float32",
) -> None:
    """Continue a spoken prompt.

    Args:
        sampling: how tokens are drawn
        model_name: hub id or folder
        prompt: WAV, FLAC, MP3 or OGG file; others with FFmpeg
        output_file: with several samples their numbers are added to its name
        codec: hub id or folder; by default what the model names
        codec_attention: by default that of the model's training codes
        device: by default the accelerator where there is one
        dtype: precision of the decoder

    Raises:
        UserError: the prompt, the model or an option cannot be used.
    """
    if output_file.suffix.lower() != ".wav" or output_file.is_dir():
        raise UserError(f"--output_file is '{output_file}'; name a .wav file")

    whole = read_audio(prompt, None, max_seconds=MAX_PROMPT_SECONDS)  # a bad one ends before the model is loaded
    for remark in whole.remarks:
        print(f"note: '{prompt}' is {remark}")
    if whole.is_cut and whole.seconds >= MAX_PROMPT_SECONDS:
        raise UserError(f"the prompt '{prompt}' is longer than {MAX_PROMPT_SECONDS:g} s; give a shorter one")
    model = load_speech_model(
        model_name,
        codec_name=codec,
        attention=codec_attention,
        device=device,
        dtype=dtype,
    )
    mimi = model.codec
    waveform = read_audio(prompt, mimi.sample_rate_hz, min_samples=mimi.frame_size)
    (prompt_TQ,) = mimi.encode([waveform.samples_S])
    for index, codes_TQ in enumerate(continue_codes(model, prompt_TQ, sampling)):
        path = output_file
        if sampling.num_samples > 1:
            path = path.with_name(f"{path.stem}_{index}{path.suffix}")
        write_wav(path, Waveform(mimi.decode(codes_TQ), mimi.sample_rate_hz))
        new_s = (len(codes_TQ) - len(prompt_TQ)) / mimi.frame_rate_hz
        print(f"{path}: {len(prompt_TQ) / mimi.frame_rate_hz:.2f} s of prompt, {new_s:.2f} s of continuation")
        if len(codes_TQ) == len(prompt_TQ):
            print(
                f"{path} holds the prompt alone: to the model the speech ends with it; cut the prompt in mid-sentence, "
                "set --min_seconds, or try another --seed"
            )


if __name__ == "__main__":
    run_command(continue_prompt, __doc__)
