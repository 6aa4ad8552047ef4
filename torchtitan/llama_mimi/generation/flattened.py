"""The flattened arm at work: an ordinary Llama over tokens, of which a position can have those of its level alone."""

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedModel

from llama_mimi.generation.row_cache import product
from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, FrameDecoder, SpeechModel, log_likelihoods


class FlattenedModel(SpeechModel):
    has_release = True

    @property
    def body(self) -> PreTrainedModel:
        return cast(LlamaForCausalLM, self.decoder).model

    @property
    def positions_per_frame(self) -> int:
        return self.sequences.vocabulary.num_quantizers

    @torch.inference_mode()
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor], *, is_admissible_only: bool = False
    ) -> torch.Tensor:
        """See `SpeechModel.log_likelihoods`. The decoder is causal, so padding on the right changes nothing."""
        ids_BL = pad_sequence(list(ids), batch_first=True).to(self.device)
        is_scored_BL = pad_sequence(list(is_scored), batch_first=True).to(self.device)
        hidden_BLD = self.body(ids_BL[:, :-1], use_cache=False).last_hidden_state
        # Only what is scored goes through the output layer: the logits of a whole batch would not fit.
        hidden_ND = hidden_BLD[is_scored_BL[:, 1:]]
        targets_N = ids_BL[:, 1:][is_scored_BL[:, 1:]]
        if is_admissible_only:
            vocabulary = self.sequences.vocabulary
            level_N = vocabulary.level(targets_N) * vocabulary.is_unit(targets_N)
            values_N = torch.empty(len(targets_N), dtype=torch.float64, device=self.device)
            for level, rows_KD in enumerate(self.output_rows):
                of_level_N = level_N == level
                logits_NK = F.linear(hidden_ND[of_level_N], rows_KD)
                values_N[of_level_N] = log_likelihoods(logits_NK, vocabulary.entries(targets_N[of_level_N]))
            return values_N.cpu()
        chunks = zip(hidden_ND.split(POSITIONS_AT_ONCE), targets_N.split(POSITIONS_AT_ONCE), strict=True)
        return torch.cat([log_likelihoods(self.decoder.lm_head(some_ND), some_N) for some_ND, some_N in chunks]).cpu()

    def embed(self, head: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        """See `SpeechModel.embed`."""
        ids_L = torch.cat([torch.as_tensor(head), self.sequences.vocabulary.ids_from_codes(codes_TQ)])
        return self.body.embed_tokens(ids_L.to(self.device))

    def frame_decoder(self, num_rows: int, capacity: int) -> "FlattenedDecoder":
        """See `SpeechModel.frame_decoder`."""
        return FlattenedDecoder(self, num_rows, capacity)

    @cached_property
    def output_rows(self) -> list[torch.Tensor]:
        """By level the rows (K, D) of the output layer that a position can have; level 0 ends with ``</audio>``'s.

        Of Llama 3's 136,450 rows these are 2,048 a position: the others would be computed to be thrown away.
        """
        vocabulary, weight_VD = self.sequences.vocabulary, self.decoder.lm_head.weight.detach()
        units_KQD = weight_VD[vocabulary.base : vocabulary.audio_start_id].unflatten(0, (-1, vocabulary.num_quantizers))
        first, *others = (rows_KD.contiguous() for rows_KD in units_KQD.unbind(1))
        return [torch.cat([first, weight_VD[vocabulary.audio_end_id, None]]), *others]


class FlattenedDecoder(FrameDecoder):
    _model: FlattenedModel

    def next_frame(self, draw: Draw) -> torch.Tensor:
        """See `FrameDecoder.next_frame`. Each level is a position of its own."""
        vocabulary = self._model.sequences.vocabulary
        entries = []
        for level, rows_KD in enumerate(self._model.output_rows):
            entries.append(draw(product(rows_KD, self._hidden_BD), level))
            codes_B = entries[-1].clamp(max=vocabulary.codebook_size - 1)
            ids_B = vocabulary.base + codes_B * vocabulary.num_quantizers + level
            self._hidden_BD = self._contexts.step(self._model.body.embed_tokens(ids_B))
        return torch.stack(entries, dim=1)
