"""Texts to tokens, in this process or in several, and always in the order of the texts."""

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
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.tokenizer import Tokenizer
from colt5dist.errors import ConfigError

HASH_BITS = 64
BATCH_CHARACTERS = 1 << 18  # texts that go to a worker at once: large enough that sending them costs little
BATCH_TEXTS = 256
BATCHES_AHEAD = 3  # a worker


@dataclass(frozen=True)
class Document:
    """A tokenized text."""

    tokens: NDArray[np.integer]
    """(tokens,) ids; none if the tokenizer has none for the text."""
    hash_value: int
    """HASH_BITS bits of a hash of the text: decides whether it is held out."""
    digest: bytes
    """A hash that tells texts apart, 16 bytes."""


def encode_document(tokenizer: Tokenizer, text: str) -> Document:
    """Tokenize one text.

    Raises:
        ConfigError: the tokenizer has no ids for something in it.
        UnicodeEncodeError: it holds half of a surrogate pair.
    """
    content = text.encode()
    return Document(
        tokenizer.encode(text), hash_text(content), hashlib.blake2b(content, digest_size=16, person=b"copy").digest()
    )


def hash_text(content: bytes) -> int:
    """The hash of a text, as UTF-8, that decides whether it is held out."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=HASH_BITS // 8).digest(), "big")


T = TypeVar("T")
Encode = Callable[[Iterable[tuple[T, str | None]]], Iterator[tuple[T, Document | None]]]
"""Takes and gives pairs of anything and a text; the text becomes a document, None stays None."""


@contextmanager
def encoder(tokenizer: Tokenizer, num_workers: int) -> Iterator[Encode]:
    """A function that tokenizes a stream of texts, in `num_workers` processes besides this one (0: in this one).

    The processes end with this one, however it ends. They should be started before a lock is taken, which they would
    hold as well.

    Raises:
        ConfigError: (the function) a process was killed, or the tokenizer has no ids for something in a text.
    """
    if not num_workers:
        yield lambda pairs: _encode_here(tokenizer, pairs)
        return
    executor = ProcessPoolExecutor(
        num_workers, mp_context=get_context("fork"), initializer=_begin_worker, initargs=(tokenizer,)
    )
    try:
        executor.submit(os.getpid).result()  # the processes are forked at the first call
        yield lambda pairs: _encode_ahead(executor, pairs, BATCHES_AHEAD * num_workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _encode_here(tokenizer: Tokenizer, pairs: Iterable[tuple[T, str | None]]) -> Iterator[tuple[T, Document | None]]:
    for item, text in pairs:
        yield item, None if text is None else encode_document(tokenizer, text)


def _encode_ahead(
    executor: ProcessPoolExecutor, pairs: Iterable[tuple[T, str | None]], most_ahead: int
) -> Iterator[tuple[T, Document | None]]:
    """Send batches of texts to the processes, and take the answers in the order in which they were sent."""
    ahead: deque[tuple[list[T], Future[list[Document | None]]]] = deque()
    try:
        for batch in _batches(pairs):
            ahead.append(([item for item, _ in batch], executor.submit(_encode_batch, [text for _, text in batch])))
            if len(ahead) > most_ahead:
                items, answer = ahead.popleft()
                yield from zip(items, answer.result(), strict=True)
        while ahead:
            items, answer = ahead.popleft()
            yield from zip(items, answer.result(), strict=True)
    except BrokenProcessPool:
        raise ConfigError(
            "--workers: a worker process was killed, perhaps for want of memory; start again with fewer, it goes on"
        ) from None


def _batches(pairs: Iterable[tuple[T, str | None]]) -> Iterator[list[tuple[T, str | None]]]:
    batch: list[tuple[T, str | None]] = []
    size = 0
    for item, text in pairs:
        batch.append((item, text))
        size += len(text or "")
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer: Tokenizer | None = None  # of a worker process


def _begin_worker(tokenizer: Tokenizer) -> None:
    """Take the tokenizer, leave stopping to the parent, and end when that one is gone."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    # a killed parent closes nothing that a worker's queue would notice
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _encode_batch(texts: list[str | None]) -> list[Document | None]:
    assert _tokenizer is not None
    return [None if text is None else encode_document(_tokenizer, text) for text in texts]
