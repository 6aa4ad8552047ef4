"""Options of eval/{generation,tts,asr}.py, and criteria of the judge. This module does not import PyTorch."""

import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llama_mimi.common.choices import DecoderPrecision
from llama_mimi.common.errors import UserError, first_line
from llama_mimi.evaluation.options import model_folder
from llama_mimi.generation.options import SamplingOptions

MAX_RECORDING_SECONDS = 60.0  # longer recordings are cut to this length
# Subfolders of --output_dir: prompts, recordings, and cached values of all systems.
PROMPTS, RECORDINGS, MEASURED = "prompts", "recordings", "measured"
RECORDING, SHUFFLED, RECONSTRUCTION = "recording", "shuffled", "reconstruction"  # references
MIN_SECONDS = 0.4  # shorter clips are not measured: voice and transcript would be meaningless
RESERVED = (RECORDING, SHUFFLED, PROMPTS, RECORDINGS, MEASURED)


@dataclass(frozen=True)
class Criteria:
    """Content of a criteria file such as eval/judge.toml."""

    names: list[str]
    system: str  # system message: role of the judge, and a question for each criterion
    request: str  # user message with the fields {prompt} and {continuation}
    sha256: str


def read_criteria(path: Path) -> Criteria:
    """Read a criteria file; raise a `UserError` if the file is not valid."""
    try:
        data = path.read_bytes()
        content = tomllib.loads(data.decode())
        names, request = list(content["criteria"]), content["request"]
        questions = "\n".join(f"- {name}: {question}" for name, question in content["criteria"].items())
        system = f"{content['system']}\n\n{questions}"
        filled = request.format(prompt="<prompt>", continuation="<continuation>")
        if not names or "<prompt>" not in filled or "<continuation>" not in filled:
            raise ValueError("the file has no criterion, or the request lacks {prompt} or {continuation}")
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"'{path}' is not a criteria file ({reason}); use the format of eval/judge.toml") from error
    return Criteria(names, system, request, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Options for the recordings."""

    corpus: str  # corpus of held-out recordings: a name, a folder, a Parquet file or a glob
    dataset_path: str | None = None  # folder of the downloaded corpus, if --corpus is a name
    split: str | None = None  # name of the split, if the corpus has several splits
    audio_column: str = "audio"  # column with the recordings
    # column with speakers: intervals are over speakers, and the clips of a shuffled pair differ in speaker
    speaker_column: str = "speaker"
    limit: int | None = None  # maximum number of recordings, chosen by a hash of their names; default: all


@dataclass(frozen=True, kw_only=True)
class PromptOptions(CorpusOptions):
    """Options for the recordings and for the length of prompts."""

    prompt_seconds: float = 3.0  # approximate length of a prompt, in seconds (at least 0.5)
    recording_seconds: float | None = None  # minimum length of a recording, in seconds; default: twice --prompt_seconds

    def __post_init__(self) -> None:
        low, high = 1.25 * self.prompt_seconds, MAX_RECORDING_SECONDS
        if not 0.5 <= self.prompt_seconds <= high / 1.25:
            raise UserError(f"--prompt_seconds is {self.prompt_seconds:g}; set a number from 0.5 to {high / 1.25:g}")
        if not low <= self.min_seconds <= high:
            raise UserError(f"--recording_seconds is {self.min_seconds:g}; set a number from {low:g} to {high:g}")

    @property
    def min_seconds(self) -> float:
        """Minimum length of a recording, in seconds."""
        return 2 * self.prompt_seconds if self.recording_seconds is None else self.recording_seconds


@dataclass(frozen=True, kw_only=True)
class TextOptions(CorpusOptions):
    """Options for recordings with transcripts."""

    text_column: str = "text"  # column with the transcripts of the recordings


@dataclass(frozen=True, kw_only=True)
class VoiceOptions(TextOptions):
    """Options for texts to speak and for voice prompts."""

    # approximate length of a voice prompt, in seconds: another recording of the speaker, with the nearest length; at 0,
    # the model reads only the text and chooses a voice
    voice_seconds: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.voice_seconds <= MAX_RECORDING_SECONDS:
            limits = f"a number from 0 to {MAX_RECORDING_SECONDS:g}"
            raise UserError(f"--voice_seconds is {self.voice_seconds:g}; set {limits}")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Measures to compute."""

    speaker_model: str | None = None  # hub id or folder of a WavLM x-vector model; default: no speaker similarity
    quality: Literal["distillmos", "aesthetics", "none"] = "distillmos"  # predictor of sound quality, or 'none'
    asr_model: str | None = None  # hub id or folder of an ASR model; required by eval/tts.py; default: no transcripts
    language: str | None = None  # language of the speech, such as 'en', for multilingual ASR; default: automatic
    text_model: str | None = None  # hub id or folder of a language model; default: no perplexity
    judge_model: str | None = None  # name of the judge model on the server; default: no judge
    judge_url: str | None = None  # URL of the judge's server, such as http://localhost:8000/v1; default: OpenAI
    judge_criteria: Path = Path("eval/judge.toml")  # TOML file with the judge's questions
    listening_batch_size: int | None = None  # number of clips that are measured at once; default: 16 on a GPU, else 8


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """Flags of eval/{generation,tts,asr}.py: recordings, a model, and the results."""

    prompts: CorpusOptions
    model_name: str | None
    name: str | None = None  # name of the system; default: name of the model or folder
    output_dir: Path
    codec: str | None = None  # hub id or folder of the codec; default: the model's codec
    batch_size: int | None = None  # number of samples or recordings per batch; default: 64 on a GPU, else 8
    device: str | None = None  # torch device; default: the GPU if there is one, else the CPU
    dtype: DecoderPrecision | None = None  # precision of the decoder; default: bfloat16 on a GPU, float32 on a CPU

    def __post_init__(self) -> None:
        for flag, value in {"batch_size": self.batch_size, "limit": self.prompts.limit}.items():
            if value is not None and value < 1:
                raise UserError(f"--{flag} is {value}; set it to 1 or more")
        if self.system in RESERVED or self.system.startswith(RECONSTRUCTION):
            raise UserError(f"--name '{self.system}' is reserved; set another --name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.system):
            raise UserError(f"--name '{self.system}' is not a valid file name; set another --name")

    @property
    def system(self) -> str:
        """Name of the system and of its result file."""
        return self.name if self.name is not None else model_folder(str(self.model_name))


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SystemOptions):
    prompts: PromptOptions
    model_name: str | None = None  # hub id or folder of a model; required without --wavs
    wavs: Path | None = None  # folder with files of another system: <prompt>.wav or <prompt>_<number>.wav
    wavs_contain_prompt: bool = False  # set this flag if each file in --wavs begins with its prompt
    # Length and randomness of continuations. --seconds also limits the references and the files in --wavs.
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(num_samples=5))
    output_dir: Path = Path("results/generation")  # folder for the prompts and the results of all systems
    measures: MeasureOptions = field(default_factory=MeasureOptions)
    # run the codec with sliding-window attention; default: the setting used in training
    codec_sliding_window: bool | None = None

    def __post_init__(self) -> None:
        if (self.model_name is None) == (self.wavs is None):
            raise UserError("set either --model_name or --wavs")
        super().__post_init__()
        needed = dict.fromkeys(("language", "text_model", "judge_model"), "asr_model")
        for flag, other in {**needed, "judge_url": "judge_model"}.items():
            if getattr(self.measures, flag) and getattr(self.measures, other) is None:
                raise UserError(f"--{flag} needs --{other}; set --{other}, or remove --{flag}")
        if self.measures.judge_model is not None:
            read_criteria(self.measures.judge_criteria)
        used = {"distillmos": self.measures.quality == "distillmos", "openai": self.measures.judge_model is not None}
        if missing := [package for package, is_used in used.items() if is_used and not find_spec(package)]:
            raise UserError(f"the package '{missing[0]}' is missing; run `uv sync --inexact --extra judging`")
        if (number := self.measures.listening_batch_size) is not None and number < 1:
            raise UserError(f"--listening_batch_size is {number}; set it to 1 or more")

    @property
    def system(self) -> str:
        return model_folder(str(self.wavs)) if self.wavs and self.name is None else super().system

    @property
    def similarity_seconds(self) -> float:
        """Length of a continuation, in seconds, in the speaker similarity at a fixed length.

        The length is that of a prompt. If the shortest recording leaves less after its prompt, or ``--seconds`` is
        less, the length is smaller, so that nearly all references have a value.
        """
        prompt_seconds, recording_seconds = self.prompts.prompt_seconds, self.prompts.min_seconds
        shortest = min(prompt_seconds, recording_seconds - prompt_seconds, self.sampling.seconds)
        return round(max(shortest, MIN_SECONDS), 2)


@dataclass(frozen=True, kw_only=True)
class TtsOptions(GenerationOptions):
    prompts: VoiceOptions  # type: ignore[assignment]  # `similarity_seconds` is the only reader of prompt lengths
    # Length and randomness of the speech. Recordings longer than --seconds are skipped.
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(seconds=20.0))
    output_dir: Path = Path("results/tts")  # folder for the recordings and the results of all systems

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measures.asr_model is None:
            raise UserError("--asr_model is missing; set --asr_model to the model that transcribes the speech")

    @property
    def similarity_seconds(self) -> float:
        """Length of the speech, in seconds, in the speaker similarity at a fixed length: that of a voice prompt."""
        return round(max(min(self.prompts.voice_seconds, self.sampling.seconds), MIN_SECONDS), 2)


@dataclass(frozen=True, kw_only=True)
class AsrOptions(SystemOptions):
    prompts: TextOptions
    model_name: str  # hub id or folder of a Llama-Mimi model with the task 'asr', or of an ASR model in transformers
    # language of the speech, such as 'de'; default: Whisper detects the language, and texts are normalised as English
    language: str | None = None
    output_dir: Path = Path("results/asr")  # folder for the recordings and the results of all systems
