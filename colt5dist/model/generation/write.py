"""The loop that writes: a step at a time, with a look of the host every few steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from colt5dist.model.generation.beams import BeamSearch
from colt5dist.model.generation.constraint import Constraint
from colt5dist.model.generation.graph import RepeatedStep
from colt5dist.model.generation.sampling import Sampling
from colt5dist.model.generation.settings import GenerationSettings

LOOK_EVERY = 16
"""Steps between two looks of the host at whether all is written."""


class State(Protocol):
    """A model in the middle of its sequences."""

    def step(self, token_ids: Tensor) -> Tensor:
        """Read a token of each row, (rows,) int64; returns the logits (rows, vocab_size) of the next one."""
        ...

    def reorder(self, parents: Tensor) -> None:
        """Row i goes on from what row parents[i] (rows,) int64 has read."""
        ...


Search = Sampling | BeamSearch


def search_for(
    settings: GenerationSettings, sample_index: Tensor, logits_type: torch.dtype, constraint: Constraint | None = None
) -> Search:
    """What chooses tokens by these settings, for samples of these numbers (b,)."""
    device, b = sample_index.device, sample_index.shape[0]
    if settings.num_beams > 1:
        return BeamSearch(settings, b, device=device, dtype=logits_type, constraint=constraint)
    return Sampling(settings, b, settings.draws(sample_index), device=device, constraint=constraint)


def decode_step(state: State, search: Search) -> None:
    """One token of every row, with fixed shapes and without a look of the host: what a CUDA graph records."""
    search.update(state.step(search.tokens))
    if search.parents is not None:
        state.reorder(search.parents)


def write(step: Callable[[], None], search: Search, num_steps: int) -> None:
    """Run a step until all is written, `num_steps` times at most."""
    for number in range(1, num_steps + 1):
        step()
        if number % LOOK_EVERY == 0 and number < num_steps and bool(search.is_done()):
            return


def write_from_start(state: State, search: Search, num_steps: int, *, graph: bool = True) -> Tensor:
    """Write from the start token on.

    Args:
        state: a model that has read no token.
        search: what chooses the tokens.
        num_steps: most tokens.
        graph: on a GPU, whether a step becomes a CUDA graph.

    Returns:
        What the search has written.
    """
    write(RepeatedStep(lambda: decode_step(state, search), search.tokens.device, graph=graph), search, num_steps)
    return search.result()


def without_end(written: Tensor, settings: GenerationSettings) -> Tensor:
    """Rows (b, steps) without the columns that are padding in all of them."""
    if settings.eos_id is None:
        return written
    ended = (written == settings.eos_id).to(torch.int64).cumsum(dim=1)
    # the end token itself is written too
    used = (ended == 0) | ((ended == 1) & (written == settings.eos_id))
    return written[:, : int(used.any(dim=0).sum())]


def together(parts: Sequence[tuple[list[int], Tensor]], num_samples: int, pad_id: int) -> Tensor:
    """Rows that were written for groups of samples, in the order of the samples.

    Args:
        parts: numbers of samples, and (their number * n, steps) of each group, with one n for all groups.
        num_samples: of all groups.
        pad_id: fills the shorter ones.
    """
    widest = max(written.shape[1] for _, written in parts)
    per_sample = parts[0][1].shape[0] // len(parts[0][0])
    out = parts[0][1].new_full((num_samples, per_sample, widest), pad_id)
    for samples, written in parts:
        out[samples, :, : written.shape[1]] = written.unflatten(0, (-1, per_sample))
    return out.flatten(0, 1)


@contextmanager
def for_inference(model: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradients, no dropout, the type of the weights whatever autocast is on, and kernels on the model's GPU."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
            yield
    finally:
        for module in training:
            module.training = True


def sample_numbers(sample_index: Any, ids: Tensor) -> Tensor:
    """(b,) int64: the samples' numbers as given, checked by the caller, or 0 .. b - 1."""
    return torch.arange(ids.shape[0], device=ids.device) if sample_index is None else sample_index
