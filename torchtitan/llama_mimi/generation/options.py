"""Flags of inference.py, including the sampling options. This module does not import PyTorch."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from llama_mimi.common.choices import GenerationPrecision, LastFrame
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import as_utf8

RANGES = {
    "seconds": (0.08, 1e9),
    "min_seconds": (0, 1e9),
    "temperature": (0, 1e9),
    "top_k": (1, 10**9),
    "top_p": (1e-9, 1),
    "window_seconds": (0.32, 1e9),  # 4 frames: the prompt's first frame, the last two frames, and the next frame
    "seed": (0, 2**63 - 1),
    "num_samples": (1, 10**9),
}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Length and randomness of continuations."""

    seconds: float = 10.0  # maximum length of the continuation, in seconds; generation stops earlier at </audio>
    min_seconds: float = 0.0  # minimum length of the continuation, in seconds; the model cannot end the speech earlier
    temperature: float = 0.8  # sampling temperature; at 0, the most likely token is chosen
    top_k: int = 30  # sample from the k most likely tokens (among those valid at this position)
    # sample from the smallest set of likely tokens (among the top_k) whose total probability is at least p; default:
    # the value in the generation config of the model, else 1
    top_p: float | None = None
    # length of the model's context (prompt and new audio), in seconds; when the context is full, only the start of the
    # prompt and the last half of the context are kept; default: maximum length of a training clip
    window_seconds: float | None = None
    seed: int = 0  # seed of the first sample; the same seed gives the same samples
    num_samples: int = 1  # number of continuations of each prompt
    # encoding of a partial last frame of a prompt: 'pad' fills the frame with zeros; 'codec' passes the frame to the
    # codec unchanged, as in Llama-Mimi's first release; default: 'codec' for released checkpoints, else 'pad'
    last_frame: LastFrame | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} is {value}; choose a value from {low:g} to {high:g}")
        if self.min_seconds > self.seconds:
            problem = f"--min_seconds is {self.min_seconds:g}, but --seconds is {self.seconds:g}"
            raise UserError(f"{problem}; increase --seconds")


@dataclass(frozen=True)
class InferenceOptions:
    """Flags of inference.py."""

    model_name: str = "llm-jp/Llama-Mimi-1.3B"  # hub id or folder of the model
    prompt: str | None = None  # file with the prompt: WAV, FLAC, MP3 or OGG; M4A, AAC, WebM and WMA need FFmpeg
    prompts: Path | None = None  # folder of prompts; requires --output_dir. To resume a killed run, repeat the command
    text: str | None = None  # text to speak, for models of the task 'tts'; begin the text with the prompt's transcript
    # UTF-8 file with a text to speak in each line, for models of the task 'tts'; requires --output_dir
    texts: Path | None = None
    # speech to transcribe, for models of the task 'asr': a file, or a folder, which requires --output_dir
    transcribe: Path | None = None
    # WAV file to write; if --num_samples is above 1, a number is added to the name of each file
    output_file: Path = Path("continuation.wav")
    output_dir: Path | None = None  # folder for the results of --prompts, --texts, or --transcribe with a folder
    stream: bool = False  # write the sample to disk during generation
    batch_size: int | None = None  # number of samples in a batch (only with --output_dir); default: 64 on a GPU, else 8
    codec: str | None = None  # hub id or folder of the codec; default: the codec in the config of the model
    # run the codec with sliding-window attention; default: the setting used in training
    codec_sliding_window: bool | None = None
    device: str | None = None  # torch device; default: the GPU if there is one, else the CPU
    # precision of the decoder; 'int8' is for CPUs; default: bfloat16 on a GPU, float32 on a CPU
    dtype: GenerationPrecision | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)  # length and randomness of continuations

    def __post_init__(self) -> None:
        file, num_rows, text = self.output_file, self.batch_size, self.text or ""
        is_many = bool(self.prompts or self.texts or (self.transcribe and self.transcribe.is_dir()))
        num_inputs = sum(map(bool, (self.prompt or text, self.prompts, self.texts, self.transcribe)))
        needs = "--prompts, --texts, and --transcribe with a folder need --output_dir"
        only_text = "--transcribe does not sample; remove --output_file and all sampling options except --last_frame"
        sampling = replace(self.sampling, last_frame=None)
        has_samples = sampling != SamplingOptions() or file != InferenceOptions.output_file
        is_batch_wrong = num_rows is not None and (num_rows < 1 or not is_many)
        is_stream_wrong = self.stream and (is_many or self.transcribe or self.sampling.num_samples > 1)
        problems = {
            "set --prompt, --text or both; or set one of --prompts, --texts and --transcribe": num_inputs != 1,
            f"{needs}; for other inputs, remove --output_dir": is_many != (self.output_dir is not None),
            f"--batch_size is {num_rows}; set it to 1 or more, and set --output_dir": is_batch_wrong,
            "--stream supports only one sample of one prompt; remove --stream": is_stream_wrong,
            only_text: self.transcribe is not None and has_samples,
            f"--text '{as_utf8(text)}' is not UTF-8; type the text in a UTF-8 terminal": as_utf8(text) != text,
            f"--output_file is '{file}'; choose a name that ends in .wav": file.suffix.lower() != ".wav",
        }
        if wrong := [problem for problem, is_wrong in problems.items() if is_wrong]:
            raise UserError(wrong[0])
