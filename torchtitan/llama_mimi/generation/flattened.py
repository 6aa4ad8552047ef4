"""The flattened arm at work: an ordinary Llama over tokens, whose sampling can only produce whole, ordered frames."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Sampling, SpeechModel, log_likelihoods
from llama_mimi.tokens.units import UnitVocabulary


class FrameGrammar(LogitsProcessor):
    """Allows at each position the codes of its level, and ``</audio>`` between frames only.

    Args:
        vocabulary: of the model.
        num_head_tokens: tokens up to and including ``<audio>``.
        min_frames: of prompt and continuation, before which the speech cannot end.
    """

    def __init__(self, vocabulary: UnitVocabulary, num_head_tokens: int, min_frames: int = 0) -> None:
        self._vocabulary, self._num_head_tokens, self._min_frames = vocabulary, num_head_tokens, min_frames

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        vocabulary = self._vocabulary
        frame, level = divmod(input_ids.shape[1] - self._num_head_tokens, vocabulary.num_quantizers)
        units = slice(vocabulary.base + level, vocabulary.audio_start_id, vocabulary.num_quantizers)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, units] = scores[:, units]
        if level == 0 and frame >= self._min_frames:
            allowed[:, vocabulary.audio_end_id] = scores[:, vocabulary.audio_end_id]
        return allowed


class FlattenedModel(SpeechModel):
    has_release = True

    def num_positions(self, num_head_tokens: int, num_frames: int) -> int:
        return num_head_tokens + num_frames * self.sequences.vocabulary.num_quantizers

    @torch.inference_mode()
    def log_likelihoods(self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `SpeechModel.log_likelihoods`. The decoder is causal, so padding on the right changes nothing."""
        ids_BL = pad_sequence(list(ids), batch_first=True).to(self.device)
        is_scored_BL = pad_sequence(list(is_scored), batch_first=True).to(self.device)
        hidden_BLD = self.decoder.model(ids_BL[:, :-1], use_cache=False).last_hidden_state
        # Only what is scored goes through the output layer: the logits of a whole batch would not fit.
        hidden_ND = hidden_BLD[is_scored_BL[:, 1:]]
        targets_N = ids_BL[:, 1:][is_scored_BL[:, 1:]]
        chunks = zip(hidden_ND.split(POSITIONS_AT_ONCE), targets_N.split(POSITIONS_AT_ONCE), strict=True)
        return torch.cat([log_likelihoods(self.decoder.lm_head(some_ND), some_N) for some_ND, some_N in chunks]).cpu()

    @torch.inference_mode()
    def generate(self, prompt_TQ: torch.Tensor, sampling: Sampling) -> list[torch.Tensor]:
        """See `SpeechModel.generate`."""
        vocabulary = self.sequences.vocabulary
        prompt_L = self.sequences.sequence(prompt_TQ, is_cut=True)  # no </audio>: the speech goes on
        num_head_tokens = len(prompt_L) - prompt_TQ.numel()
        drawing: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawing = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        config = GenerationConfig(
            max_new_tokens=sampling.max_frames * vocabulary.num_quantizers,
            bos_token_id=self.sequences.tokenizer.bos_token_id,
            eos_token_id=vocabulary.audio_end_id,
            pad_token_id=vocabulary.audio_end_id,
            **drawing,
        )
        prompt_BL = prompt_L[None].repeat(sampling.num_samples, 1).to(self.device)
        grammar = FrameGrammar(vocabulary, num_head_tokens, len(prompt_TQ) + sampling.min_frames)
        ids_BL = self.decoder.generate(
            prompt_BL,
            attention_mask=torch.ones_like(prompt_BL),
            generation_config=config,
            logits_processor=LogitsProcessorList([grammar]),
        )
        samples = []
        for ids_L in ids_BL[:, num_head_tokens:].cpu():
            units_L = ids_L[ids_L != vocabulary.audio_end_id]
            samples.append(vocabulary.codes_from_ids(units_L))
        return samples
