"""Greedy transcription of speech (task "asr")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llama_mimi.generation.kv_cache import BatchedKVCache, product
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import text_ids

# A transcript has at most 2 tokens per frame (25 per second for Mimi) and 16 further tokens. The transcripts in
# assets/tiny need up to 11.5 tokens per second with a tokenizer of 512 entries; the tokens of Llama 3 are longer.
TOKENS_PER_FRAME, FURTHER_TOKENS = 2, 16


class Transcript(NamedTuple):
    """Transcript of a clip."""

    text: str
    is_cut: bool  # True if the transcript reached the maximum number of tokens before EOS


@torch.inference_mode()
def transcribe(model: SpeechModel, codes: Sequence[torch.Tensor], num_rows: int) -> list[Transcript]:
    """Return a transcript of each clip. Each token is the most likely token after ``BOS <audio> codes </audio>``.

    Text tokens and EOS are allowed. A newline cannot be the first token, because after ``</audio>`` a newline means
    that the next utterance follows (tokens/tokenizer.py).

    Args:
        codes: codes (T, Q) of each clip.
        num_rows: maximum number of clips in a batch. Clips of similar length share a batch.

    Raises:
        UserError: the model was not trained on the task "asr", a clip is too long, or logits are not finite.
    """
    model.require_task("asr", "transcription")
    if not codes:
        return []
    tokenizer, longest = model.tokenizer, max(map(len, codes))
    capacity = 3 + longest * tokenizer.positions_per_frame + _max_tokens(longest)  # 3: BOS, <audio> and </audio>
    model.require_capacity(capacity, "a clip and its transcript", "split the clip")
    if model.device.type == "cpu":
        num_rows = min(num_rows, len(codes))  # on a GPU, each number of rows needs a separate CUDA graph
    order = sorted(range(len(codes)), key=lambda index: len(codes[index]), reverse=True)
    is_valid_2V = _valid_tokens(tokenizer).to(model.device)
    transcripts: dict[int, Transcript] = {}
    for start in range(0, len(codes), num_rows):
        batch = order[start : start + num_rows]
        with model.borrow_caches(num_rows, capacity) as caches:
            found = _transcribe_batch(model, [codes[index] for index in batch], caches[0], is_valid_2V)
        transcripts |= dict(zip(batch, found, strict=True))
    return [transcripts[index] for index in range(len(codes))]


def _transcribe_batch(
    model: SpeechModel, codes: Sequence[torch.Tensor], contexts: BatchedKVCache, is_valid_2V: torch.Tensor
) -> list[Transcript]:
    tokenizer, output_VD = model.tokenizer.text_tokenizer, model.output_VD[: is_valid_2V.shape[1]]
    contexts.prefill({row: model.embed(model.tokenizer.ids(codes_TQ)) for row, codes_TQ in enumerate(codes)})
    tokens: list[list[int]] = [[] for _ in codes]
    is_cut: dict[int, bool] = {}  # of finished rows
    step = 0
    while len(is_cut) < len(codes):
        logits_BV = product(output_VD, contexts.hidden_BD)
        model.require_finite(logits_BV.isfinite().all())
        ids_B = logits_BV.masked_fill(~is_valid_2V[min(step, 1)], -torch.inf).argmax(dim=1).cpu()
        for row in set(range(len(codes))) - is_cut.keys():
            is_eos = ids_B[row] == tokenizer.eos_token_id
            if is_eos or step == _max_tokens(len(codes[row])):
                is_cut[row] = not is_eos
                contexts.reset(row)
            else:
                tokens[row].append(int(ids_B[row]))
        contexts.step(model.embed(ids_B))
        step += 1
    return [
        Transcript(tokenizer.decode(ids, clean_up_tokenization_spaces=False), is_cut[row])
        for row, ids in enumerate(tokens)
    ]


def _max_tokens(num_frames: int) -> int:
    return TOKENS_PER_FRAME * num_frames + FURTHER_TOKENS


def _valid_tokens(tokenizer: SpeechTokenizer) -> torch.Tensor:
    """Return masks (2, V) of the tokens before the audio tokens: valid as the first token, and valid later."""
    text_tokenizer = tokenizer.text_tokenizer
    is_valid_2V = torch.ones(2, tokenizer.vocabulary.base, dtype=torch.bool)
    is_valid_2V[:, [id for id, token in text_tokenizer.added_tokens_decoder.items() if token.special]] = False
    is_valid_2V[:, text_tokenizer.eos_token_id] = True
    is_valid_2V[0, text_ids(text_tokenizer, "\n")[0]] = False
    return is_valid_2V
