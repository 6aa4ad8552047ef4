"""The decoding loop of both architectures: frames of many samples, drawn side by side."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.generation.kv_cache import BatchedKVCache
from llama_mimi.generation.speech_model import SpeechModel

POSITION_STEP = 256  # contexts have room for a multiple of it, so that most caches are of one size


@dataclass(frozen=True)
class Sampling:
    """How new frames are drawn."""

    max_frames: int
    min_frames: int
    window_frames: int  # maximum length of prompt and new audio that the model sees at once
    temperature: float  # 0 takes the most likely entry
    top_k: int  # draw from the k most likely entries
    top_p: float  # of these, draw from the fewest whose probabilities sum to p


@dataclass(frozen=True)
class Request:
    """A sample to be drawn: codes (T, Q) of its prompt, its own seed, and a transcript for the task "tts"."""

    prompt_TQ: torch.Tensor  # (0, Q) if there is only text
    seed: int
    text: str | None = None


class FinishReason(Enum):
    """Why a sample has no further frame."""

    EOS = "ended"
    LENGTH = "cut"


Drawn = Iterator[tuple[int, torch.Tensor | FinishReason]]


@dataclass
class _Row:
    """A sample that is being drawn."""

    number: int
    request: Request
    recent: deque[torch.Tensor]  # the last frames (Q,), as many as a window holds
    generator: torch.Generator
    num_seen: int  # frames in its context; as many as a window holds before it is read
    num_new: int = 0


def decode(model: SpeechModel, requests: Sequence[Request], sampling: Sampling, num_rows: int) -> Drawn:
    """Draw samples, ``num_rows`` at a time; the next one takes the place of one that has ended.

    When the window is full, the model reads again the beginning of the prompt (up to a quarter of the window) and the
    last half of the window, so that no position is beyond those that it was trained on.

    Returns:
        An iterator over ``(request number, next frame (Q,) on the CPU)``, at last ``(request number, FinishReason)``.

    Raises:
        UserError: at once if the window does not fit into the model's context; later if the model overflows.
    """
    if not requests:
        return iter(())
    longest = max(len(request.prompt_TQ) for request in requests) + sampling.max_frames
    window = min(sampling.window_frames, longest)
    longest_head = max(len(model.tokenizer.prefix_ids(request.text)) for request in requests)
    capacity = longest_head + window * model.tokenizer.positions_per_frame
    context = model.backbone.config.max_position_embeddings
    if capacity > context:
        problem = f"text and a window of {window:,} frames take {capacity:,} positions"
        raise UserError(f"{problem}, more than the model's context of {context:,}; lower --window_seconds")
    if model.device.type == "cpu":
        num_rows = min(num_rows, len(requests))  # a GPU has one graph for each number of rows
    size = (num_rows, min(-(-capacity // POSITION_STEP) * POSITION_STEP, context))
    return _decode(model, requests, replace(sampling, window_frames=window), size)


@torch.inference_mode()
def _decode(model: SpeechModel, requests: Sequence[Request], sampling: Sampling, size: tuple[int, int]) -> Drawn:
    try:
        caches = model.spare_caches.pop(size, None) or model.caches(*size)
        yield from _draw_samples(model, caches, requests, sampling)
    except torch.OutOfMemoryError as error:
        problem = f"the memory of '{model.device}' is full with {size[0]:,} samples of {size[1]:,} positions"
        remedy = "lower --batch_size or --window_seconds, or use --dtype bfloat16"
        raise UserError(f"{problem}; {remedy}") from error
    model.spare_caches.clear()
    model.spare_caches[size] = caches


def _draw_samples(
    model: SpeechModel, caches: Sequence[BatchedKVCache], requests: Sequence[Request], sampling: Sampling
) -> Drawn:
    contexts, Q, window = caches[0], model.codec.num_quantizers, sampling.window_frames
    rows: list[_Row | None] = [None] * len(contexts.hidden_BD)
    waiting = deque(enumerate(requests))
    is_finite = torch.tensor(True)  # the logits of level 0

    def draw(logits_BK: torch.Tensor, level: int) -> torch.Tensor:
        nonlocal is_finite
        logits_BK = logits_BK.float()
        if level == 0:
            is_finite = logits_BK.isfinite().all()
            logits_BK[:, -1].masked_fill_(~may_end_B, -torch.inf)
        return draw_entries(logits_BK, sampling, uniform_BQ[:, level])

    for place in range(len(rows)):
        contexts.reset(place)
    while True:
        for place, row in enumerate(rows):
            if row is None and waiting:
                number, request = waiting.popleft()
                generator = torch.Generator().manual_seed(request.seed)
                rows[place] = row = _Row(number, request, deque(request.prompt_TQ, window), generator, num_seen=window)
            if row is not None and row.num_seen == window:
                prompt_TQ = row.request.prompt_TQ
                frames_TQ = torch.stack(list(row.recent)) if row.recent else prompt_TQ
                if len(frames_TQ) == window:
                    frames_TQ = torch.cat([prompt_TQ[: window // 4], frames_TQ[-(window // 2) :]])
                row.num_seen = len(frames_TQ)
                contexts.prefill(place, model.embed(model.tokenizer.prefix_ids(row.request.text), frames_TQ))
        if not any(rows):
            return
        uniform_BQ = torch.stack([torch.rand(Q, generator=row.generator) if row else torch.zeros(Q) for row in rows])
        may_end_B = torch.tensor([row is None or row.num_new >= sampling.min_frames for row in rows])
        uniform_BQ, may_end_B = uniform_BQ.to(model.device), may_end_B.to(model.device)
        entries_BQ = model.next_frame(caches, draw).cpu()  # the loop waits for the device once a frame
        if not is_finite:
            dtype = str(model.decoder.dtype).removeprefix("torch.")
            raise UserError(f"logits are not finite: the model overflows in {dtype}; generate in another --dtype")
        for place, (row, entries_Q) in enumerate(zip(rows, entries_BQ, strict=True)):
            if row is None:
                continue
            ends = entries_Q[0] == model.end_entry
            if not ends:
                row.recent.append(entries_Q)
                row.num_new += 1
                row.num_seen += 1
                yield row.number, entries_Q
            if ends or row.num_new == sampling.max_frames:
                yield row.number, FinishReason.EOS if ends else FinishReason.LENGTH
                rows[place] = None
                contexts.reset(place)


def draw_entries(logits_BK: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """Draw one entry (B,) from each row of logits, with random numbers in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BK.argmax(dim=-1)
    values_Bk, entries_Bk = logits_BK.topk(min(sampling.top_k, logits_BK.shape[1]))  # most likely first
    probs_Bk = (values_Bk / sampling.temperature).softmax(dim=-1)
    totals_Bk = probs_Bk.cumsum(dim=-1)
    if sampling.top_p < 1:
        probs_Bk = probs_Bk.masked_fill(totals_Bk - probs_Bk >= sampling.top_p, 0)
        totals_Bk = probs_Bk.cumsum(dim=-1)
    # The first entry whose total is above the random number, so one whose probability is not 0.
    places_B1 = (totals_Bk <= uniform_B[:, None] * totals_Bk[:, -1:]).sum(dim=-1, keepdim=True)
    return entries_Bk.gather(1, places_B1.clamp(max=totals_Bk.shape[1] - 1))[:, 0]
