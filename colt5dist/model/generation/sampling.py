"""The likeliest next token, or a draw."""

import torch
from torch import Tensor

from colt5dist.model.generation.constraint import Constraint
from colt5dist.model.generation.settings import GenerationSettings


class Sampling:
    """Writes each row by itself, greedily or by draws; every tensor has a fixed shape and stays where it is.

    Args:
        settings: without beams.
        num_samples: samples; each has num_return_sequences rows, which are neighbours.
        draws: (rows, max_new_tokens) in [0, 1), a number for each draw; None: the likeliest token.
        device: where the logits are.
        constraint: which tokens are allowed; None: all.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        num_samples: int,
        draws: Tensor | None,
        *,
        device: torch.device,
        constraint: Constraint | None = None,
    ) -> None:
        self._settings, self._draws, self._constraint = settings, draws, constraint
        rows = num_samples * settings.rows_per_sample
        self._written = torch.full((rows, settings.max_new_tokens), settings.pad_id, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tokens = torch.full((rows,), settings.pad_id, device=device)
        """(rows,) int64, the newest tokens, at first the start token."""
        self.parents: Tensor | None = None
        """Each row goes on from itself."""

    def update(self, logits: Tensor) -> None:
        """Choose the next token of each row from logits (rows, vocab_size)."""
        if self._constraint is not None:
            logits = self._constraint.apply(logits, self._step)
        if self._draws is None:
            token = logits.argmax(dim=-1)
        else:
            uniform = self._draws.index_select(1, self._step)
            token = draw(
                logits,
                uniform,
                temperature=self._settings.temperature,
                top_k=self._settings.top_k,
                top_p=self._settings.top_p,
            )
        token = token.masked_fill(self._finished, self._settings.pad_id)
        if self._constraint is not None:
            self._constraint.read(token)
        self._written.index_copy_(1, self._step, token.unsqueeze(1))
        if self._settings.eos_id is not None:
            self._finished |= token == self._settings.eos_id
        self.tokens.copy_(token)
        self._step.add_(1)

    def is_done(self) -> Tensor:
        """() bool: no further token changes the result."""
        return self._finished.all()

    def result(self) -> Tensor:
        """(b * num_return_sequences, max_new_tokens) int64, padded after the end token."""
        return self._written


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw a token of each row by a given uniform number, from the likeliest token to the least likely one.

    Args:
        logits: (rows, vocab_size).
        uniform: (rows, 1) in [0, 1).
        temperature: above 0; divides the logits first.
        top_k: then only the k largest are left; None: all.
        top_p: then only the likeliest whose probabilities first reach this sum; None: all.

    Returns:
        (rows,) int64.
    """
    scores, ids = logits / temperature, None
    if top_k is not None:
        scores, ids = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    elif top_p is not None:
        scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    # float64: so the order in which a device adds hardly ever decides
    shares = scores.double().softmax(dim=-1)
    if top_p is not None:
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, 0.0)
    reached = shares.cumsum(dim=-1)
    place = (reached <= uniform * reached[:, -1:]).sum(dim=-1, keepdim=True)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
