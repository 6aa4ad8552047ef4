"""The decoding loop of both architectures: frames of many samples, drawn side by side."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.generation.speech_model import FrameDecoder, SpeechModel

POSITION_STEP = 256  # contexts have room for a multiple of it, so that most decoders are of one size


@dataclass(frozen=True)
class Sampling:
    """How new frames are drawn.

    Args:
        max_frames, min_frames: of new audio; the speech does not go on after, and cannot end before.
        window_frames: of prompt and new audio, that the model sees at once.
        temperature: 0 takes the likeliest entry.
        top_k: sample from so many likeliest entries.
        top_p: of them, from as few as have this probability together.
    """

    max_frames: int
    min_frames: int
    window_frames: int
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Request:
    """A sample to be drawn.

    Args:
        prompt_TQ: codes that it goes on from; none, (0, Q), where there is only text.
        seed: of its random numbers, which depend on nothing else.
        text: transcript of prompt and continuation (task "tts").
    """

    prompt_TQ: torch.Tensor
    seed: int
    text: str | None = None


class End(Enum):
    """Why a sample has no further frame."""

    BY_MODEL = "ended"
    BY_LENGTH = "cut"


@dataclass
class _Row:
    """A sample that is being drawn."""

    index: int
    head: list[int]
    anchor_AQ: torch.Tensor  # the prompt's beginning
    recent: deque[torch.Tensor]  # the last frames (Q,), as many as a window holds
    generator: torch.Generator
    num_new: int = 0
    num_seen: int = field(init=False)  # frames in its context


def decode(
    model: SpeechModel, requests: Sequence[Request], sampling: Sampling, num_rows: int
) -> Iterator[tuple[int, torch.Tensor | End]]:
    """Draw samples, ``num_rows`` at a time; where one has ended, the next takes its place.

    A sample that outgrows the window goes on from an anchor, which is a quarter of the window or less from the
    beginning of its prompt, and the last half of the window. They are read anew, as if the speech between had not
    been, so that no position is beyond those that the model was trained on.

    Returns:
        Of each sample in turn the number of its request with the next frame (Q,) on the CPU, or at last with why there
        is none.

    Raises:
        UserError: at once, the window does not fit into the model's context; later, the model overflows.
    """
    if not requests:
        return iter(())
    heads = [model.sequences.head(request.text) for request in requests]
    longest = max(len(request.prompt_TQ) for request in requests) + sampling.max_frames
    window = min(sampling.window_frames, longest)
    capacity = max(map(len, heads)) + window * model.positions_per_frame
    context = model.body.config.max_position_embeddings
    if capacity > context:
        raise UserError(
            f"text and a window of {window:,} frames take {capacity:,} positions, more than the model's context of "
            f"{context:,}; lower --window_seconds"
        )
    if model.device.type == "cpu":
        num_rows = min(num_rows, len(requests))  # a GPU has one graph for each number of rows
    size = (num_rows, min(-(-capacity // POSITION_STEP) * POSITION_STEP, context))
    return _decode(model, size, requests, heads, sampling, window)


@torch.inference_mode()
def _decode(
    model: SpeechModel,
    size: tuple[int, int],
    requests: Sequence[Request],
    heads: Sequence[list[int]],
    sampling: Sampling,
    window: int,
) -> Iterator[tuple[int, torch.Tensor | End]]:
    num_rows, capacity = size
    try:
        decoder = model.spare_decoders.pop(size, None) or model.frame_decoder(num_rows, capacity)
        yield from _draw_samples(model, decoder, [None] * num_rows, requests, heads, sampling, window)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of '{model.device}' is full with {num_rows:,} samples of {capacity:,} positions; lower "
            "--batch_size or --window_seconds, or take --dtype bfloat16"
        ) from error
    else:
        model.spare_decoders.clear()
        model.spare_decoders[size] = decoder


def _draw_samples(
    model: SpeechModel,
    decoder: FrameDecoder,
    rows: list[_Row | None],
    requests: Sequence[Request],
    heads: Sequence[list[int]],
    sampling: Sampling,
    window: int,
) -> Iterator[tuple[int, torch.Tensor | End]]:
    Q = model.sequences.vocabulary.num_quantizers
    for place in range(len(rows)):
        decoder.clear(place)
    waiting = deque(range(len(requests)))

    def fill(place: int, row: _Row) -> None:
        """Let the model read what fits into the window, or anchor and last frames."""
        frames_TQ = torch.stack(list(row.recent)) if row.recent else row.anchor_AQ
        if len(frames_TQ) >= window:
            frames_TQ = torch.cat([row.anchor_AQ, frames_TQ[-(window // 2) :]])
        row.num_seen = len(frames_TQ)
        decoder.fill(place, row.head, frames_TQ)

    while True:
        for place, row in enumerate(rows):
            if row is None and waiting:
                index = waiting.popleft()
                prompt_TQ = requests[index].prompt_TQ
                generator = torch.Generator().manual_seed(requests[index].seed)
                recent = deque(prompt_TQ, maxlen=window)
                rows[place] = row = _Row(index, heads[index], prompt_TQ[: window // 4], recent, generator)
                fill(place, row)
            elif row is not None and row.num_seen == window:
                fill(place, row)
        if not any(rows):
            return
        uniform_BQ = torch.stack([torch.rand(Q, generator=row.generator) if row else torch.zeros(Q) for row in rows])
        may_end_B = torch.tensor([row is None or row.num_new >= sampling.min_frames for row in rows])
        draw = _Draw(sampling, uniform_BQ.to(model.device), may_end_B.to(model.device))
        entries_BQ = decoder.next_frame(draw).cpu()  # the loop waits for the device once a frame
        if not draw.is_finite:
            dtype = str(model.decoder.dtype).removeprefix("torch.")
            raise UserError(f"logits are not finite: the model overflows in {dtype}; generate in another --dtype")
        for place, (row, entries_Q) in enumerate(zip(rows, entries_BQ, strict=True)):
            if row is None:
                continue
            end = End.BY_MODEL if entries_Q[0] == model.end_entry else None
            if end is None:
                row.recent.append(entries_Q)
                row.num_new += 1
                row.num_seen += 1
                yield row.index, entries_Q
                end = End.BY_LENGTH if row.num_new == sampling.max_frames else None
            if end is not None:
                yield row.index, end
                rows[place] = None
                decoder.clear(place)


class _Draw:
    """Draws the entries of one frame of B samples.

    Args:
        uniform_BQ: random numbers in [0, 1), each row's own.
        may_end_B: whether a sample may end in this frame.
    """

    def __init__(self, sampling: Sampling, uniform_BQ: torch.Tensor, may_end_B: torch.Tensor) -> None:
        self._sampling, self._uniform_BQ, self._may_end_B = sampling, uniform_BQ, may_end_B
        self.is_finite = torch.tensor(True)  # the logits of level 0

    def __call__(self, logits_BV: torch.Tensor, level: int) -> torch.Tensor:
        sampling, logits_BV = self._sampling, logits_BV.float()
        if level == 0:
            self.is_finite = logits_BV.isfinite().all()
            ends_V = torch.arange(logits_BV.shape[1], device=logits_BV.device) == logits_BV.shape[1] - 1
            logits_BV = logits_BV.masked_fill(ends_V & ~self._may_end_B[:, None], -torch.inf)
        if sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        values_Bk, entries_Bk = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1]))  # likeliest first
        shares_Bk = (values_Bk / sampling.temperature).softmax(dim=-1)
        totals_Bk = shares_Bk.cumsum(dim=-1)
        if sampling.top_p < 1:
            shares_Bk = shares_Bk.masked_fill(totals_Bk - shares_Bk >= sampling.top_p, 0)
            totals_Bk = shares_Bk.cumsum(dim=-1)
        # The first entry whose total is above the random number, which is one that has a share.
        places_B1 = (totals_Bk <= self._uniform_BQ[:, level, None] * totals_Bk[:, -1:]).sum(dim=-1, keepdim=True)
        return entries_Bk.gather(1, places_B1.clamp(max=totals_Bk.shape[1] - 1))[:, 0]
