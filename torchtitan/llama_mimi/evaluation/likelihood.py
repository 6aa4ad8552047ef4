"""How likely clips are under a model: the one function that all benchmarks score with."""

from collections.abc import Sequence

import torch

from llama_mimi.evaluation.scoring import Scoring, check_model, join, scored_sequence
from llama_mimi.generation.speech_model import SpeechModel


def batch_scores(model: SpeechModel, clips: Sequence[tuple[torch.Tensor, bool]], scoring: Scoring) -> list[float]:
    """Scores of clips that share one batch; higher is likelier.

    Args:
        model: the decoder and its tokens.
        clips: for each clip its codes_TQ and whether it was cut.
        scoring: which tokens enter a score, and how.

    Raises:
        UserError: the scoring does not fit the model.
    """
    check_model(scoring, model.sequences.vocabulary.num_quantizers, has_release=model.has_release)
    sequences = [
        scored_sequence(model.sequences, codes_TQ, is_cut=is_cut, scoring=scoring) for codes_TQ, is_cut in clips
    ]
    ids, is_scored = zip(*sequences, strict=True)
    log_probs_N = model.log_likelihoods(ids, is_scored, is_admissible_only=scoring.likelihood == "grammar")
    counts = [int(is_scored_L.sum()) for _, is_scored_L in sequences]
    return [
        join(log_probs_n, len(codes_TQ), model.codec.frame_rate_hz, scoring)
        for log_probs_n, (codes_TQ, _) in zip(log_probs_N.split(counts), clips, strict=True)
    ]
