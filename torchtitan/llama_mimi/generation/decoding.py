"""Decoding loop that draws the frames of a batch of samples, for both architectures."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.generation.speech_model import SpeechModel


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, with lengths in frames."""

    max_frames: int
    min_frames: int
    window_frames: int  # maximum length of the context (prompt and new audio)
    temperature: float  # at 0, the most likely entry is chosen
    top_k: int  # draw from the k most likely entries
    top_p: float  # draw from the smallest set of these k entries whose total probability is at least p


@dataclass(frozen=True)
class Request:
    """A sample to be drawn."""

    prompt_TQ: torch.Tensor  # (0, Q) if there is only text
    seed: int
    text: str | None = None  # transcript of prompt and continuation, for the task "tts"


class FinishReason(Enum):
    """The reason why a sample ended."""

    EOS = "ended"
    LENGTH = "cut"


Drawn = Iterator[tuple[int, torch.Tensor | FinishReason]]


@dataclass
class _Row:
    """A sample that is being drawn."""

    number: int
    request: Request
    num_new: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.request.seed)
        self.context = list(self.request.prompt_TQ)  # the frames (Q,) that the model sees


@torch.inference_mode()
def decode(model: SpeechModel, requests: Sequence[Request], sampling: Sampling, num_rows: int) -> Drawn:
    """Draw samples in batches of ``num_rows``; when a sample ends, the next request takes its place in the batch.

    When the window is full, only the start of the prompt (up to a quarter of the window) and the last half of the
    window are kept. Position indices are therefore never larger than in training.

    Yields:
        ``(request index, next frame (Q,) on the CPU)`` and, at the end of a sample, ``(request index, FinishReason)``.

    Raises:
        UserError: the window does not fit into the model's context, the model was not trained on the task, or the
            logits are not finite.
    """
    if not requests:
        return
    model.require_speech(any(request.text is not None for request in requests))
    window = min(sampling.window_frames, sampling.max_frames + max(len(request.prompt_TQ) for request in requests))
    longest_prefix = max(len(model.tokenizer.prefix_ids(request.text)) for request in requests)
    capacity = longest_prefix + window * model.tokenizer.positions_per_frame
    context = model.backbone.config.max_position_embeddings
    if capacity > context:
        problem = f"the text and a window of {window:,} frames need {capacity:,} positions"
        raise UserError(f"{problem}, more than the model's context of {context:,}; reduce --window_seconds")
    if model.device.type == "cpu":
        num_rows = min(num_rows, len(requests))  # on a GPU, each number of rows needs a separate CUDA graph
    Q = model.codec.num_quantizers
    rows: list[_Row | None] = [None] * num_rows
    waiting = deque(enumerate(requests))
    is_finite = torch.tensor(True)  # set by `draw` at level 0

    def draw(logits_BK: torch.Tensor, level: int) -> torch.Tensor:
        nonlocal is_finite
        logits_BK = logits_BK.float()
        if level == 0:
            is_finite = logits_BK.isfinite().all()
            logits_BK[:, -1].masked_fill_(~may_end_B, -torch.inf)
        return draw_entries(logits_BK, sampling, uniform_BQ[:, level])

    with model.borrow_caches(num_rows, capacity) as caches:
        contexts = caches[0]
        while waiting or any(rows):
            inputs = {}
            for place, row in enumerate(rows):
                if is_new := row is None and bool(waiting):
                    rows[place] = row = _Row(*waiting.popleft())
                if row is not None and (is_new or len(row.context) == window):
                    prompt_TQ = row.request.prompt_TQ
                    if len(row.context) >= window:
                        row.context = [*prompt_TQ[: window // 4], *row.context[-(window // 2) :]]
                    frames_TQ = torch.stack(row.context) if row.context else prompt_TQ
                    inputs[place] = model.embed(model.tokenizer.encode(frames_TQ, is_cut=True, text=row.request.text))
            contexts.prefill(inputs)
            drawn = [torch.rand(Q, generator=row.generator) if row else torch.zeros(Q) for row in rows]
            may_end = [row is None or row.num_new >= sampling.min_frames for row in rows]
            uniform_BQ, may_end_B = torch.stack(drawn).to(model.device), torch.tensor(may_end, device=model.device)
            entries_BQ = model.next_frame(caches, draw).cpu()  # the loop waits for the device once per frame
            model.require_finite(is_finite)
            for place, (row, entries_Q) in enumerate(zip(rows, entries_BQ, strict=True)):
                if row is None:
                    continue
                is_end = entries_Q[0] == model.end_entry
                if not is_end:
                    row.context.append(entries_Q)
                    row.num_new += 1
                    yield row.number, entries_Q
                if is_end or row.num_new == sampling.max_frames:
                    yield row.number, FinishReason.EOS if is_end else FinishReason.LENGTH
                    rows[place] = None
                    contexts.reset(place)


def draw_entries(logits_BK: torch.Tensor, sampling: Sampling, uniform_B: torch.Tensor) -> torch.Tensor:
    """Draw one entry from each row of logits. ``uniform_B`` contains random numbers in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BK.argmax(dim=-1)
    values_Bk, entries_Bk = logits_BK.topk(min(sampling.top_k, logits_BK.shape[1]))  # most likely first
    probs_Bk = (values_Bk / sampling.temperature).softmax(dim=-1)
    totals_Bk = probs_Bk.cumsum(dim=-1)
    if sampling.top_p < 1:
        probs_Bk = probs_Bk.masked_fill(totals_Bk - probs_Bk >= sampling.top_p, 0)
        totals_Bk = probs_Bk.cumsum(dim=-1)
    # Take the first entry whose cumulative probability exceeds the random number. Its probability is above 0.
    places_B1 = (totals_Bk <= uniform_B[:, None] * totals_Bk[:, -1:]).sum(dim=-1, keepdim=True)
    return entries_Bk.gather(1, places_B1.clamp(max=totals_Bk.shape[1] - 1))[:, 0]
