"""Tokenizes texts in this process or in several; the results have the order of the texts."""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.inputs.megatron import TokenIds
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.long_texts import LONG_BYTES, encode_long
from colt5dist.data.tokenizer import JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError

Text = str | bytes | TokenIds | Pair
"""A text, or the two of a pair; one of more than LONG_BYTES is bytes, in UTF-8. A document of a token file is ids."""
HASH_BITS = 64
BATCH_CHARACTERS = 1 << 18  # sent to a worker at once: large enough that sending costs little
BATCH_TEXTS = 256
BATCHES_AHEAD = 3  # per worker


@dataclass(frozen=True)
class Document:
    """A tokenized text."""

    tokens: NDArray[np.integer]
    """(tokens,) ids; empty if the tokenizer gives none for the text. Those of a pair: input, end token, target."""
    hash_value: int
    """A hash of the text, or of the input, with HASH_BITS bits, which decides whether it is held out."""
    digest: bytes
    """A hash of the text, or of both, with 16 bytes, which identifies duplicates."""
    num_unknown: int = 0
    """How many of the ids stand for a part of the text that the vocabulary lacks."""
    input_tokens: int = 0
    """Of a pair: ids of its input, without the end token."""
    held_out: bool | None = None
    """Whether its file says that it is held out, or that it is not; None: the hash decides."""


def encode_document(tokenizer: Tokenizer, text: Text, tick: Callable[[float], None] = lambda share: None) -> Document:
    """Tokenize one text.

    Args:
        tokenizer: makes the ids.
        text: the text; a long one is bytes, and one of a token file is ids, which are kept as they are.
        tick: called while a long text is tokenized, with the share that is done.

    Raises:
        ConfigError: the tokenizer has no ids for a part of the text, or lacks one of the ids.
        UnicodeEncodeError: the text contains half of a surrogate pair.
    """
    if isinstance(text, Pair):
        return _encode_pair(tokenizer, text, tick)
    if isinstance(text, TokenIds):
        tokens = _given_ids(tokenizer, text)
        content = tokens.astype("<u4").tobytes()
    elif isinstance(text, bytes):
        content, tokens = text, encode_long(tokenizer, text, tick)
    else:
        content, tokens = text.encode(), tokenizer.encode(text)
    num_unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    digest = hashlib.blake2b(content, digest_size=16, person=b"copy").digest()
    return Document(tokens, hash_text(content), digest, num_unknown)


def _given_ids(tokenizer: Tokenizer, text: TokenIds) -> NDArray[np.integer]:
    """The ids of a document of a token file, without the end tokens at its end: a sample adds its own."""
    assert isinstance(tokenizer, JsonTokenizer), "without the tokenizer, `prepare` refuses token files"
    outside = text.ids[(text.ids < 0) | (text.ids >= tokenizer.file_vocab_size)]
    if len(outside):
        raise ConfigError(
            f"--input: {text.place}: holds the id {outside[0]}, and the tokenizer has the ids 0 to "
            f"{tokenizer.file_vocab_size - 1}; give as --tokenizer the tokenizer.json that made the ids"
        )
    others = np.flatnonzero(~np.isin(text.ids, list(tokenizer.end_ids)))
    return text.ids[: others[-1] + 1 if len(others) else 0].astype(tokenizer.dtype)


def _encode_pair(tokenizer: Tokenizer, pair: Pair, tick: Callable[[float], None]) -> Document:
    """Tokenize a pair: its input and its target, with an end token between them.

    The only end token is the one between them, where readers find the end of the input. A pair has no tokens where
    one of its texts has none, or holds the end token, which also stands for unknown text in some vocabularies.
    """
    contents = [pair.input.encode(), pair.target.encode()]
    sides = [
        encode_long(tokenizer, content, tick) if len(content) > LONG_BYTES else tokenizer.encode(text)
        for content, text in zip(contents, (pair.input, pair.target), strict=True)
    ]
    eos = np.array([tokenizer.eos_id], dtype=tokenizer.dtype)
    tokens = np.concatenate([sides[0], eos, sides[1]]).astype(tokenizer.dtype, copy=False)
    if not all(map(len, sides)) or np.count_nonzero(tokens == tokenizer.eos_id) != 1:
        tokens = tokens[:0]
    num_unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    digest = hashlib.blake2b(digest_size=16, person=b"pair")
    for content in contents:
        digest.update(b"%d " % len(content) + content)
    return Document(tokens, hash_text(contents[0]), digest.digest(), num_unknown, len(sides[0]))


def hash_text(content: bytes) -> int:
    """Return the hash of a text (UTF-8) that decides whether it is held out."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BITS // 8).digest(), "big")


T = TypeVar("T")
Tick = Callable[[T, float], None]
"""Called with the item of a long text and the share of the text that is done."""
Encode = Callable[[Iterable[tuple[T, Text | None]], Tick[T]], Iterator[tuple[T, Document | None]]]
"""Maps pairs (anything, text) to pairs (the same, document); a text of None becomes None."""


@contextmanager
def encoder(tokenizer: Tokenizer, num_workers: int) -> Iterator[Encode]:
    """Provide a function that tokenizes a stream of texts.

    The worker processes end when this process ends, in whatever way. They should be started before a lock is taken,
    since they would inherit it.

    Args:
        tokenizer: makes the ids.
        num_workers: processes besides this one (0: this process tokenizes).

    Raises:
        ConfigError: (from the function) a worker was killed, or the tokenizer has no ids for a part of a text.
    """
    if not num_workers:
        yield lambda pairs, tick: _encode_here(tokenizer, pairs, tick)
        return
    executor = ProcessPoolExecutor(
        num_workers, mp_context=get_context("fork"), initializer=_begin_worker, initargs=(tokenizer,)
    )
    try:
        executor.submit(os.getpid).result()  # the processes are forked at the first call
        yield lambda pairs, tick: _encode_ahead(executor, tokenizer, pairs, tick, BATCHES_AHEAD * num_workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _encode_here(
    tokenizer: Tokenizer, pairs: Iterable[tuple[T, Text | None]], tick: Tick[T]
) -> Iterator[tuple[T, Document | None]]:
    for item, text in pairs:
        yield item, None if text is None else encode_document(tokenizer, text, partial(tick, item))


def _encode_ahead(
    executor: ProcessPoolExecutor,
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[T, Text | None]],
    tick: Tick[T],
    most_ahead: int,
) -> Iterator[tuple[T, Document | None]]:
    """Send batches of texts to the workers, and yield the results in the order in which they were sent.

    A long text is tokenized in this process, when all texts before it are done, so that it exists only once. So are
    ids, with which there is little to do.
    """
    ahead: deque[tuple[list[T], Future[list[Document | None]]]] = deque()
    try:
        for batch in _batches(pairs):
            if _is_alone(batch[0][1]):
                while ahead:
                    items, answer = ahead.popleft()
                    yield from zip(items, answer.result(), strict=True)
                yield from _encode_here(tokenizer, batch, tick)
                continue
            ahead.append(([item for item, _ in batch], executor.submit(_encode_batch, [text for _, text in batch])))
            if len(ahead) > most_ahead:
                items, answer = ahead.popleft()
                yield from zip(items, answer.result(), strict=True)
        while ahead:
            items, answer = ahead.popleft()
            yield from zip(items, answer.result(), strict=True)
    except BrokenProcessPool:
        raise ConfigError(
            "--workers: a worker process was killed, perhaps because memory ran out; run the command again with fewer "
            "workers, and it resumes"
        ) from None


def _is_alone(text: Text | None) -> bool:
    """Whether a text is a batch of its own."""
    return text.is_long if isinstance(text, Pair) else isinstance(text, bytes | TokenIds)


def _batches(pairs: Iterable[tuple[T, Text | None]]) -> Iterator[list[tuple[T, Text | None]]]:
    """Batches of texts; a long text, and one that is ids already, is a batch of its own."""
    batch: list[tuple[T, Text | None]] = []
    size = 0
    for item, text in pairs:
        if _is_alone(text):
            if batch:
                yield batch
            yield [(item, text)]
            batch, size = [], 0
            continue
        batch.append((item, text))
        size += len(text or "")
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer: Tokenizer | None = None  # of a worker process


def _begin_worker(tokenizer: Tokenizer) -> None:
    """Store the tokenizer, and do as `end_with_parent`."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    end_with_parent()


def end_with_parent() -> None:
    """In a child process: ignore Ctrl-C, which the parent handles, and exit when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    # a worker's queue does not notice that the parent was killed
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _encode_batch(texts: list[Text | None]) -> list[Document | None]:
    assert _tokenizer is not None
    return [None if text is None else encode_document(_tokenizer, text) for text in texts]
