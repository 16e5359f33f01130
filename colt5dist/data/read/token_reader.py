"""Reads tokens from shards, with the index that says where each member is.

A member whose tar header is, byte for byte, the one that our writer makes is used directly. Any other member goes
through webdataset's tar parser, which reads what other tar writers make and finds out what is wrong with a damaged one.
"""

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from colt5dist.data.order.blocks import Chunk
from colt5dist.data.read.shards import ShardSet
from colt5dist.data.tar_members import FIELD, member_key, tar_header
from colt5dist.errors import ConfigError

OPEN_FILES = 32
FEW_PIECES = 16  # up to this number, joining pieces one by one is faster
HOW_TO_FIX = "copy or prepare the shards again"


class DamagedShardError(ConfigError):
    """A part of a shard is not what was written; the message names the file, the place, and how to fix it."""


class UnreadableShardError(DamagedShardError):
    """A shard cannot be read at the moment."""


@dataclass(frozen=True)
class Damage:
    """A range of damaged tokens on the set's axis."""

    start: int
    """Position of the first token."""
    stop: int
    """Position after the last token."""
    message: str
    """What was found in which place, and how to fix it."""


@dataclass(frozen=True)
class Member:
    """A member in memory."""

    tokens: NDArray[np.integer]
    """(tokens,) its ids; damaged ones have arbitrary values."""
    damage: tuple[Damage, ...]
    """Its damaged parts, which must not be used."""


class TokenReader:
    """Random access to the tokens of a shard set; the members that were used last are kept in memory.

    Args:
        shards: the shard set.
        cache_bytes: most bytes of tokens that are kept in memory (at least one member is).
    """

    def __init__(self, shards: ShardSet, *, cache_bytes: int) -> None:
        self._shards = shards
        self._index = shards.index
        self._dtype = shards.dtype
        self._eos_id = shards.tokenizer.eos_id
        # for shards at an address whose members are downloaded one by one; otherwise files are opened
        self._remote = shards.remote if shards.remote and shards.remote.reads_members else None
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._members: OrderedDict[int, Member] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Return tokens start..stop-1 of the set's axis, (stop - start,).

        Raises:
            DamagedShardError: some of them are not what was written.
            UnreadableShardError: the shard cannot be read.
        """
        parts = []
        while start < stop:
            number = self._index.member_at(start)
            first, member = self._index.member_start(number), self._member(number)
            for damage in member.damage:
                if damage.start < stop and start < damage.stop:
                    raise DamagedShardError(damage.message)
            parts.append(member.tokens[start - first : stop - first])
            start = first + len(member.tokens)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype=self._dtype)])

    def read_chunk(self, chunk: Chunk) -> NDArray[np.integer]:
        """Return the text of a sample, with an end token after each piece that has one; raises what `read` raises."""
        if len(chunk.starts) == 1 and not chunk.ended[0]:
            return self.read(int(chunk.starts[0]), int(chunk.stops[0]))
        if len(chunk.starts) <= FEW_PIECES:
            return self._join_few(chunk)
        return self._join_many(chunk)

    def _join_few(self, chunk: Chunk) -> NDArray[np.integer]:
        """Read the pieces of a chunk one by one."""
        starts, stops, ended = chunk.starts.tolist(), chunk.stops.tolist(), chunk.ended.tolist()
        text = np.empty(sum(stops) - sum(starts) + sum(ended), dtype=self._dtype)
        place = 0
        for start, stop, has_end in zip(starts, stops, ended, strict=True):
            end = place + stop - start
            text[place:end] = self.read(start, stop)
            if has_end:
                text[end] = self._eos_id
            place = end + has_end
        return text

    def _join_many(self, chunk: Chunk) -> NDArray[np.integer]:
        """Read the pieces of a chunk together; adjacent ones are read at once."""
        breaks = np.flatnonzero(chunk.starts[1:] != chunk.stops[:-1]) + 1
        starts = chunk.starts[np.concatenate(([0], breaks))]
        stops = chunk.stops[np.concatenate((breaks - 1, [len(chunk.stops) - 1]))]
        tokens = [self.read(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        piece_ends = np.cumsum(chunk.stops - chunk.starts + chunk.ended)
        text = np.empty(int(piece_ends[-1]), dtype=self._dtype)
        is_text = np.ones(len(text), dtype=bool)
        is_text[piece_ends[chunk.ended] - 1] = False
        text[is_text] = np.concatenate(tokens)
        text[~is_text] = self._eos_id
        return text

    def damage_of(self, number: int) -> list[str]:
        """Return the damage of a member, one line per record.

        Raises:
            UnreadableShardError: the shard cannot be read.
        """
        return [damage.message for damage in self._member(number).damage]

    def _member(self, number: int) -> Member:
        """A member from memory, or else from the shard."""
        if number in self._members:
            self._members.move_to_end(number)
            return self._members[number]
        member = self._load(number)
        self._members[number] = member
        self._cached_bytes += member.tokens.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._members) > 1:
            self._cached_bytes -= self._members.popitem(last=False)[1].tokens.nbytes
        return member

    def _load(self, number: int) -> Member:
        """Read and check a member; download it a second time if it arrives damaged."""
        member = self._read_member(number)
        if member.damage and self._remote:
            member = self._read_member(number)  # the network may have damaged it, not the shard
        return member

    def _read_member(self, number: int) -> Member:
        """Read a member and compare it with the index: its name, the lengths of its records, their checksums."""
        entry = self._index.members[number]
        shard = int(entry["shard"])
        path = self._shards.shard_name(shard)
        place = f"{path}: at byte {int(entry['offset'])}"
        try:
            content = self._read_bytes(shard, int(entry["offset"]), int(entry["size"]))
        except OSError as error:
            raise UnreadableShardError(f"{place}: cannot be read ({error.strerror or error}); {HOW_TO_FIX}") from None
        lengths = self._index.record_lengths(number)
        header = np.concatenate(([len(lengths)], lengths)).astype("<u4").tobytes()
        size = len(header) + int(lengths.sum()) * self._dtype.itemsize
        if content[: tarfile.BLOCKSIZE] == tar_header(number, size):
            payload, problem = memoryview(content)[tarfile.BLOCKSIZE :][:size], ""
        else:
            payload, problem = _payload(content, path, number)
        if not problem and (len(payload) != size or payload[: len(header)] != header):
            problem = "has other record lengths than the index"
        start = self._index.member_start(number)
        if problem:
            lost = Damage(start, start + int(lengths.sum()), f"{place}: {problem}; {HOW_TO_FIX}")
            return Member(np.zeros(int(lengths.sum()), dtype=self._dtype), (lost,))
        records = payload[len(header) :]
        damage = []
        begin = 0
        for record, (length, checksum) in enumerate(
            zip(lengths.tolist(), self._index.record_checksums(number), strict=True)
        ):
            end = begin + length * self._dtype.itemsize
            if zlib.crc32(records[begin:end]) != checksum:
                message = f"{place}: record {record} of member {member_key(number)} is damaged; {HOW_TO_FIX}"
                damage.append(Damage(start, start + length, message))
            begin, start = end, start + length
        return Member(np.frombuffer(records, dtype=self._dtype), tuple(damage))

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on; raises OSError."""
        if self._remote:
            return self._remote.read(self._shards.manifest.shards[shard], offset, size)
        return os.pread(self._file(shard).fileno(), size, offset)

    def _file(self, shard: int) -> BinaryIO:
        """The open file of a shard; every read passes its own offset, so processes can share the file."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self._shards.open_shard(shard)
        self._files.move_to_end(shard)
        return self._files[shard]


def _payload(content: bytes, path: str, number: int) -> tuple[memoryview, str]:
    """(content, problem) of the bytes of a member, from webdataset's parser; the problem is empty if there is none."""
    source = {"stream": io.BytesIO(content), "url": path}
    try:
        samples = list(group_by_keys(tar_file_expander([source])))
    except Exception as error:  # tarfile and webdataset raise many kinds
        return memoryview(b""), f"is not a tar member ({type(error).__name__})"
    if len(samples) != 1 or samples[0]["__key__"] != member_key(number) or FIELD not in samples[0]:
        return memoryview(b""), f"is not member {member_key(number)}"
    return memoryview(samples[0][FIELD]), ""
