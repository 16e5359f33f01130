"""Writes a rank's fragments as one safetensors file, and hashes it in the same pass, in pieces on several threads.

The library's `save_file` needs all tensors in host memory at once and computes no hash, which would take a second pass.
The format is eight bytes (length of the header), the header in JSON, and the bytes of the tensors. The files are read
with the library.
"""

import hashlib
import json
import os
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from colt5dist.storage.complete_file import PIECE_BYTES, FileEntry
from colt5dist.train.engine.fragments import Fragment

ELEMENT_BYTES = 4
"""Bytes per element: all tensors are float32."""


def write_rank_file(path: Path, fragments: Sequence[Fragment], *, num_threads: int) -> FileEntry:
    """Write the fragments and flush them to disk.

    Args:
        path: the file to write.
        fragments: flat float32 tensors on any device; they must not change meanwhile.
        num_threads: threads that copy, hash and write.

    Returns:
        Size and hashes of the file.

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
    """
    header = _header(fragments)
    starts = [len(header)]
    for fragment in fragments:
        starts.append(starts[-1] + ELEMENT_BYTES * fragment.tensor.numel())
    size = starts[-1]
    num_pieces = -(-size // PIECE_BYTES)
    hashes = [""] * num_pieces
    pinned = any(fragment.tensor.is_cuda for fragment in fragments)
    buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
    for _ in range(min(num_threads, num_pieces)):
        buffers.put(torch.empty(min(PIECE_BYTES, size) // ELEMENT_BYTES, dtype=torch.float32, pin_memory=pinned))

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:

        def write_piece(number: int) -> None:
            first, last = number * PIECE_BYTES, min((number + 1) * PIECE_BYTES, size)
            buffer = buffers.get()
            data = buffer.numpy().data.cast("B")[: last - first]
            if first < len(header):
                part = header[first:last]
                data[: len(part)] = part
            index = max(0, bisect_right(starts, first) - 1)
            while index < len(fragments) and starts[index] < last:
                start = starts[index]
                low, high = max(first, start), min(last, starts[index + 1])
                source = fragments[index].tensor[(low - start) // ELEMENT_BYTES : (high - start) // ELEMENT_BYTES]
                buffer[(low - first) // ELEMENT_BYTES : (high - first) // ELEMENT_BYTES].copy_(source)
                index += 1
            hashes[number] = hashlib.sha256(data).hexdigest()
            _write_at(descriptor, data, first)
            buffers.put(buffer)

        _in_threads(write_piece, num_pieces, num_threads)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(name=path.name, bytes=size, sha256=tuple(hashes))


def _header(fragments: Sequence[Fragment]) -> bytes:
    """The first bytes of the file, padded to a multiple of eight so that no element is split between two pieces."""
    content: dict[str, object] = {
        "__metadata__": {"shapes": json.dumps({f"{f.name}|{f.key}": list(f.shape) for f in fragments})}
    }
    end = 0
    for fragment in fragments:
        assert fragment.tensor.dtype == torch.float32 and fragment.tensor.dim() == 1, fragment.name
        start, end = end, end + ELEMENT_BYTES * fragment.tensor.numel()
        content[f"{fragment.name}|{fragment.key}|{fragment.offset}"] = {
            "dtype": "F32",
            "shape": [fragment.tensor.numel()],
            "data_offsets": [start, end],
        }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; one system call may write only a part."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _in_threads(call: Callable[[int], None], count: int, num_threads: int) -> None:
    """Call with 0 .. count - 1 on daemon threads, which do not keep a failing process alive; raise the first error."""
    numbers: Iterator[int] = iter(range(count))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                call(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(num_threads, count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
