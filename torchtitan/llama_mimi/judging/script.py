"""eval/generation.py: from prompts to results."""

import itertools
import json
import os
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_mimi.audio.mimi import CodecAttention, MimiCodec
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, digest, is_synthetic, locked, read_json, write_atomically
from llama_mimi.common.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.common.resume import require_same
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.results import model_folder
from llama_mimi.generation.continuation import SamplingOptions, checkpoint_note
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.prompt_folder import SETTINGS, continue_folder, describe_model
from llama_mimi.generation.speech_model import DecoderPrecision
from llama_mimi.judging import systems
from llama_mimi.judging.prompts import PROMPTS, RECORDINGS, PromptOptions, PromptSet, make_prompts
from llama_mimi.judging.samples import MEASURED, MeasureOptions, measure_samples
from llama_mimi.report.comparisons import generations_markdown

FORMAT, KIND = 2, "generations"
OFFICIAL_CORPORA = ("librispeech_clean_test",)
BATCH_SIZES = (8, 64)  # without and with a GPU
RESERVED = (systems.RECORDING, systems.SHUFFLED, PROMPTS, RECORDINGS, MEASURED)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Flags of eval/generation.py."""

    prompts: PromptOptions
    model_name: str | None = None  # hub id or folder of a model of this project
    # instead of a model, a folder of continuations by any system, named <prompt>.wav or <prompt>_<number>.wav
    wavs: Path | None = None
    wavs_hold_prompt: bool = False  # the files of --wavs begin with their prompt
    name: str | None = None  # name of the system; default: the model's or folder's
    # options of sampling; --seconds also limits WAVs and recordings
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(num_samples=5))
    output_dir: Path = Path("results/generation")  # folder of one set of prompts and of all systems that continue them
    measures: MeasureOptions = field(default_factory=MeasureOptions)
    codec: str | None = None  # hub id or folder; default: the model's
    codec_attention: CodecAttention | None = None  # default: that of the model's training data
    batch_size: int | None = None  # number of samples in a batch; default: 8, on GPUs 64
    device: str | None = None  # default: the accelerator, if there is one
    dtype: DecoderPrecision = "float32"  # precision of the decoder

    def __post_init__(self) -> None:
        if (self.model_name is None) == (self.wavs is None):
            raise UserError("give either a --model_name or a folder of --wavs")
        if self.wavs_hold_prompt and self.wavs is None:
            raise UserError("--wavs_hold_prompt needs --wavs; set it, or leave --wavs_hold_prompt out")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; it must be 1 or more")
        is_file_name = re.fullmatch(rf"(?!{systems.RECONSTRUCTION})[A-Za-z0-9][A-Za-z0-9._-]*", self.system)
        if not is_file_name or self.system in RESERVED:
            raise UserError(f"--name is '{self.system}', which is reserved or not a file name; choose another")

    @property
    def system(self) -> str:
        """Name of the system and of its result file."""
        return self.name if self.name is not None else model_folder(str(self.model_name or self.wavs))


def judge_generations(options: GenerationOptions) -> None:
    """Continue prompts, measure the continuations, write results, and print a table.

    Raises:
        UserError: a flag, a file, a model or a server cannot be used.
    """
    measures = options.measures
    asks_openai = measures.judge_model is not None and measures.judge_url is None and not measures.dry_run
    if asks_openai and "OPENAI_API_KEY" not in os.environ:
        raise UserError("--judge_model without --judge_url asks OpenAI; set OPENAI_API_KEY or --judge_url")
    with torchrun_ranks(options.device) as ranks, ExitStack() as locks:

        def lock_and_cut() -> PromptSet:
            locks.enter_context(locked(options.output_dir / f".{options.system}{LOCK}", "--output_dir"))
            with locked(options.output_dir / LOCK, "--output_dir", wait=True):
                return make_prompts(options.output_dir, options.prompts)

        _judge(options, from_first(lock_and_cut), ranks)


def _judge(options: GenerationOptions, prompts: PromptSet, ranks: Ranks) -> None:
    own, made_by, codec = _own_samples(options, prompts, ranks)
    folder, corpus = options.output_dir, options.prompts.corpus

    def check_earlier() -> None:
        """Refuse to replace the result of another system with the same name."""
        if (earlier := read_json(str(folder), f"{options.system}.json")) is not None:
            origin = {key: value for key, value in made_by.items() if key in ("wavs", "model_sha256")}
            what = f"'{folder / options.system}.json'"
            require_same(earlier.get("made_by") or {}, origin, what, "choose another --name")

    from_first(check_earlier)
    if ranks.rank == 0 and not any(prompt.speaker for prompt in prompts.prompts):
        print("the corpus has no speakers, so that shuffled pairs may have one voice", flush=True)
    samples = {options.system: own, **systems.references(prompts, codec, options.sampling.seconds, ranks)}
    everything = list(itertools.chain(*samples.values()))
    records, descriptions = measure_samples(everything, prompts, options.measures, ranks)
    if ranks.rank > 0 or options.measures.dry_run:
        return
    remaining = iter(records)
    for system, some in samples.items():
        own_records = list(itertools.islice(remaining, len(some)))
        result = {
            "format": FORMAT,
            "kind": KIND,
            "system": system,
            "prompts_sha256": prompts.sha256,
            "num_prompts": len(prompts.prompts),
            "seconds": options.sampling.seconds,
            "measures": descriptions,
            "versions": versions(),
            "audio_sha256": digest([sample.clip.key for sample in some]),
            "data_kind": "synthetic" if is_synthetic(corpus) else "official" if corpus in OFFICIAL_CORPORA else "other",
            "made_by": made_by if system == options.system else None,
            "missing": Counter(f"{name}: {why}" for record in own_records for name, why in record["missing"].items()),
            "samples": own_records,
        }
        content = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(str(folder), f"{system}.json", content.encode())
    print(generations_markdown(folder))
    print(f"written: '{folder / options.system}.json' and the results of the references")


def _own_samples(
    options: GenerationOptions, prompts: PromptSet, ranks: Ranks
) -> tuple[list[systems.Sample], dict[str, Any], MimiCodec | None]:
    """Return the samples of the system, their origin, and the codec of a model."""
    if (wavs := options.wavs) is not None:
        hold_prompt, seconds = options.wavs_hold_prompt, options.sampling.seconds
        samples = from_first(lambda: systems.wavs(prompts, wavs, hold_prompt=hold_prompt, max_seconds=seconds))
        return samples, {"wavs": str(wavs)}, None
    model_name = str(options.model_name)
    model = load_speech_model(
        model_name,
        codec_name=options.codec,
        attention=options.codec_attention,
        device=str(ranks.device),
        dtype=options.dtype,
    )
    if ranks.rank == 0 and (note := checkpoint_note(model, options.sampling)):
        print(note, flush=True)
    made_by = from_first(lambda: describe_model(model_name, model, options.dtype))
    folder = options.output_dir / options.system
    num_rows = options.batch_size or BATCH_SIZES[ranks.device.type == "cuda"]
    records = continue_folder(model, options.output_dir / PROMPTS, folder, options.sampling, num_rows, ranks, made_by)
    samples = systems.continuations(prompts, folder, records, model.codec.frame_rate_hz)
    return samples, read_json(str(folder), SETTINGS) or {}, model.codec
