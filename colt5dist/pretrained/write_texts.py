"""From texts to the texts that a model writes, in batches; also line by line from a file to a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colt5dist.data.inputs.compressed import DAMAGE, open_compressed
from colt5dist.data.inputs.files import COMPRESSED_SUFFIXES
from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.errors import ConfigError, first_line
from colt5dist.files import write_whole
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5

CONTEXT_TOKENS = 16
"""Tokens before an answer that are decoded with it: a tokenizer may write a token otherwise where a text begins."""


def write_texts(
    model: CoLT5 | CausalCoLT5,
    tokenizer: ModelTokenizer,
    texts: Sequence[str],
    *,
    first_index: int = 0,
    **settings: Any,
) -> list[list[str]]:
    """Write the targets of some texts, or what follows them if the model is decoder-only.

    Args:
        model: from `colt5dist.load`.
        tokenizer: its tokenizer.
        texts: one batch; names of sentinels and mode tokens in them are these tokens.
        first_index: number of the first text in the whole data set; draws depend on it and not on the batch.
        settings: `max_new_tokens` and the other settings of `CoLT5.generate`.

    Returns:
        For each text its num_return_sequences results; sentinels are written by their names.

    Raises:
        ConfigError: a text is empty, or cannot be encoded.
        ValueError: a setting is wrong.
    """
    rows = [input_of(model, tokenizer, text, place) for place, text in enumerate(texts, start=first_index)]
    input_ids, mask = padded(rows, tokenizer.pad_id, model)
    numbers = torch.arange(first_index, first_index + len(texts), device=input_ids.device)
    written = model.generate(input_ids, input_mask=mask, sample_index=numbers, **settings)
    per_text = written.tolist()
    each = len(per_text) // len(texts)
    is_causal = isinstance(model, CausalCoLT5)
    return [
        [
            text_after(tokenizer, rows[number] if is_causal else [], until_end(ids, tokenizer.eos_id))
            for ids in per_text[number * each : (number + 1) * each]
        ]
        for number in range(len(texts))
    ]


def input_of(model: CoLT5 | CausalCoLT5, tokenizer: ModelTokenizer, text: str, number: int) -> list[int]:
    """Ids of a text as the model was trained on them: with the end token, or after the start token.

    Raises:
        ConfigError: the text is empty, or cannot be encoded.
    """
    if not text.strip():
        raise ConfigError(f"text {number}: has no text; give one that is not empty")
    ids = tokenizer.encode(text).tolist()
    return [tokenizer.start_id, *ids] if isinstance(model, CausalCoLT5) else [*ids, tokenizer.eos_id]


def padded(rows: Sequence[Sequence[int]], pad_id: int, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Rows of ids as (b, longest) int64 and the mask of the valid ones, on the model's device."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad_id, dtype=np.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    device = next(model.parameters()).device
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def until_end(ids: Sequence[int], eos_id: int) -> list[int]:
    """Ids before the end token."""
    return list(ids[: ids.index(eos_id)] if eos_id in ids else ids)


def text_after(tokenizer: ModelTokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Text of ids that follow other ids, with the space between the two where the tokenizer means one."""
    context = list(before[-CONTEXT_TOKENS:])
    beginning, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(beginning) :] if whole.startswith(beginning) else tokenizer.decode(ids)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a JSON-lines file."""

    number: int
    """Its number, from 1 on."""
    record: dict[str, Any]
    """The object."""
    text: str
    """Its text."""


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a JSON-lines file, also a compressed one (.gz, .zst); empty lines are left out.

    Args:
        path: an object a line.

    Yields:
        The number of a line, from 1 on, and its object.

    Raises:
        ConfigError: the file cannot be read, or a line is no object.
    """
    number = 0
    try:
        with open(path, "rb") as raw:
            suffix = path.suffix.lower()
            stream = open_compressed(raw, suffix) if suffix in COMPRESSED_SUFFIXES else raw
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield number, _object(text, path, number)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: line {number} is not UTF-8; give a file of JSON objects, one a line") from None
    except (OSError, *DAMAGE) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ConfigError(f"{path}: cannot be read ({reason})") from None


def _object(text: str, path: Path, number: int) -> dict[str, Any]:
    """The object that a line is."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: line {number} is not JSON; give an object a line") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: line {number} is not a JSON object; give an object a line")
    return record


def read_lines(path: Path, key: str) -> list[Line]:
    """Read the texts of a JSON-lines file.

    Args:
        path: as `read_objects` takes it.
        key: of the text in each.

    Raises:
        ConfigError: the file cannot be read, a line is no object with a text, or there is none.
    """
    lines = []
    for number, record in read_objects(path):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ConfigError(f"{path}: line {number} has no text with the key {key!r}; --input-key names another")
        lines.append(Line(number=number, record=record, text=record[key]))
    if not lines:
        raise ConfigError(f"{path}: has no line; give an object a line")
    return lines


def batches(lines: Sequence[Line], size: int) -> Iterator[tuple[int, Sequence[Line]]]:
    """Lines in batches, each with the number of its first one, counted from 0."""
    for first in range(0, len(lines), size):
        yield first, lines[first : first + size]


def write_lines(path: Path, lines: Sequence[Line], results: Sequence[Any], key: str) -> None:
    """Write the objects of `lines` with their results under a key, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_objects(path, [{**line.record, key: result} for line, result in zip(lines, results, strict=True)])


def write_objects(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write objects, one a line, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        content = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()
    except UnicodeEncodeError:  # half a character, which JSON can escape and UTF-8 has no form for
        content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
