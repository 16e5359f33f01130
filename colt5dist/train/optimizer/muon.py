"""Muon: the momentum of a weight matrix is orthogonalised before it is applied; AdamW for all that is no such matrix.

    momentum <- mu * momentum + gradient
    update    = orthogonalised(gradient + mu * momentum)                      (Nesterov)
    weight   <- (1 - lr * decay) * weight - lr * 0.2 * sqrt(max(rows, columns)) * update

Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon),
for momentum, Newton-Schulz iteration and its coefficients, and for queries, keys and values as matrices of their own;
Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2), for weight decay and for the factor
0.2 * sqrt(max(rows, columns)): it gives the update the root mean square that AdamW's usually has, so that AdamW's
learning rate and weight decay serve both.

ZeRO gives a rank flat tensors that hold parts of matrices, and an update needs the whole matrix. So each matrix has one
rank that collects its parts, orthogonalises it, and gives each rank the update of its part:

    parts of all matrices -> all-to-all -> some whole matrices, orthogonalised -> all-to-all -> parts of all updates

On GPUs this is done in bf16, on CPUs in float32; momentum and weights are float32 throughout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that each iteration applies to the singular values."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
"""Matrices with a smaller norm are divided by this, so that zeros stay zeros."""
ADAMW_RMS = 0.2
"""Root mean square of a usual AdamW update, in units of the learning rate."""
MOMENTUM = "momentum_buffer"
"""Key of the momentum in the optimizer's state."""
ELEMENTS_AT_ONCE = 2**26
"""Elements a rank orthogonalises at once: bounds the memory that a step takes besides the states, to about 16 bytes an
element on GPUs."""


@dataclass(frozen=True)
class Matrix:
    """A weight (rows, columns) that holds one or several linear maps; its rows are in the order (outer, map, inner)."""

    rows: int
    columns: int
    outer: int = 1
    """How often the maps alternate; 1: one lies below the other."""
    num_maps: int = 1

    @property
    def num_elements(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Multiply-adds of an iteration, but for a factor."""
        rows = self.rows // self.num_maps
        return self.num_elements * min(rows, self.columns)

    @property
    def scale(self) -> float:
        """What an orthogonalised map is multiplied by, so that its root mean square is that of an AdamW update."""
        return ADAMW_RMS * math.sqrt(max(self.rows // self.num_maps, self.columns))

    @property
    def map_shape(self) -> tuple[int, int]:
        """Rows and columns of one map."""
        return self.rows // self.num_maps, self.columns

    def split(self, weights: Tensor) -> Tensor:
        """Weights like this one (k * rows * columns,) -> (k * num_maps, rows / num_maps, columns)."""
        parts = weights.view(-1, self.outer, self.num_maps, self.rows // self.num_maps // self.outer, self.columns)
        return parts.transpose(1, 2).reshape(-1, *self.map_shape)

    def join(self, maps: Tensor) -> Tensor:
        """The inverse of `split`."""
        parts = maps.view(-1, self.num_maps, self.outer, self.rows // self.num_maps // self.outer, self.columns)
        return parts.transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class Part:
    """Elements of a matrix that lie in a rank's flat tensor."""

    matrix: int
    """Number of the matrix."""
    start: int
    """First element in the flat tensor."""
    offset: int
    """First element in the flattened matrix."""
    count: int
    """Number of elements."""


class Slices:
    """Slices of flat tensors, taken in one call.

    Args:
        places: first element and number of elements of each; no two overlap.
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self._sizes: list[int] = []
        self._end = 0
        number_of = {}
        for place in sorted(places):
            start, count = place
            if start > self._end:  # nobody's
                self._sizes.append(start - self._end)
            number_of[place] = len(self._sizes)
            self._sizes.append(count)
            self._end = max(self._end, start + count)
        self._numbers = [number_of[place] for place in places]

    def of(self, flat: Tensor) -> list[Tensor]:
        """The slices of a tensor, in the order of the places."""
        pieces = flat.split_with_sizes([*self._sizes, flat.numel() - self._end])
        return [pieces[number] for number in self._numbers]


def orthogonalise(maps: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 by Newton-Schulz iterations: to about 0.7 to 1.2.

    Args:
        maps: (k, rows, columns), bf16 or float32.

    Returns:
        The same shape and type.
    """
    a, b, c = COEFFICIENTS
    is_tall = maps.shape[-2] > maps.shape[-1]
    x = maps.mT if is_tall else maps
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp_min(SMALLEST_NORM).to(maps.dtype)  # makes no float32 copy of the matrices
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalise_all(groups: Sequence[tuple[Matrix, Tensor]]) -> list[Tensor]:
    """Orthogonalise and scale matrices, those whose maps have one shape together.

    Args:
        groups: weights of one kind, k of them, with their elements (k * rows * columns,).

    Returns:
        The updates of each group, (k * rows * columns,).
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, (matrix, _) in enumerate(groups):
        by_shape.setdefault(matrix.map_shape, []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in by_shape.values():
        maps = [groups[number][0].split(groups[number][1]) for number in numbers]
        done = orthogonalise(torch.cat(maps)) * groups[numbers[0]][0].scale
        for number, own in zip(numbers, done.split([len(part) for part in maps]), strict=True):
            found[number] = groups[number][0].join(own)
    return [found[number] for number in range(len(groups))]


def owners(matrices: Sequence[Matrix], num_ranks: int) -> list[int]:
    """Which rank orthogonalises which matrix, such that all have about as much to do; the same on every rank."""
    load = [0] * num_ranks
    found = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: -matrices[number].cost):
        found[number] = load.index(min(load))
        load[found[number]] += matrices[number].cost
    return found


class Exchange:
    """Matrices whose elements are spread over the flat tensors of the ranks, and one rank for each that sees it whole.

    Args:
        matrices: the matrices, the same on every rank.
        parts: what each rank holds of them; only one entry: this rank holds all, and nothing is exchanged.
        rank: this rank's place in `parts`.
    """

    def __init__(self, matrices: Sequence[Matrix], parts: Sequence[Sequence[Part]], rank: int) -> None:
        self.is_alone = len(parts) == 1
        owner = owners(matrices, len(parts))
        kinds = {matrix: kind for kind, matrix in enumerate(dict.fromkeys(matrices))}
        # those of one kind lie beside each other where they are orthogonalised
        self.mine = sorted(
            (number for number, of in enumerate(owner) if of == rank), key=lambda number: kinds[matrices[number]]
        )
        groups = [(kind, len(list(of))) for kind, of in groupby(matrices[number] for number in self.mine)]
        self._kinds = [kind for kind, _ in groups]
        self._kind_sizes = [kind.num_elements * number for kind, number in groups]
        sizes = [matrices[number].num_elements for number in self.mine]
        starts = dict(zip(self.mine, accumulate(sizes, initial=0), strict=False))
        to_send = [[part for part in parts[rank] if owner[part.matrix] == other] for other in range(len(parts))]
        to_receive = [[part for part in of_other if owner[part.matrix] == rank] for of_other in parts]
        sent = [(part.start, part.count) for to in to_send for part in to]
        received = [(starts[part.matrix] + part.offset, part.count) for of in to_receive for part in of]
        self._sent, self._received = Slices(sent), Slices(received)
        self._sent_sizes, self._received_sizes = [count for _, count in sent], [count for _, count in received]
        self._num_sent = [sum(part.count for part in to) for to in to_send]
        self._num_received = [sum(part.count for part in of) for of in to_receive]

    def step(self, gradient: Tensor, weights: Tensor, lr: float) -> None:
        """Orthogonalise the matrices of a tensor, and apply the updates; collective.

        Args:
            gradient: this rank's flat tensor of what is orthogonalised, float32.
            weights: its flat tensor of weights, float32, of the same size.
            lr: learning rate.
        """
        dtype = torch.bfloat16 if gradient.is_cuda else torch.float32
        values = self._to_owners(_joined(self._sent.of(gradient), like=gradient).to(dtype))
        whole = values.new_empty(sum(self._kind_sizes))
        if self._received_sizes:
            torch._foreach_copy_(self._received.of(whole), list(values.split_with_sizes(self._received_sizes)))
        groups = zip(self._kinds, whole.split_with_sizes(self._kind_sizes), strict=True)
        done = _joined(orthogonalise_all(list(groups)), like=whole)
        updates = self._from_owners(_joined(self._received.of(done), like=whole)).float()
        if self._sent_sizes:
            pieces = updates.split_with_sizes(self._sent_sizes)
            torch._foreach_add_(self._sent.of(weights), list(pieces), alpha=-lr)

    def _to_owners(self, values: Tensor) -> Tensor:
        return self._all_to_all(values, self._num_sent, self._num_received)

    def _from_owners(self, values: Tensor) -> Tensor:
        return self._all_to_all(values, self._num_received, self._num_sent)

    def _all_to_all(self, values: Tensor, num_sent: list[int], num_received: list[int]) -> Tensor:
        if self.is_alone:
            return values
        received = values.new_empty(sum(num_received))
        dist.all_to_all_single(received, values, num_received, num_sent)
        return received


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the other parameters.

    Before the first step `place` has to say which part of which matrix each tensor holds. A step uses up the gradients
    of the matrices.

    Args:
        matrices: the parameters that are Muon's; ZeRO puts flat tensors in their place.
        others: the parameters that are AdamW's; they are not decayed.
        lr: learning rate of both.
        momentum: decay rate of Muon's momentum.
        weight_decay: decoupled weight decay of the matrices.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        other_groups: further parameter groups that are AdamW's.
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        other_groups: Sequence[dict[str, Any]] = (),
    ) -> None:
        groups = [{"params": list(others), "weight_decay": 0.0}, *other_groups]
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        own = {"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum, "is_muon": True}
        super().__init__([own, *self._adamw.param_groups], {"lr": lr})
        self._exchanges: dict[Tensor, list[Exchange]] = {}

    def place(self, flat: Tensor, matrices: Sequence[Matrix], parts: Sequence[Sequence[Part]], rank: int) -> None:
        """Say what a tensor of the matrices' group holds.

        Args:
            flat: the tensor that is stepped on; of any shape, contiguous.
            matrices: the matrices of which it, or its like on another rank, holds parts.
            parts: what each rank's tensor holds of them; only one entry: this one holds all.
            rank: this rank's place in `parts`.
        """
        total = sum(matrix.num_elements for matrix in matrices)
        num_rounds = max(1, math.ceil(total / (ELEMENTS_AT_ONCE * len(parts))))
        self._exchanges[flat] = []
        for first in range(num_rounds):
            # with a stride: a rank holds neighbouring matrices, and every rank should have something to send
            chosen = {number: place for place, number in enumerate(range(first, len(matrices), num_rounds))}
            of_round = [
                [Part(chosen[p.matrix], p.start, p.offset, p.count) for p in of_rank if p.matrix in chosen]
                for of_rank in parts
            ]
            self._exchanges[flat].append(Exchange([matrices[number] for number in chosen], of_round, rank))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients; collective where ranks hold parts of matrices."""
        assert closure is None
        for group in self.param_groups:
            if group.get("is_muon"):
                self._step_matrices(group)
        self._adamw.param_groups = [group for group in self.param_groups if not group.get("is_muon")]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if MOMENTUM not in state:
                state["step"] = torch.zeros((), device=p.device)
                state[MOMENTUM] = torch.zeros_like(p)
            state["step"] += 1
            state[MOMENTUM].mul_(momentum).add_(p.grad)
            p.grad.add_(state[MOMENTUM], alpha=momentum)
            p.mul_(1 - lr * decay)
            gradient, weights = p.grad.view(-1), p.view(-1)
            for exchange in self._exchanges[p]:
                exchange.step(gradient, weights, lr)


def _joined(pieces: list[Tensor], like: Tensor) -> Tensor:
    """One tensor of all pieces, perhaps of none; `like` has their type."""
    return torch.cat(pieces) if pieces else like.new_empty(0)
