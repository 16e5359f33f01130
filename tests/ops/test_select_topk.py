"""select_topk: the largest scores, ties to the smaller position, masked last, ascending; the same on every device."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5dist.errors import ConfigError
from colt5dist.ops.select_topk import IMPLEMENTATIONS, select_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])


def by_sorting(scores, num_tokens, mask):
    """The definition, row by row."""
    picked = []
    for row, valid in zip(scores.tolist(), mask.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (not valid[i], -row[i] if valid[i] else 0.0, i))
        picked.append(sorted(order[:num_tokens]))
    return torch.tensor(picked, dtype=torch.int64).view(len(picked), num_tokens)


@settings(max_examples=60, deadline=None, database=None)
@given(st.data())
def test_against_sorting(data):
    n = data.draw(st.integers(1, 20))
    score = st.sampled_from([-1e30, -1.0, -0.0, 0.0, 0.5, 0.5000001, 3.0, 3e38])
    scores = torch.tensor(data.draw(st.lists(st.lists(score, min_size=n, max_size=n), min_size=1, max_size=3)))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in scores])
    num_tokens = data.draw(st.integers(0, n))
    for implementation in IMPLEMENTATIONS:
        select = partial(select_topk, scores.to(DEVICE), num_tokens, implementation=implementation)
        assert torch.equal(select(mask.to(DEVICE)).cpu(), by_sorting(scores, num_tokens, mask))
        assert torch.equal(select().cpu(), by_sorting(scores, num_tokens, torch.ones_like(mask)))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_long_rows_with_ties(implementation, dtype):
    scores = torch.randn(2, 3, 5000).to(dtype)  # half precision: thousands of ties
    mask = torch.rand(2, 3, 5000) > 0.1
    actual = select_topk(scores.to(DEVICE), 1111, mask.to(DEVICE), implementation=implementation).cpu()
    expected = by_sorting(
        scores.float().view(6, -1) if dtype != torch.float64 else scores.view(6, -1), 1111, mask.view(6, -1)
    )
    assert actual.dtype == torch.int64 and torch.equal(actual.view(6, -1), expected)


@every_implementation
def test_rows_with_fewer_valid_than_wanted(implementation):
    scores = torch.tensor([[0.0, 5.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    mask = torch.tensor([[False, False, True, False], [False] * 4], device=DEVICE)
    assert select_topk(scores, 2, mask, implementation=implementation).tolist() == [[0, 2], [0, 1]]


@every_implementation
def test_nan_gives_positions_that_exist(implementation):
    scores = torch.tensor([[float("nan"), 1.0, float("nan")], [float("nan")] * 3], device=DEVICE)
    assert select_topk(scores, 2, implementation=implementation).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 4)], ids=str)
def test_empty(shape):
    assert select_topk(torch.zeros(shape), 0).shape == (*shape[:-1], 0)
    assert select_topk(torch.zeros(shape), 2).shape == (*shape[:-1], 2)


def test_strides_do_not_matter():
    scores = torch.randn(50, 4, 2)
    assert torch.equal(select_topk(scores[..., 1].T, 7), select_topk(scores[..., 1].T.contiguous(), 7))


@every_implementation
def test_strides_of_the_mask_do_not_matter(implementation):
    scores = torch.randn(4, 50, device=DEVICE)
    mask = (torch.rand(50, 4, device=DEVICE) > 0.3).T
    expected = select_topk(scores, 7, mask.contiguous(), implementation="reference")
    assert torch.equal(select_topk(scores, 7, mask, implementation=implementation), expected)
    assert torch.equal(
        select_topk(scores[:, ::2], 3, implementation=implementation), select_topk(scores[:, ::2].clone(), 3)
    )


def test_opcheck():
    operator = torch.ops.colt5dist.select_topk.default
    torch.library.opcheck(operator, (torch.randn(2, 9), 4, torch.rand(2, 9) > 0.3, False))
    torch.library.opcheck(operator, (torch.randn(9), 4, None, False))


def test_compiles_without_a_gradient():
    scores = torch.randn(2, 9, requires_grad=True)
    compiled = torch.compile(lambda scores: select_topk(scores, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), select_topk(scores, 4))
    assert not compiled(scores).requires_grad


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_tokens": 6}, "num_tokens"),
        ({"num_tokens": -1}, "num_tokens"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 5)}, "mask"),
    ],
    ids=["too-many", "negative", "mask-shape", "mask-type"],
)
def test_wrong_arguments_are_named(change, named):
    with pytest.raises(ConfigError, match=f"^{named}:"):
        select_topk(**{"scores": torch.zeros(2, 5), "num_tokens": 2, **change})
