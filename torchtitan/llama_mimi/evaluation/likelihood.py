"""How likely clips are under a model: the one function that all benchmarks score with."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from llama_mimi.evaluation.scoring import Scoring, join, scored_sequence
from llama_mimi.generation.speech_model import SpeechModel

# Positions whose logits are made at once: 1.1 GB in float32 at the 136,450 entries of Llama 3 with 4 levels.
POSITIONS_AT_ONCE = 2048


@torch.inference_mode()
def batch_scores(model: SpeechModel, clips: Sequence[tuple[torch.Tensor, bool]], scoring: Scoring) -> list[float]:
    """Scores of clips that share one batch; higher is likelier.

    Args:
        model: the decoder and its tokens.
        clips: for each clip its codes_TQ and whether it was cut.
        scoring: which tokens enter a score, and how.

    The decoder is causal, so padding on the right changes nothing.

    Raises:
        UserError: the scoring names a level that the model does not have.
    """
    sequences = [
        scored_sequence(model.sequences, codes_TQ, is_cut=is_cut, scoring=scoring) for codes_TQ, is_cut in clips
    ]
    ids_BL = pad_sequence([ids_L for ids_L, _ in sequences], batch_first=True).to(model.device)
    is_scored_BL = pad_sequence([is_scored_L for _, is_scored_L in sequences], batch_first=True).to(model.device)
    hidden_BLD = model.decoder.model(ids_BL[:, :-1], use_cache=False).last_hidden_state
    # Only what is scored goes through the output layer: the logits of a whole batch would not fit.
    hidden_ND = hidden_BLD[is_scored_BL[:, 1:]]
    targets_N = ids_BL[:, 1:][is_scored_BL[:, 1:]]
    log_probs_N = torch.cat(
        [
            log_likelihoods(model.decoder.lm_head(some_ND), some_N)
            for some_ND, some_N in zip(
                hidden_ND.split(POSITIONS_AT_ONCE), targets_N.split(POSITIONS_AT_ONCE), strict=True
            )
        ]
    ).cpu()
    counts = [int(is_scored_L.sum()) for _, is_scored_L in sequences]
    return [
        join(log_probs_n, len(codes_TQ), model.codec.frame_rate_hz, scoring)
        for log_probs_n, (codes_TQ, _) in zip(log_probs_N.split(counts), clips, strict=True)
    ]


def log_likelihoods(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods (N,) in nats, float64, of targets under logits of any precision."""
    logits_NV = logits_NV.float()
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    return target_N.double() - logits_NV.logsumexp(dim=1).double()
