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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
ELEMENTS_AT_ONCE = 2**25
"""Elements a rank orthogonalises at once: bounds the memory that a step takes besides the states."""


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

    def split(self, weight: Tensor) -> Tensor:
        """(rows * columns,) -> (num_maps, rows / num_maps, columns)."""
        parts = weight.view(self.outer, self.num_maps, -1, self.columns)
        return parts.transpose(0, 1).reshape(self.num_maps, -1, self.columns)

    def join(self, maps: Tensor) -> Tensor:
        """The inverse of `split`."""
        return maps.view(self.num_maps, self.outer, -1, self.columns).transpose(0, 1).reshape(-1)


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

    def of_flat(self, flat: Tensor) -> Tensor:
        """These elements of the flat tensor."""
        return flat[self.start : self.start + self.count]

    def of_matrix(self, flattened: Tensor) -> Tensor:
        """These elements of the flattened matrix."""
        return flattened[self.offset : self.offset + self.count]


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
    x = (x / norm.clamp_min(SMALLEST_NORM)).to(maps.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalise_all(weights: Sequence[tuple[Matrix, Tensor]]) -> list[Tensor]:
    """Orthogonalise and scale matrices, those of one shape together.

    Args:
        weights: matrices, each with its elements (rows * columns,).

    Returns:
        The updates (rows * columns,) in the same order and type.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    maps = [matrix.split(values) for matrix, values in weights]
    for number, stacked in enumerate(maps):
        by_shape.setdefault(tuple(stacked.shape[1:]), []).append(number)
    for numbers in by_shape.values():
        matrices = [weights[number][0] for number in numbers]
        done = orthogonalise(torch.cat([maps[number] for number in numbers])) * matrices[0].scale
        for number, stacked in zip(numbers, done.split([matrix.num_maps for matrix in matrices]), strict=True):
            maps[number] = stacked
    return [matrix.join(stacked) for (matrix, _), stacked in zip(weights, maps, strict=True)]


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
        self.matrices = matrices
        self.is_alone = len(parts) == 1
        owner = owners(matrices, len(parts))
        self.mine = [number for number, of in enumerate(owner) if of == rank]
        to_send = [[part for part in parts[rank] if owner[part.matrix] == other] for other in range(len(parts))]
        to_receive = [[part for part in of_other if owner[part.matrix] == rank] for of_other in parts]
        self.sent = [part for to in to_send for part in to]
        self.received = [part for of in to_receive for part in of]
        self._num_sent = [sum(part.count for part in to) for to in to_send]
        self._num_received = [sum(part.count for part in of) for of in to_receive]

    def updates(self, flat: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Orthogonalise matrices; collective.

        Args:
            flat: this rank's flat tensor, float32.

        Yields:
            This rank's parts, and the float32 update of each.
        """
        dtype = torch.bfloat16 if flat.is_cuda else torch.float32
        values = self._to_owners(_joined([part.of_flat(flat) for part in self.sent], flat, dtype))
        whole = {number: values.new_empty(self.matrices[number].num_elements) for number in self.mine}
        for part, piece in zip(self.received, values.split([part.count for part in self.received]), strict=True):
            part.of_matrix(whole[part.matrix]).copy_(piece)
        done = orthogonalise_all([(self.matrices[number], values) for number, values in whole.items()])
        whole = dict(zip(whole, done, strict=True))
        answers = _joined([part.of_matrix(whole[part.matrix]) for part in self.received], flat, dtype)
        mine = self._from_owners(answers).float()
        yield from zip(self.sent, mine.split([part.count for part in self.sent]), strict=True)

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
                pairs = list(exchange.updates(gradient))
                if pairs:
                    targets, updates = zip(*((part.of_flat(weights), update) for part, update in pairs), strict=True)
                    torch._foreach_add_(list(targets), list(updates), alpha=-lr)


def _joined(pieces: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """One tensor of all pieces, perhaps of none."""
    return torch.cat([piece.to(dtype) for piece in pieces]) if pieces else like.new_empty(0, dtype=dtype)
