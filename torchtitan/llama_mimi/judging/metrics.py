"""Measures of continuations: voice, sound quality and transcripts."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from llama_mimi.audio.silence import silences
from llama_mimi.common.distributed import DistributedContext, broadcast_from_rank0
from llama_mimi.common.errors import UserError
from llama_mimi.common.files import digest
from llama_mimi.common.hub import load_pretrained, weights_sha256
from llama_mimi.common.resume import ProgressLog, map_resumable
from llama_mimi.common.versions import versions
from llama_mimi.judging.systems import Clip
from llama_mimi.report.document import import_extra
from llama_mimi.report.results import FIXED_LENGTH

INSTALL = "run `uv sync --inexact --extra judging`"
RATE_HZ = 16_000  # sample rate of all audio models in this module
ROUNDING_SECONDS = 0.001  # resampling can make a clip shorter by one sample
MIN_PAUSE_SECONDS = 0.3  # shorter silences count as speech
WORD = re.compile(r"[^\W_]+(?:['\u2019.][^\W_]+)*")  # "don't" and "10.5" are single words
# Tensors that only training uses. A published model may lack some of these tensors, or contain unknown ones.
WITHOUT_EFFECT = r"(masked_spec_embed|objective\.weight|\.masked_bias)$|^(quantizer|project_q|project_hid)\."
Input = tuple[Any, ...]  # clips or texts
Value = Any  # dict of numbers or texts, or the reason for a missing value (str)


@dataclass(frozen=True)
class Measure:
    """A function that computes values of inputs, and a description of the models and settings that it uses."""

    name: str  # name in results, and name of the folder of cached values
    keys: Sequence[str]  # keys of a value
    description: dict[str, Any]  # models, hashes and settings
    compute: Callable[[Sequence[Input]], Iterable[Value]]  # returns the values of a batch, in order
    batch_size: int = 16  # maximum number of inputs in a batch


def compute(measure: Measure, inputs: Sequence[Input], folder: Path, ranks: DistributedContext) -> list[Value]:
    """Return the value of each input. Ranks share the work; values cached in ``folder`` are not computed again."""
    keys = [digest([part.key if isinstance(part, Clip) else part for part in one]) for one in inputs]
    log = ProgressLog(folder / measure.name, measure.description)
    values = broadcast_from_rank0(log.load)
    todo = [(key, one) for key, one in dict(zip(keys, inputs, strict=True)).items() if key not in values]
    batches = [dict(todo[start : start + measure.batch_size]) for start in range(0, len(todo), measure.batch_size)]

    def work(batch: Mapping[str, Input]) -> Iterator[tuple[str, Value]]:
        for key, value in zip(batch, measure.compute(list(batch.values())), strict=True):
            numbers = [one for one in value.values() if isinstance(one, float)] if isinstance(value, dict) else []
            yield key, value if all(map(math.isfinite, numbers)) else "not finite"

    unit = f"{measure.name} value"
    values |= map_resumable(batches, work, log, ranks, unit=unit, is_done=lambda key, value: isinstance(value, dict))
    return [values[key] for key in keys]


def words_of(text: str) -> list[str]:
    """Return the words of a transcript, in lower case and without punctuation."""
    return WORD.findall(text.lower())


def auto_bleu(words: Sequence[str]) -> float:
    """Return the fraction of bigrams that occur more than once in a text; 0 for a text without bigrams.

    Auto-BLEU (Lakhotia et al. 2021, arXiv 2102.01192) with n = 2, computed as in `calc_auto_bleu` of slamkit (commit
    f563e56). But slamkit counts punctuation as words, distinguishes upper and lower case, and transcribes the prompt
    together with the continuation. A high value means that a system repeats itself.
    """
    counts = Counter(pairwise(words))
    return sum(count for count in counts.values() if count > 1) / max(counts.total(), 1)


def load_evaluator(cls: Any, name: str, device: torch.device, *, what: str) -> transformers.PreTrainedModel:
    """Load a model in float32; raise a `UserError` if the weights do not fit the class ``cls``."""
    options = {"dtype": torch.float32, "allow_torch_weights": True, "without_effect": WITHOUT_EFFECT}
    return load_pretrained(cls, name, what=what, **options).to(device).eval()


def _describe(name: str) -> dict[str, Any]:
    return {"model": name, "sha256": weights_sha256(name), "transformers": versions()["transformers"]}


def pauses() -> Measure:
    """Return a measure: a clip's length (s) and fraction of silence (pauses of at least `MIN_PAUSE_SECONDS`)."""

    def value(clip: Clip) -> Value:
        waveform = clip.read(RATE_HZ)
        silent = sum(length for _, length in silences(waveform, MIN_PAUSE_SECONDS))
        return {"seconds": waveform.seconds, "silent": min(silent / max(waveform.seconds, 1e-9), 1.0)}

    return Measure("pauses", ("seconds", "silent"), {"pause_seconds": MIN_PAUSE_SECONDS}, partial(starmap, value))


def speaker_encoder(model_name: str, device: torch.device) -> Callable[[Clip], torch.Tensor]:
    """Load a `WavLMForXVector`; return a function from a clip to its x-vector (D,)."""
    model = load_evaluator(transformers.WavLMForXVector, model_name, device, what="speaker model")
    extract = load_pretrained(transformers.AutoFeatureExtractor, model_name, what="speaker model")

    @torch.inference_mode()
    def embed(clip: Clip) -> torch.Tensor:  # without a batch, because padding would change WavLM's group norm
        samples_S = clip.read(RATE_HZ).samples_S.numpy()
        features = extract(samples_S, sampling_rate=RATE_HZ, return_tensors="pt").input_values
        return model(features.to(device)).embeddings[0].cpu()

    return embed


def speaker_similarity(model_name: str, seconds: float, device: torch.device) -> Measure:
    """Return a measure: the cosine similarity of the x-vectors of a prompt and its continuation.

    A second value, ``similarity/N``, uses only the first N = ``seconds`` of the continuation, because the similarity
    depends on the length of a clip. If the continuation is shorter, this value is None.
    """
    embed, fixed = cache(speaker_encoder(model_name, device)), f"{FIXED_LENGTH}{seconds:g}"

    def similarity(prompt: Clip, clip: Clip) -> float:
        return float(torch.cosine_similarity(embed(prompt), embed(clip), dim=0))

    def value(prompt: Clip, continuation: Clip) -> Value:
        start = replace(continuation, end_seconds=continuation.start_seconds + seconds)
        is_long = continuation.read(RATE_HZ).seconds > seconds - ROUNDING_SECONDS
        return {"similarity": similarity(prompt, continuation), fixed: similarity(prompt, start) if is_long else None}

    description = {**_describe(model_name), "similarity_seconds": seconds}
    return Measure("similarity", ("similarity", fixed), description, partial(starmap, value))


def distillmos(device: torch.device) -> Measure:
    """Return a measure: the mean opinion score, from 1 to 5, that DistillMOS predicts (arXiv 2502.05356)."""
    package = import_extra("distillmos", "--quality distillmos", INSTALL)
    with redirect_stdout(None):  # the package prints a path
        model = package.ConvTransformerSQAModel().to(device).eval()

    @torch.inference_mode()
    def value(clip: Clip) -> Value:
        return {"distillmos": float(model(clip.read(RATE_HZ).samples_S[None].to(device)))}

    description = {"model": "distillmos", "version": version("distillmos")}
    return Measure("distillmos", ("distillmos",), description, partial(starmap, value))


def aesthetics(batch_size: int) -> Measure:
    """Return a measure: the four scores of Audiobox-Aesthetics (arXiv 2502.05139), from 1 to 10."""
    remedy = "install audiobox-aesthetics (CC BY 4.0)"
    package = import_extra("audiobox_aesthetics.infer", "--quality aesthetics", remedy)
    predictor = package.initialize_predictor()  # facebook/audiobox-aesthetics, safetensors

    def values(batch: Sequence[Input]) -> Iterable[Value]:
        audio = [{"path": clip.read(RATE_HZ).samples_S[None], "sample_rate": RATE_HZ} for (clip,) in batch]
        return ({f"aesthetics/{axis}": score for axis, score in axes.items()} for axes in predictor.forward(audio))

    keys = [f"aesthetics/{axis}" for axis in ("CE", "CU", "PC", "PQ")]
    description = {"model": "facebook/audiobox-aesthetics", "version": version("audiobox_aesthetics")}
    return Measure("aesthetics", keys, description, values, batch_size)


def transcripts(model_name: str, language: str | None, device: torch.device, batch_size: int) -> Measure:
    """Return a measure: a clip's transcript (greedy decoding). Without ``language``, Whisper detects the language."""
    config = load_pretrained(transformers.AutoConfig, model_name, what="ASR model")
    is_seq2seq = config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    model_class = transformers.AutoModelForSpeechSeq2Seq if is_seq2seq else transformers.AutoModelForCTC
    model = load_evaluator(model_class, model_name, device, what="ASR model")
    languages = getattr(getattr(model, "generation_config", None), "lang_to_id", None) or {}
    if is_seq2seq and language is not None and f"<|{language}|>" not in languages:
        raise UserError(f"'{model_name}' does not support --language '{language}'; choose another, or remove this flag")
    # Without timestamps, Whisper transcribes only the first 30 s.
    options: dict[str, Any] = {"return_timestamps": True} if config.model_type == "whisper" else {}
    if is_seq2seq:
        chosen = {} if language is None else {"language": language, "task": "transcribe"}
        options["generate_kwargs"] = {"num_beams": 1, "do_sample": False, **chosen}
    transcribe = transformers.pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=load_pretrained(transformers.AutoTokenizer, model_name, what="ASR model"),
        feature_extractor=load_pretrained(transformers.AutoFeatureExtractor, model_name, what="ASR model"),
        device=device,
        batch_size=batch_size if is_seq2seq else 1,  # CTC models would transcribe the padding
    )

    def values(batch: Sequence[Input]) -> Iterable[Value]:
        audio = ({"raw": clip.read(RATE_HZ).samples_S.numpy(), "sampling_rate": RATE_HZ} for (clip,) in batch)
        return ({"text": transcript["text"].strip()} for transcript in transcribe(audio, **options))

    description = {**_describe(model_name), "language": language, "num_beams": 1}
    return Measure("transcripts", ("text",), description, values, batch_size)


def perplexity(model_name: str, device: torch.device) -> Measure:
    """Return a measure: two mean losses, in nats per token, of a language model on transcripts.

    ``log_perplexity`` is the loss on the continuation given the prompt. ``log_generative_perplexity`` is the loss on
    prompt and continuation together, as in `asr_perplexity` of slamkit (commit 1f85d5b).
    """
    model = load_evaluator(transformers.AutoModelForCausalLM, model_name, device, what="language model")
    tokenizer = load_pretrained(transformers.AutoTokenizer, model_name, what="language model")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError(f"'{model_name}' has neither a BOS nor an EOS token; choose a --text_model with one of them")

    @torch.inference_mode()
    def value(prompt: str, continuation: str) -> Value:
        encoded = tokenizer([prompt, f" {continuation}"], add_special_tokens=False, split_special_tokens=True)
        given, new = [first, *encoded.input_ids[0]], encoded.input_ids[1]
        logits_LV = model(input_ids=torch.tensor([given + new], device=device)).logits[0].float().cpu()
        loss = torch.nn.functional.cross_entropy(logits_LV[len(given) - 1 : -1], torch.tensor(new))
        loss_of_all = torch.nn.functional.cross_entropy(logits_LV[:-1], torch.tensor(given[1:] + new))
        return {"log_perplexity": float(loss), "log_generative_perplexity": float(loss_of_all)}

    keys = ("log_perplexity", "log_generative_perplexity")
    return Measure("perplexity", keys, _describe(model_name), partial(starmap, value))
