"""All chosen measures of all samples: one record for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import Ranks
from llama_mimi.judging import metrics
from llama_mimi.judging.judge import judge, read_criteria
from llama_mimi.judging.prompts import PROMPTS, PromptSet
from llama_mimi.judging.systems import Clip, Sample

BATCH_SIZES = (8, 16)  # without and with a GPU; Whisper large needs 0.5 GB for a clip in float32
MEASURED = "measured"  # folder of the values of all systems
MIN_SECONDS = 0.4  # a shorter clip has no voice, and ASR models hear words in anything
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Choice of measures."""

    # hub id or folder, such as microsoft/wavlm-base-plus-sv; default: no speaker similarity
    speaker_model: str | None = None
    # distillmos rates degradation more than naturalness; aesthetics is Audiobox-Aesthetics, if installed
    quality: Literal["distillmos", "aesthetics", "none"] = "distillmos"
    asr_model: str | None = None  # hub id or folder, such as openai/whisper-large-v3; default: no transcripts
    language: str | None = None  # spoken language, for ASR models that know several, such as en
    text_model: str | None = None  # hub id or folder of a causal language model, for the perplexity of transcripts
    judge_model: str | None = None  # name of a model that --judge_url serves; default: no judge
    judge_url: str | None = None  # server with OpenAI's protocol, such as http://localhost:8000/v1; default: OpenAI's
    judge_criteria: Path = Path("eval/judge.toml")  # file of the judge's questions
    dry_run: bool = False  # transcribe, then print only the first question to the judge and the number of calls
    listening_batch_size: int | None = None  # number of clips in a batch; default: 8, on GPUs 16

    def __post_init__(self) -> None:
        needed = dict.fromkeys(("language", "text_model", "judge_model"), "asr_model")
        needed |= dict.fromkeys(("judge_url", "dry_run"), "judge_model")
        for flag, other in needed.items():
            if getattr(self, flag) and getattr(self, other) is None:
                raise UserError(f"--{flag} needs --{other}; set it, or leave --{flag} out")
        if self.listening_batch_size is not None and self.listening_batch_size < 1:
            raise UserError(f"--listening_batch_size is {self.listening_batch_size}; it must be 1 or more")
        if self.judge_model is not None:
            read_criteria(self.judge_criteria)


def measure_samples(
    samples: Sequence[Sample], prompts: PromptSet, options: MeasureOptions, ranks: Ranks
) -> tuple[list[Record], dict[str, Any]]:
    """Measure samples; values are kept in the folder of the prompts.

    Returns:
        For each sample a record of its prompt, number, file, measures and texts, and by measure the reason why one is
        ``missing``; and the description of each measure.
    """
    device, is_real = ranks.device, not options.dry_run
    batch_size = options.listening_batch_size or BATCH_SIZES[device.type == "cuda"]
    folder = prompts.folder / MEASURED
    records: list[Record] = []
    for sample in samples:
        path = sample.clip.path
        file = path.relative_to(prompts.folder) if path.is_relative_to(prompts.folder) else path
        names = {"prompt": sample.prompt.name, "sample": sample.number, "file": str(file)}
        records.append({**names, "missing": {}, **sample.known})
    descriptions: dict[str, Any] = {}

    def take(measure: metrics.Measure, inputs: Sequence[metrics.Input]) -> list[metrics.Value]:
        descriptions[measure.name] = measure.description
        return metrics.take(measure, inputs, folder, ranks)

    def enter(measure: metrics.Measure, some: Sequence[Record], inputs: Sequence[metrics.Input]) -> None:
        """Enter a measure of some records; the others get None."""
        for record in records:
            record |= dict.fromkeys(measure.keys)
        for record, value in zip(some, take(measure, inputs), strict=True):
            if isinstance(value, str):
                record["missing"][measure.name] = value
            else:
                record |= value

    enter(metrics.pauses(), records, [(sample.clip,) for sample in samples])
    for record in records:
        if record["seconds"] < MIN_SECONDS:
            record["missing"]["sound"] = "too short"
    heard = [record for record in records if not record["missing"]]
    usable = [sample for sample, record in zip(samples, records, strict=True) if not record["missing"]]
    clips = [sample.clip for sample in usable]
    prompt_clips = [Clip(prompts.file(PROMPTS, sample.prompt)) for sample in usable]
    if is_real and options.speaker_model is not None:
        clip_pairs = list(zip(prompt_clips, clips, strict=True))
        enter(metrics.speaker_similarity(options.speaker_model, device), heard, clip_pairs)
    if is_real and options.quality == "distillmos":
        enter(metrics.distillmos(device), heard, [(clip,) for clip in clips])
    if is_real and options.quality == "aesthetics":
        enter(metrics.aesthetics(batch_size), heard, [(clip,) for clip in clips])
    if options.asr_model is None:
        return records, descriptions
    asr = metrics.transcripts(options.asr_model, options.language, device, batch_size)
    texts = [value["text"] for value in take(asr, [(clip,) for clip in clips + prompt_clips])]
    for record in records:
        record["words_per_minute"] = None
    for record, text, prompt_text in zip(heard, texts[: len(heard)], texts[len(heard) :], strict=True):
        num_words = len(metrics.words_of(text))
        record |= {"prompt_text": prompt_text, "text": text, "words_per_minute": 60 * num_words / record["seconds"]}
        if not num_words:
            record["missing"]["words"] = "no words"
    spoken = [record for record in heard if "words" not in record["missing"]]
    pairs = [(record["prompt_text"], record["text"]) for record in spoken]
    if is_real and options.text_model is not None:
        enter(metrics.log_perplexity(options.text_model, device), spoken, pairs)
    if options.judge_model is not None:
        criteria = read_criteria(options.judge_criteria)
        if is_real:
            enter(judge(options.judge_url, options.judge_model, criteria), spoken, pairs)
        elif ranks.rank == 0:
            for message in criteria.messages(*pairs[0]) if pairs else ():
                print(f"--- {message['role']}\n{message['content'].strip()}")
            print(f"--- {len(set(pairs)):,} such calls, less those with known replies")
    return records, descriptions
