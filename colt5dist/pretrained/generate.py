"""What `launch/generate.py` does: one text, or a file of texts, with a stored model."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.pretrained.fill import Filled, fill_texts
from colt5dist.pretrained.load import load
from colt5dist.pretrained.write_texts import batches, read_lines, write_lines, write_texts


def generate_text(path: str, text: str, *, fills: bool, place: dict[str, Any], **settings: Any) -> list[str]:
    """Write for one text.

    Args:
        path: of the stored model.
        text: the text.
        fills: whether its blanks are filled.
        place: `device`, `dtype`, `step` and `ema`; None: the default of each.
        settings: those of `write_texts`, or of `fill_texts`.

    Returns:
        num_return_sequences texts.

    Raises:
        ValueError: the model cannot be loaded, the text is empty or its blanks are wrong, or a setting is.
    """
    return _write(*_loaded(path, **place), [text], 0, fills, settings)[0]


def generate_file(
    path: str,
    source: Path,
    target: Path,
    input_key: str,
    output_key: str,
    batch_size: int,
    *,
    fills: bool,
    place: dict[str, Any],
    **settings: Any,
) -> str:
    """Write for each line of a JSON-lines file; the order of the lines stays.

    Args:
        path: of the stored model.
        source: the file that is read.
        target: the file that is written, whole or not at all.
        input_key: key of the text in each object.
        output_key: key that what is written gets: a text, or a list of num_return_sequences.
        batch_size: texts at a time.
        fills: whether blanks are filled.
        place: `device`, `dtype`, `step` and `ema`; None: the default of each.
        settings: those of `write_texts`, or of `fill_texts`.

    Returns:
        A line that says what was done.

    Raises:
        ValueError: a file, a line, the model, a text or a setting is wrong.
    """
    lines = read_lines(source, input_key)
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: its folder does not exist; make it first")
    model, tokenizer = _loaded(path, **place)
    results: list[Any] = []
    begin = time.monotonic()
    for first, batch in batches(lines, batch_size):
        written = _write(model, tokenizer, [line.text for line in batch], first, fills, settings)
        results += [texts if len(texts) > 1 else texts[0] for texts in written]
    write_lines(target, lines, results, output_key)
    return f"written: {target} ({len(lines)} lines, {time.monotonic() - begin:.1f} s)"


def _loaded(
    path: str, device: str | None = None, dtype: str | None = None, step: int | str | None = None, ema: bool = False
) -> tuple[CoLT5 | CausalCoLT5, ModelTokenizer]:
    """The model and its tokenizer, on a GPU if there is one and nothing else is said."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda, but PyTorch finds no GPU; use cpu")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = dtype or ("bfloat16" if place == "cuda" else "float32")
    return load(path, step=step, ema=ema, device=place, dtype=getattr(torch, name))


def _write(
    model: CoLT5 | CausalCoLT5,
    tokenizer: ModelTokenizer,
    texts: Sequence[str],
    first: int,
    fills: bool,
    settings: dict[str, Any],
) -> list[list[str]]:
    """num_return_sequences texts for each of a batch, whose first text has the number `first`."""
    if not fills:
        return write_texts(model, tokenizer, texts, first_index=first, **settings)
    filled = fill_texts(model, tokenizer, texts, first_index=first, **settings)
    for number, results in enumerate(filled):
        for line in dict.fromkeys(line for result in results for line in blank_notes(result, **settings)):
            print(f"note: text {first + number}: {line}", file=sys.stderr)
    return [[result.text for result in results] for results in filled]


def blank_notes(filled: Filled, *, max_answer_tokens: int, **settings: Any) -> list[str]:
    """A line for each blank that still looks blank: white space alone, as much as there may be.

    Args:
        filled: a text whose blanks are filled.
        max_answer_tokens: most tokens in a blank.
        settings: others of `fill_texts`, which are not read.
    """
    return [
        f"<{number}>: {size} tokens, all of them white space, cut at --max-new-tokens; the model has perhaps read too "
        "little"
        for number, (answer, size) in enumerate(zip(filled.answers, filled.num_tokens, strict=True))
        if size == max_answer_tokens and answer.isspace()
    ]
