"""`colt5dist.load`: a trained model and its tokenizer, from any of the forms in which they are stored."""

from pathlib import Path

import torch

from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.model.pretrained_form import check_arguments, config_of
from colt5dist.storage.stored_model import StoredModel, open_stored

AVERAGED = ", the moving average of its weights"
"""What reports add to the name of a checkpoint whose average was taken."""


def load(
    path: str | Path,
    *,
    step: int | str | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[CoLT5 | CausalCoLT5, ModelTokenizer]:
    """Read a trained model and its tokenizer.

    Args:
        path: a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or an exported folder.
        step: of a run folder, the step of the checkpoint to take instead, or "best".
        ema: whether to take the moving average of its weights, which a checkpoint holds if `train.ema` was set.
        dtype: floating-point type of the weights; None: as they are stored (checkpoints: float32).
        device: where to put the model; None: the CPU.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        TypeError: step is no whole number, ema no bool, or dtype no floating-point type.
        ValueError: there is no such model, it is not whole, or it has no average; one line that names it.
    """
    check_arguments(step, dtype, ema)
    stored = open_stored(path, step, ema=ema)
    tokenizer = ModelTokenizer.open(stored.root / TOKENIZER_FOLDER)
    return model_class(stored).from_stored(stored, dtype=dtype, device=device), tokenizer


def model_class(stored: StoredModel) -> type[CoLT5] | type[CausalCoLT5]:
    """The class that a stored model is of.

    Raises:
        ConfigError: its configuration is not one of this version's.
    """
    return CausalCoLT5 if config_of(stored).architecture == CausalCoLT5.architecture else CoLT5
