"""Models of text and speech: likelihoods of mixed sequences, and transcription, compared with plain loops."""

import pytest
import torch
from test_generation import K, built, clip
from transformers import CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.common.errors import UserError
from llama_mimi.generation.loading import load_speech_model
from llama_mimi.generation.transcription import transcribe

Q, BOS, EOS, NEWLINE, SPECIAL = 4, 508, 509, 198, (508, 510, 511)
KINDS = {"flattened": {}, "hierarchical": {"text_head": "tied"}, "separate": {"text_head": "separate"}}
SEQUENCES = {
    "asr": (clip(3, seed=1), "one two"),
    "interleaved": ("one\n", clip(4, seed=2), "\ntwo\n", clip(2, seed=3), "\nthree\n"),
    "text": ("one two",),
}


@pytest.fixture(scope="module", params=KINDS)
def model(codec, request):
    """A random model, which often predicts EOS, and other tokens that are not text."""
    model = built(codec, request.param.replace("separate", "hierarchical"), Q, **KINDS[request.param])
    model.decoder.config.update({"num_quantizers": Q, "tasks": ["asr", "interleaved", "text"]})
    vocabulary = model.tokenizer.vocabulary
    with torch.no_grad():
        model.output_VD[[*SPECIAL, NEWLINE, vocabulary.audio_start_id, vocabulary.audio_end_id]] *= 3
        model.output_VD[EOS] *= 2
        if model.tokenizer.architecture == "hierarchical":
            model.decoder.lm_head.weight.copy_(model.output_VD[vocabulary.admissible_ids(torch.device("cpu"))[0]])
    return model


def tokens(model, *parts):
    """Return the positions of a sequence: ids of tokens, and frames as lists of codes."""
    vocabulary, found = model.tokenizer.vocabulary, [BOS]
    for part in parts:
        if isinstance(part, str):
            found += model.tokenizer.text_tokenizer(part, add_special_tokens=False).input_ids
        else:
            found += [vocabulary.audio_start_id, *part.tolist(), vocabulary.audio_end_id]
    return found


@torch.no_grad()
def states(model, positions):
    """Return the hidden state of stock transformers after each token of a sequence, by flattened index."""
    decoder, vocabulary = model.decoder, model.tokenizer.vocabulary
    if model.tokenizer.architecture == "flattened":
        return decoder.model(torch.tensor([flat(model, positions)])).last_hidden_state[0]
    inputs = []
    for token in positions:
        if token == vocabulary.audio_end_id:
            token = [K] * Q
        if isinstance(token, list):
            inputs.append(decoder.backbone_model.embed_tokens(torch.tensor([[token]]))[0, 0])
        else:
            inputs.append(decoder.embed_text_tokens(torch.tensor(token)))
    return decoder.backbone_model(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0]


def flat(model, positions):
    base = model.tokenizer.vocabulary.base
    frames = [[base + code * Q + q for q, code in enumerate(t)] if isinstance(t, list) else [t] for t in positions]
    return [token for frame in frames for token in frame]


@torch.no_grad()
def plain_log_likelihoods(model, positions):
    """Return the log-likelihood of each flattened token except the first."""
    hidden, decoder, ids = states(model, positions), model.decoder, flat(model, positions)
    if model.tokenizer.architecture == "flattened":
        logits_LV = decoder.lm_head(hidden)
        return [logits_LV[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1)]
    matrix_VD = decoder.text_head.weight if hasattr(decoder, "text_head") else decoder.embed_text_tokens.weight
    values = []
    for state_D, token in zip(hidden, positions[1:], strict=False):
        (first, *_) = flat(model, [token])
        values.append((matrix_VD @ state_D).log_softmax(-1)[first].item())
        for level in range(1, Q if isinstance(token, list) else 1):
            depth = decoder.depth_decoder(torch.tensor([[0, *token[:level]]]), state_D[None]).logits[0, -1]
            values.append(depth.log_softmax(-1)[token[level]].item())
    return values


def test_likelihoods_of_mixed_sequences_are_those_of_stock_transformers(model):
    """All sequences are one batch. Two sets of scored tokens complete each other."""
    ids = [model.tokenizer.ids(*parts) for parts in SEQUENCES.values()]
    ids[2] = torch.cat([ids[2], torch.tensor([EOS])])
    sets = [[torch.arange(len(ids_L)) % 3 == 0 for ids_L in ids]]
    sets.append([~mask_L for mask_L in sets[0]])
    found = model.log_likelihoods(ids, *sets)
    for parts, ids_L, values_L in zip(SEQUENCES.values(), ids, found, strict=True):
        positions = tokens(model, *parts) + [EOS] * (len(parts) == 1)
        assert flat(model, positions) == ids_L.tolist() and values_L[0].isnan()
        assert values_L[1:].tolist() == pytest.approx(plain_log_likelihoods(model, positions), abs=2e-5)
    is_audio = [model.tokenizer.vocabulary.is_audio(ids_L) for ids_L in ids]
    valid = torch.cat(model.log_likelihoods(ids, is_audio, is_admissible_only=True))
    gain = (valid - torch.cat(found))[torch.cat(is_audio)]
    assert gain.min() >= -1e-6 and gain.max() > 0.1, "fewer tokens share the probability"


@torch.no_grad()
def plain_transcript(model, codes_TQ, max_tokens):
    positions, text = tokens(model, codes_TQ), []
    matrix_VD = model.decoder.lm_head.weight if model.tokenizer.architecture == "flattened" else model.output_VD
    while True:
        logits_V = matrix_VD @ states(model, positions + text)[-1]
        allowed = [i for i in range(BOS + 4) if i not in SPECIAL and (text or i != NEWLINE)]
        best = allowed[int(logits_V[allowed].argmax())]
        if best == EOS or len(text) == max_tokens:
            return model.tokenizer.text_tokenizer.decode(text), best != EOS
        text.append(best)


def test_transcripts_are_those_of_a_plain_loop(model):
    """Compare single clips with batches of clips of several lengths; masks and the maximum length matter."""
    codes = [clip(length, seed=length + 20) for length in (2, 9, 4, 0, 6, 3, 5, 1)]
    wanted = [plain_transcript(model, codes_TQ, 2 * len(codes_TQ) + 16) for codes_TQ in codes]
    assert transcribe(model, codes, num_rows=3) == wanted
    assert [transcribe(model, [codes_TQ], num_rows=4)[0] for codes_TQ in codes] == wanted
    assert {is_cut for _, is_cut in wanted} == {False, True} and len(set(wanted)) > 4
    assert transcribe(model, [], num_rows=3) == []


def test_models_without_the_task_are_refused(codec, model):
    other = built(codec, "hierarchical")
    with pytest.raises(UserError, match="transcription needs the task 'asr', but the model was trained on tts"):
        transcribe(other, [clip(3)], num_rows=1)
    ids = [model.tokenizer.ids("one")]
    with pytest.raises(UserError, match="the config of the model lacks text_head, so the model cannot predict text"):
        other.log_likelihoods(ids, [torch.ones(len(ids[0]), dtype=torch.bool)])
    model.require_task("this test", "tts", "interleaved")


def test_a_folder_with_a_text_head_is_loaded(model, tmp_path):
    """The loaded model and the saved model give the same transcripts. Stock classes ignore a separate text head."""
    model.decoder.save_pretrained(tmp_path)
    model.tokenizer.text_tokenizer.save_pretrained(tmp_path)
    loaded = load_speech_model(str(tmp_path), codec_name=model.codec.name, device="cpu")
    assert loaded.tasks == ["asr", "interleaved", "text"]
    assert transcribe(loaded, [clip(5)], 1) == transcribe(model, [clip(5)], 1)
    stock_class = LlamaForCausalLM if loaded.tokenizer.architecture == "flattened" else CsmForConditionalGeneration
    _, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"text_head.weight"}
