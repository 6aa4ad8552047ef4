"""Implementation of eval/{generation,tts,asr}.py: generate speech or transcripts, compute measures, write results."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers import AutoConfig

from llama_mimi.audio.mimi import MimiCodec
from llama_mimi.common.command_line import REPORT, print_next
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0, distributed_context
from llama_mimi.common.files import LOCK, digest, is_synthetic, locked, read_json, visible_files, write_atomically
from llama_mimi.common.hub import load_pretrained, weights_sha256
from llama_mimi.common.resume import require_same
from llama_mimi.common.versions import versions
from llama_mimi.evaluation.results import FORMAT
from llama_mimi.generation.continuation import settings_note
from llama_mimi.generation.loading import MODELS, load_speech_model
from llama_mimi.generation.prompt_folder import BATCHES_PER_GROUP, SETTINGS, Prompt, describe_model, draw_samples
from llama_mimi.generation.transcription import transcribe
from llama_mimi.judging import metrics, systems
from llama_mimi.judging.error_rates import add_error_rates
from llama_mimi.judging.judge import judge
from llama_mimi.judging.options import (
    MAX_RECORDING_SECONDS,
    MEASURED,
    MIN_SECONDS,
    PROMPTS,
    RECORDINGS,
    AsrOptions,
    CorpusOptions,
    GenerationOptions,
    MeasureOptions,
    SystemOptions,
    TtsOptions,
    read_criteria,
)
from llama_mimi.judging.prompts import PromptSet, make_prompts
from llama_mimi.judging.systems import Clip, Sample
from llama_mimi.report.comparisons import comparable_sets, summary
from llama_mimi.report.document import to_markdown
from llama_mimi.report.results import KIND, read_results

# Batch sizes on a CPU and on a GPU. Whisper large needs 0.5 GB per clip in float32.
BATCH_SIZES, LISTENING_BATCH_SIZES = (8, 64), (8, 16)
Record = dict[str, Any]


def judge_generations(options: GenerationOptions) -> None:
    """Continue prompts or speak texts, measure the speech, write results and print a table."""
    max_seconds = options.sampling.seconds if isinstance(options, TtsOptions) else MAX_RECORDING_SECONDS
    with distributed_context(options.device) as ranks, ExitStack() as locks:
        prompts = _lock_and_make(locks, options, max_seconds)
        own, made_by, codec = _own_samples(options, prompts, ranks)
        if ranks.rank == 0 and not any(prompt.speaker for prompt in prompts.prompts):
            print("the corpus does not name speakers, so the two voices of a shuffled pair can be the same", flush=True)
        samples = {options.system: own, **systems.references(prompts, codec, options.sampling.seconds, ranks)}
        everything = [sample for of_system in samples.values() for sample in of_system]
        seconds = options.similarity_seconds
        records, descriptions = measure_samples(everything, prompts, options.measures, seconds, ranks)
        settings = {"seconds": options.sampling.seconds, "measures": descriptions}
        if ranks.rank == 0:
            _write_results(prompts, options.prompts, made_by, samples, records, settings)


def score_recogniser(options: AsrOptions) -> None:
    """Transcribe recordings, write the transcripts and their error rates, and print a table."""
    with distributed_context(options.device) as ranks, ExitStack() as locks:
        prompts = _lock_and_make(locks, options, MAX_RECORDING_SECONDS)
        recogniser = _recogniser(options, ranks)
        samples = [Sample(prompt, 0, Clip(prompts.file(RECORDINGS, prompt))) for prompt in prompts.prompts]
        values = metrics.compute(recogniser, [(sample.clip,) for sample in samples], prompts.folder / MEASURED, ranks)
        records = [_record(sample, prompts) | value for sample, value in zip(samples, values, strict=True)]
        measures = {"error_rates": add_error_rates(records, prompts, options.language, "asr")}
        settings = {"seconds": MAX_RECORDING_SECONDS, "measures": measures}
        if ranks.rank == 0:
            made_by: Record = {"model": options.model_name, "model_sha256": weights_sha256(options.model_name)}
            # Paths and versions are elsewhere in the result, and do not identify a recogniser.
            description = recogniser.description | {"language": options.language}
            made_by["recogniser"] = {k: v for k, v in description.items() if k not in ("model", "transformers")}
            _write_results(prompts, options.prompts, made_by, {options.system: samples}, records, settings)


def _recogniser(options: AsrOptions, ranks: DistributedContext) -> metrics.Measure:
    """Return a measure that transcribes clips by a speech language model or by an ASR model of transformers."""
    name, is_gpu = options.model_name, ranks.device.type == "cuda"
    kind = load_pretrained(AutoConfig, name, what="model").model_type
    if kind not in MODELS:
        batch_size = options.batch_size or LISTENING_BATCH_SIZES[is_gpu]
        return metrics.transcripts(name, options.language, ranks.device, batch_size)
    model = load_speech_model(name, codec_name=options.codec, device=str(ranks.device), dtype=options.dtype)
    model.require_task("eval/asr.py", "asr")
    num_rows = options.batch_size or BATCH_SIZES[is_gpu]

    def values(batch: Sequence[metrics.Input]) -> Iterator[metrics.Value]:
        samples = [clip.read(model.codec.sample_rate_hz).samples_S for (clip,) in batch]
        for text, is_cut in transcribe(model, model.codec.encode_many(samples), num_rows):
            yield {"text": text, "ended": float(not is_cut)}

    description = broadcast_from_rank0(lambda: describe_model(name, model))
    del description["versions"]  # cached transcripts stay valid after a new commit
    return metrics.Measure("transcripts", ("text", "ended"), description, values, BATCHES_PER_GROUP * num_rows)


def _lock_and_make(locks: ExitStack, options: SystemOptions, max_seconds: float) -> PromptSet:
    """Return the prompts in a folder. The first command creates the prompts. Lock the result of the system."""

    def lock_and_make() -> PromptSet:
        locks.enter_context(locked(options.output_dir / f".{options.system}{LOCK}", "--output_dir"))
        with locked(options.output_dir / LOCK, "--output_dir", wait=True):
            return make_prompts(options.output_dir, options.prompts, max_seconds)

    return broadcast_from_rank0(lock_and_make)


def _write_results(
    prompts: PromptSet,
    options: CorpusOptions,
    made_by: Record,
    samples: Mapping[str, Sequence[Sample]],
    records: Sequence[Record],
    settings: Record,
) -> None:
    """Write a result file for each system, and print a table. ``made_by`` describes the origin of the first system."""
    folder, own = prompts.folder, next(iter(samples))
    if earlier := read_json(str(folder), f"{own}.json"):  # refuse another system with the same name
        origin: Record = {key: made_by[key] for key in ("wavs", "model_sha256", "recogniser") if key in made_by}
        require_same(earlier.get("made_by") or {}, origin, f"'{folder / own}.json'", "choose another --name")
    for system, some in samples.items():
        own_records, records = records[: len(some)], records[len(some) :]
        result = {
            "format": FORMAT,
            "kind": KIND,
            "system": system,
            "prompts_sha256": prompts.sha256,
            **settings,
            "versions": versions(),
            "audio_sha256": digest([sample.clip.key for sample in some]),
            "data_kind": "synthetic" if is_synthetic(options.corpus) else "other",
            "made_by": made_by if system == own else None,
            "missing": Counter(f"{name}: {why}" for record in own_records for name, why in record["missing"].items()),
            "samples": own_records,
        }
        content = json.dumps(result, indent=1, allow_nan=False) + "\n"
        write_atomically(str(folder), f"{system}.json", content.encode())
    items = read_results(visible_files(folder, "*.json"))
    print(to_markdown([summary(some, title) for title, some in comparable_sets(items)]))
    print(f"written to {folder / own}.json; the results of other systems and references are in the same folder")
    print_next(REPORT, results=folder, output_file=folder / "report.md")


def _record(sample: Sample, prompts: PromptSet) -> Record:
    """Return a record without measures."""
    path, speaker = sample.clip.path, sample.prompt.speaker
    file = path.relative_to(prompts.folder) if path.is_relative_to(prompts.folder) else path
    names = {"prompt": sample.prompt.name, "sample": sample.number, "file": str(file)}
    return names | ({"speaker": speaker} if speaker else {}) | {"missing": {}, **sample.known}


def _own_samples(
    options: GenerationOptions, prompts: PromptSet, ranks: DistributedContext
) -> tuple[list[Sample], Record, MimiCodec | None]:
    """Return the system's samples, their origin, and the codec (None for --wavs)."""
    if (wavs := options.wavs) is not None:
        arguments = prompts, wavs, options.wavs_contain_prompt, options.sampling.seconds
        return broadcast_from_rank0(lambda: systems.wavs(*arguments)), {"wavs": str(wavs)}, None
    name, device, window = str(options.model_name), str(ranks.device), options.codec_sliding_window
    model = load_speech_model(name, codec_name=options.codec, sliding_window=window, device=device, dtype=options.dtype)
    if ranks.rank == 0:
        print(settings_note(model, options.sampling), flush=True)
    made_by = broadcast_from_rank0(lambda: describe_model(name, model))
    folder = options.output_dir / options.system
    num_rows = options.batch_size or BATCH_SIZES[ranks.device.type == "cuda"]
    own = []
    for prompt in sorted(prompts.prompts, key=lambda prompt: f"{prompt.name}.wav"):
        path = prompts.file(PROMPTS, prompt) if prompt.seconds else None
        own.append(Prompt(f"{prompt.name}.wav", path, f"{prompt.prompt_text} {prompt.text}".strip() or None))
    records = draw_samples(model, own, folder, options.sampling, num_rows, ranks, made_by)
    samples = systems.continuations(prompts, folder, records, model.codec.frame_rate_hz)
    if ranks.rank == 0:
        print(f"{len(records):,} samples are in {folder}", flush=True)
    return samples, read_json(str(folder), SETTINGS) or {}, model.codec


def measure_samples(
    samples: Sequence[Sample],
    prompts: PromptSet,
    options: MeasureOptions,
    similarity_seconds: float,
    ranks: DistributedContext,
) -> tuple[list[Record], Record]:
    """Return a record for each sample, and a description of each measure; cache values in the prompts' folder.

    A record contains prompt, speaker of the prompt (if the corpus names speakers), sample, file, measures and texts.
    The key ``missing`` gives reasons for missing measures.
    """
    device, descriptions = ranks.device, Record()
    batch_size = options.listening_batch_size or LISTENING_BATCH_SIZES[device.type == "cuda"]
    records = [_record(sample, prompts) for sample in samples]

    def values_of(measure: metrics.Measure, inputs: Sequence[metrics.Input]) -> list[metrics.Value]:
        descriptions[measure.name] = measure.description
        return metrics.compute(measure, inputs, prompts.folder / MEASURED, ranks)

    def enter(measure: metrics.Measure, some: Sequence[Record], inputs: Sequence[metrics.Input]) -> None:
        """Add a measure to the records ``some``; in all other records, set the measure to None."""
        for record in records:
            record |= dict.fromkeys(measure.keys)
        for record, value in zip(some, values_of(measure, inputs), strict=True):
            if isinstance(value, str):
                record["missing"][measure.name] = value
            else:
                record |= value
                record["missing"] |= {key: "too short" for key in value if value[key] is None}

    enter(metrics.pauses(), records, [(sample.clip,) for sample in samples])
    for record in records:
        if record["seconds"] < MIN_SECONDS:
            record["missing"]["sound"] = "too short"
    usable = [(sample, record) for sample, record in zip(samples, records, strict=True) if not record["missing"]]
    audible = [record for _, record in usable]
    clips = [(sample.clip,) for sample, _ in usable]
    if options.speaker_model is not None:
        prompted = [(sample, record) for sample, record in usable if sample.prompt.seconds]
        clip_pairs = [(Clip(prompts.file(PROMPTS, sample.prompt)), sample.clip) for sample, _ in prompted]
        measure = metrics.speaker_similarity(options.speaker_model, similarity_seconds, device)
        enter(measure, [record for _, record in prompted], clip_pairs)
        for sample, record in usable:
            record["missing"] |= {} if sample.prompt.seconds else {"similarity": "no voice prompt"}
    if options.quality == "distillmos":
        enter(metrics.distillmos(device), audible, clips)
    if options.quality == "aesthetics":
        enter(metrics.aesthetics(batch_size), audible, clips)
    if options.asr_model is None:
        return records, descriptions
    asr = metrics.transcripts(options.asr_model, options.language, device, batch_size)
    prompt_clips = [(Clip(prompts.file(PROMPTS, sample.prompt)),) for sample, _ in usable if not sample.prompt.text]
    texts = [value["text"] for value in values_of(asr, clips + prompt_clips)]
    prompt_texts = texts[len(audible) :] or [sample.prompt.prompt_text for sample, _ in usable]
    for record in records:
        record |= dict.fromkeys(("words_per_minute", "auto_bleu"))
    for record, text, prompt_text in zip(audible, texts, prompt_texts, strict=False):
        words = metrics.words_of(text)
        record |= {"prompt_text": prompt_text, "text": text, "words_per_minute": 60 * len(words) / record["seconds"]}
        if words:
            record["auto_bleu"] = metrics.auto_bleu(words)
        else:
            record["missing"]["words"] = "no words"
    if any(prompt.text for prompt in prompts.prompts):
        descriptions["error_rates"] = add_error_rates(records, prompts, options.language, "tts")
    spoken = [record for record in audible if "words" not in record["missing"]]
    pairs = [(record["prompt_text"], record["text"]) for record in spoken]
    if options.text_model is not None:
        enter(metrics.perplexity(options.text_model, device), spoken, pairs)
    if options.judge_model is not None:
        criteria = read_criteria(options.judge_criteria)
        enter(judge(options.judge_url, options.judge_model, criteria), spoken, pairs)
    return records, descriptions
