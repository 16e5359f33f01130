"""What may be written next: answers to the blanks of a text, each after its sentinel, in order."""

import torch
from torch import Tensor


class Constraint:
    """Allows a row's `sentinel 0, answer 0, sentinel 1, answer 1, ..., end token` and nothing else.

    This is the target of span corruption (Raffel et al., arXiv 1910.10683). An answer has at least one token. When it
    has `answer_tokens`, the next sentinel follows, or the end token.

    Args:
        num_blanks: (rows,) int64, blanks of each row's text, 1 or more.
        answer_tokens: most tokens of an answer.
        is_text: (vocab_size,) bool, the ids that an answer may have.
        first_sentinel: id of sentinel 0.
        eos_id: the end token.
    """

    def __init__(
        self, num_blanks: Tensor, *, answer_tokens: int, is_text: Tensor, first_sentinel: int, eos_id: int
    ) -> None:
        self._num_blanks, self._answer_tokens = num_blanks, answer_tokens
        self._is_text = is_text
        self._first_sentinel, self._eos_id = first_sentinel, eos_id
        self._ids = torch.arange(is_text.shape[0], device=is_text.device)
        self._sentinels = torch.zeros_like(num_blanks)
        self._in_answer = torch.full_like(num_blanks, answer_tokens)

    def apply(self, logits: Tensor, step: Tensor) -> Tensor:
        """Logits (rows, vocab_size), -inf where an id is not allowed in this step, (1,) int64."""
        text = (step > 0) & (self._in_answer < self._answer_tokens)
        mark = torch.where(self._sentinels < self._num_blanks, self._first_sentinel + self._sentinels, self._eos_id)
        is_mark = (self._ids == mark.unsqueeze(1)) & (self._in_answer > 0).unsqueeze(1)
        allowed = is_mark | (self._is_text & text.unsqueeze(1))
        return logits.masked_fill(~allowed, float("-inf"))

    def read(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Take the newest tokens (rows,) into account, each of which follows what row parents[i] has written."""
        sentinels, in_answer = self._sentinels, self._in_answer
        if parents is not None:
            sentinels, in_answer = sentinels[parents], in_answer[parents]
        is_text = self._is_text[tokens]
        self._in_answer.copy_(torch.where(is_text, in_answer + 1, 0))
        self._sentinels.copy_(sentinels + (tokens == self._first_sentinel + sentinels))
