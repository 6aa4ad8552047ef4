"""TorchTitan's Llama and Hugging Face's are the same model; padding and company change nothing."""

import pytest
import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mimi.checkpoint.huggingface import hf_config, model_args
from llama_mimi.common.errors import UserError
from llama_mimi.data.packing import BatchPacker
from llama_mimi.model.architectures import parallelize
from llama_mimi.model.llama import FLAVORS, LlamaMimi, LlamaMimiArgs
from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.training.loss import LevelMeter, SpeechLoss

VOCAB = 300


def llama_config(tied: bool, rope: dict, intermediate_size: int = 176) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500000.0, **rope},
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


LLAMA_3_2 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def tokens_BL():
    return torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [LLAMA_3_2, LLAMA_3_2 | {"factor": 8.0}, {"rope_type": "default"}])
@pytest.mark.parametrize("intermediate_size", [176, 100])
def test_hugging_face_to_torchtitan(tied, rope, intermediate_size, tokens_BL):
    torch.manual_seed(0)
    hf = LlamaForCausalLM(llama_config(tied, rope, intermediate_size)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():  # norms are ones at the start, which would hide a swap
            parameter.add_(0.02 * torch.randn_like(parameter))
    args = model_args(hf.config)
    args.max_seq_len = 256
    model = LlamaMimi(args)
    with torch.no_grad():
        model.init_weights()
    state = {k: v for k, v in hf.state_dict().items() if not (tied and k == "lm_head.weight")}
    model.load_state_dict(Llama3StateDictAdapter(args, None).from_hf(state))
    torch.testing.assert_close(model(tokens_BL).compute(), hf(tokens_BL).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_torchtitan_to_hugging_face(tied, tokens_BL):
    torch.manual_seed(0)
    args = LlamaMimiArgs(
        dim=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=VOCAB,
        ffn_dim_multiplier=1.3,
        multiple_of=32,
        rope_theta=500000,
        rope_scaling_args=RoPEScalingArgs(32.0, 1.0, 4.0, 8192),
        max_seq_len=256,
        enable_weight_tying=tied,
    )
    model = LlamaMimi(args)
    with torch.no_grad():
        model.init_weights()
    config = hf_config(args)
    hf = LlamaForCausalLM(config).eval()
    missing, unexpected = hf.load_state_dict(Llama3StateDictAdapter(args, None).to_hf(model.state_dict()), strict=False)
    assert missing == (["lm_head.weight"] if tied else []) and not unexpected
    torch.testing.assert_close(model(tokens_BL).compute(), hf(tokens_BL).logits, atol=1e-5, rtol=1e-5)
    assert hf_config(model_args(config)).to_dict() == config.to_dict()


def test_a_scaling_of_positions_that_is_unknown_here_is_refused():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="rope_type is 'linear'"):
        model_args(LlamaConfig(rope_parameters=rope))


@pytest.mark.parametrize(
    ("flavor", "vocab_size", "num_params"),
    # Llama-3.2-1B has 1,235,814,400 parameters and Llama-3.1-8B 8,030,261,248, by their model cards, at 128,256 entries
    [("1B", 128_256, 1_235_814_400), ("8B", 128_256, 8_030_261_248)],
)
def test_flavours_have_the_published_size(flavor, vocab_size, num_params):
    args = FLAVORS[flavor]
    args = LlamaMimiArgs(**{**vars(args), "vocab_size": vocab_size, "max_seq_len": 128})
    with torch.device("meta"):
        model = LlamaMimi(args)
    counted, flops = args.get_nparams_and_flops(model, 1024)
    assert counted == num_params
    multiplied = num_params - (0 if args.enable_weight_tying else vocab_size * args.dim)
    assert flops == 6 * multiplied + 12 * args.n_layers * args.dim * 1024


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    args = LlamaMimiArgs(**{**vars(FLAVORS["tiny"]), "vocab_size": tokenizer.vocabulary.size, "max_seq_len": 256})
    model = LlamaMimi(args)
    with torch.no_grad():
        model.init_weights()
    return model


def rows(tokenizer, clips, seq_len, is_packed=False):
    """One full batch of codes_TQ, as the loader makes it; pieces that do not fit are a mistake of the test."""
    packer = BatchPacker(tokenizer, 1 if is_packed else len(clips), seq_len, is_packed=is_packed, has_positions=True)
    for codes_TQ in clips:
        assert packer.add(codes_TQ.numpy(), is_cut=False) == len(codes_TQ)
    return packer.take()


def loss_and_gradient(model, tokenizer, clips, seq_len, pad_id=0, is_packed=False):
    inputs, labels_BL = rows(tokenizer, clips, seq_len, is_packed)
    inputs_BL, positions_BL = inputs["input"], inputs["positions"]
    lengths = [len(tokenizer.encode(codes_TQ, is_cut=False)) - 1 for codes_TQ in clips]
    lengths_B1 = torch.tensor([[sum(lengths)]] if is_packed else [[length] for length in lengths])
    inputs_BL[torch.arange(seq_len) >= lengths_B1] = pad_id
    extra = {}
    if model.model_args.attn_type == "varlen":
        masks = model.get_attention_masks(inputs_BL, None, {"positions": positions_BL})
        extra = {"attention_masks": masks, "positions": positions_BL}
    meter = LevelMeter()
    loss_sum = SpeechLoss(tokenizer.vocabulary, meter, [1.0] * 4)(model(inputs_BL, **extra), labels_BL)
    loss = loss_sum / (labels_BL != IGNORE_INDEX).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), model.tok_embeddings.weight.grad.clone(), meter.pop()


def clip(num_frames, seed):
    return torch.randint(256, (num_frames, 4), generator=torch.Generator().manual_seed(seed))


def test_padding_changes_no_loss(model, tokenizer):
    clips = [clip(8, 0), clip(5, 1)]
    loss, gradient, _ = loss_and_gradient(model, tokenizer, clips, 40)
    for seq_len, pad_id in ((40, 7), (40, tokenizer.vocabulary.audio_end_id), (96, 0)):
        other_loss, other_gradient, _ = loss_and_gradient(model, tokenizer, clips, seq_len, pad_id)
        torch.testing.assert_close(other_loss, loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=1e-5)


def packed_twin(model):
    """The same weights, with attention within the clips of a row."""
    args = LlamaMimiArgs(**{**vars(model.model_args), "attn_type": "varlen", "attn_mask_type": "block_causal"})
    twin = LlamaMimi(args)
    with torch.no_grad():
        twin.init_weights()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("seq_len", [76, 90])  # filled to the last place, and with padding behind
@pytest.mark.parametrize("pad_id", [0, 7])
def test_packed_clips_are_as_if_alone(model, tokenizer, seq_len, pad_id):
    clips = [clip(8, 0), clip(1, 1), clip(5, 2), clip(3, 3)]
    packed = packed_twin(model)
    loss, gradient, sums = loss_and_gradient(packed, tokenizer, clips, seq_len, pad_id, is_packed=True)
    padded_loss, padded_gradient, padded_sums = loss_and_gradient(model, tokenizer, clips, 48)
    torch.testing.assert_close(loss, padded_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, padded_gradient, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, padded_sums, atol=1e-4, rtol=1e-6)
    loss_and_gradient(model, tokenizer, clips, 48)
    for (name, parameter), other in zip(packed.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_level_losses_are_those_of_a_plain_loop(model, tokenizer):
    codes_TQ = clip(6, 0)
    ids_L = tokenizer.encode(codes_TQ, is_cut=False)
    loss, _, sums = loss_and_gradient(model, tokenizer, [codes_TQ], 32)
    log_probs_LV = model(ids_L[None, :-1]).compute()[0].log_softmax(-1)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for position, target in enumerate(ids_L[1:].tolist()):
        if target == tokenizer.vocabulary.audio_start_id:
            continue
        row = 4 if target == tokenizer.vocabulary.audio_end_id else (target - tokenizer.vocabulary.base) % 4
        expected[0, row] -= log_probs_LV[position, target].item()
        expected[1, row] += 1
        admissible = [tokenizer.vocabulary.base + 4 * code + row % 4 for code in range(256)]
        admissible += [tokenizer.vocabulary.audio_end_id] * (row % 4 == 0)
        expected[2, row] -= (log_probs_LV[position, target] - log_probs_LV[position, admissible].logsumexp(0)).item()
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.double(), expected[0].sum() / expected[1].sum(), atol=1e-5, rtol=1e-5)


def test_packed_rows_without_the_kernel_are_not_compiled():
    args = LlamaMimiArgs(dim=64, n_layers=1, n_heads=4, vocab_size=VOCAB, max_seq_len=64, attn_type="varlen")
    job_config = JobConfig()
    job_config.compile.enable = True
    with pytest.raises(UserError, match="--compile.components loss"):
        parallelize(LlamaMimi(args), ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1), job_config)
