"""The hierarchical architecture: one step of the backbone per frame, one step of the depth decoder per level."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CsmConfig, CsmForConditionalGeneration, PreTrainedModel

from llama_mimi.common.errors import UserError
from llama_mimi.generation.kv_cache import BatchedKVCache, product
from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, SpeechModel, log_likelihoods


class CsmWithTextHead(CsmForConditionalGeneration):
    """A CSM with an output matrix over the whole vocabulary that is separate from the text embeddings.

    The config of such a folder has ``text_head = "separate"``. Stock CSM ignores the tensor ``text_head.weight``.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__(config)
        self.text_head = nn.Linear(config.hidden_size, config.text_vocab_size, bias=False)
        self.post_init()


class HierarchicalModel(SpeechModel):
    """A checkpoint of `CsmForConditionalGeneration`; see `SpeechModel`."""

    @property
    def backbone(self) -> PreTrainedModel:
        return self.decoder.backbone_model

    @property
    def output_VD(self) -> torch.Tensor:
        csm, kind = self.decoder, getattr(self.decoder.config, "text_head", None)
        if kind is None:
            problem = "the config of the model lacks text_head, so the model cannot predict text"
            raise UserError(f"{problem}; add a task such as 'asr' to data.tasks and train a model")
        return csm.embed_text_tokens.weight if kind == "tied" else csm.text_head.weight

    def _positions(self, ids_L: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the P positions of flattened ids. A frame is one position, and so is any other token.

        Returns:
            First id (P,) of each position; entries (P, Q): codes of frames, K at other positions; mask (P,) of
            positions with text embeddings: text tokens, BOS, EOS, <audio>; position (L,) and level (L,) of each token.
        """
        vocabulary = self.tokenizer.vocabulary
        level_L = vocabulary.level(ids_L) * vocabulary.is_audio(ids_L)
        place_L = (level_L == 0).cumsum(0) - 1
        ids_P = ids_L[level_L == 0]
        entries_PQ = torch.full((len(ids_P), self.codec.num_quantizers), self.end_entry)
        entries_PQ[place_L, level_L] = vocabulary.entries(ids_L)
        is_text_P = ~vocabulary.is_audio(ids_P) & (ids_P != vocabulary.audio_end_id)
        return ids_P, entries_PQ, is_text_P, place_L, level_L

    def embed(self, ids_L: torch.Tensor) -> torch.Tensor:
        ids_P, entries_PQ, is_text_P, *_ = (values.to(self.device) for values in self._positions(ids_L))
        frames_PD = self.backbone.embed_tokens(entries_PQ[None])[0]
        return torch.where(is_text_P[:, None], self.decoder.embed_text_tokens(ids_P), frames_PD)

    @torch.inference_mode()
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], *is_scored: Sequence[torch.Tensor], is_admissible_only: bool = False
    ) -> list[torch.Tensor]:
        Q = self.codec.num_quantizers
        embedded = [self.embed(ids_L) for ids_L in ids]
        padded_BPD = pad_sequence(embedded, batch_first=True)  # right padding has no effect
        hidden_BPD = self.backbone(inputs_embeds=padded_BPD, use_cache=False).last_hidden_state
        before_BPD = F.pad(hidden_BPD, (0, 0, 1, -1))  # the hidden state that predicts each position
        # N: positions of all sequences.
        hidden_ND = torch.cat([state_PD[: len(own_PD)] for state_PD, own_PD in zip(before_BPD, embedded, strict=True)])
        ids_N, entries_NQ, is_text_N, place_L, level_L = self._positions(torch.cat(list(ids)))
        values_NQ = torch.full(entries_NQ.shape, torch.nan, dtype=torch.float64)
        for masks in is_scored:
            is_target_NQ = torch.zeros_like(entries_NQ, dtype=torch.bool)
            is_target_NQ[place_L, level_L] = torch.cat([F.pad(mask_L[1:], (1, 0)) for mask_L in masks])
            of_frames_NQ = is_target_NQ & ~is_text_N[:, None]
            if of_frames_NQ.any():
                num_levels = Q if of_frames_NQ[:, 1:].any() else 1  # level 0 needs no depth decoder
                frames = hidden_ND[~is_text_N], entries_NQ[~is_text_N, :num_levels]
                found_fQ = self._frame_log_likelihoods(*frames, is_admissible_only)
                values_NQ[of_frames_NQ] = found_fQ[of_frames_NQ[~is_text_N, :num_levels]]
            # With a text head, text tokens and the entries of level 0 share one softmax.
            has_one_softmax = hasattr(self.decoder.config, "text_head") and not is_admissible_only
            by_head_N = is_target_NQ[:, 0] & (is_text_N | has_one_softmax)
            if by_head_N.any():
                assert not is_admissible_only, "text is scored over the whole vocabulary"
                found_n = self._vocabulary_log_likelihoods(hidden_ND[by_head_N], ids_N[by_head_N].to(self.device))
                values_NQ[by_head_N, 0] = found_n.cpu()
        return list(values_NQ[place_L, level_L].split([len(ids_L) for ids_L in ids]))

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
