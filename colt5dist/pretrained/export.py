"""Writes a trained model as one folder: for colt5dist, for transformers, and for a person."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer
from colt5dist.errors import ConfigError
from colt5dist.files import fsync_tree
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.pretrained.huggingface_tokenizer import write_huggingface_tokenizer
from colt5dist.pretrained.load import model_class
from colt5dist.pretrained.model_card import model_card
from colt5dist.storage.stored_model import open_stored

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    """The folder."""
    source: Path
    """The checkpoint, or exported folder, that it was made from."""
    num_bytes: int
    """Size of all files."""


def export(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    step: int | str | None = None,
    ema: bool = False,
) -> Exported:
    """Write a trained model and its tokenizer into a new folder, which appears when it is whole.

    Args:
        path: a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder.
        output: the new folder.
        dtype: type of the weights; None: as they are stored (checkpoints: float32).
        step: of a run folder, the step of the checkpoint to take instead, or "best".
        ema: whether to take the moving average of its weights, which a checkpoint holds if `train.ema` was set.

    Raises:
        ConfigError: there is no such model, it is damaged, or the folder cannot be written or is there already.
    """
    output = Path(os.path.abspath(output))
    if os.path.lexists(output):
        raise ConfigError(f"--output: {output} is there already; name a new folder")
    stored = open_stored(path, step, ema=ema)
    tokenizer = ModelTokenizer.open(stored.root / TOKENIZER_FOLDER)
    model = model_class(stored).from_stored(stored, dtype=dtype)
    partial = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save(partial / TOKENIZER_FOLDER)
        write_huggingface_tokenizer(tokenizer, partial, causal=isinstance(model, CausalCoLT5))
        if stored.is_checkpoint:
            (partial / CARD).write_text(model_card(stored, model), encoding="utf-8")
        elif (stored.root / CARD).exists():
            shutil.copyfile(stored.root / CARD, partial / CARD)
        fsync_tree(partial)
        os.rename(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            f"--output: {output} cannot be written ({error.strerror or error}); make room, or name another folder"
        ) from None
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return Exported(output, stored.folder, size)
