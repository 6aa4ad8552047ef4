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
        self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor], *, is_admissible_only: bool = False
    ) -> torch.Tensor:
        vocabulary, Q = self.tokenizer.vocabulary, self.codec.num_quantizers
        embedded, places, entries, wanted = [], [], [], []
        for ids_L, is_scored_L in zip(ids, is_scored, strict=True):
            first = int((ids_L == vocabulary.audio_start_id).nonzero()[0]) + 1
            assert not bool(is_scored_L[:first].any()), "text and <audio> are not predicted"
            # The end of the speech is a separate frame, and only its level 0 can be scored.
            missing = (first - len(ids_L)) % Q
            entries_TQ = F.pad(vocabulary.entries(ids_L[first:]), (0, missing), value=self.end_entry).view(-1, Q)
            embedded.append(self.embed(ids_L[:first], entries_TQ))
            places.append(slice(first - 1, first - 1 + len(entries_TQ)))
            entries.append(entries_TQ)
            wanted.append(F.pad(is_scored_L[first:], (0, missing)).view(-1, Q))
        padded_BLD = pad_sequence(embedded, batch_first=True)  # right padding has no effect
        hidden_BLD = self.backbone(inputs_embeds=padded_BLD, use_cache=False).last_hidden_state
        hidden_ND = torch.cat([hidden_LD[place] for hidden_LD, place in zip(hidden_BLD, places, strict=True)])
        wanted_NQ = torch.cat(wanted)
        levels = slice(None) if bool(wanted_NQ[:, 1:].any()) else slice(1)  # level 0 needs no depth decoder
        targets_NQ, values = torch.cat(entries)[:, levels].to(self.device), []
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
        return torch.cat(values).cpu()[wanted_NQ[:, levels]]

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
