"""The hierarchical architecture: the backbone takes one step a frame, the depth decoder one step a level."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llama_mimi.generation.kv_cache import BatchedKVCache, product
from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, SpeechModel, log_likelihoods


class HierarchicalModel(SpeechModel):
    """A checkpoint of `CsmForConditionalGeneration`; see `SpeechModel`."""

    has_release = False

    @property
    def backbone(self) -> PreTrainedModel:
        return self.decoder.backbone_model

    def embed(self, head: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        text_LD = self.decoder.embed_text_tokens(torch.as_tensor(head).to(self.device))
        return torch.cat([text_LD, self.backbone.embed_tokens(codes_TQ[None].to(self.device))[0]])

    @torch.inference_mode()
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor], *, is_admissible_only: bool = False
    ) -> torch.Tensor:
        vocabulary, Q = self.tokenizer.vocabulary, self.codec.num_quantizers
        embedded, places, entries, wanted = [], [], [], []
        for ids_L, is_scored_L in zip(ids, is_scored, strict=True):
            num_head = int((ids_L == vocabulary.audio_start_id).nonzero()[0]) + 1
            assert not bool(is_scored_L[:num_head].any()), "no text is predicted, nor <audio>"
            # The end is a frame of its own: it is scored at level 0, and its other levels are no events.
            missing = (num_head - len(ids_L)) % Q
            entries_TQ = F.pad(vocabulary.entries(ids_L[num_head:]), (0, missing), value=self.end_entry).view(-1, Q)
            embedded.append(self.embed(ids_L[:num_head], entries_TQ))
            places.append(slice(num_head - 1, num_head - 1 + len(entries_TQ)))
            entries.append(entries_TQ)
            wanted.append(F.pad(is_scored_L[num_head:], (0, missing)).view(-1, Q))
        padded_BLD = pad_sequence(embedded, batch_first=True)  # causal: padding on the right is not seen
        hidden_BLD = self.backbone(inputs_embeds=padded_BLD, use_cache=False).last_hidden_state
        hidden = torch.cat([hidden_LD[place] for hidden_LD, place in zip(hidden_BLD, places, strict=True)])
        wanted_NQ = torch.cat(wanted)
        levels = slice(None) if bool(wanted_NQ[:, 1:].any()) else slice(1)  # level 0 needs no depth decoder
        targets = torch.cat(entries)[:, levels]
        chunks = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
        values = [self._frame_log_likelihoods(*chunk, is_admissible_only) for chunk in chunks]
        return torch.cat(values)[wanted_NQ[:, levels]]

    def _frame_log_likelihoods(
        self, hidden_ND: torch.Tensor, entries_NQ: torch.Tensor, is_admissible_only: bool
    ) -> torch.Tensor:
        """Return log-likelihoods (N, Q), float64 on the CPU, of frames given the backbone's states; or of level 0."""
        entries_NQ = entries_NQ.to(self.device)
        logits_NQV = self.decoder.lm_head(hidden_ND)[:, None]
        if entries_NQ.shape[1] > 1:
            given_NQ = F.pad(entries_NQ[:, :-1], (1, 0))  # the first place is that of the backbone's state
            depth = self.decoder.depth_decoder(given_NQ, hidden_ND, use_cache=False)
            logits_NQV = torch.cat([logits_NQV, depth.logits], dim=1)
        if is_admissible_only:
            logits_NQV[:, 0, self.end_entry + 1 :] = -torch.inf
            logits_NQV[:, 1:, self.end_entry :] = -torch.inf
        values_N = log_likelihoods(logits_NQV.flatten(0, 1), entries_NQ.flatten())
        return values_N.view(entries_NQ.shape).cpu()

    def caches(self, num_rows: int, capacity: int) -> list[BatchedKVCache]:
        # In the second, position 0 is the backbone's state, q + 1 the code of level q.
        depth = BatchedKVCache(self.decoder.depth_decoder.model, num_rows, self.codec.num_quantizers)
        return [*super().caches(num_rows, capacity), depth]

    def next_frame(self, caches: Sequence[BatchedKVCache], draw: Draw) -> torch.Tensor:
        contexts, levels = caches
        csm, end = self.decoder, self.end_entry
        depth, head = csm.depth_decoder.model, csm.depth_decoder.codebooks_head.weight
        entries = [draw(product(csm.lm_head.weight, contexts.hidden_BD)[:, : end + 1], 0)]
        levels.restart()
        levels.step(product(depth.inputs_embeds_projector.weight, contexts.hidden_BD))
        for level in range(1, self.codec.num_quantizers):
            codes_B = entries[-1].clamp(max=end - 1)  # any code in place of an end
            inputs_BD = depth.embed_tokens(codes_B + (level - 1) * depth.vocab_size)
            levels.step(product(depth.inputs_embeds_projector.weight, inputs_BD))
            entries.append(draw(product(head[level - 1].T, levels.hidden_BD)[:, :end], level))
        entries_BQ = torch.stack(entries, dim=1)
        contexts.step(self.backbone.embed_tokens(entries_BQ.clamp(max=end - 1)[:, None])[:, 0])
        return entries_BQ
