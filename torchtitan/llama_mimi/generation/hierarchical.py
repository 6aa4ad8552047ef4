"""The hierarchical architecture: one step of the backbone per frame, one step of the depth decoder per level."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llama_mimi.generation.kv_cache import BatchedKVCache, product
from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, SpeechModel, log_likelihoods


class HierarchicalModel(SpeechModel):
    """A checkpoint of `CsmForConditionalGeneration`; see `SpeechModel`."""

    @property
    def backbone(self) -> PreTrainedModel:
        return self.decoder.backbone_model

    def embed(self, prefix: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        text_LD = self.decoder.embed_text_tokens(torch.as_tensor(prefix).to(self.device))
        return torch.cat([text_LD, self.backbone.embed_tokens(codes_TQ[None].to(self.device))[0]])

    @torch.inference_mode()
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], *is_scored: Sequence[torch.Tensor], is_admissible_only: bool = False
    ) -> list[torch.Tensor]:
        vocabulary, Q = self.tokenizer.vocabulary, self.codec.num_quantizers
        firsts = [int((ids_L == vocabulary.audio_start_id).nonzero()[0]) + 1 for ids_L in ids]

        def by_frame(values: Sequence[torch.Tensor], fill: int) -> list[torch.Tensor]:
            """Return values (L,) as (T, Q). The end of the speech is a frame of which only level 0 can be scored."""
            audio = [values_L[first:] for values_L, first in zip(values, firsts, strict=True)]
            return [F.pad(audio_L, (0, -len(audio_L) % Q), value=fill).view(-1, Q) for audio_L in audio]

        entries = by_frame([vocabulary.entries(ids_L) for ids_L in ids], self.end_entry)
        clips = list(zip(ids, firsts, entries, strict=True))
        embedded = [self.embed(ids_L[:first], entries_TQ) for ids_L, first, entries_TQ in clips]
        padded_BLD = pad_sequence(embedded, batch_first=True)  # right padding has no effect
        hidden_BLD = self.backbone(inputs_embeds=padded_BLD, use_cache=False).last_hidden_state
        places = [slice(first - 1, first - 1 + len(entries_TQ)) for _, first, entries_TQ in clips]
        hidden_ND = torch.cat([hidden_LD[place] for hidden_LD, place in zip(hidden_BLD, places, strict=True)])
        targets_NQ = torch.cat(entries)
        values_NQ = torch.full(targets_NQ.shape, torch.nan, dtype=torch.float64)
        for masks in is_scored:
            assert not any(mask_L[:first].any() for mask_L, first in zip(masks, firsts, strict=True)), "not predicted"
            is_target_NQ = torch.cat(by_frame(masks, False))
            if is_target_NQ.any():
                num_levels = Q if is_target_NQ[:, 1:].any() else 1  # level 0 needs no depth decoder
                found = self._frame_log_likelihoods(hidden_ND, targets_NQ[:, :num_levels], is_admissible_only)
                values_NQ[is_target_NQ] = found[is_target_NQ[:, :num_levels]]
        values = [of_clip.flatten() for of_clip in values_NQ.split([len(entries_TQ) for entries_TQ in entries])]
        padded = [F.pad(values_L, (first, 0), value=torch.nan) for values_L, first in zip(values, firsts, strict=True)]
        return [values_L[: len(ids_L)] for values_L, ids_L in zip(padded, ids, strict=True)]

    def _frame_log_likelihoods(
        self, hidden_ND: torch.Tensor, targets_NQ: torch.Tensor, is_admissible_only: bool
    ) -> torch.Tensor:
        """Return the log-likelihoods (N, Q) of N frames' entries. With one level, the depth decoder does not run."""
        targets_NQ, values = targets_NQ.to(self.device), []
        chunks = zip(hidden_ND.split(POSITIONS_AT_ONCE), targets_NQ.split(POSITIONS_AT_ONCE), strict=True)
        for hidden_nD, targets_nQ in chunks:
            logits_nQV = self.decoder.lm_head(hidden_nD)[:, None]
            if targets_nQ.shape[1] > 1:
                inputs_nQ = F.pad(targets_nQ[:, :-1], (1, 0))  # the first position is the backbone's state
                depth = self.decoder.depth_decoder(inputs_nQ, hidden_nD, use_cache=False)
                logits_nQV = torch.cat([logits_nQV, depth.logits], dim=1)
            if is_admissible_only:
                logits_nQV[:, 0, self.end_entry + 1 :] = -torch.inf
                logits_nQV[:, 1:, self.end_entry :] = -torch.inf
            values.append(log_likelihoods(logits_nQV.flatten(0, 1), targets_nQ.flatten()).view(targets_nQ.shape))
        return torch.cat(values).cpu()

    def caches(self, num_rows: int, capacity: int) -> list[BatchedKVCache]:
        # Position 0 of the second cache is the backbone's state, and position q + 1 is the code of level q.
        depth = BatchedKVCache(self.decoder.depth_decoder.model, num_rows, self.codec.num_quantizers, self.is_int8)
        return [*super().caches(num_rows, capacity), depth]

    def next_frame(self, caches: Sequence[BatchedKVCache], draw: Draw) -> torch.Tensor:
        (contexts, levels), csm, end = caches, self.decoder, self.end_entry
        depth, head = csm.depth_decoder.model, csm.depth_decoder.codebooks_head.weight
        entries = [draw(product(csm.lm_head.weight, contexts.hidden_BD)[:, : end + 1], 0)]
        levels.restart()
        levels.step(product(depth.inputs_embeds_projector.weight, contexts.hidden_BD))
        for level in range(1, self.codec.num_quantizers):
            codes_B = entries[-1].clamp(max=end - 1)  # the end has no code; the frame is not used
            inputs_BD = depth.embed_tokens(codes_B + (level - 1) * depth.vocab_size)
            levels.step(product(depth.inputs_embeds_projector.weight, inputs_BD))
            entries.append(draw(product(head[level - 1].T, levels.hidden_BD)[:, :end], level))
        entries_BQ = torch.stack(entries, dim=1)
        contexts.step(self.backbone.embed_tokens(entries_BQ.clamp(max=end - 1)[:, None])[:, 0])
        return entries_BQ
