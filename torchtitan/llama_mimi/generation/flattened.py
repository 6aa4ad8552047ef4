"""The flattened architecture: a Llama over audio tokens. At each position, only tokens of one level can be drawn."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llama_mimi.generation.kv_cache import BatchedKVCache, product
from llama_mimi.generation.speech_model import Draw, SpeechModel, log_likelihoods


class FlattenedModel(SpeechModel):
    """A checkpoint of `LlamaForCausalLM`; see `SpeechModel`."""

    @property
    def backbone(self) -> PreTrainedModel:
        return self.decoder.model

    @property
    def output_VD(self) -> torch.Tensor:
        return self.decoder.lm_head.weight

    def embed(self, ids_L: torch.Tensor) -> torch.Tensor:
        return self.backbone.embed_tokens(ids_L.to(self.device))

    @torch.inference_mode()
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], *is_scored: Sequence[torch.Tensor], is_admissible_only: bool = False
    ) -> list[torch.Tensor]:
        ids_BL = pad_sequence(list(ids), batch_first=True).to(self.device)  # right padding has no effect
        hidden_BLD = self.backbone(ids_BL[:, :-1], use_cache=False).last_hidden_state
        values_BL = torch.full(ids_BL.shape, torch.nan, dtype=torch.float64, device=self.device)
        of_targets = self._admissible_log_likelihoods if is_admissible_only else self._vocabulary_log_likelihoods
        for masks in is_scored:
            # Compute logits of scored positions only; the logits of a whole batch would not fit into memory.
            is_target_BL = pad_sequence(list(masks), batch_first=True).to(self.device)[:, 1:]
            if is_target_BL.any():
                targets_N = ids_BL[:, 1:][is_target_BL]
                values_BL[:, 1:][is_target_BL] = of_targets(hidden_BLD[is_target_BL], targets_N)
        return [values_L[: len(ids_L)] for values_L, ids_L in zip(values_BL.cpu(), ids, strict=True)]

    def _admissible_log_likelihoods(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        vocabulary = self.tokenizer.vocabulary
        is_code_N = vocabulary.is_audio(targets_N)
        assert (is_code_N | (targets_N == vocabulary.audio_end_id)).all(), "text is scored over the whole vocabulary"
        level_N = vocabulary.level(targets_N) * is_code_N
        values_N = torch.empty(len(targets_N), dtype=torch.float64, device=self.device)
        for level, rows_KD in enumerate(self.output_rows):
            of_level_N = level_N == level
            logits_NK = F.linear(hidden_ND[of_level_N], rows_KD)
            values_N[of_level_N] = log_likelihoods(logits_NK, vocabulary.entries(targets_N[of_level_N]))
        return values_N

    @cached_property
    def output_rows(self) -> list[torch.Tensor]:
        """For each level, rows (K, D) of the output matrix. The last row of level 0 belongs to ``</audio>``."""
        vocabulary, weight_VD = self.tokenizer.vocabulary, self.decoder.lm_head.weight.detach()
        audio_KQD = weight_VD[vocabulary.base : vocabulary.audio_start_id].unflatten(0, (-1, vocabulary.num_quantizers))
        first, *others = (rows_KD.contiguous() for rows_KD in audio_KQD.unbind(1))
        return [torch.cat([first, weight_VD[vocabulary.audio_end_id, None]]), *others]

    def next_frame(self, caches: Sequence[BatchedKVCache], draw: Draw) -> torch.Tensor:
        (contexts,), vocabulary, entries = caches, self.tokenizer.vocabulary, []
        for level, rows_KD in enumerate(self.output_rows):
            entries.append(draw(product(rows_KD, contexts.hidden_BD), level))
            codes_B = entries[-1].clamp(max=vocabulary.codebook_size - 1)  # the end has no code; the frame is not used
            ids_B = vocabulary.base + codes_B * vocabulary.num_quantizers + level
            contexts.step(self.backbone.embed_tokens(ids_B))
        return torch.stack(entries, dim=1)
