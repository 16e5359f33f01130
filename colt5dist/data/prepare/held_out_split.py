"""Writes a training set and its held-out set, and decides which document goes where.

A document is held out when the hash of its text, as a share of all hashes, is below the validation fraction; so
copies of one text always land on the same side, and neither order nor number of the other documents matters. At least
one text is held out: the one with the smallest hash so far waits until all are seen.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.manifest import TOKENIZER_NAME, VALIDATION_FOLDER, Manifest, TokenizerEntry
from colt5dist.data.prepare.shard_writer import ShardSetWriter
from colt5dist.data.prepare.tokenize_texts import HASH_BITS, Document, encode_document
from colt5dist.data.tokenizer import JsonTokenizer, Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import fsync_tree, write_whole

WAITING_PATTERN = "waiting-*"
LENGTH_BINS = 48  # documents by the power of two of their length

CUT_TOKENS = 4096


def held_out_below(validation_fraction: float) -> int:
    """Documents whose hash is below this are held out."""
    return int(validation_fraction * (1 << HASH_BITS))


class CorpusWriter:
    """Tokenizes documents and appends them to the training or the held-out shards in one folder.

    Files named WAITING_PATTERN are left in the folder for the caller to remove.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        validation_fraction: float,
        shard_bytes: int = 1 << 29,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin in `folder`, or go on from the `state` that an earlier writer saved there."""
        self.folder = folder
        self._tokenizer = tokenizer
        self._fraction = validation_fraction
        self._threshold = held_out_below(validation_fraction)
        self._sets = {
            name: ShardSetWriter(
                folder / name, tokenizer.dtype, shard_bytes=shard_bytes, state=state["sets"][name] if state else None
            )
            for name in ("", VALIDATION_FOLDER)
        }
        self.length_counts = state["length_counts"] if state else [0] * LENGTH_BINS
        # the text with the smallest hash: which set it belongs to is known at the end
        self._waiting: tuple[int, NDArray[np.integer], int] | None = None
        if state and state["waiting"]:
            hash_value, copies = state["waiting"]
            self._waiting = hash_value, np.fromfile(self._waiting_path(hash_value), dtype=tokenizer.dtype), copies

    @property
    def num_documents(self) -> int:
        """Documents added, held-out ones included."""
        return sum(part.num_documents for part in self._sets.values()) + (self._waiting[2] if self._waiting else 0)

    @property
    def num_tokens(self) -> int:
        """Tokens added, held-out ones included."""
        waiting = self._waiting[2] * len(self._waiting[1]) if self._waiting else 0
        return sum(part.num_tokens for part in self._sets.values()) + waiting

    def add(self, text: str) -> int:
        """Add a document; returns its tokens (0: the text is empty, nothing was added).

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair.
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
        if self._waiting is None or hash_value < self._waiting[0]:
            self._release()
            self._waiting = hash_value, tokens, 1
        elif hash_value == self._waiting[0]:
            self._waiting = hash_value, tokens, self._waiting[2] + 1
        else:
            self._set_of(hash_value).add(tokens)

    def _set_of(self, hash_value: int) -> ShardSetWriter:
        return self._sets[VALIDATION_FOLDER if hash_value < self._threshold else ""]

    def _release(self, target: ShardSetWriter | None = None) -> None:
        """Write the waiting text to the set of its hash, or to `target`."""
        if self._waiting is not None:
            hash_value, tokens, copies = self._waiting
            for _ in range(copies):
                (target or self._set_of(hash_value)).add(tokens)
            self._waiting = None

    def _waiting_path(self, hash_value: int) -> Path:
        return self.folder / WAITING_PATTERN.replace("*", f"{hash_value:016x}")

    def save(self) -> dict[str, Any]:
        """Bring everything to the disk and return the state to go on from, as JSON takes it."""
        if self._waiting is not None and not self._waiting_path(self._waiting[0]).exists():
            write_whole(self._waiting_path(self._waiting[0]), self._waiting[1].astype(self._tokenizer.dtype).tobytes())
        return {
            "sets": {name: part.save() for name, part in self._sets.items()},
            "length_counts": self.length_counts,
            "waiting": (self._waiting[0], self._waiting[2]) if self._waiting else None,
        }

    def close(self, source: dict[str, Any]) -> Manifest:
        """Write what is left, the indexes and both manifests; `source` is put in them. Returns the training set's.

        Raises:
            ConfigError: a single token is all there is, so that nothing can be held out.
        """
        training, validation = self._sets[""], self._sets[VALIDATION_FOLDER]
        assert self._waiting is not None, "no document was added"
        if training.num_documents:
            self._release(validation)
        elif validation.num_documents:
            self._release(training)
        else:
            self._cut_only_document(training, validation)
        held_out = self._close_set(VALIDATION_FOLDER, None, source)
        return self._close_set("", held_out.checksum, source)

    def _cut_only_document(self, training: ShardSetWriter, validation: ShardSetWriter) -> None:
        """One text is all there is: its end is held out, a few thousand tokens of it at least where it has them."""
        assert self._waiting is not None
        _, tokens, _ = self._waiting
        held_out = max(round(self._fraction * len(tokens)), min(CUT_TOKENS, len(tokens) // 2))
        if not 0 < held_out < len(tokens):
            raise ConfigError("--input: holds a single token; name files with more text in them")
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
