"""The hierarchical arm at work: the backbone takes a step a frame, the depth decoder one a level.

The logits are those of the stock `CsmForConditionalGeneration`; what is drawn from them is decided here. Its own
``generate`` starts another ``generate`` for every frame, and cannot keep a frame from being half an end.
"""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import CsmForConditionalGeneration, DynamicCache, PreTrainedModel

from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, SpeechModel, Step, log_likelihoods


class HierarchicalModel(SpeechModel):
    has_release = False

    @property
    def csm(self) -> CsmForConditionalGeneration:
        return cast(CsmForConditionalGeneration, self.decoder)

    @property
    def body(self) -> PreTrainedModel:
        return self.csm.backbone_model

    @property
    def positions_per_frame(self) -> int:
        return 1

    @torch.inference_mode()
    def log_likelihoods(self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `SpeechModel.log_likelihoods`."""
        hidden, entries, wanted = [], [], []
        for (hidden_LD, num_head, entries_TQ), is_scored_L in zip(self._read(ids), is_scored, strict=True):
            assert not bool(is_scored_L[:num_head].any()), "no text is predicted, nor <audio>"
            T = len(entries_TQ)
            hidden.append(hidden_LD[num_head - 1 : num_head - 1 + T])
            entries.append(entries_TQ)
            # The end has the place of a level 0, and its other levels are no events.
            is_wanted = torch.zeros(entries_TQ.numel(), dtype=torch.bool)
            is_wanted[: len(is_scored_L) - num_head] = is_scored_L[num_head:]
            wanted.append(is_wanted)
        wanted_NQ = torch.cat(wanted).view(-1, self.sequences.vocabulary.num_quantizers)
        levels = slice(None) if bool(wanted_NQ[:, 1:].any()) else slice(1)  # a score of level 0 needs no depth decoder
        frames = zip(
            torch.cat(hidden).split(POSITIONS_AT_ONCE),
            torch.cat(entries)[:, levels].split(POSITIONS_AT_ONCE),
            strict=True,
        )
        values = [self._frame_log_likelihoods(hidden_ND, entries_NQ) for hidden_ND, entries_NQ in frames]
        return torch.cat(values)[wanted_NQ[:, levels]]

    def _read(self, ids: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
        """For each clip the backbone's states (L, D), the number of tokens before the frames, and entries (T, Q).

        The end is the last frame, where the clip has one.
        """
        vocabulary = self.sequences.vocabulary
        heads, entries = [], []
        for ids_L in ids:
            num_head = int((ids_L == vocabulary.audio_start_id).nonzero()[0]) + 1
            has_end = bool(ids_L[-1] == vocabulary.audio_end_id)
            codes_TQ = vocabulary.codes_from_ids(ids_L[num_head : len(ids_L) - has_end])
            end_1Q = torch.full((1, vocabulary.num_quantizers), vocabulary.codebook_size)
            heads.append(ids_L[:num_head])
            entries.append(torch.cat([codes_TQ, end_1Q[:has_end]]))
        embedded = [
            torch.cat([self._embed_text(head_L), self._embed_frames(entries_TQ)])
            for head_L, entries_TQ in zip(heads, entries, strict=True)
        ]
        # The backbone is causal, so padding on the right changes nothing.
        padded_BLD = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
        hidden_BLD = self.body(inputs_embeds=padded_BLD, use_cache=False).last_hidden_state
        return [
            (hidden_LD, len(head_L), entries_TQ)
            for hidden_LD, head_L, entries_TQ in zip(hidden_BLD, heads, entries, strict=True)
        ]

    def _frame_log_likelihoods(self, hidden_ND: torch.Tensor, entries_NQ: torch.Tensor) -> torch.Tensor:
        """Log-likelihoods (N, Q), float64 on the CPU, of frames after the backbone's states; of level 0 (N, 1)."""
        entries_NQ = entries_NQ.to(self.device)
        logits_NQV = self.csm.lm_head(hidden_ND)[:, None]
        if entries_NQ.shape[1] > 1:
            given_NQ = torch.nn.functional.pad(entries_NQ[:, :-1], (1, 0))  # the first place is the backbone's state's
            depth = self.csm.depth_decoder(input_ids=given_NQ, backbone_last_hidden_state=hidden_ND, use_cache=False)
            logits_NQV = torch.cat([logits_NQV, depth.logits], dim=1)
        values_N = log_likelihoods(logits_NQV.flatten(0, 1), entries_NQ.flatten())
        return values_N.view(entries_NQ.shape).cpu()

    def embed(self, head: Sequence[int], codes_TQ: torch.Tensor) -> torch.Tensor:
        """See `SpeechModel.embed`."""
        return torch.cat([self._embed_text(torch.tensor(head)), self._embed_frames(codes_TQ)])

    def next_frame(self, hidden_BD: torch.Tensor, draw: Draw, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpeechModel.next_frame`. The levels of each frame have a cache of their own."""
        entries_B = draw(self.csm.lm_head(hidden_BD)[:, : self.end_entry + 1], 0)
        entries = [entries_B]
        given_Bn, state = torch.nn.functional.pad(self._codes(entries_B)[:, None], (1, 0)), hidden_BD
        cache = DynamicCache(config=self.csm.depth_decoder.config)
        for level in range(1, self.sequences.vocabulary.num_quantizers):
            logits_BV = self.csm.depth_decoder(
                input_ids=given_Bn,
                backbone_last_hidden_state=state,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            entries.append(draw(logits_BV[:, : self.end_entry], level))
            given_Bn, state = entries[-1][:, None], None
        entries_BQ = torch.stack(entries, dim=1)
        return entries_BQ, step(self.body.embed_tokens(self._codes(entries_BQ)[:, None])[:, 0])

    def _codes(self, entries: torch.Tensor) -> torch.Tensor:
        """Entries without the end, in whose place there is some code."""
        return entries.clamp(max=self.end_entry - 1)

    def _embed_text(self, ids_L: torch.Tensor) -> torch.Tensor:
        return self.csm.embed_text_tokens(ids_L.to(self.device))

    def _embed_frames(self, entries_TQ: torch.Tensor) -> torch.Tensor:
        return self.body.embed_tokens(entries_TQ[None].to(self.device))[0]
