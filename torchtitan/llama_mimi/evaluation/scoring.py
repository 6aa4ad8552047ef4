"""Scores of clips. A score is the mean log-likelihood of the scored tokens; a likelier clip has a higher score."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from llama_mimi.common.batching import bucket_by_length
from llama_mimi.common.distributed import DistributedContext
from llama_mimi.common.errors import UserError
from llama_mimi.common.resume import ProgressLog, map_resumable
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.evaluation.options import Scoring
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.tokenizer import SpeechTokenizer


def score_clips(
    model: SpeechModel,
    codes: Mapping[str, CodedClip],
    scoring: Scoring,
    batch_tokens: int,
    log: ProgressLog,
    ranks: DistributedContext,
) -> dict[str, float]:
    """Return the score of each clip. Clips with equal codes have equal scores; scores in ``log`` are reused.

    ``batch_tokens``: maximum number of tokens in a batch, including padding. Scores that are not finite raise an error.
    """

    def content_hash(clip: CodedClip) -> str:
        has_end = scoring.as_released or not clip.is_cut
        return hashlib.sha256(clip.codes_TQ.astype(np.uint16).tobytes() + bytes([has_end])).hexdigest()

    keys = {name: content_hash(clip) for name, clip in codes.items()}
    unique = {keys[name]: clip for name, clip in codes.items()}
    order = sorted(unique)  # batches depend only on the codes, so a resumed run has the same batches
    plan = bucket_by_length([unique[key].codes_TQ.size for key in order], batch_tokens)
    plan.reverse()  # if memory is too small, the first batch fails
    batches = [{order[i]: unique[order[i]] for i in batch} for batch in plan]

    def work(batch: Mapping[str, CodedClip]) -> Iterator[tuple[str, float]]:
        clips = [(torch.from_numpy(clip.codes_TQ.astype(np.int64)), clip.is_cut) for clip in batch.values()]
        scores = batch_scores(model, clips, scoring)
        if not all(map(math.isfinite, scores)):
            problem = f"a score is not finite: the model overflows in {model.decoder.dtype}"
            raise UserError(f"{problem}; set --dtype float32, or use another checkpoint")
        yield from zip(batch, scores, strict=True)

    done = map_resumable(batches, work, log, ranks, unit="clip")
    return {name: done[key] for name, key in keys.items()}


def batch_scores(model: SpeechModel, clips: Sequence[tuple[torch.Tensor, bool]], scoring: Scoring) -> list[float]:
    """Return the scores of a batch of clips (codes_TQ, is_cut), in nats per token."""
    sequences = [scored_sequence(model.tokenizer, codes_TQ, is_cut, scoring) for codes_TQ, is_cut in clips]
    ids, is_scored = zip(*sequences, strict=True)
    log_probs_N = model.log_likelihoods(ids, is_scored, is_admissible_only=scoring.likelihood == "grammar")
    counts = [int(is_scored_L.sum()) for is_scored_L in is_scored]
    return [float(log_probs_n.mean()) for log_probs_n in log_probs_N.split(counts)]


def scored_sequence(
    tokenizer: SpeechTokenizer, codes_TQ: torch.Tensor, is_cut: bool, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (L,) of a clip, and a mask (L,) of the scored positions."""
    vocabulary, Q = tokenizer.vocabulary, tokenizer.vocabulary.num_quantizers
    if scoring.as_released:
        ids_L = tokenizer.encode(codes_TQ, is_cut=False)[0 if tokenizer.adds_bos else 1 :]
        is_scored_L = torch.zeros_like(ids_L, dtype=torch.bool)
        is_scored_L[slice(1, None) if scoring.levels is None else slice(2, None, Q)] = True
        return ids_L, is_scored_L
    ids_L = tokenizer.encode(codes_TQ, is_cut=is_cut)
    levels = torch.tensor(range(Q) if scoring.levels is None else scoring.levels)
    is_scored_L = vocabulary.is_audio(ids_L) & torch.isin(vocabulary.level(ids_L), levels)
    return ids_L, is_scored_L | (ids_L == vocabulary.audio_end_id)
