"""Reads tokens from the shards: members through webdataset's tar parser, at the places that the index names."""

import io
import os
import zlib
from collections import OrderedDict
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from colt5dist.data.blocks import Chunk
from colt5dist.data.shards import ShardSet
from colt5dist.data.writer import FIELD, member_key
from colt5dist.errors import ConfigError

OPEN_FILES = 32


class DamagedShardError(ConfigError):
    """A part of a shard is not what was written; the message names file, place and mend."""


class TokenReader:
    """Random access to the tokens of a shard set, with the members read last kept in memory."""

    def __init__(self, shards: ShardSet, *, cache_bytes: int) -> None:
        """Read from `shards`, keeping at most `cache_bytes` of tokens (one member at least)."""
        self._shards = shards
        self._index = shards.index
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._members: OrderedDict[int, NDArray[np.integer]] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens start..stop-1 of the set's axis.

        Raises:
            DamagedShardError: they cannot be read, or are not what was written.
        """
        parts = []
        while start < stop:
            number = self._index.member_at(start)
            first, member = self._index.member_start(number), self._member(number)
            parts.append(member[start - first : stop - first])
            start = first + len(member)
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype=self._shards.dtype)])

    def read_chunk(self, chunk: Chunk) -> NDArray[np.integer]:
        """The text of a sample, with end tokens where the chunk has them."""
        if len(chunk.starts) == 1 and not chunk.ended[0]:
            return self.read(int(chunk.starts[0]), int(chunk.stops[0]))
        # pieces that touch are read in one go
        breaks = np.flatnonzero(chunk.starts[1:] != chunk.stops[:-1]) + 1
        starts = chunk.starts[np.concatenate(([0], breaks))]
        stops = chunk.stops[np.concatenate((breaks - 1, [len(chunk.stops) - 1]))]
        tokens = [self.read(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        piece_ends = np.cumsum(chunk.stops - chunk.starts + chunk.ended)
        text = np.empty(int(piece_ends[-1]), dtype=self._shards.dtype)
        is_text = np.ones(len(text), dtype=bool)
        is_text[piece_ends[chunk.ended] - 1] = False
        text[is_text] = np.concatenate(tokens)
        text[~is_text] = self._shards.tokenizer.eos_id
        return text

    def _member(self, number: int) -> NDArray[np.integer]:
        """Tokens of a member."""
        if number in self._members:
            self._members.move_to_end(number)
            return self._members[number]
        tokens = self._load(number)
        self._members[number] = tokens
        self._cached_bytes += tokens.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._members) > 1:
            self._cached_bytes -= self._members.popitem(last=False)[1].nbytes
        return tokens

    def _load(self, number: int) -> NDArray[np.integer]:
        """Read a member and compare it with the index: its name, the lengths of its records, their checksums."""
        entry = self._index.members[number]
        shard = int(entry["shard"])
        path = self._shards.folder / self._shards.manifest.shards[shard].file
        place = f"{path}: at byte {int(entry['offset'])}"
        mend = "copy or prepare the shards again"
        try:
            content = os.pread(self._file(shard).fileno(), int(entry["size"]), int(entry["offset"]))
            source = {"stream": io.BytesIO(content), "url": str(path)}
            samples = list(group_by_keys(tar_file_expander([source])))
        except OSError as error:
            raise DamagedShardError(f"{place}: cannot be read ({error.strerror or error}); {mend}") from None
        except Exception as error:  # tarfile and webdataset raise many kinds
            raise DamagedShardError(f"{place}: is no tar member ({type(error).__name__}); {mend}") from None
        if len(samples) != 1 or samples[0]["__key__"] != member_key(number) or FIELD not in samples[0]:
            raise DamagedShardError(f"{place}: is not member {member_key(number)}; {mend}")
        payload = samples[0][FIELD]
        lengths = self._index.record_lengths(number)
        header = np.concatenate(([len(lengths)], lengths)).astype("<u4").tobytes()
        size = len(header) + int(lengths.sum()) * self._shards.dtype.itemsize
        if len(payload) != size or payload[: len(header)] != header:
            raise DamagedShardError(f"{place}: has other record lengths than the index; {mend}")
        records = memoryview(payload)[len(header) :]
        begin = 0
        for record, (length, checksum) in enumerate(
            zip(lengths.tolist(), self._index.record_checksums(number), strict=True)
        ):
            end = begin + length * self._shards.dtype.itemsize
            if zlib.crc32(records[begin:end]) != checksum:
                raise DamagedShardError(f"{place}: record {record} of member {member_key(number)} is damaged; {mend}")
            begin = end
        return np.frombuffer(payload, dtype=self._shards.dtype, offset=len(header))

    def _file(self, shard: int) -> BinaryIO:
        """The open file of a shard; positions are given with each read, so processes may share it."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self._shards.folder / self._shards.manifest.shards[shard].file, "rb")  # noqa: SIM115
        self._files.move_to_end(shard)
        return self._files[shard]
