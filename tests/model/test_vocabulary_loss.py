"""The chunked loss against cross-entropy over all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from colt5dist.model import vocabulary_loss
from colt5dist.model.vocabulary_loss import VocabularyLoss

B, T, D, V = 2, 9, 16, 50


def arguments(dtype=torch.float64):
    torch.manual_seed(0)
    module = VocabularyLoss(D, V, std=0.5).to(dtype)
    hidden = torch.randn(B, T, D, dtype=dtype).requires_grad_()
    mask = torch.arange(T)[None] < torch.tensor([[T], [4]])
    return module, hidden, torch.randint(0, V, (B, T)), mask


@pytest.mark.parametrize("chunk_logits", [1, 4 * V, 7 * V, 2**26], ids=["1 token", "4 tokens", "7 tokens", "all"])
def test_equals_cross_entropy(chunk_logits, monkeypatch):
    monkeypatch.setattr(vocabulary_loss, "MAX_CHUNK_LOGITS", chunk_logits)
    module, hidden, targets, mask = arguments()
    loss, z_loss = module(hidden, targets, mask)
    logits = hidden @ module.weight.t()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T) * mask
    expected_z = logits.logsumexp(-1).square() * mask
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(z_loss, expected_z, rtol=0, atol=1e-11)
    assert loss[~mask].count_nonzero() == 0 == z_loss[~mask].count_nonzero()
    weights, z_weights = torch.randn(2, B, T, dtype=torch.float64)
    inputs = (hidden, module.weight)
    actual = torch.autograd.grad((loss * weights + z_loss * z_weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights + expected_z * z_weights).sum(), inputs)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=0, atol=1e-10)
    assert actual[0][~mask].count_nonzero() == 0


def test_no_tensor_of_all_tokens_by_vocabulary_is_kept(monkeypatch):
    monkeypatch.setattr(vocabulary_loss, "MAX_CHUNK_LOGITS", 4 * V)
    module, hidden, targets, mask = arguments(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(hidden, targets, mask)
    assert kept and max(kept) <= max(V * D, B * T * D) < B * T * V


def test_without_a_mask_every_token_counts():
    module, hidden, targets, _ = arguments()
    loss, z_loss = module(hidden, targets, None)
    assert (loss > 0).all() and (z_loss > 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_logits_give_float32_losses(autocast, monkeypatch):
    monkeypatch.setattr(vocabulary_loss, "MAX_CHUNK_LOGITS", 4 * V)
    module, hidden, targets, mask = arguments(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, z_loss = module(hidden, targets, mask)
    assert loss.dtype == z_loss.dtype == torch.float32
    exact = F.cross_entropy(
        (hidden.double() @ module.weight.double().t()).flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(loss.double()[mask], exact.view(B, T)[mask], rtol=0, atol=0.05)
    loss.sum().backward()
    assert module.weight.grad.dtype == module.weight.dtype and hidden.grad.dtype == hidden.dtype
