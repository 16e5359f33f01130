"""`from_pretrained` and `save_pretrained` of the models: from and to files, without DeepSpeed and other processes."""

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.model.config import CoLT5Config
from colt5dist.model.vocabulary_loss import VocabularyLoss
from colt5dist.nn.attention.relative_bias import RelativeBias
from colt5dist.nn.dropout import Dropout, dropout_of
from colt5dist.ops.checks import check_whole
from colt5dist.storage.exported import CONFIG_NAME, FORMAT_VERSION, SECTION, write_weights
from colt5dist.storage.stored_model import StoredModel, open_stored

CLASSES = {"encoder_decoder": "CoLT5", "causal": "CausalCoLT5"}
"""Name of the model's class by `model.architecture`."""
TRANSFORMERS_CLASSES = {
    "encoder_decoder": ("CoLT5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "causal": ("CoLT5ForCausalLM", "AutoModelForCausalLM"),
}
"""The same for transformers: the class in `MODELING_FILE`, and what opens it."""
MODELING_FILE = Path(__file__).parent / "huggingface" / "modeling_colt5dist.py"
"""The file that is copied into a saved folder for transformers."""
GENERATION_NAME = "generation_config.json"
PLACES = ("shards", "sources", "validation", "cache_gb", "num_workers", "skip")
"""Keys of `data` that say where the run's text is, and not how samples are made; a saved folder does not name them."""
EVALUATION = ("eval_samples", "micro_batch_size", "precision")
"""Keys of `train` that decide how the run evaluates."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a model that was read from files keeps of them, for those who use it and for saving it again."""

    step: int = 0
    """Steps that it was trained for."""
    data: dict[str, Any] = field(default_factory=dict)
    """Section `data` of its configuration: how its samples were made."""
    train: dict[str, Any] = field(default_factory=dict)
    """Section `train` of its configuration."""
    token_ids: dict[str, int] | None = None
    """Ids `pad_id`, `start_id` and `eos_id` of its tokenizer, where that is known."""


class PretrainedForm(nn.Module):
    """A model that can be read from files and written to files.

    Attributes:
        config: sizes and routing.
        seed: seed of random routing.
        origin: what is known of the files that it was read from.
    """

    architecture: ClassVar[str]
    """The `model.architecture` of the class."""
    config: CoLT5Config
    seed: int
    loss: VocabularyLoss
    origin: Origin = Origin()
    pad_id: int = 0
    """The tokenizer's pad token, with which the decoder starts."""
    eos_id: int = 1
    """The tokenizer's end token."""

    def _dropout(self, sample_index: Tensor | None, ids: Tensor) -> Dropout | None:
        """What this pass over ids (b, tokens) drops; None in evaluation, or without dropout."""
        training = self.loss.training  # not of this module: transformers holds the parts of a model, not the model
        return dropout_of(self.config.dropout, sample_index, ids, seed=self.seed, training=training)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        step: int | str | None = None,
        ema: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read a trained model. Hashes are compared, and one copy of the weights is all the memory that it takes.

        Args:
            path: a run folder (its newest whole checkpoint is taken), a checkpoint inside one, or a folder that
                `save_pretrained` or launch/export.py wrote.
            step: of a run folder, the step of the checkpoint to take instead, or "best": the one that
                `checkpoint.keep_best` has kept.
            ema: whether to take the moving average of the weights, which a checkpoint holds if `train.ema` was set.
            dtype: floating-point type of the weights; None: as they are stored (checkpoints: float32).
            device: where to put it; None: the CPU.

        Returns:
            The model, in evaluation mode.

        Raises:
            TypeError: step is no whole number, ema no bool, or dtype no floating-point type.
            ValueError: there is no such model, it is not whole, has no average, or is of another class; one line that
                names it.
        """
        check_arguments(step, dtype, ema)
        return cls.from_stored(open_stored(path, step, ema=ema), dtype=dtype, device=device)

    @classmethod
    def from_stored(
        cls, stored: StoredModel, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """Read a trained model that `open_stored` has found; arguments and errors are those of `from_pretrained`."""
        config = config_of(stored)
        if config.architecture != cls.architecture:
            other = CLASSES[config.architecture]
            raise ConfigError(f"{stored.folder}: holds a {other}, not a {cls.__name__}; use {other}.from_pretrained")
        with torch.device("meta"):
            model = cls(config, seed=stored.settings.get("seed", 0))  # type: ignore[call-arg]
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        _check_shapes(stored, shapes)
        stored.check_hashes()
        model.to(dtype or stored.dtype).to_empty(device=device or "cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                stored.fill(name, 0, parameter.view(-1))
        for module in model.modules():
            if isinstance(module, RelativeBias):
                module.reset_buckets()
        model.origin = Origin(
            step=stored.step,
            data=stored.settings.get("data", {}),
            train=stored.settings.get("train", {}),
            token_ids=stored.token_ids,
        )
        if model.origin.token_ids is not None:
            model.pad_id, model.eos_id = model.origin.token_ids["pad_id"], model.origin.token_ids["eos_id"]
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model so that `from_pretrained` reads it, and transformers with `trust_remote_code=True`.

        The tokenizer is another object with its own files; launch/export.py writes both.

        Args:
            folder: is made where it is missing; files of the same names are replaced.

        Raises:
            OSError: it cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, dict(self.named_parameters()))
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        for name, content in ((CONFIG_NAME, self._exported_config()), (GENERATION_NAME, self._generation_config())):
            write_whole(folder / name, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())

    def _generation_config(self) -> dict[str, Any]:
        """Content of generation_config.json, which is for transformers."""
        ids = self.origin.token_ids
        if ids is None:
            return {"use_cache": False}
        found = {"pad_token_id": ids["pad_id"], "eos_token_id": ids["eos_id"], "use_cache": False}
        start = "bos_token_id" if self.architecture == "causal" else "decoder_start_token_id"
        return {**found, start: ids["start_id"]}

    def _exported_config(self) -> dict[str, Any]:
        """Content of config.json: one section for `from_pretrained`, and keys that transformers reads."""
        section = {
            "format_version": FORMAT_VERSION,
            "step": self.origin.step,
            "token_ids": self.origin.token_ids,
            "settings": {
                "seed": self.seed,
                "model": asdict(self.config),
                "data": {key: value for key, value in self.origin.data.items() if key not in PLACES},
                "train": {key: value for key, value in self.origin.train.items() if key in EVALUATION},
            },
        }
        name, auto = TRANSFORMERS_CLASSES[self.architecture]
        ids = {key: value for key, value in self._generation_config().items() if key != "use_cache"}
        return {
            SECTION: section,
            "architectures": [name],
            "auto_map": {
                "AutoConfig": f"{MODELING_FILE.stem}.CoLT5TransformersConfig",
                auto: f"{MODELING_FILE.stem}.{name}",
            },
            "dtype": str(next(self.parameters()).dtype).removeprefix("torch."),
            "is_encoder_decoder": self.architecture == "encoder_decoder",
            "model_type": "colt5dist",
            "hidden_size": self.config.d_model,
            "num_attention_heads": self.config.num_heads,
            "num_hidden_layers": self.config.num_decoder_layers,
            "vocab_size": self.config.vocab_size,
            **ids,
        }


def check_arguments(step: Any, dtype: Any, ema: Any = False) -> None:
    """Raise where arguments of `from_pretrained` have a wrong type.

    Raises:
        TypeError: step is no whole number and not "best", ema no bool, or dtype no floating-point type.
    """
    if step is not None and step != "best":
        check_whole(step=step)
    if not isinstance(ema, bool):
        raise TypeError(f"ema: {ema!r} is no bool; use True or False")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: {dtype!r} is no floating-point type of torch; use for instance torch.bfloat16")


def config_of(stored: StoredModel) -> CoLT5Config:
    """The configuration of a trained model.

    Raises:
        ConfigError: it has keys that this version does not know, or wrong values.
    """
    settings = stored.settings["model"]
    known = {key.name for key in fields(CoLT5Config)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(
            f"{stored.folder}: model.{unknown[0]} is unknown to this version; use the one that trained it"
        )
    config = CoLT5Config(**settings)
    problems = config.problems()
    if problems:
        raise ConfigError(f"{stored.folder}: {problems[0]}")
    return config


def _check_shapes(stored: StoredModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise where the files have other parameters than the model."""
    found = [f"parameter {name} is missing" for name in shapes if name not in stored.shapes]
    found += [f"parameter {name} is not in this model" for name in stored.shapes if name not in shapes]
    found += [
        f"parameter {name} has shape {stored.shapes[name]}, its configuration needs {shape}"
        for name, shape in shapes.items()
        if stored.shapes.get(name, shape) != shape
    ]
    if found:
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        raise ConfigError(f"{stored.folder}: {found[0]}{more}; use the version that wrote it")
