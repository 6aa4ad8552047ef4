"""Every measure that was asked for, of every sample: one record each."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import Ranks
from llama_mimi.judging.judge import Judge, read_criteria
from llama_mimi.judging.measures import FAILED, Measure, Stage, missing, take
from llama_mimi.judging.prompts import PromptSet
from llama_mimi.judging.sound import Aesthetics, DistillMos, Pair, Pauses, SpeakerSimilarity
from llama_mimi.judging.systems import MIN_SECONDS, Clip, Sample
from llama_mimi.judging.words import Perplexity, TextPair, Transcripts, words_of

BATCH_SIZES = (8, 16)  # without and with a GPU; Whisper large takes half a GB of a clip in float32
MEASURED = "measured"  # folder of the values of all systems
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What is measured.

    Args:
        speaker_model: hub id or folder, such as microsoft/wavlm-base-plus-sv; without, no speaker similarity.
        quality: distillmos rates degradation more than naturalness; aesthetics is Audiobox-Aesthetics, where installed.
        asr_model: hub id or folder of a recogniser, such as openai/whisper-large-v3; without, no transcripts.
        language: spoken, for recognisers that know several, such as "en".
        text_model: hub id or folder of a causal language model, for the perplexity of transcripts.
        judge_model: name of a model that --judge_url serves; without, no judge.
        judge_url: of a server that speaks OpenAI's protocol, such as http://localhost:8000/v1; by default OpenAI's.
        judge_criteria: what the judge is asked.
        judge_parallel: calls at once, of each rank of torchrun.
        judge_timeout: seconds that a call may take.
        dry_run: transcribe, then print what the judge would be asked and how many calls that is, and nothing else.
        listening_batch_size: clips or texts that are heard or read at once; by default 8, on GPUs 16.

    Raises:
        UserError: flags that do not go together, or a file of criteria that is none.
    """

    speaker_model: str | None = None
    quality: Literal["distillmos", "aesthetics", "none"] = "distillmos"
    asr_model: str | None = None
    language: str | None = None
    text_model: str | None = None
    judge_model: str | None = None
    judge_url: str | None = None
    judge_criteria: Path = Path("eval/judge.toml")
    judge_parallel: int = 8
    judge_timeout: float = 120.0
    dry_run: bool = False
    listening_batch_size: int | None = None

    def __post_init__(self) -> None:
        if (self.text_model or self.judge_model or self.language) and self.asr_model is None:
            raise UserError("--text_model, --judge_model and --language are of transcripts; name an --asr_model, too")
        if (self.judge_url is not None or self.dry_run) and self.judge_model is None:
            raise UserError("--judge_url and --dry_run are of a judge; name its --judge_model")
        for flag in ("judge_parallel", "judge_timeout"):
            if not 0 < getattr(self, flag) < float("inf"):
                raise UserError(f"--{flag} is {getattr(self, flag)}; it must be a positive number")
        if self.listening_batch_size is not None and self.listening_batch_size < 1:
            raise UserError(f"--listening_batch_size is {self.listening_batch_size}; it must be 1 or more")
        if self.judge_model is not None:
            read_criteria(self.judge_criteria)

    def check_key(self) -> None:
        """Refuse to ask OpenAI without a key, before anything else is done.

        Raises:
            UserError: there is none.
        """
        asks_openai = self.judge_model is not None and self.judge_url is None and not self.dry_run
        if asks_openai and "OPENAI_API_KEY" not in os.environ:
            raise UserError("--judge_model without --judge_url asks OpenAI; set OPENAI_API_KEY, or name a --judge_url")


class Listener:
    """Takes the measures.

    Args:
        folder: of the prompts and all systems that continue them; values are kept there.
    """

    def __init__(self, options: MeasureOptions, prompts: PromptSet, folder: Path, ranks: Ranks) -> None:
        self._options, self._prompts, self._folder, self._ranks = options, prompts, folder, ranks
        self._batch_size = options.listening_batch_size or BATCH_SIZES[ranks.device.type == "cuda"]
        self.described: dict[str, Any] = {}  # what took each measure
        self.stages: dict[str, Stage] = {}  # what it cost

    def records(self, samples: Sequence[Sample]) -> list[Record]:
        """Of each sample its prompt, number, file, measures and text, and by measure why one is ``missing``.

        Raises:
            UserError: a file, a model or the judge cannot be used.
        """
        options, device = self._options, self._ranks.device
        records = [self._record(sample) for sample in samples]
        for place, of_clip in self._values(Pauses(), {n: sample.clip for n, sample in enumerate(samples)}).items():
            records[place] |= of_clip
            if of_clip["seconds"] < MIN_SECONDS:
                records[place]["missing"]["sound"] = "too short"
        heard = {n: sample.clip for n, sample in enumerate(samples) if not records[n]["missing"]}
        prompts = {n: Clip(self._prompts.path(samples[n].prompt)) for n in heard}
        if options.speaker_model is not None and not options.dry_run:
            pairs = {n: Pair(prompts[n], clip) for n, clip in heard.items()}
            self._enter(records, SpeakerSimilarity(options.speaker_model, device), pairs)
        if options.quality == "distillmos" and not options.dry_run:
            self._enter(records, DistillMos(device, self._batch_size), heard)
        elif options.quality == "aesthetics" and not options.dry_run:
            self._enter(records, Aesthetics(self._batch_size), heard)
        if options.asr_model is not None:
            said = self._transcribe(
                Transcripts(options.asr_model, options.language, device, self._batch_size), heard, prompts
            )
            for record in records:
                record["words_per_minute"] = None
            for place, pair in said.items():
                words = len(words_of(pair.continuation))
                records[place] |= {
                    "prompt_text": pair.prompt,
                    "text": pair.continuation,
                    "words_per_minute": 60 * words / records[place]["seconds"],
                }
                if not words:
                    records[place]["missing"]["words"] = "no words"
            self._read(records, {n: pair for n, pair in said.items() if not records[n]["missing"]})
        return records

    def _record(self, sample: Sample) -> Record:
        path = sample.clip.path
        file = path.relative_to(self._folder) if path.is_relative_to(self._folder) else path
        return {"prompt": sample.prompt.name, "sample": sample.number, "file": str(file), "missing": {}, **sample.known}

    def _transcribe(
        self, recogniser: Transcripts, heard: Mapping[int, Clip], prompts: Mapping[int, Clip]
    ) -> dict[int, TextPair]:
        """What prompts and continuations say; the places of prompts are negative."""
        texts = self._values(recogniser, {**heard, **{-1 - n: clip for n, clip in prompts.items()}})
        return {n: TextPair(texts[-1 - n], texts[n]) for n in heard}

    def _read(self, records: Sequence[Record], said: Mapping[int, TextPair]) -> None:
        """Enter what is to be said of texts; in a dry run say what the judge would be asked."""
        options = self._options
        if options.text_model is not None and not options.dry_run:
            self._enter(records, Perplexity(options.text_model, self._ranks.device, self._batch_size), said)
        if options.judge_model is None:
            return
        criteria = read_criteria(options.judge_criteria)
        judge = Judge(options.judge_url, options.judge_model, criteria, options.judge_parallel, options.judge_timeout)
        if not options.dry_run:
            self._enter(records, judge, said)
        elif self._ranks.rank == 0:
            inputs = {pair.key: pair for pair in said.values()}
            todo = missing(judge, inputs, self._folder / MEASURED)
            for message in criteria.messages(inputs[todo[0]]) if todo else ():
                print(f"--- {message['role']}\n{message['content'].strip()}")
            print(f"--- {len(todo):,} such calls; {len(inputs) - len(todo):,} replies are known already")

    def _values(self, measure: Measure, inputs: Mapping[int, Any]) -> dict[int, Any]:
        """A measure of inputs by place; the same input is measured once."""
        self.described[measure.name] = measure.describe()
        by_key = {one.key: one for one in inputs.values()}
        values, self.stages[measure.name] = take(measure, by_key, self._folder / MEASURED, self._ranks)
        return {place: values[one.key] for place, one in inputs.items()}

    def _enter(self, records: Sequence[Record], measure: Measure, inputs: Mapping[int, Any]) -> None:
        """Enter a measure, one of several numbers as several measures; records without a value get None."""
        values = self._values(measure, inputs)
        for place, value in values.items():
            if isinstance(value, str) and value.startswith(FAILED):
                records[place]["missing"][measure.name] = value.removeprefix(FAILED)
            elif isinstance(value, dict):
                records[place] |= {f"{measure.name}/{key}": number for key, number in value.items()}
            else:
                records[place][measure.name] = value
        own = {key for record in records for key in record if key.split("/")[0] == measure.name}
        for record in records:
            record |= dict.fromkeys(own - record.keys())
