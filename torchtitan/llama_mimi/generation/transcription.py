"""Greedy transcription of speech (task "asr")."""

from collections.abc import Sequence

import torch

from llama_mimi.generation.kv_cache import product
from llama_mimi.generation.speech_model import SpeechModel
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import text_ids

# A transcript has at most 2 tokens per frame (25 per second for Mimi) and 16 further tokens. The transcripts in
# assets/tiny need up to 11.5 tokens per second with a tokenizer of 512 entries; the tokens of Llama 3 are longer.
TOKENS_PER_FRAME, FURTHER_TOKENS = 2, 16


@torch.inference_mode()
def transcribe(model: SpeechModel, codes: Sequence[torch.Tensor], num_rows: int) -> list[tuple[str, bool]]:
    """Return the transcript of each clip, and True if it reached the maximum number of tokens before EOS.

    Each token is the most likely token after ``BOS <audio> codes </audio>``.
    Text tokens and EOS are allowed. A newline cannot be the first token, because after ``</audio>`` a newline means
    that the next utterance follows (tokens/tokenizer.py). A `UserError` is raised if the model was not trained on the
    task "asr", or if logits are not finite.

    Args:
        codes: codes (T, Q) of each clip.
        num_rows: maximum number of clips in a batch. Clips of similar length share a batch.
    """
    model.require_task("transcription", "asr")
    if not codes:
        return []
    tokenizer, text_tokenizer = model.tokenizer, model.tokenizer.text_tokenizer
    limits = [TOKENS_PER_FRAME * len(codes_TQ) + FURTHER_TOKENS for codes_TQ in codes]
    longest = max(map(len, codes)) * tokenizer.positions_per_frame + 3  # BOS, <audio> and </audio>
    if model.device.type == "cpu":
        num_rows = min(num_rows, len(codes))  # on a GPU, each number of rows needs a separate CUDA graph
    order = sorted(range(len(codes)), key=limits.__getitem__, reverse=True)
    is_first_V, is_later_V = _valid_tokens(tokenizer).to(model.device)
    tokens: list[list[int]] = [[] for _ in codes]
    is_cut = [False] * len(codes)
    for start in range(0, len(codes), num_rows):
        unfinished = dict(enumerate(order[start : start + num_rows]))  # clips by row
        with model.borrow_caches(num_rows, longest + max(limits)) as (contexts, *_):
            contexts.prefill({row: model.embed(tokenizer.ids(codes[clip])) for row, clip in unfinished.items()})
            is_valid_V = is_first_V
            while unfinished:
                logits_BV = product(model.output_VD[: len(is_valid_V)], contexts.hidden_BD)
                model.require_finite(logits_BV.isfinite().all())
                ids_B = logits_BV.masked_fill(~is_valid_V, -torch.inf).argmax(dim=1).cpu()
                for row, clip in list(unfinished.items()):
                    if (token := int(ids_B[row])) != text_tokenizer.eos_token_id and len(tokens[clip]) < limits[clip]:
                        tokens[clip].append(token)
                    else:
                        is_cut[clip] = token != text_tokenizer.eos_token_id
                        contexts.reset(row)
                        del unfinished[row]
                contexts.step(model.embed(ids_B))
                is_valid_V = is_later_V
    texts = [text_tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in tokens]
    return list(zip(texts, is_cut, strict=True))


def _valid_tokens(tokenizer: SpeechTokenizer) -> torch.Tensor:
    """Return masks (2, V) of the tokens before the audio tokens: valid as the first token, and valid later."""
    text_tokenizer = tokenizer.text_tokenizer
    is_valid_2V = torch.ones(2, tokenizer.vocabulary.base, dtype=torch.bool)
    is_valid_2V[:, [id for id, token in text_tokenizer.added_tokens_decoder.items() if token.special]] = False
    is_valid_2V[:, text_tokenizer.eos_token_id] = True
    is_valid_2V[0, text_ids(text_tokenizer, "\n")[0]] = False
    return is_valid_2V
