"""TorchTitan and Hugging Face models give equal results, and packing does not change the loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_hierarchical import as_on_gpus, built, clip, loss_of
from torch._dynamo.testing import CompileCounterWithBackend
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mimi.checkpoint.huggingface import hf_config, model_args
from llama_mimi.common.errors import UserError
from llama_mimi.model.architectures import parallelize
from llama_mimi.model.cross_entropy import chunk_losses
from llama_mimi.model.llama import FLAVORS, LlamaMimi, LlamaMimiArgs, PackedAttention

VOCAB = 300


LLAMA_3_2 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_2 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [LLAMA_3_2, LLAMA_3_2 | {"factor": 8.0}, {"rope_type": "default"}])
@pytest.mark.parametrize("intermediate_size", [176, 100])
def test_torchtitan_and_hugging_face_have_the_same_logits(tied, rope, intermediate_size):
    torch.manual_seed(0)
    config = LlamaConfig(
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
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():  # initial norms are all ones, which would hide a swap
            parameter.add_(0.02 * torch.randn_like(parameter))
    args = replace(model_args(config), max_seq_len=256)
    model, adapter = LlamaMimi(args), Llama3StateDictAdapter(args, None)
    with torch.no_grad():
        model.init_weights()
    state = {name: weight for name, weight in hf.state_dict().items() if not (tied and name == "lm_head.weight")}
    model.load_state_dict(adapter.from_hf(state))
    tokens_BL = torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens_BL).compute(), hf(tokens_BL).logits, atol=1e-5, rtol=1e-5)
    back = adapter.to_hf(model.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert replace(model_args(hf_config(args)), max_seq_len=256) == args


CARDS = [("1B", 1_235_814_400, 8192), ("8B", 8_030_261_248, 14_336)]  # published sizes of Llama 3.2 and 3.1


@pytest.mark.parametrize(("flavor", "num_params", "width"), CARDS)
def test_flavours_have_the_size_of_their_model_cards(flavor, num_params, width):
    args = replace(FLAVORS[flavor], vocab_size=128_256, max_seq_len=128)
    with torch.device("meta"):
        model = LlamaMimi(args)
    counted, flops = args.get_nparams_and_flops(model, 1024)
    assert counted == num_params and hf_config(args).intermediate_size == width
    multiplied = num_params - (0 if args.enable_weight_tying else 128_256 * args.dim)
    assert flops == 6 * multiplied + 12 * args.n_layers * args.dim * 1024


def test_shapes_have_the_ratios_of_the_1b_model():
    unlike = {"vocab_size": 0, "max_seq_len": 0}  # set by a config
    for name in ("2048x16", "2048x16+1024x4"):
        assert replace(FLAVORS[name], **unlike) == replace(FLAVORS["1B"], **unlike)
    args = FLAVORS["768x8"]
    assert (args.n_heads, args.n_kv_heads, args.ffn_dim) == (12, 3, 3072)
    assert (args.depth.dim, args.depth.n_layers, args.depth.ffn_dim) == (384, 2, 3072)
    assert model_args(hf_config(args)).ffn_dim == args.ffn_dim
    for name in ("700x12", "768", "0x4", "768x0", "768x8+100x2", "2B"):
        assert name not in FLAVORS
        with pytest.raises(KeyError):
            FLAVORS[name]


@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
@pytest.mark.parametrize("spare", [0, 14])  # without and with padding at the end
@pytest.mark.parametrize("pad_id", [0, 7])
def test_packed_clips_are_as_if_alone(architecture, spare, pad_id):
    model, tokenizer = built(architecture)
    packed, _ = built(architecture, attn_type="varlen", attn_mask_type="block_causal")
    clips = [clip(8, 0), clip(1, 1), clip(5, 2), clip(3, 3)]
    seq_len = tokenizer.positions_per_frame * 17 + 2 * 4 + spare
    loss, sums = loss_of(packed, tokenizer, clips, seq_len, is_packed=True, pad_id=pad_id)
    padded_loss, padded_sums = loss_of(model, tokenizer, clips, 48)
    torch.testing.assert_close(loss, padded_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, padded_sums, atol=1e-4, rtol=1e-6)
    for (name, parameter), other in zip(packed.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


def attend_with_mask(self, q_BHLD, k_BGLD, v_BGLD, bounds):
    """Attention within clips that can be compiled on a CPU. Like the kernel of GPUs, it reads bounds as a tensor."""
    B, _, L, _ = q_BHLD.shape
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q_BHLD, k_BGLD, v_BGLD))
    positions_N = torch.arange(B * L)
    clips_N = torch.bucketize(positions_N, bounds.cu_seq_q, right=True)
    mask_NN = (clips_N[:, None] == clips_N) & (positions_N[:, None] >= positions_N)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask_NN, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("architecture", ["flattened", "hierarchical"])
def test_only_the_first_step_compiles(architecture, monkeypatch):
    """Blocks and loss are compiled for all numbers of clips, frames and targets, with the attention of GPUs."""
    packing = {"attn_type": "varlen", "attn_mask_type": "block_causal"}
    (plain, tokenizer), (model, _) = built(architecture, **packing), built(architecture, **packing)
    batches = [[clip(3 + step, index) for index in range(3 + step)] for step in range(5)]
    seq_len = tokenizer.positions_per_frame * 64
    wanted = [loss_of(plain, tokenizer, clips, seq_len, is_packed=True)[0] for clips in batches]

    as_on_gpus(monkeypatch)
    monkeypatch.setattr(PackedAttention, "forward", attend_with_mask)
    counter, job_config, counts = CompileCounterWithBackend("aot_eager"), JobConfig(), []
    job_config.compile.enable, job_config.compile.backend = True, counter
    job_config.activation_checkpoint.mode = "none"  # as in the configs of 1B
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True, recompile_limit=8):  # restored after the test
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            parallelize(model, ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1), job_config)
        chunk_step = torch.compile(chunk_losses, backend=counter)
        for clips, loss in zip(batches, wanted, strict=True):
            found, _ = loss_of(model, tokenizer, clips, seq_len, is_packed=True, chunk_step=chunk_step)
            torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
            counts.append(counter.frame_count)
    # The depth decoder has blocks and output matrices of another width.
    assert counts == [2 if architecture == "flattened" else 4] * 5
    for graph in counter.graphs:  # only one size is dynamic: the number of clips, frames or targets
        inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        assert sum(isinstance(value, torch.SymInt) for value in inputs) == 1


def test_level_losses_are_those_of_a_plain_loop():
    (model, tokenizer), codes_TQ = built("flattened"), clip(6, 0)
    ids_L = tokenizer.encode(codes_TQ, is_cut=False)
    loss, sums = loss_of(model, tokenizer, [codes_TQ], 32)
    log_probs_LV = model(ids_L[None, :-1]).compute()[0].log_softmax(-1)
    expected = torch.zeros(3, 6, dtype=torch.float64)  # four levels, the end and text
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
