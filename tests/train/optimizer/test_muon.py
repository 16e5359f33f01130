"""Muon's parts in one process; at ZeRO stages it is tested in tests/train/engine/test_muon_and_average.py."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colt5dist.train.optimizer import muon
from colt5dist.train.optimizer.muon import Exchange, Matrix, Muon, Part, orthogonalise, owners


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 16, 96), (2, 96, 16)], ids=str)
def test_singular_values_come_near_1(shape: tuple[int, int, int]) -> None:
    """Whatever the scale; directions stay, a matrix of a stack does not depend on the others, and zeros stay zeros."""
    maps = 1e-4 * torch.randn(shape)
    done = orthogonalise(maps)
    values = torch.linalg.svdvals(done)
    assert values.min() > 0.3 and values.max() < 1.3
    torch.testing.assert_close(orthogonalise(maps[1:2] * 1e4), done[1:2], rtol=1e-3, atol=1e-3)
    left, _, right = torch.linalg.svd(maps, full_matrices=False)
    off_diagonal = left.mT @ done @ right.mT - torch.diag_embed((left.mT @ done @ right.mT).diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-2
    assert not orthogonalise(torch.zeros(shape)).any()
    in_bf16 = orthogonalise(maps.bfloat16())  # as on GPUs
    assert in_bf16.dtype is torch.bfloat16 and (in_bf16 - done).norm() < 0.05 * done.norm()


def test_a_step_is_that_of_pytorch() -> None:
    """Two steps of torch.optim.Muon, which iterates in bf16 (8 bits), with the factor that fits AdamW's rate."""
    start, gradients = torch.randn(24, 64), torch.randn(2, 24, 64)
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    weight, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    other = torch.nn.Parameter(torch.zeros(3))
    ours = Muon([weight], [other], betas=(0.9, 0.95), eps=1e-8, **settings)
    ours.place(weight, [Matrix(24, 64)], [[Part(0, 0, 0, weight.numel())]], rank=0)
    published = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for gradient in gradients:
        weight.grad, theirs.grad, other.grad = gradient.clone(), gradient.clone(), torch.ones(3)
        ours.step()
        published.step()
    assert (weight - start).norm() > 0.1
    assert (weight - theirs).norm() < 0.02 * (weight - start).norm()
    assert other.tolist() == pytest.approx([-0.2] * 3)  # AdamW: the rate in each step


def muon_of(flat: torch.nn.Parameter, matrices: list[Matrix], parts: list[Part]) -> Muon:
    """Muon for a flat tensor of which one rank holds all; nothing is decayed."""
    other = torch.nn.Parameter(torch.zeros(1, device=flat.device))
    optimizer = Muon([flat], [other], lr=0.1, momentum=0.9, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-8)
    optimizer.place(flat, matrices, [parts], rank=0)
    return optimizer


class CountOperators(TorchDispatchMode):
    """Counts what PyTorch is told to do, which on a GPU is what the host's time goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_layers_need_no_more_operators() -> None:
    counts = []
    for layers in (2, 40):
        matrices = [Matrix(16, 8), Matrix(24, 8, num_maps=3), Matrix(16, 8, outer=2, num_maps=2)] * layers
        sizes = [matrix.num_elements for matrix in matrices]
        parts = [Part(number, sum(sizes[:number]), 0, size) for number, size in enumerate(sizes)]
        flat = torch.nn.Parameter(torch.randn(sum(sizes)))
        optimizer = muon_of(flat, matrices, parts)
        flat.grad = torch.randn(sum(sizes))
        with CountOperators() as operators:
            optimizer.step()
        counts.append(operators.count)
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_on_a_cpu() -> None:
    """Of matrices of several kinds, some between elements that are no matrix's, in bf16 there and float32 here."""
    matrices = [Matrix(64, 32), Matrix(96, 32, num_maps=3), Matrix(64, 32), Matrix(64, 32, outer=4, num_maps=2)]
    sizes = [matrix.num_elements for matrix in matrices]
    parts = [Part(number, 5 + sum(sizes[:number]) + number, 0, size) for number, size in enumerate(sizes)]
    start, gradient = torch.randn(sum(sizes) + 20), torch.randn(sum(sizes) + 20)
    found = []
    for device in ("cpu", "cuda"):
        flat = torch.nn.Parameter(start.to(device, copy=True))
        optimizer = muon_of(flat, matrices, parts)
        for _ in range(2):
            flat.grad = gradient.to(device, copy=True)
            optimizer.step()
        found.append(flat.detach().cpu())
    assert (found[1] - found[0]).norm() < 0.05 * (found[0] - start).norm()
    assert torch.equal(found[1][:5], start[:5]) and (found[0] - start).norm() > 0.1


def test_rows_of_maps_are_found_again() -> None:
    """Keys and values of two heads alternate; queries, keys and values lie below each other."""
    weight = torch.arange(8.0).repeat_interleave(3)
    heads = Matrix(8, 3, outer=2, num_maps=2)
    assert heads.split(weight)[:, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    stacked = Matrix(8, 3, num_maps=4)
    assert stacked.split(weight)[:, :, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for matrix in (heads, stacked):
        assert torch.equal(matrix.join(matrix.split(weight)), weight)
        two = torch.cat([weight, -weight])  # of one kind: one after the other
        assert torch.equal(matrix.split(two), torch.cat([matrix.split(weight), -matrix.split(weight)]))
        assert torch.equal(matrix.join(matrix.split(two)), two)


def test_ranks_share_the_work() -> None:
    matrices = [Matrix(64, 64)] * 6 + [Matrix(256, 64)] * 5 + [Matrix(16, 64)] * 9
    owner = owners(matrices, 4)
    load = [sum(m.cost for m, of in zip(matrices, owner, strict=True) if of == rank) for rank in range(4)]
    assert max(load) <= 1.5 * sum(load) / 4
    assert len(set(owners([Matrix(8, 8)] * 2, 3))) == 2  # a rank may have none


def test_rounds_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat tensor of five matrices and padding, in one round and in five."""
    matrices = [Matrix(8, 4), Matrix(4, 4), Matrix(6, 4, num_maps=3), Matrix(8, 4, 2, 2), Matrix(4, 12)]
    sizes = [matrix.num_elements for matrix in matrices]
    parts = [Part(number, sum(sizes[:number]), 0, size) for number, size in enumerate(sizes)]
    start, gradient = torch.randn(sum(sizes) + 3), torch.randn(sum(sizes) + 3)
    found = []
    for at_once, num_rounds in ((2**20, 1), (31, 5)):
        monkeypatch.setattr(muon, "ELEMENTS_AT_ONCE", at_once)
        flat = torch.nn.Parameter(start.clone())
        optimizer = muon_of(flat, matrices, parts)
        assert len(optimizer._exchanges[flat]) == num_rounds
        flat.grad = gradient.clone()
        optimizer.step()
        found.append(flat.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][-3:], start[-3:]) and not torch.isclose(found[0][:-3], start[:-3]).any()


def test_parts_of_two_ranks_are_sent_to_the_owners() -> None:
    """What each rank sends to and receives from each: a matrix that is cut, and one that lies on one rank."""
    matrices = [Matrix(4, 4), Matrix(2, 4)]
    parts = [[Part(0, 0, 0, 10)], [Part(0, 0, 10, 6), Part(1, 6, 0, 8)]]
    first, second = (Exchange(matrices, parts, rank) for rank in (0, 1))
    assert (first.mine, second.mine) == ([0], [1])
    assert (first._num_sent, first._num_received) == ([10, 0], [10, 6])
    assert (second._num_sent, second._num_received) == ([6, 8], [0, 8])
