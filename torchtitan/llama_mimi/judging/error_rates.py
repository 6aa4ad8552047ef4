"""Word and character error rates of transcripts."""

from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from statistics import fmean
from typing import Any

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from llama_mimi.judging.prompts import PromptSet


def add_error_rates(
    records: Sequence[dict[str, Any]], prompts: PromptSet, language: str | None, task: str
) -> dict[str, Any]:
    """Compare the transcript (key "text") of each record with its recording's text; return a description.

    ``<task>/wer`` is the number of wrong words (substituted, deleted or inserted) in percent of the *mean* number of
    words of a text. The mean over all recordings is the usual word error rate. All systems have the same denominator.
    `crossed_interval` treats the denominator as a constant. ``<task>/cer`` counts characters, including spaces.
    ``<task>/wer_shuffled`` compares the transcript with the text of another recording: the next recording in the order
    of the hashes of names. ``<task>/wer_gain`` is ``wer_shuffled`` minus ``wer``. A record without a transcript counts
    as an empty transcript.

    All texts are normalised by Whisper's code in transformers. The normaliser for English has a table of British and
    American spellings, which transformers does not contain, so spellings are not unified.
    """
    is_english = language in (None, "en")
    normalise = EnglishTextNormalizer({}) if is_english else BasicTextNormalizer()
    raw = {prompt.name: prompt.text for prompt in prompts.prompts}
    # `BasicTextNormalizer` replaces final punctuation by a space.
    texts = {name: normalise(text).strip() for name, text in raw.items()}
    order = sorted(texts, key=lambda name: sha256(name.encode()).digest())
    others = dict(zip(order, order[1:] + order[:1], strict=True))
    mean_words = max(fmean(len(text.split()) for text in texts.values()), 1)
    mean_characters = max(fmean(map(len, texts.values())), 1)
    for record in records:
        text, found = texts[record["prompt"]], normalise(record.get("text", "")).strip()
        words, characters = jiwer.process_words(text, found), jiwer.process_characters(text, found)
        shuffled = jiwer.process_words(texts[others[record["prompt"]]], found)
        wer, wer_shuffled = 100 * _errors(words) / mean_words, 100 * _errors(shuffled) / mean_words
        record["reference"] = raw[record["prompt"]]
        record["word_errors"] = {"words": len(text.split()), "errors": _errors(words)}
        record |= {f"{task}/wer": wer, f"{task}/cer": 100 * _errors(characters) / mean_characters}
        record |= {f"{task}/wer_shuffled": wer_shuffled, f"{task}/wer_gain": wer_shuffled - wer}
    return {"normaliser": "English" if is_english else "basic", "jiwer": version("jiwer")}


def _errors(output: jiwer.WordOutput | jiwer.CharacterOutput) -> int:
    return output.substitutions + output.deletions + output.insertions
