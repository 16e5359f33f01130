"""The kind of each token of a document: sentinel, number, punctuation, start of a line, and so on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.model_tokenizer import ModelTokenizer

KINDS = (
    "sentinel",
    "special",
    "line break",
    "line start",
    "number",
    "word start",
    "word rest",
    "punctuation",
    "space",
    "other",
)
"""Kinds of tokens; every token is of the first one that fits.

sentinel: the mark of a blank; special: end, pad, mode or unknown token; line break: has a line break in it; line start:
the first token of a line that is more than space; number: has a digit; word start: has a letter, and begins a word;
word rest: has a letter, and goes on with a word; punctuation: other characters than letters, digits and space; space:
nothing else; other: a part of a character.
"""
SENTINEL, SPECIAL, LINE_BREAK, LINE_START, NUMBER, WORD_START, WORD_REST, PUNCTUATION, SPACE, OTHER = range(len(KINDS))
NOT_DECODED = "\ufffd"


def token_texts(ids: Sequence[int], tokenizer: ModelTokenizer) -> list[str]:
    """Text of each token, with the space before it where the token stands for one; empty for special tokens.

    Args:
        ids: token ids.
        tokenizer: the model's tokenizer.
    """
    text = tokenizer.tokenizer
    # a tokenizer may leave out the space of a token that stands alone, so each is decoded after another one
    anchor = [int(token) for token in text.encode("a")]
    before = text.decode(anchor)
    lengths = text.byte_lengths
    texts = {}
    for token in set(ids):
        is_text = token < len(lengths) and lengths[token] > 0
        whole = text.decode([*anchor, token]) if is_text else before
        texts[token] = whole[len(before) :] if whole.startswith(before) else text.decode([token])
    return [texts[token] for token in ids]


def token_kinds(ids: Sequence[int], tokenizer: ModelTokenizer) -> NDArray[np.int8]:
    """Kind of each token of a document.

    Args:
        ids: the ids of its tokens, in order.
        tokenizer: the model's tokenizer.

    Returns:
        (tokens,) indices into KINDS.
    """
    kinds = np.empty(len(ids), dtype=np.int8)
    line_begins, previous = True, ""
    for place, (token, text) in enumerate(zip(ids, token_texts(ids, tokenizer), strict=True)):
        kind = _kind_of_text(text, previous)
        if token >= tokenizer.first_sentinel:
            kind = SENTINEL
        elif not text:
            kind = SPECIAL
        elif line_begins and kind not in (LINE_BREAK, SPACE):
            kind = LINE_START
        if kind not in (SPACE, SENTINEL, SPECIAL):
            line_begins = kind == LINE_BREAK
        kinds[place], previous = kind, text
    return kinds


def _kind_of_text(text: str, previous: str) -> int:
    """Kind of a token by its own text and that of the token before it."""
    if "\n" in text:
        return LINE_BREAK
    if NOT_DECODED in text:
        return OTHER
    if any(character.isdigit() for character in text):
        return NUMBER
    if any(character.isalpha() for character in text):
        goes_on = text[0].isalpha() and previous[-1:].isalpha()
        return WORD_REST if goes_on else WORD_START
    return PUNCTUATION if text.strip() else SPACE
