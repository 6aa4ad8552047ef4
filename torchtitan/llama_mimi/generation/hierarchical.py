"""The hierarchical arm at work: the backbone takes a step a frame, the depth decoder one a level.

The logits are those of the stock `CsmForConditionalGeneration`; what is drawn from them is decided here. Its own
``generate`` starts another ``generate`` for every frame, and cannot keep a frame from being half an end.
"""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import CsmForConditionalGeneration, PreTrainedModel

from llama_mimi.generation.row_cache import RowCache, product
from llama_mimi.generation.speech_model import POSITIONS_AT_ONCE, Draw, FrameDecoder, SpeechModel, log_likelihoods


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
    def log_likelihoods(
        self, ids: Sequence[torch.Tensor], is_scored: Sequence[torch.Tensor], *, is_admissible_only: bool = False
    ) -> torch.Tensor:
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
        values = [
            self._frame_log_likelihoods(hidden_ND, entries_NQ, is_admissible_only) for hidden_ND, entries_NQ in frames
        ]
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
        embedded = [self.embed(head_L, entries_TQ) for head_L, entries_TQ in zip(heads, entries, strict=True)]
        # The backbone is causal, so padding on the right changes nothing.
        padded_BLD = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
        hidden_BLD = self.body(inputs_embeds=padded_BLD, use_cache=False).last_hidden_state
        return [
            (hidden_LD, len(head_L), entries_TQ)
            for hidden_LD, head_L, entries_TQ in zip(hidden_BLD, heads, entries, strict=True)
        ]

    def _frame_log_likelihoods(
        self, hidden_ND: torch.Tensor, entries_NQ: torch.Tensor, is_admissible_only: bool
    ) -> torch.Tensor:
        """Log-likelihoods (N, Q), float64 on the CPU, of frames after the backbone's states; of level 0 (N, 1)."""
        entries_NQ = entries_NQ.to(self.device)
        logits_NQV = self.csm.lm_head(hidden_ND)[:, None]
        if entries_NQ.shape[1] > 1:
            given_NQ = torch.nn.functional.pad(entries_NQ[:, :-1], (1, 0))  # the first place is the backbone's state's
            depth = self.csm.depth_decoder(input_ids=given_NQ, backbone_last_hidden_state=hidden_ND, use_cache=False)
            logits_NQV = torch.cat([logits_NQV, depth.logits], dim=1)
        if is_admissible_only:
            logits_NQV[:, 0, self.end_entry + 1 :] = -torch.inf
            logits_NQV[:, 1:, self.end_entry :] = -torch.inf
        values_N = log_likelihoods(logits_NQV.flatten(0, 1), entries_NQ.flatten())
        return values_N.view(entries_NQ.shape).cpu()

    def embed(self, head: Sequence[int] | torch.Tensor, codes_TQ: torch.Tensor) -> torch.Tensor:
        """See `SpeechModel.embed`. A frame of ends is read, too."""
        text_LD = self.csm.embed_text_tokens(torch.as_tensor(head).to(self.device))
        return torch.cat([text_LD, self.body.embed_tokens(codes_TQ[None].to(self.device))[0]])

    def frame_decoder(self, num_rows: int, capacity: int) -> "HierarchicalDecoder":
        """See `SpeechModel.frame_decoder`."""
        return HierarchicalDecoder(self, num_rows, capacity)


class HierarchicalDecoder(FrameDecoder):
    _model: HierarchicalModel

    def __init__(self, model: HierarchicalModel, num_rows: int, capacity: int) -> None:
        super().__init__(model, num_rows, capacity)
        # Position 0 is the backbone's state, position q + 1 the code of level q.
        self._levels = RowCache(model.csm.depth_decoder.model, num_rows, model.codec.num_quantizers)

    def next_frame(self, draw: Draw) -> torch.Tensor:
        """See `FrameDecoder.next_frame`. The backbone takes one step, the depth decoder one a level."""
        csm, end = self._model.csm, self._model.end_entry
        depth, head = csm.depth_decoder.model, csm.depth_decoder.codebooks_head.weight
        entries = [draw(product(csm.lm_head.weight, self._hidden_BD)[:, : end + 1], 0)]
        self._levels.restart()
        self._levels.step(product(depth.inputs_embeds_projector.weight, self._hidden_BD))
        for level in range(1, self._model.codec.num_quantizers):
            codes_B = entries[-1].clamp(max=end - 1)  # in the place of an end some code
            inputs_BD = depth.embed_tokens(codes_B + (level - 1) * depth.vocab_size)
            hidden_BD = self._levels.step(product(depth.inputs_embeds_projector.weight, inputs_BD))
            entries.append(draw(product(head[level - 1].T, hidden_BD)[:, :end], level))
        entries_BQ = torch.stack(entries, dim=1)
        codes_BQ = entries_BQ.clamp(max=end - 1)
        self._hidden_BD = self._contexts.step(self._model.body.embed_tokens(codes_BQ[:, None])[:, 0])
        return entries_BQ
