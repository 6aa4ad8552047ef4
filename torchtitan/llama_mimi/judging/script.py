"""eval/generation.py: from prompts to a table."""

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_mimi.audio.mimi import CodecAttention, MimiCodec, codec_hash, load_codec_config
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import LOCK, locked, read_json, write_atomically
from llama_mimi.common.ranks import Ranks, from_first, torchrun_ranks
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.results import model_folder
from llama_mimi.generation.continuation import SamplingOptions, checkpoint_note
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.prompt_folder import SETTINGS, continue_folder, describe_model
from llama_mimi.generation.speech_model import DecoderPrecision
from llama_mimi.judging.listening import MEASURED, Listener, MeasureOptions, Record
from llama_mimi.judging.measures import Stage
from llama_mimi.judging.prompts import PROMPTS, RECORDINGS, PromptOptions, PromptSet, make_prompts
from llama_mimi.judging.systems import (
    RECORDING,
    SHUFFLED,
    Sample,
    continuations,
    reconstructions,
    recordings,
    shuffled,
    wavs,
)
from llama_mimi.report.comparisons import generations_markdown
from llama_mimi.report.results import KIND

FORMAT = 1
RECONSTRUCTION = "reconstruction"
BATCH_SIZES = (8, 64)  # without and with a GPU
Systems = dict[str, list[Sample]]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Flags of eval/generation.py.

    Args:
        model_name: hub id or folder of a model of ours.
        wavs: instead, a folder of continuations by any system, called <prompt>.wav or <prompt>_<number>.wav.
        wavs_hold_prompt: those files begin with their prompt.
        name: of the row; by default that of the model or folder.
        prompts: which recordings are continued.
        sampling: how tokens are drawn, and for how long; also WAVs and recordings are heard so long.
        output_dir: of one set of prompts and all systems that continue them.
        measures: what is measured.
        num_quantizers: levels of the codec's reconstruction; by default the model's.
        codec: hub id or folder; by default what the model names.
        codec_attention: by default that of the model's training codes.
        batch_size: samples that are drawn at once; by default 8, on GPUs 64.
        device: by default the accelerator where there is one.
        dtype: precision of the decoder.

    Raises:
        UserError: flags that do not go together.
    """

    prompts: PromptOptions
    model_name: str | None = None
    wavs: Path | None = None
    wavs_hold_prompt: bool = False
    name: str | None = None
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(num_samples=5))
    output_dir: Path = Path("results/generation")
    measures: MeasureOptions = field(default_factory=MeasureOptions)
    num_quantizers: int | None = None
    codec: str | None = None
    codec_attention: CodecAttention | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: DecoderPrecision = "float32"

    def __post_init__(self) -> None:
        if (self.model_name is None) == (self.wavs is None):
            raise UserError("give either a --model_name or a folder of --wavs")
        if self.wavs_hold_prompt and self.wavs is None:
            raise UserError("--wavs_hold_prompt is of --wavs; leave it out")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; it must be 1 or more")
        if self.system in (RECORDING, SHUFFLED) or self.system.startswith(RECONSTRUCTION):
            raise UserError(f"a system cannot be called '{self.system}', as a reference is; give it another --name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.system) or self.system in (
            PROMPTS,
            RECORDINGS,
            MEASURED,
        ):
            raise UserError(f"--name is '{self.system}', which cannot be the name of a result file; choose another")

    @property
    def system(self) -> str:
        """What the row and its result file are called."""
        return self.name if self.name is not None else model_folder(str(self.model_name or self.wavs))


def judge_generations(options: GenerationOptions) -> None:
    """Continue prompts, measure what is heard, and print a table.

    Raises:
        UserError: a flag, a file, a model or a server cannot be used.
    """
    options.measures.check_key()
    with torchrun_ranks(options.device) as ranks:
        try:
            _run(options, ranks)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of '{ranks.device}' is full; lower --listening_batch_size, or --batch_size if no sample "
                "was made"
            ) from error


def _run(options: GenerationOptions, ranks: Ranks) -> None:
    with ExitStack() as held:

        def begin() -> PromptSet:
            of_system = options.output_dir / f".{options.system}{LOCK}"
            held.enter_context(locked(of_system, "--output_dir"))  # of rank 0, to the end
            with locked(options.output_dir / LOCK, "--output_dir", wait=True):
                return make_prompts(options.output_dir, options.prompts)

        _judge(options, from_first(begin), ranks)


def _judge(options: GenerationOptions, prompts: PromptSet, ranks: Ranks) -> None:
    own, made_by, codec, stages = _system(options, prompts, ranks)
    systems = {options.system: own, **_references(options, prompts, codec, ranks)}
    from_first(lambda: _check_earlier(options.output_dir / f"{options.system}.json", made_by))
    listener = Listener(options.measures, prompts, options.output_dir, ranks)
    everything = [sample for samples in systems.values() for sample in samples]
    records = iter(listener.records(everything))
    by_system = {system: list(itertools.islice(records, len(samples))) for system, samples in systems.items()}
    if ranks.rank == 0 and not options.measures.dry_run:
        header = {
            "format": FORMAT,
            "kind": KIND,
            "prompts_sha256": prompts.sha256,
            "num_prompts": len(prompts.prompts),
            "seconds": options.sampling.seconds,
            "measures": listener.described,
            "versions": versions(),
        }
        of_own: dict[str, Record] = {
            system: {"audio_sha256": _audio_sha256(samples)} for system, samples in systems.items()
        }
        of_own[options.system]["made_by"] = made_by
        _write(options.output_dir, by_system, header, of_own)
        print(generations_markdown(options.output_dir))
        for name, stage in (stages | listener.stages).items():
            if stage.inputs and stage.seconds:
                print(f"{name}: {stage.inputs:,} in {stage.seconds:.1f} s, {stage.inputs / stage.seconds:.2f} a second")
        print(f"written to {options.output_dir / options.system}.json, with references beside it")


def _audio_sha256(samples: Sequence[Sample]) -> str:
    """Two results with the same are of the same continuations."""
    return hashlib.sha256("".join(sample.clip.key for sample in samples).encode()).hexdigest()


def _system(
    options: GenerationOptions, prompts: PromptSet, ranks: Ranks
) -> tuple[list[Sample], Record, MimiCodec | None, dict[str, Stage]]:
    """Samples to judge, how they were made, the codec to reconstruct recordings by, and what new samples cost."""
    if options.wavs is not None:
        codec = None
        if options.codec is not None and options.num_quantizers is not None:
            attention = options.codec_attention or "windowed"
            codec = MimiCodec(options.codec, options.num_quantizers, ranks.device, attention=attention)
        folder = options.wavs
        seconds = options.sampling.seconds
        samples = from_first(lambda: wavs(prompts, folder, hold_prompt=options.wavs_hold_prompt, max_seconds=seconds))
        return samples, {"wavs": str(folder)}, codec, {}
    assert options.model_name is not None
    model = load_speech_model(
        options.model_name,
        codec_name=options.codec,
        attention=options.codec_attention,
        device=str(ranks.device),
        dtype=options.dtype,
    )
    if ranks.rank == 0 and (note := checkpoint_note(model, options.sampling)):
        print(note, flush=True)
    made_by = from_first(lambda: describe_model(str(options.model_name), model, options.dtype))
    if options.num_quantizers is not None:
        load_codec_config(model.codec.name, options.num_quantizers)
    folder = options.output_dir / options.system
    before = set(folder.glob("*.wav"))
    began = time.perf_counter()
    num_rows = options.batch_size or BATCH_SIZES[ranks.device.type == "cuda"]
    records = continue_folder(model, options.output_dir / PROMPTS, folder, options.sampling, num_rows, ranks, made_by)
    samples = continuations(prompts, folder, records, model.codec.frame_rate_hz)
    num_new = sum(sample.clip.path not in before for sample in samples)
    stage = Stage(num_new, round(time.perf_counter() - began, 2))
    codec = model.codec.at_depth(options.num_quantizers or model.codec.num_quantizers)
    return samples, read_json(str(folder), SETTINGS) or {}, codec, {"generation": stage}


def _check_earlier(path: Path, made_by: Record) -> None:
    """Refuse to replace the result of another system of this name."""
    earlier = (read_json(str(path.parent), path.name) or {}).get("made_by", made_by)
    for key in ("wavs", "model_sha256"):
        if earlier.get(key) != made_by.get(key):
            raise UserError(f"'{path}' is of another system, with {key} {earlier.get(key)!r}; give this one a --name")


def _references(options: GenerationOptions, prompts: PromptSet, codec: MimiCodec | None, ranks: Ranks) -> Systems:
    seconds = options.sampling.seconds
    if ranks.rank == 0 and not any(prompt.speaker for prompt in prompts.prompts):
        print("the corpus names no speakers, so that shuffled pairs may be of one voice", flush=True)
    references = {RECORDING: recordings(prompts, seconds), SHUFFLED: shuffled(prompts, seconds)}
    if codec is not None:
        name = f"{RECONSTRUCTION}_q{codec.num_quantizers}"
        folder = options.output_dir / name
        of_codec = {"codec_sha256": codec_hash(codec.name), "codec_attention": codec.attention}
        from_first(lambda: _keep(folder, of_codec))
        with ExitStack() as held:  # another system may be judged at the same time
            lock = locked(options.output_dir / LOCK, "--output_dir", wait=True)
            from_first(lambda: held.enter_context(lock))
            references[name] = reconstructions(prompts, codec, folder, seconds, ranks)
    elif ranks.rank == 0:
        print("no reconstruction by a codec in the table; name a --codec and --num_quantizers for it", flush=True)
    return references


def _keep(folder: Path, of_codec: Record) -> None:
    earlier = read_json(str(folder), SETTINGS)
    if earlier not in (None, of_codec):
        raise UserError(f"'{folder}' is of another codec or attention; name another --output_dir")
    write_atomically(str(folder), SETTINGS, (json.dumps(of_codec, indent=1) + "\n").encode())


def _write(folder: Path, records: Mapping[str, list[Record]], header: Record, of_own: Mapping[str, Record]) -> None:
    """Write a result file for each system."""
    for system, of_system in records.items():
        reasons = Counter(f"{name}: {why}" for record in of_system for name, why in record["missing"].items())
        result: Record = {
            **header,
            "system": system,
            **of_own[system],
            "missing": dict(reasons),
            "samples": of_system,
        }
        content = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(str(folder), f"{system}.json", content.encode())
        for reason, number in reasons.items():
            print(f"{system}: {number:,} of {len(of_system):,} samples have no value of {reason}")
