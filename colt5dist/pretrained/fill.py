"""Filling the blanks of a text by the sentinels that span corruption has taught: `fill(model, tokenizer, text)`."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.model.generation import Constraint
from colt5dist.ops.checks import check_counts
from colt5dist.pretrained.write_texts import padded, text_after, until_end

BLANK = re.compile(r"<(\d+)>|_{3,}")


class Filled(NamedTuple):
    """A text whose blanks are filled."""

    text: str
    """The whole text; what is not a blank is as it was, to the character."""
    answers: tuple[str, ...]
    """What stands in each blank."""
    num_tokens: tuple[int, ...]
    """Tokens that were written for each blank; max_answer_tokens where the answer may have been cut there."""


def fill(model: CoLT5 | CausalCoLT5, tokenizer: ModelTokenizer, text: str, **settings: Any) -> str:
    """Fill the blanks of a text; `fill_texts` does it with many, and says what a blank is.

    Args:
        model: from `colt5dist.load`, an encoder-decoder that span corruption has trained.
        tokenizer: its tokenizer.
        text: with blanks `<0>`, `<1>`, ... or `___`.
        settings: those of `fill_texts`, for instance max_answer_tokens.

    Returns:
        The text with its blanks filled; what is not a blank is as it was.

    Raises:
        ValueError: the text has no blank, too many, or one out of order; or a setting is wrong.
    """
    return fill_texts(model, tokenizer, [text], **settings)[0][0].text


def fill_texts(
    model: CoLT5 | CausalCoLT5,
    tokenizer: ModelTokenizer,
    texts: Sequence[str],
    *,
    max_answer_tokens: int = 32,
    mode: str | None = None,
    first_index: int = 0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    **settings: Any,
) -> list[list[Filled]]:
    """Fill the blanks of some texts.

    A blank is `<0>`, `<1>`, ..., in this order, or `___` (three underscores or more). Each becomes a sentinel of the
    input, and what is written is constrained to the form that the model was trained on: each sentinel in turn, followed
    by one token or more of text.

    Args:
        model: from `colt5dist.load`, an encoder-decoder that span corruption has trained.
        tokenizer: its tokenizer.
        texts: one batch.
        max_answer_tokens: most tokens in a blank.
        mode: the mode token that the input begins with; None: R, ordinary spans, if the model knows mode tokens.
        first_index: number of the first text in the whole data set; draws depend on it and not on the batch.
        num_beams: as in `CoLT5.generate`.
        num_return_sequences: as in `CoLT5.generate`.
        settings: the other settings of `CoLT5.generate`, without max_new_tokens.

    Returns:
        For each text its num_return_sequences results.

    Raises:
        ConfigError: the model is decoder-only, or a text has no blank, more than there are sentinels, one out of order,
            or nothing else.
        ValueError: a setting is wrong.
    """
    if isinstance(model, CausalCoLT5):
        raise ConfigError("fill: the model is decoder-only, it only continues texts; use an encoder-decoder")
    check_counts(max_answer_tokens=max_answer_tokens, num_beams=num_beams, num_return_sequences=num_return_sequences)
    beginning = []
    if mode is not None or tokenizer.num_modes:
        beginning = [tokenizer.mode_id("R" if mode is None else mode)]
    cut = [pieces_of(text, tokenizer.num_sentinels, number) for number, text in enumerate(texts, start=first_index)]
    encoded = [[tokenizer.tokenizer.encode(piece).tolist() if piece else [] for piece in pieces] for pieces in cut]
    rows = [[*beginning, *joined(pieces, tokenizer), tokenizer.eos_id] for pieces in encoded]
    input_ids, mask = padded(rows, tokenizer.pad_id, model)
    num_blanks = torch.tensor([len(pieces) - 1 for pieces in cut], device=input_ids.device)
    each = num_beams if num_beams > 1 else num_return_sequences
    written = model.generate(
        input_ids,
        input_mask=mask,
        # every sentinel, every answer, the end token
        max_new_tokens=max(len(pieces) - 1 for pieces in cut) * (1 + max_answer_tokens) + 1,
        sample_index=torch.arange(first_index, first_index + len(texts), device=input_ids.device),
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        constraint=Constraint(
            num_blanks.repeat_interleave(each),
            answer_tokens=max_answer_tokens,
            is_text=text_ids(tokenizer, model.config.vocab_size).to(input_ids.device),
            first_sentinel=tokenizer.first_sentinel,
            eos_id=tokenizer.eos_id,
        ),
        **settings,
    ).tolist()
    return [
        [
            put_back(pieces, encoded[number], answers_in(until_end(ids, tokenizer.eos_id), tokenizer), tokenizer)
            for ids in written[number * num_return_sequences : (number + 1) * num_return_sequences]
        ]
        for number, pieces in enumerate(cut)
    ]


def pieces_of(text: str, num_sentinels: int, number: int = 0) -> list[str]:
    """What stands before, between and after the blanks of a text.

    Args:
        text: the text.
        num_sentinels: most blanks.
        number: of the text, for the message.

    Raises:
        ConfigError: there is no blank, one too many, one out of order, or nothing else.
    """
    pieces, end, count = [], 0, 0
    for count, blank in enumerate(BLANK.finditer(text), start=1):
        if blank[1] is not None and int(blank[1]) != count - 1:
            remedy = f"<{count - 1}> comes there; number the blanks in their order, or write ___"
            raise ConfigError(f"text {number}: blank {blank[0]} is out of order, {remedy}")
        pieces.append(text[end : blank.start()])
        end = blank.end()
    if not count:
        raise ConfigError(f"text {number}: has no blank; write <0>, <1>, ... or ___ where text is missing")
    if count > num_sentinels:
        raise ConfigError(
            f"text {number}: has {count} blanks, but the model has {num_sentinels} sentinels; leave fewer blanks"
        )
    pieces.append(text[end:])
    if not "".join(pieces).strip():
        raise ConfigError(f"text {number}: has no text beside its blanks; give some")
    return pieces


def joined(pieces: Sequence[Sequence[int]], tokenizer: ModelTokenizer) -> list[int]:
    """Ids of pieces with sentinels between them."""
    ids = list(pieces[0])
    for number, piece in enumerate(pieces[1:]):
        ids += [tokenizer.sentinel_id(number), *piece]
    return ids


def text_ids(tokenizer: ModelTokenizer, vocab_size: int) -> torch.Tensor:
    """(vocab_size,) bool: the ids that stand for text."""
    is_text = torch.zeros(vocab_size, dtype=torch.bool)
    lengths = torch.from_numpy(tokenizer.tokenizer.byte_lengths)
    is_text[: len(lengths)] = lengths > 0
    return is_text


def answers_in(ids: Sequence[int], tokenizer: ModelTokenizer) -> list[list[int]]:
    """Ids that follow each sentinel."""
    answers: list[list[int]] = []
    for token in ids:
        if token >= tokenizer.first_sentinel:
            answers.append([])
        else:
            answers[-1].append(token)
    return answers


def put_back(
    pieces: Sequence[str], ids: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], tokenizer: ModelTokenizer
) -> Filled:
    """The text with its answers; ids are those of the pieces."""
    texts = [text_after(tokenizer, before, answer) for before, answer in zip(ids[:-1], answers, strict=True)]
    whole = pieces[0] + "".join(answer + piece for answer, piece in zip(texts, pieces[1:], strict=True))
    return Filled(whole, tuple(texts), tuple(map(len, answers)))
