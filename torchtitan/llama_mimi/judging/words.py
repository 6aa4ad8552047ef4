"""Measures of what continuations say: transcripts, and how likely a language model finds them."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.judging.measures import in_batches
from llama_mimi.judging.models import describe_listener, load_listener
from llama_mimi.judging.sound import RATE_HZ
from llama_mimi.judging.systems import Clip

# Letters and digits, also around an apostrophe or a point: don't and 10.5 are one word each.
_WORD = re.compile(r"[^\W_]+(?:['\u2019.][^\W_]+)*")


class TextPair(NamedTuple):
    """What a prompt says, and what its continuation does."""

    prompt: str
    continuation: str

    @property
    def key(self) -> str:
        """Hash of both."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


def words_of(text: str) -> list[str]:
    """Words of a transcript in a script that parts them, without marks and capitals."""
    return _WORD.findall(text.lower())


class Transcripts:
    """What a recogniser hears in a clip.

    Args:
        model_name: hub id or folder of what the `transformers` pipeline for speech recognition takes.
        language: spoken, for models that know several, such as Whisper; None lets them guess.
        batch_size: clips at once, where the model can hear several.
    """

    name = "transcripts"

    def __init__(self, model_name: str, language: str | None, device: torch.device, batch_size: int) -> None:
        config = load_pretrained(AutoConfig, model_name, what="recogniser")
        is_whisper = config.model_type == "whisper"
        is_seq2seq = config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        model_class = AutoModelForSpeechSeq2Seq if is_seq2seq else AutoModelForCTC
        model = load_listener(model_class, model_name, device, what="recogniser")
        languages = getattr(getattr(model, "generation_config", None), "lang_to_id", None) or {}
        if language is not None and f"<|{language}|>" not in languages:
            raise UserError(
                f"--language is '{language}', which '{model_name}' cannot be told; leave it out, or give a code of its "
                "languages, such as en"
            )
        # Greedy; Whisper hears more than 30 s with timestamps alone.
        self._options: dict[str, Any] = {"generate_kwargs": {"num_beams": 1, "do_sample": False}} if is_seq2seq else {}
        if is_whisper:
            self._options["return_timestamps"] = True
        if language is not None:
            self._options["generate_kwargs"] |= {"language": language, "task": "transcribe"}
        self._description = {**describe_listener(model_name), "language": language, "num_beams": 1}
        self._pipeline = pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=load_pretrained(AutoTokenizer, model_name, what="recogniser"),
            feature_extractor=load_pretrained(AutoFeatureExtractor, model_name, what="recogniser"),
            device=device,
            # Of models with CTC the pipeline reads what they hear in the padding of a batch, too.
            batch_size=batch_size if is_seq2seq else 1,
        )

    def describe(self) -> dict[str, Any]:
        return self._description

    def values(self, inputs: Sequence[Clip]) -> Iterator[tuple[int, str]]:
        audio = ({"raw": clip.read(RATE_HZ).samples_S.numpy(), "sampling_rate": RATE_HZ} for clip in inputs)
        for place, heard in enumerate(self._pipeline(audio, **self._options)):
            yield place, heard["text"].strip()


class Perplexity:
    """Mean negative log-likelihood, in nats per token, of a continuation's text given the prompt's.

    Args:
        model_name: hub id or folder of a causal language model.
        batch_size: texts at once.
    """

    name = "log_perplexity"

    def __init__(self, model_name: str, device: torch.device, batch_size: int) -> None:
        self._model_name, self._device, self._batch_size = model_name, device, batch_size
        self._model = load_listener(AutoModelForCausalLM, model_name, device, what="language model")
        self._description = describe_listener(model_name)
        self._tokenizer = load_pretrained(AutoTokenizer, model_name, what="language model")

    def describe(self) -> dict[str, Any]:
        return self._description

    @torch.inference_mode()
    def values(self, inputs: Sequence[TextPair]) -> Iterator[tuple[int, float]]:
        for start, pairs in in_batches(inputs, self._batch_size):
            tokenized = [self._tokens(pair) for pair in pairs]
            ids_BL = pad_sequence([ids_L for ids_L, _ in tokenized], batch_first=True).to(self._device)
            is_there_BL = torch.zeros_like(ids_BL)
            for row, (ids_L, _) in enumerate(tokenized):
                is_there_BL[row, : len(ids_L)] = 1
            logits_BLV = self._model(input_ids=ids_BL, attention_mask=is_there_BL).logits
            for row, (ids_L, given) in enumerate(tokenized):
                log_probs_NV = logits_BLV[row, given - 1 : len(ids_L) - 1].float().log_softmax(dim=-1)
                of_token_N = log_probs_NV.gather(1, ids_L[given:, None].to(self._device))
                yield start + row, -float(of_token_N.mean())

    def _tokens(self, pair: TextPair) -> tuple[torch.Tensor, int]:
        """Both texts as ids (L,), and how many of them are given; the first is one that begins a text."""
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        prompt = self._tokenizer(pair.prompt, **plain).input_ids
        continuation = self._tokenizer(f" {pair.continuation}", **plain).input_ids
        first = self._tokenizer.bos_token_id
        first = self._tokenizer.eos_token_id if first is None else first
        given = ([] if first is None else [first]) + prompt
        if not given:
            raise UserError(
                f"'{self._model_name}' has no token that begins a text, and a prompt is empty; name another"
            )
        return torch.tensor(given + continuation), len(given)
