"""Decides which documents are held out, and writes the training set and the held-out set.

A document is held out when the hash of its text, divided by the number of possible hashes, is below the validation
fraction. So copies of a text are always in the same set, whatever the order and number of the other documents. At
least one text is held out: the one with the smallest hash so far waits until all documents were seen.

Where documents are few or very unequal, this may hold out far too many or too few tokens. `CorpusWriter.moved_texts`
then names the texts that belong in the other set, and the corpus is written again. Nothing is random in it, but in such
a corpus the side of a text depends on the other texts.

Of a pair, the hash is that of its input: pairs with equal inputs are in the same set. Where a file says which set it
belongs to, the hash is not asked.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.manifest import TOKENIZER_NAME, VALIDATION_FOLDER, Manifest, TokenizerEntry
from colt5dist.data.prepare.pair_lengths import PairLengths
from colt5dist.data.prepare.shard_writer import ShardSetWriter
from colt5dist.data.prepare.tokenize_texts import HASH_BITS, Document, encode_document
from colt5dist.data.tokenizer import JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import fsync_tree, write_whole

WAITING_PATTERN = "waiting-*"
PAIR_SIDES = ("inputs", "targets")
LENGTH_BINS = 48  # documents are counted by the power of two of their length

CUT_TOKENS = 4096  # held out, if possible, where a single document is all there is
MOST_CUT = 0.1  # share of a corpus of several documents that is held out to have CUT_TOKENS
MOST_HELD_OUT = 0.75  # share of the tokens: a training set of scraps is worse than held-out scraps

KNOWN_TEXTS = 256  # texts with the smallest hashes, and as many of the largest that are held out
TOLERATED = 3.0  # times too many or too few tokens are held out before texts are moved
GAIN = 1.5  # by which moving must bring the held-out tokens nearer


def held_out_below(validation_fraction: float) -> int:
    """Return the bound below which a document's hash means that it is held out."""
    return int(validation_fraction * (1 << HASH_BITS))


class _KnownTexts:
    """The sizes of KNOWN_TEXTS texts: those whose rank is smallest.

    Args:
        entries: [rank, hash, tokens of all copies] of each, from an earlier writer.
    """

    def __init__(self, entries: list[list[int]]) -> None:
        self.tokens = {hash_value: tokens for _, hash_value, tokens in entries}
        self._heap = [(-rank, hash_value) for rank, hash_value, _ in entries]  # the largest rank first
        heapq.heapify(self._heap)

    def add(self, rank: int, hash_value: int, tokens: int) -> None:
        """Take a text into account; copies must have the same rank."""
        if hash_value in self.tokens:
            self.tokens[hash_value] += tokens
        elif len(self._heap) < KNOWN_TEXTS:
            self.tokens[hash_value] = tokens
            heapq.heappush(self._heap, (-rank, hash_value))
        elif rank < -self._heap[0][0]:
            self.tokens[hash_value] = tokens
            _, dropped = heapq.heapreplace(self._heap, (-rank, hash_value))
            del self.tokens[dropped]

    def save(self) -> list[list[int]]:
        """Return the `entries` to continue with."""
        return [[-rank, hash_value, self.tokens[hash_value]] for rank, hash_value in self._heap]


@dataclass
class _Waiting:
    """The documents whose hash is the smallest so far; their set is known at the end.

    Copies of a text are kept once. Pairs with equal inputs have the same hash, and may have different targets.
    """

    hash_value: int
    """Their hash."""
    tokens: list[NDArray[np.integer]]
    """Ids of each document, in order, without copies that follow each other."""
    copies: list[int]
    """How often each is there."""

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Add a document with the same hash."""
        if np.array_equal(tokens, self.tokens[-1]):
            self.copies[-1] += 1
        else:
            self.tokens.append(tokens)
            self.copies.append(1)

    @property
    def num_documents(self) -> int:
        """Documents, copies included."""
        return sum(self.copies)

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return sum(len(part) * copies for part, copies in zip(self.tokens, self.copies, strict=True))


class CorpusWriter:
    """Tokenizes documents and appends them to the training or the held-out shards in one folder.

    Files that match WAITING_PATTERN stay in the folder; the caller removes them.

    Args:
        folder: folder of the training set; the held-out set is in its folder validation/.
        tokenizer: makes the ids.
        validation_fraction: share of the documents that is held out.
        shard_bytes: largest size of a shard in bytes.
        moved: hash of a text -> whether it is held out, against the rule; None: the rule decides for all.
        state: what `save` of an earlier writer returned, to continue from; None starts new sets.
        pairs: whether the documents are pairs.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        validation_fraction: float,
        shard_bytes: int = 1 << 29,
        moved: Mapping[int, bool] | None = None,
        state: dict[str, Any] | None = None,
        pairs: bool = False,
    ) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        self._fraction = validation_fraction
        self._threshold = held_out_below(validation_fraction)
        self._moved = dict(state["moved"]) if state else moved or {}
        self._smallest = _KnownTexts(state["smallest"] if state else [])  # by hash
        self._largest = _KnownTexts(state["largest"] if state else [])  # of the texts that are held out
        self._sets = {
            name: ShardSetWriter(
                folder / name, tokenizer.dtype, shard_bytes=shard_bytes, state=state["sets"][name] if state else None
            )
            for name in ("", VALIDATION_FOLDER)
        }
        self.num_unknown = state["num_unknown"] if state else 0
        self.length_counts = state["length_counts"] if state else [0] * LENGTH_BINS
        self._split_by_files = state["split_by_files"] if state else False
        lengths = (state["pairs"] if state else None) or {}
        # of inputs and targets
        self.pair_lengths = {side: PairLengths(lengths.get(side)) for side in PAIR_SIDES} if pairs else None
        self._waiting: _Waiting | None = None
        if state and state["waiting"]:
            hash_value, lengths, copies = state["waiting"]
            ids = np.fromfile(self._waiting_path(hash_value), dtype=tokenizer.dtype, count=sum(lengths))
            self._waiting = _Waiting(hash_value, np.split(ids, np.cumsum(lengths)[:-1]), copies)

    @property
    def num_moved(self) -> int:
        """Texts that `moved` puts into another set than their hash."""
        return sum(held_out != (hash_value < self._threshold) for hash_value, held_out in self._moved.items())

    @property
    def num_documents(self) -> int:
        """Documents added, held-out ones included."""
        waiting = self._waiting.num_documents if self._waiting else 0
        return sum(part.num_documents for part in self._sets.values()) + waiting

    @property
    def num_tokens(self) -> int:
        """Tokens added, held-out ones included."""
        waiting = self._waiting.num_tokens if self._waiting else 0
        return sum(part.num_tokens for part in self._sets.values()) + waiting

    def add(self, text: str) -> int:
        """Tokenize a text and add it; return its number of tokens (0: the text is empty and was not added).

        Raises:
            UnicodeEncodeError: the text contains half of a surrogate pair.
        """
        document = encode_document(self._tokenizer, text)
        self.add_document(document)
        return len(document.tokens)

    def add_document(self, document: Document) -> None:
        """Add a tokenized document; one without tokens adds nothing."""
        tokens, hash_value = document.tokens, document.hash_value
        if not len(tokens):
            return
        self.length_counts[len(tokens).bit_length()] += 1
        self.num_unknown += document.num_unknown
        if self.pair_lengths:
            sides = document.input_tokens, len(tokens) - document.input_tokens - 1
            for lengths, number in zip(self.pair_lengths.values(), sides, strict=True):
                lengths.add(number)
        if document.held_out is not None:
            self._split_by_files = True
            self._sets[VALIDATION_FOLDER if document.held_out else ""].add(tokens)
            return
        self._smallest.add(hash_value, hash_value, len(tokens))
        if hash_value < self._threshold:
            self._largest.add(-len(tokens), hash_value, len(tokens))
        if self._waiting is None or hash_value < self._waiting.hash_value:
            self._release()
            self._waiting = _Waiting(hash_value, [tokens], [1])
        elif hash_value == self._waiting.hash_value:
            self._waiting.add(tokens)
        else:
            self._set_of(hash_value).add(tokens)

    def _set_of(self, hash_value: int) -> ShardSetWriter:
        held_out = self._moved.get(hash_value, hash_value < self._threshold)
        return self._sets[VALIDATION_FOLDER if held_out else ""]

    def moved_texts(self) -> dict[int, bool]:
        """Return the `moved` of a writer whose held-out share is near the validation fraction, counted in tokens.

        Texts are taken in the order of their hashes, without those that are too large. It is empty, as usually, where
        at most TOLERATED times too many or too few tokens are held out, or where no choice would be much better.
        """
        validation = self._sets[VALIDATION_FOLDER]
        waiting = self._waiting
        if self._moved or self._split_by_files or waiting is None or self.num_documents == waiting.num_documents:
            return {}
        wanted = max(self._fraction * self.num_tokens, min(CUT_TOKENS, MOST_CUT * self.num_tokens))

        def error(tokens: int) -> float:
            if not 0 < tokens <= MOST_HELD_OUT * self.num_tokens:
                return float("inf")
            return max(tokens / wanted, wanted / tokens)

        before = validation.num_tokens + waiting.num_tokens
        if error(before) <= TOLERATED:
            return {}
        known = dict(sorted(self._smallest.tokens.items()))
        held_out = {hash_value for hash_value in known if hash_value < self._threshold} | {waiting.hash_value}
        if len(held_out) == KNOWN_TEXTS:  # and perhaps more: enough of them for the rule, unless some are very large
            chosen, after = set(held_out), before
            sizes = {**known, **self._largest.tokens}
            for hash_value in sorted(self._largest.tokens, key=lambda value: (-self._largest.tokens[value], value)):
                if error(after - sizes[hash_value]) >= error(after):
                    break
                chosen.discard(hash_value)
                held_out.add(hash_value)
                after -= sizes[hash_value]
        else:
            chosen, after = set(), 0
            most = max(1, len(known) // 2)
            for hash_value, tokens in known.items():
                if after + tokens <= wanted and len(chosen) < most:
                    chosen.add(hash_value)
                    after += tokens
            nearest = min(known, key=lambda value: (error(known[value]), value))
            if error(known[nearest]) < error(after):
                chosen, after = {nearest}, known[nearest]
        if error(after) * GAIN > error(before):
            return {}
        return {hash_value: hash_value in chosen for hash_value in sorted(held_out | chosen)}

    def _release(self, target: ShardSetWriter | None = None) -> None:
        """Write the waiting text to the set of its hash, or to `target`."""
        if self._waiting is not None:
            part = target or self._set_of(self._waiting.hash_value)
            for tokens, copies in zip(self._waiting.tokens, self._waiting.copies, strict=True):
                for _ in range(copies):
                    part.add(tokens)
            self._waiting = None

    def _waiting_path(self, hash_value: int) -> Path:
        return self.folder / WAITING_PATTERN.replace("*", f"{hash_value:016x}")

    def save(self) -> dict[str, Any]:
        """Flush everything to disk; return the state to continue from, which can be written as JSON."""
        if waiting := self._waiting:
            path = self._waiting_path(waiting.hash_value)
            content = np.concatenate(waiting.tokens).astype(self._tokenizer.dtype, copy=False)
            if not path.exists() or path.stat().st_size < content.nbytes:  # a longer one begins with the same ids
                write_whole(path, content.tobytes())
        return {
            "sets": {name: part.save() for name, part in self._sets.items()},
            "length_counts": self.length_counts,
            "num_unknown": self.num_unknown,
            "moved": list(self._moved.items()),
            "smallest": self._smallest.save(),
            "largest": self._largest.save(),
            "waiting": (waiting.hash_value, list(map(len, waiting.tokens)), waiting.copies) if waiting else None,
            "pairs": self._saved_lengths(),
            "split_by_files": self._split_by_files,
        }

    def _saved_lengths(self) -> dict[str, dict[str, int]] | None:
        return {side: lengths.save() for side, lengths in self.pair_lengths.items()} if self.pair_lengths else None

    def close(self, source: dict[str, Any]) -> Manifest:
        """Write the remaining documents, the indexes and both manifests.

        Args:
            source: what the shards were made from; it is stored in the manifests.

        Returns:
            The manifest of the training set.

        Raises:
            ConfigError: there is only a single token, so nothing can be held out; or all pairs are for one set.
        """
        training, validation = self._sets[""], self._sets[VALIDATION_FOLDER]
        assert self.num_documents, "no document was added"
        if self.pair_lengths:
            source = {**source, "pairs": self._saved_lengths()}
        if self._split_by_files:
            source = {**source, "split_by_files": True}
        if self._moved:
            self._release()
        elif training.num_documents:
            self._release(validation)
        elif validation.num_documents:
            self._release(training)
        elif self.pair_lengths:
            raise ConfigError("--input: all pairs have the same input, so none can be held out; give other pairs too")
        else:
            self._cut_only_document(training, validation)
            source = {**source, "cut": True}
        if not (training.num_documents and validation.num_documents):
            missing = "held-out" if training.num_documents else "training"
            raise ConfigError(f"--input: there are no {missing} pairs; give files with some")
        held_out = self._close_set(VALIDATION_FOLDER, None, source)
        return self._close_set("", held_out.checksum, source)

    def _cut_only_document(self, training: ShardSetWriter, validation: ShardSetWriter) -> None:
        """Hold out the end of the only text: if it is long enough, at least a few thousand tokens."""
        assert self._waiting is not None
        (tokens,) = self._waiting.tokens
        held_out = max(round(self._fraction * len(tokens)), min(CUT_TOKENS, len(tokens) // 2))
        if not 0 < held_out < len(tokens):
            raise ConfigError("--input: holds a single token; give files with more text")
        training.add(tokens[:-held_out])
        validation.add(tokens[-held_out:])
        self._waiting = None

    def _close_set(self, name: str, validation: str | None, source: dict[str, Any]) -> Manifest:
        folder = self.folder / name
        part = self._sets[name]
        if isinstance(self._tokenizer, JsonTokenizer):
            write_whole(folder / TOKENIZER_NAME, self._tokenizer.content)
        shards, index = part.close()
        fsync_tree(folder)
        manifest = Manifest(
            tokenizer=TokenizerEntry(
                kind=self._tokenizer.kind,
                fingerprint=self._tokenizer.fingerprint,
                vocab_size=self._tokenizer.vocab_size,
                pad_id=self._tokenizer.pad_id,
                eos_id=self._tokenizer.eos_id,
            ),
            dtype=self._tokenizer.dtype.name,
            documents=part.num_documents,
            tokens=part.num_tokens,
            shards=shards,
            index=index,
            validation=validation,
            source=source,
        )
        manifest.write(folder)
        return manifest
