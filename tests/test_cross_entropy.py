"""The chunked loss and its gradient equal PyTorch's cross-entropy over all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llama_mimi.model import cross_entropy as module
from llama_mimi.model.cross_entropy import cross_entropy, pending_logits, vocabulary_targets
from llama_mimi.tokens.tokenizer import IGNORE_INDEX
from llama_mimi.tokens.vocabulary import AudioVocabulary

V, D = 23, 8
VOCABULARY = AudioVocabulary(base=5, codebook_size=8, num_quantizers=2)  # 23 entries


def case(B, L, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_BLD = (scale * torch.randn(B, L, D, generator=generator)).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels_BL = torch.randint(V, (B, L), generator=generator)
    labels_BL[torch.rand(B, L, generator=generator) < 0.3] = IGNORE_INDEX
    return hidden_BLD, weight_VD, labels_BL


def in_chunks(hidden_BLD, weight_VD, labels_BL, rows, monkeypatch, weights_L=None, step=None):
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * 4 * V)
    monkeypatch.setattr(module, "CHUNK_MULTIPLE", 1)
    targets = vocabulary_targets(labels_BL, VOCABULARY)
    weights_N = (torch.ones(labels_BL.numel()) if weights_L is None else weights_L)[targets.positions_N]
    return cross_entropy(pending_logits(hidden_BLD, weight_VD), targets, weights_N, step)


def plain(hidden_BLD, weight_VD, labels_BL):
    logits_NV = F.linear(hidden_BLD, weight_VD).float().flatten(0, 1)
    return F.cross_entropy(logits_NV, labels_BL.flatten(), reduction="none", ignore_index=IGNORE_INDEX)


@given(B=st.integers(1, 3), L=st.integers(1, 9), rows=st.integers(1, 30), seed=st.integers(0, 99))
def test_value_and_gradients_are_those_of_the_full_logits(B, L, rows, seed):
    hidden_BLD, weight_VD, labels_BL = case(B, L, seed)
    weights_L = torch.rand(B * L, generator=torch.Generator().manual_seed(seed)) * 4
    with pytest.MonkeyPatch.context() as monkeypatch:
        loss_sum, losses_N, _ = in_chunks(hidden_BLD, weight_VD, labels_BL, rows, monkeypatch, weights_L)
    plain_L = plain(hidden_BLD, weight_VD, labels_BL)
    torch.testing.assert_close(losses_N, plain_L[labels_BL.flatten() != IGNORE_INDEX].detach())
    wanted = (weights_L * plain_L).sum()
    torch.testing.assert_close(loss_sum, wanted)
    # The trainer divides the sum by the number of targets.
    found = torch.autograd.grad(loss_sum / 7, (hidden_BLD, weight_VD))
    torch.testing.assert_close(found, torch.autograd.grad(wanted / 7, (hidden_BLD, weight_VD)))


def test_gradients_of_long_sums_are_kept_in_float32(monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(16, 256, dtype=torch.bfloat16)
    exact = torch.autograd.grad(
        plain(hidden_BLD.double(), weight_VD.double(), labels_BL).sum(), (hidden_BLD, weight_VD)
    )
    found = torch.autograd.grad(in_chunks(hidden_BLD, weight_VD, labels_BL, 8, monkeypatch)[0], (hidden_BLD, weight_VD))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 4e-3  # half a step of bfloat16


@pytest.mark.parametrize("excess", [0.0, 200.0])  # additional logit of text tokens; exp(-200) is 0 in float32
def test_losses_over_admissible_entries_are_those_of_a_plain_loop(excess, monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(3, 20)
    with torch.no_grad():
        hidden_BLD[..., 0] = 1.0
        weight_VD[: VOCABULARY.base, 0] += excess
    labels_BL[(labels_BL < VOCABULARY.base) | (labels_BL == VOCABULARY.audio_start_id)] = VOCABULARY.audio_end_id
    _, losses_N, admissible_N = in_chunks(hidden_BLD, weight_VD, labels_BL, 7, monkeypatch)
    wanted = []
    for hidden_D, label in zip(hidden_BLD.flatten(0, 1).double(), labels_BL.flatten().tolist(), strict=True):
        if label == IGNORE_INDEX:
            continue
        level = 0 if label == VOCABULARY.audio_end_id else (label - 5) % 2
        ids = [5 + 2 * code + level for code in range(8)] + [VOCABULARY.audio_end_id] * (level == 0)
        log_probs = (weight_VD[ids].double() @ hidden_D).log_softmax(0)
        wanted.append(-log_probs[ids.index(label)].item())
    assert admissible_N.tolist() == pytest.approx(wanted, abs=1e-4 if excess else 1e-5)
    assert bool((admissible_N < losses_N).all()) and not admissible_N.requires_grad


def test_large_logits_do_not_overflow(monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(2, 6, scale=1e3)
    loss_sum, *_ = in_chunks(hidden_BLD, weight_VD, labels_BL, 5, monkeypatch)
    torch.testing.assert_close(loss_sum, plain(hidden_BLD, weight_VD, labels_BL).sum())


def test_no_targets_and_no_gradients(monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(2, 6)
    nothing_BL = torch.full_like(labels_BL, IGNORE_INDEX)
    loss_sum, losses_N, _ = in_chunks(hidden_BLD, weight_VD, nothing_BL, 5, monkeypatch)
    loss_sum.backward()
    assert loss_sum == 0 and not len(losses_N) and not weight_VD.grad.any() and not hidden_BLD.grad.any()
    with torch.no_grad():
        loss_sum, *_ = in_chunks(hidden_BLD, weight_VD, labels_BL, 5, monkeypatch)
    assert not loss_sum.requires_grad
    torch.testing.assert_close(loss_sum, plain(hidden_BLD, weight_VD, labels_BL).sum().detach())


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, *_ = in_chunks(hidden_BLD, weight_VD, labels_BL, 5, monkeypatch)
        wanted = plain(hidden_BLD, weight_VD, labels_BL).sum()
    torch.testing.assert_close(loss_sum, wanted)
    found = torch.autograd.grad(loss_sum, (hidden_BLD, weight_VD))
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (hidden_BLD, weight_VD)), rtol=2e-2, atol=2e-2)


def test_a_chunk_can_be_compiled(monkeypatch):
    hidden_BLD, weight_VD, labels_BL = case(2, 6)
    compiled = torch.compile(module.chunk_losses, backend="aot_eager", fullgraph=True)
    loss_sum, *_ = in_chunks(hidden_BLD, weight_VD, labels_BL, 4, monkeypatch, step=compiled)
    found = torch.autograd.grad(loss_sum, (hidden_BLD, weight_VD))
    wanted = plain(hidden_BLD, weight_VD, labels_BL).sum()
    torch.testing.assert_close(loss_sum, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (hidden_BLD, weight_VD)))
