"""soft_topk as an operator of PyTorch: registration, torch.compile, selective checkpointing, autocast."""

import importlib
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from colt5dist.ops.soft_topk import soft_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {
    "scalar": {"implementation": "scalar"},
    "triton": {"implementation": "triton"},
    "newton": {"implementation": "scalar", "solver": "newton"},
    "newton-triton": {"implementation": "triton", "solver": "newton"},
}
FORWARD_OPERATORS = [
    getattr(torch.ops.colt5dist, f"soft_topk_{name}_forward").default
    for name in ("scalar", "newton", "triton", "newton_triton")
]
every_operator = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def inputs(masked=True):
    scores = torch.randn(2, 13, device=DEVICE, requires_grad=True)
    k = torch.tensor([2.0, 3.5], device=DEVICE, requires_grad=True)
    return scores, k, torch.rand(2, 13, device=DEVICE) > 0.2 if masked else None


@pytest.mark.parametrize("operator", FORWARD_OPERATORS, ids=lambda operator: operator.name().split("::")[1])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_opcheck(operator, masked):
    scores, k, mask = inputs(masked)
    settings = (3.0, 0.2) if "newton" in operator.name() else (3.0, 0.2, 2.0, 0.7, 4, 2)
    torch.library.opcheck(operator, (scores, k, mask, *settings))
    torch.library.opcheck(operator, (scores, None, mask, *settings))


@every_operator
def test_compiles_into_one_graph(settings):
    def weights(scores, k, mask):
        return soft_topk(scores * 2, k, mask=mask, eps=0.3, n_iters=5, checkpoint_segments=2, **settings) * 3

    scores, k, mask = inputs()
    grad = torch.randn(2, 13, device=DEVICE)
    expected = weights(scores, k, mask)
    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    actual = compiled(scores, k, mask)
    assert torch.equal(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual, (scores, k), grad), torch.autograd.grad(expected, (scores, k), grad), strict=True
    ):
        assert torch.equal(one, other)


@every_operator
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
def test_selective_checkpointing_can_keep_the_result(monkeypatch, settings, kept):
    def policy(_context, operator, *_args, **_kwargs):
        keep = kept and operator in FORWARD_OPERATORS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def weights(scores, k):
        return soft_topk(scores.sin(), k, mask=mask, eps=0.3, n_iters=5, **settings).cos()

    scores, k, mask = inputs()
    expected = torch.autograd.grad(weights(scores, k).sum(), (scores, k))
    executed = count_forwards(monkeypatch)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    result = checkpoint(weights, scores, k, use_reentrant=False, context_fn=contexts)
    actual = torch.autograd.grad(result.sum(), (scores, k))
    assert len(executed) == (1 if kept else 2)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def count_forwards(monkeypatch):
    """A list that grows whenever a forward operator runs: each calls one of these functions once, no backward does."""
    executed = []

    def counted(function):
        return lambda *arguments: (executed.append(function), function(*arguments))[1]

    for name in ("scalar_state.output", "newton.output", "triton.empty_result", "newton_triton.empty_result"):
        module = importlib.import_module(f"colt5dist.ops.soft_topk.{name.split('.')[0]}")
        attribute = name.split(".")[1]
        monkeypatch.setattr(module, attribute, counted(getattr(module, attribute)))
    return executed


@every_operator
def test_autocast_changes_nothing(settings):
    scores, k, mask = inputs()
    weights = partial(soft_topk, mask=mask, eps=0.3, n_iters=5, **settings)
    expected = weights(scores, k)
    expected_gradients = torch.autograd.grad(expected.sum(), (scores, k))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = weights(scores, k)
        gradients = torch.autograd.grad(actual.sum(), (scores, k))
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(one, other)
