"""Writes one shard set: tar shards in webdataset's format, and their index.

A member holds many short documents, or a part of a long one. The content of `0000000042.tokens` is the number of
records (uint32), the length of each in tokens (uint32), then their tokens one after the other. The bytes depend only on
the documents and their order. The state after any document can be saved, and writing can resume from it.
"""

import base64
import hashlib
import os
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.data.index import IndexWriter
from colt5dist.data.manifest import IndexEntry, ShardEntry
from colt5dist.data.tar_members import MEMBER_TOKENS, member_key, tar_member


class ShardFile:
    """One tar file while it is written: its bytes, its hash, its counts.

    Args:
        path: path of the file.
        state: `counts` of an earlier writer, to continue after its first `state["bytes"]` bytes; None starts a new
            file.
    """

    def __init__(self, path: Path, state: dict[str, int] | None = None) -> None:
        self._path = path
        self._file = open(path, "r+b" if state else "w+b")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self.counts = state or {"bytes": 0, "members": 0, "documents": 0, "tokens": 0}
        self._file.truncate(self.counts["bytes"])
        while block := self._file.read(1 << 20):
            self._hash.update(block)

    def append(self, content: bytes, *, documents: int, tokens: int) -> None:
        """Add a member.

        Args:
            content: its bytes, header and padding included.
            documents: documents that end in it.
            tokens: tokens in it.
        """
        self._write(content)
        self.counts["members"] += 1
        self.counts["documents"] += documents
        self.counts["tokens"] += tokens

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.counts["bytes"] += len(content)

    def flush(self) -> None:
        """Flush everything that was added to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> ShardEntry:
        """Close the tar file with two empty blocks, padded to a whole tar record; return its entry of the manifest."""
        size = self.counts["bytes"]
        whole = -(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        self._write(bytes(whole - size))
        self._file.close()
        return ShardEntry(file=self._path.name, sha256=self._hash.hexdigest(), **self.counts)


class ShardSetWriter:
    """Appends documents to the shards of one set.

    Args:
        folder: folder of the set, which is made where it is missing.
        dtype: type of the stored ids.
        shard_bytes: a shard is closed before it would grow beyond this number of bytes.
        state: what `save` of an earlier writer returned, to resume from; everything written after it is cut off. None
            starts a new set.
    """

    def __init__(self, folder: Path, dtype: np.dtype, *, shard_bytes: int, state: dict[str, Any] | None = None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._shards = [ShardEntry(**entry) for entry in state["shards"]] if state else []
        self._index = IndexWriter(folder, tuple(state["index"]) if state else None)
        self._file = ShardFile(self._shard_path(), state["file"] if state else None)
        self._written_tokens = state["written_tokens"] if state else 0
        # the records of the next member, and how many documents end among them
        self._pending: list[NDArray[np.integer]] = []
        self._pending_documents = state["pending_documents"] if state else 0
        if state and state["pending"]:
            pending = np.frombuffer(base64.b64decode(state["pending"]), dtype=dtype)
            self._pending = np.split(pending, np.cumsum(state["pending_lengths"])[:-1])
        self._pending_tokens = sum(len(record) for record in self._pending)

    @property
    def num_documents(self) -> int:
        """Documents added."""
        return self._index.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens added."""
        return self._written_tokens + self._pending_tokens

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Add a document: (tokens,) ids, at least one."""
        assert len(tokens), "an empty document"
        tokens = tokens.astype(self._dtype, copy=False)
        if self._pending_tokens + len(tokens) > MEMBER_TOKENS:
            self._write_member()
        for start in range(0, len(tokens), MEMBER_TOKENS):
            if self._pending_tokens == MEMBER_TOKENS:
                self._write_member()
            self._pending.append(tokens[start : start + MEMBER_TOKENS])
            self._pending_tokens += len(self._pending[-1])
        self._pending_documents += 1
        self._index.add_document(self.num_tokens)

    def save(self) -> dict[str, Any]:
        """Flush everything to disk; return the state to resume from, which can be written as JSON."""
        self._file.flush()
        self._index.flush()
        return {
            "shards": [asdict(entry) for entry in self._shards],
            "index": self._index.counts,
            "file": self._file.counts,
            "written_tokens": self._written_tokens,
            "pending_documents": self._pending_documents,
            "pending_lengths": [len(record) for record in self._pending],
            "pending": base64.b64encode(b"".join(record.tobytes() for record in self._pending)).decode(),
        }

    def close(self) -> tuple[tuple[ShardEntry, ...], tuple[IndexEntry, ...]]:
        """Write the pending records, close all files, and return the manifest's entries of shards and index."""
        self._write_member()
        self._shards.append(self._file.close())
        return tuple(self._shards), self._index.close()

    def _shard_path(self) -> Path:
        return self._folder / f"{len(self._shards):06d}.tar"

    def _write_member(self) -> None:
        """Write the pending records as one member, if there are any."""
        if not self._pending:
            return
        records = [record.tobytes() for record in self._pending]
        header = np.array([len(records), *(len(record) for record in self._pending)], dtype="<u4")
        content = tar_member(member_key(self._index.num_members), b"".join([header.tobytes(), *records]))
        if self._file.counts["members"] and self._file.counts["bytes"] + len(content) > self._shard_bytes:
            self._shards.append(self._file.close())
            self._file = ShardFile(self._shard_path())
        self._written_tokens += self._pending_tokens
        self._index.add_member(
            tokens_end=self._written_tokens,
            offset=self._file.counts["bytes"],
            size=len(content),
            shard=len(self._shards),
            checksums=[zlib.crc32(record) for record in records],
        )
        self._file.append(content, documents=self._pending_documents, tokens=self._pending_tokens)
        self._pending, self._pending_tokens, self._pending_documents = [], 0, 0
