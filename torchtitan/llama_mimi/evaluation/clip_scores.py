"""Scores of all clips of a benchmark: in batches of like length, shared by ranks, and kept when a run is killed."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from llama_mimi.common.batching import batches_of_like_size
from llama_mimi.common.errors import UserError
from llama_mimi.common.ranks import Ranks, from_first, gather
from llama_mimi.common.resume import ProgressLog
from llama_mimi.evaluation.clip_codes import CachedCodes
from llama_mimi.evaluation.likelihood import batch_scores
from llama_mimi.evaluation.scoring import Scoring
from llama_mimi.generation.speech_model import SpeechModel


def score_clips(
    model: SpeechModel,
    codes: Mapping[str, CachedCodes],
    scoring: Scoring,
    batch_tokens: int,
    log: ProgressLog,
    ranks: Ranks,
) -> dict[str, float]:
    """Scores by clip. Clips of the same codes have the very same score, so that a tie is one.

    Args:
        model: that scores.
        codes: of the clips, by what they are called.
        scoring: which tokens enter a score, and how.
        batch_tokens: the most a batch holds with its padding; one clip always fits.
        log: of what was scored before.
        ranks: that share the batches.

    Raises:
        UserError: the scoring does not fit the model, a score is not finite, or the log cannot be written.
    """
    hashes = {name: _content_hash(clip, scoring) for name, clip in codes.items()}
    unique = {hashes[name]: clip for name, clip in codes.items()}
    names = sorted(unique)  # batches depend on the codes alone, so that they are the same after a kill
    plan = batches_of_like_size([unique[name].codes_TQ.size for name in names], batch_tokens)
    batches = [[names[index] for index in batch] for batch in reversed(plan)]  # too long a batch fails at once
    done = from_first(log.load)
    todo = [batch for batch in batches if not done.keys() >= set(batch)]
    if ranks.rank == 0 and len(todo) < len(batches):
        print(f"{len(batches) - len(todo):,} of {len(batches):,} batches were scored before", flush=True)
    mine = todo[ranks.rank :: ranks.world_size]
    new: dict[str, float] = {}
    with tqdm(total=sum(map(len, mine)), unit="clip", desc="scores", disable=ranks.rank > 0) as progress:
        for batch in mine:
            scores = dict(zip(batch, _score_batch(model, [unique[name] for name in batch], scoring), strict=True))
            log.add(scores)
            new |= scores
            progress.update(len(batch))
    for others in gather(new):
        done |= others
    return {name: done[content] for name, content in hashes.items()}


def _score_batch(model: SpeechModel, clips: Sequence[CachedCodes], scoring: Scoring) -> list[float]:
    codes = [(torch.from_numpy(clip.codes_TQ.astype(np.int64)), clip.is_cut) for clip in clips]
    scores = batch_scores(model, codes, scoring)
    if not all(map(math.isfinite, scores)):
        dtype = str(model.decoder.dtype).removeprefix("torch.")
        raise UserError(f"a score is not finite: the model overflows in {dtype}; score it in another --dtype")
    return scores


def _content_hash(clip: CachedCodes, scoring: Scoring) -> str:
    """SHA-256 of everything in a clip that its score depends on."""
    has_end = scoring.as_released or not clip.is_cut
    content = np.ascontiguousarray(clip.codes_TQ, dtype=np.uint16).tobytes() + bytes([has_end])
    return hashlib.sha256(content).hexdigest()
