"""Scores of clips. A score is the mean log-likelihood of the scored tokens; a likelier clip has a higher score.

With the preset "official", each clip has a score for the primary rule, which decides the accuracy of the benchmark, and
a score for each further rule. `eval/README.md` defines the rules. "after_prompt" and "normalised" follow arXiv
2601.06329. "text_prompt" and "text_ending" follow the cross-modal StoryCloze of slp-rl/slamkit.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llama_mimi.common.batching import bucket_by_length
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.resume import ProgressLog, map_resumable
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.evaluation.benchmarks import Clip
from llama_mimi.evaluation.options import PRIMARY, PROMPT_RULES, Scoring
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.tokenizer import SpeechTokenizer

TextSequences = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by rule: ids (L,), and mask (L,) of the scored tokens


def shared_prompt(first_TQ: np.ndarray, second_TQ: np.ndarray) -> int:
    """Return the number of frames in the longest common prefix of two clips' codes, in whole frames.

    At least one frame of each clip follows the prompt, even if one clip is a prefix of the other.
    """
    limit = min(len(first_TQ), len(second_TQ)) - 1
    differs_T = (first_TQ[:limit] != second_TQ[:limit]).any(axis=1)
    return int(differs_T.argmax()) if differs_T.any() else limit


def score_clips(
    model: SpeechModel,
    codes: Mapping[str, CodedClip],
    clips: Sequence[tuple[str, int | None]],
    scoring: Scoring,
    batch_tokens: int,
    log: ProgressLog,
    ranks: DistributedContext,
) -> list[dict[str, float]]:
    """Return the scores of each clip by rule: `Scoring.by_levels`, and `PROMPT_RULES` for a clip with a prompt.

    Clips with equal codes and equal prompts have equal scores. Scores in ``log`` are reused. Scores that are not finite
    raise an error.

    Args:
        clips: name in ``codes`` and number of prompt frames of each clip. Without a shared prompt, the number is 0. In
            benchmarks without prompts, the number is None.
        batch_tokens: maximum number of tokens in a batch, including padding.
    """

    def key(clip: CodedClip, prompt: int) -> str:
        has_end = scoring.as_released or not clip.is_cut
        content = hashlib.sha256(clip.codes_TQ.astype(np.uint16).tobytes() + bytes([has_end])).hexdigest()
        return f"{content} after {prompt}" if prompt else content

    def rest(clip: CodedClip, prompt: int) -> CodedClip:
        return replace(clip, codes_TQ=clip.codes_TQ[prompt:])

    wholes = {key(codes[name], prompt or 0): (codes[name], prompt or 0) for name, prompt in clips}
    rests = [(rest(clip, prompt), 0) for clip, prompt in wholes.values() if prompt]
    batches = []
    for unique in (wholes, {key(*item): item for item in rests if key(*item) not in wholes}):
        batches += _batches(unique, lambda item: item[0].codes_TQ.size, batch_tokens)

    def work(batch: Mapping[str, tuple[CodedClip, int]]) -> Iterator[tuple[str, dict[str, float]]]:
        some = [(torch.from_numpy(clip.codes_TQ.astype(np.int64)), clip.is_cut) for clip, _ in batch.values()]
        scores = batch_scores(model, some, scoring, [prompt for _, prompt in batch.values()])
        model.require_finite(torch.tensor([score for of_clip in scores for score in of_clip.values()]).isfinite().all())
        yield from zip(batch, scores, strict=True)

    done = map_resumable(batches, work, log, ranks, unit="clip")
    found = []
    for name, prompt in clips:
        scores = done[key(codes[name], prompt or 0)]
        if prompt is not None:
            after = scores.get("after_prompt", scores[PRIMARY])
            without_prompt = done[key(rest(codes[name], prompt), 0)][PRIMARY] if prompt else 0.0
            scores = scores | dict(zip(PROMPT_RULES, (after, after - without_prompt), strict=True))
        found.append(scores)
    return found


def _batches(items: Mapping[str, Any], length: Callable[[Any], int], batch_tokens: int) -> list[dict[str, Any]]:
    """Divide items into batches. The batches do not depend on the order of ``items``, so a restart repeats them."""
    order = sorted(items)
    plan = bucket_by_length([length(items[name]) for name in order], batch_tokens)
    return [{order[i]: items[order[i]] for i in batch} for batch in reversed(plan)]  # first the largest memory


def score_texts(
    model: SpeechModel, texts: Sequence[TextSequences], batch_tokens: int, log: ProgressLog, ranks: DistributedContext
) -> list[dict[str, float]]:
    """Return the scores of each clip's `text_sequences` by rule, in nats per token; for arguments see `score_clips`."""

    def key(ids_L: torch.Tensor, is_scored_L: torch.Tensor) -> str:
        return hashlib.sha256(ids_L.numpy().tobytes() + is_scored_L.numpy().tobytes()).hexdigest()

    def work(batch: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[str, float]]:
        ids, masks = zip(*batch.values(), strict=True)
        values = model.log_likelihoods(ids, masks)
        scores = [float(values_L[mask_L].mean()) for values_L, mask_L in zip(values, masks, strict=True)]
        model.require_finite(torch.tensor(scores).isfinite().all())
        yield from zip(batch, scores, strict=True)

    unique = {key(*sequence): sequence for of_clip in texts for sequence in of_clip.values()}
    batches = _batches(unique, lambda sequence: len(sequence[0]), batch_tokens)
    done = map_resumable(batches, work, log, ranks, unit="text")
    return [{rule: done[key(*sequence)] for rule, sequence in of_clip.items()} for of_clip in texts]


def text_sequences(
    model: SpeechModel, clip: Clip, coded: CodedClip, scoring: Scoring, rules: Sequence[str]
) -> TextSequences:
    """Return the sequences of a clip by rule, as far as the transcript and the time of the ending are known.

    The codes of an ending are the last codes of the whole clip, so these codes also depend on the spoken prompt.
    """
    if not clip.text:
        return {}
    tokenizer, frames = model.tokenizer, clip.prompt_seconds * model.codec.frame_rate_hz
    found = {}
    if "text" in rules:
        eos = torch.tensor([tokenizer.text_tokenizer.eos_token_id])
        ids_L = torch.cat([tokenizer.ids(f"{clip.prompt} {clip.text}".strip()), eos])
        found["text"] = ids_L, torch.arange(len(ids_L)) > 0
    if "text_prompt" in rules and 1 <= frames < len(coded.codes_TQ):  # False if the ending was cut
        codes_TQ, frames = torch.from_numpy(coded.codes_TQ.astype(np.int64)), int(frames)
        ids_L = tokenizer.ids(clip.prompt, "\n", codes_TQ[frames:])[: -1 if coded.is_cut else None]
        found["text_prompt"] = ids_L, scored_tokens(tokenizer, ids_L, scoring)
        ids_L = tokenizer.ids(codes_TQ[:frames], "\n", clip.text, "\n")
        found["text_ending"] = ids_L, torch.arange(len(ids_L)) >= len(tokenizer.ids(codes_TQ[:frames], "\n"))
    return found


def batch_scores(
    model: SpeechModel,
    clips: Sequence[tuple[torch.Tensor, bool]],
    scoring: Scoring,
    prompts: Sequence[int],
) -> list[dict[str, float]]:
    """Return the scores of a batch of clips (codes_TQ, is_cut) by rule, in nats per token.

    ``prompts``: number of prompt frames of each clip. Only clips with a prompt have a score "after_prompt".
    """
    tokenizer, Q = model.tokenizer, model.tokenizer.vocabulary.num_quantizers
    ids = [clip_ids(tokenizer, codes_TQ, is_cut, scoring) for codes_TQ, is_cut in clips]
    masks = [{name: scored_tokens(tokenizer, ids_L, rule) for name, rule in scoring.by_levels.items()} for ids_L in ids]
    primary = [of_clip[PRIMARY] for of_clip in masks]
    others = [torch.stack([*of_clip.values()]).any(dim=0) & ~of_clip[PRIMARY] for of_clip in masks]
    values = model.log_likelihoods(ids, primary, others, is_admissible_only=scoring.likelihood == "grammar")
    for of_clip, prompt in zip(masks, prompts, strict=True):
        if prompt:
            after = len(tokenizer.prefix_ids()) + prompt * Q
            of_clip["after_prompt"] = of_clip[PRIMARY].index_fill(0, torch.arange(after), False)
    return [
        {name: float(values_L[mask_L].mean()) for name, mask_L in of_clip.items()}
        for values_L, of_clip in zip(values, masks, strict=True)
    ]


def clip_ids(tokenizer: SpeechTokenizer, codes_TQ: torch.Tensor, is_cut: bool, scoring: Scoring) -> torch.Tensor:
    """Return the ids (L,) of a clip."""
    if scoring.as_released:
        return tokenizer.encode(codes_TQ, is_cut=False)[0 if tokenizer.adds_bos else 1 :]
    return tokenizer.encode(codes_TQ, is_cut=is_cut)


def scored_tokens(tokenizer: SpeechTokenizer, ids_L: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Return a mask (L,) of the tokens of a clip that a rule scores."""
    vocabulary, Q = tokenizer.vocabulary, tokenizer.vocabulary.num_quantizers
    if scoring.as_released:
        is_scored_L = torch.zeros_like(ids_L, dtype=torch.bool)
        is_scored_L[slice(1, None) if scoring.levels is None else slice(2, None, Q)] = True
        return is_scored_L
    levels = torch.tensor(range(Q) if scoring.levels is None else scoring.levels)
    is_scored_L = vocabulary.is_audio(ids_L) & torch.isin(vocabulary.level(ids_L), levels)
    return is_scored_L | (ids_L == vocabulary.audio_end_id)
