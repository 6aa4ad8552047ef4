"""How likely a clip is under a model: the one function all benchmarks score with."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from llama_mimi.sequences import SequenceBuilder
from llama_mimi.speech_model import SpeechModel

# "all": every token after BOS, that is <audio>, units of all levels, and </audio>.
# "semantic": the level-0 units and </audio>, as the original release scores sLM21 and StoryCloze.
ScoredTokens = Literal["all", "semantic"]


def is_scored(sequences: SequenceBuilder, ids: torch.Tensor, scored: ScoredTokens) -> torch.Tensor:
    """True for the tokens of ``ids`` (predicted ones, without BOS) that enter a score."""
    if scored == "all":
        return torch.ones_like(ids, dtype=torch.bool)
    vocabulary = sequences.vocabulary
    is_semantic = vocabulary.is_unit(ids) & (vocabulary.level(ids) == 0)
    return is_semantic | (ids == vocabulary.audio_end_id)


@torch.inference_mode()
def mean_log_likelihoods(
    model: SpeechModel, clips: Sequence[tuple[torch.Tensor, bool]], scored: ScoredTokens
) -> list[float]:
    """Mean log-likelihood in nats per scored token of each clip; higher is likelier.

    Args:
        clips: for each clip its codes_TQ and whether it was cut (a cut clip has no ``</audio>``).
        scored: which tokens enter the mean.

    The clips share one batch; the decoder is causal, so padding on the right changes nothing.
    """
    sequences = [model.sequences.sequence(codes_TQ, is_cut=is_cut) for codes_TQ, is_cut in clips]
    inputs_BL = pad_sequence([ids_L[:-1] for ids_L in sequences], batch_first=True).to(model.device)
    hidden_BLD = model.decoder.model(inputs_BL).last_hidden_state
    scores = []
    for ids_L, hidden_LD in zip(sequences, hidden_BLD, strict=True):
        targets_N = ids_L[1:]
        mask_N = is_scored(model.sequences, targets_N, scored)
        # Logits of the scored positions of one clip only: a batch of full logits would not fit.
        logits_NV = model.decoder.lm_head(hidden_LD[: len(targets_N)][mask_N.to(model.device)]).float()
        targets_N1 = targets_N[mask_N].to(model.device)[:, None]
        log_probs_N = logits_NV.log_softmax(dim=-1).gather(1, targets_N1)
        scores.append(float(log_probs_N.double().mean()))
    return scores
