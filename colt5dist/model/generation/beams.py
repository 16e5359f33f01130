"""Beam search, with the rules of the library transformers at its default early_stopping=False.

Of the continuations of a sample's k beams the 2k likeliest are candidates. Those of the best k that end are finished:
their score is the sum of their log-probabilities over length ** length_penalty, the length counting written tokens with
the end token, and the k best finished ones are kept. The k likeliest candidates that do not end are the next beams. A
sample is done when k are finished and its best beam, scored as if it ended now, is no better than the worst of them. At
max_new_tokens every candidate ends.
"""

import torch
from torch import Tensor

from colt5dist.model.generation.constraint import Constraint
from colt5dist.model.generation.settings import GenerationSettings

NEVER = float("-inf")


class BeamSearch:
    """The beams of some samples; every tensor has a fixed shape and stays where it is.

    Args:
        settings: with num_beams above 1.
        num_samples: b; each has num_beams rows, which are neighbours.
        device: where the logits are.
        dtype: of the logits.
        constraint: which tokens are allowed; None: all.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        num_samples: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        constraint: Constraint | None = None,
    ) -> None:
        self._settings, self._constraint = settings, constraint
        b, k, steps = num_samples, settings.num_beams, settings.max_new_tokens
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        lengths = torch.arange(1, steps + 1, dtype=torch.float64, device=device)
        self._divisors = (lengths**settings.length_penalty).to(dtype)
        self._beams = torch.full((b, k, steps), settings.pad_id, device=device)
        # at first all beams of a sample are the same: only one of them goes on
        self._scores = torch.full((b, k), NEVER, dtype=dtype, device=device)
        self._scores[:, 0] = 0.0
        self._finished = self._beams.clone()
        self._finished_scores = torch.full((b, k), NEVER, dtype=dtype, device=device)
        self._open = torch.ones(b, 1, dtype=torch.bool, device=device)
        self._first_rows = torch.arange(b, device=device).unsqueeze(1) * k
        self.tokens = torch.full((b * k,), settings.pad_id, device=device)
        """(rows,) int64, the newest tokens, at first the start token."""
        self.parents: Tensor | None = torch.arange(b * k, device=device)
        """(rows,) int64, the row from which each row goes on."""

    def update(self, logits: Tensor) -> None:
        """Choose the next tokens and beams from logits (rows, vocab_size)."""
        assert self.parents is not None
        b, k, _ = self._beams.shape
        if self._constraint is not None:
            logits = self._constraint.apply(logits, self._step)
        sums = logits.log_softmax(dim=-1).view(b, k, -1) + self._scores.unsqueeze(-1)
        num_ids = sums.shape[-1]
        candidate_sums, places = sums.flatten(1).topk(2 * k, dim=-1)
        parents, tokens = places // num_ids, places % num_ids
        candidates = _pick(self._beams, parents).index_copy_(2, self._step, tokens.unsqueeze(-1))
        ends = (self._step == self._settings.max_new_tokens - 1).expand_as(tokens)
        if self._settings.eos_id is not None:
            ends = ends | (tokens == self._settings.eos_id)

        going, picked = candidate_sums.masked_fill(ends, NEVER).topk(k, dim=-1)
        divisor = self._divisors.index_select(0, self._step)
        self._finish(candidates[:, :k], (candidate_sums / divisor)[:, :k].masked_fill(~ends[:, :k], NEVER))
        self._beams.copy_(_pick(candidates, picked))
        self._scores.copy_(going)
        self.tokens.copy_(tokens.gather(1, picked).flatten())
        self.parents.copy_((self._first_rows + parents.gather(1, picked)).flatten())
        if self._constraint is not None:
            self._constraint.read(self.tokens, self.parents)
        # -inf where fewer than k are finished
        self._open &= going[:, :1] / divisor > self._finished_scores.amin(dim=1, keepdim=True)
        self._step.add_(1)

    def _finish(self, sequences: Tensor, scores: Tensor) -> None:
        """Keep the best of what is finished and of sequences (b, k, max_new_tokens) with scores (b, k)."""
        scores = torch.cat((self._finished_scores, scores.masked_fill(~self._open, NEVER)), dim=1)
        best, picked = scores.topk(self._beams.shape[1], dim=-1)
        self._finished.copy_(_pick(torch.cat((self._finished, sequences), dim=1), picked))
        self._finished_scores.copy_(best)

    def is_done(self) -> Tensor:
        """() bool: no further token changes the result."""
        return ~self._open.any()

    def result(self) -> Tensor:
        """(b * num_return_sequences, max_new_tokens) int64, the best first, padded after the end token."""
        return self._finished[:, : self._settings.num_return_sequences].flatten(0, 1)


def _pick(sequences: Tensor, numbers: Tensor) -> Tensor:
    """Sequences (b, k, steps) by their numbers (b, m) -> (b, m, steps)."""
    return sequences.gather(1, numbers.unsqueeze(-1).expand(-1, -1, sequences.shape[-1]))
