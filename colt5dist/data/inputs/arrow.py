"""Arrow files: the stream format, in which Hugging Face `datasets` saves, and the file format.

The file is mapped into memory, so that only the text that is read occupies it. Record batches are checked before their
values are used: damaged offsets would otherwise point anywhere.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colt5dist.data.inputs.records import DamagedError, NoTextError, one_line

FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_arrow(path: Path, column: str, first: int) -> Iterator[tuple[Any, int]]:
    """Yield the values of a column, and about how many bytes of the file were read before each.

    Args:
        path: the file.
        column: name of the column.
        first: rows to leave out.

    Yields:
        (value, bytes): the value of a column of text as bytes in UTF-8, None where it is null, else as Python has it.

    Raises:
        DamagedError: the rest cannot be read.
        NoTextError: there is no such column.
    """
    import pyarrow  # imported here: an optional package, needed for these files only

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch, position in _batches(source, column):
                if row + batch.num_rows <= first:
                    row += batch.num_rows
                    continue
                values = _checked(batch.column(0))
                begin = max(first - row, 0)
                row += begin
                for value in values[begin:]:
                    row += 1
                    yield value.as_py(), position
            if not is_whole(source):
                raise DamagedError("the file ends without the mark of its end")
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeError) as error:
        raise DamagedError(one_line(error)) from None


def _batches(source: Any, column: str) -> Iterator[tuple[Any, int]]:
    """(record batch with this column only, bytes of the file before its end)."""
    from pyarrow import ipc

    is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
    source.seek(0)
    schema = (ipc.open_file if is_file else ipc.open_stream)(source).schema
    places = schema.get_all_field_indices(column)
    if len(places) != 1:
        source.seek(0)
        counts = (batch.num_rows for batch, _ in _all_batches(source, is_file, None))
        if documents := sum(counts):
            raise NoTextError(f"its columns are {', '.join(schema.names)}", documents)
        return
    source.seek(0)
    yield from _all_batches(source, is_file, ipc.IpcReadOptions(included_fields=places))


def _all_batches(source: Any, is_file: bool, options: Any) -> Iterator[tuple[Any, int]]:
    from pyarrow import ipc

    if is_file:
        reader = ipc.open_file(source, options=options)
        size = source.size()
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number), size * (number + 1) // reader.num_record_batches
        return
    for batch in ipc.open_stream(source, options=options):
        yield batch, source.tell()


def _checked(values: Any) -> Any:
    """A column whose offsets lie inside its data; a text becomes bytes, which are looked at one by one."""
    import pyarrow

    if pyarrow.types.is_string(values.type):
        values = values.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(values.type):
        values = values.view(pyarrow.large_binary())
    values.validate(full=True)
    return values


def is_whole(source: Any) -> bool:
    """Whether an open file has its end: a stream that is cut between two batches reads like a whole one."""
    source.seek(0)
    begin = source.read(len(FILE_MAGIC))
    source.seek(max(source.seek(0, os.SEEK_END) - len(END_OF_STREAM), 0))
    if begin == FILE_MAGIC:
        return source.read().endswith(FILE_MAGIC)
    # streams from before 2019 have no mark before the size of a message
    return source.read().endswith(END_OF_STREAM if begin[:4] == END_OF_STREAM[:4] else b"\0" * 4)
