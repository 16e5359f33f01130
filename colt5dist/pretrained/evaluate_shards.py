"""What `launch/evaluate.py --shards` does: a stored model, shard sets by their names, and the figures of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch

from colt5dist.data import TOKENIZER_FOLDER, ModelTokenizer, Sources, open_sources
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.pretrained.evaluation import HeldOutLoss, Part, data_config, evaluate
from colt5dist.pretrained.load import AVERAGED, model_class
from colt5dist.storage.stored_model import open_stored


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one model."""

    path: str
    """The checkpoint or the exported folder."""
    step: int
    """Steps that the model was trained for."""
    ema: bool
    """Whether its weights are the moving average."""
    sets: dict[str, HeldOutLoss]
    """The loss on each shard set by its name."""

    @property
    def total(self) -> HeldOutLoss:
        """All sets together."""
        return reduce(add, self.sets.values())

    def as_json(self) -> dict[str, Any]:
        """One object: the figures of all sets together, and those of each."""
        sets = {name: loss.as_json() for name, loss in self.sets.items()}
        return {"path": self.path, "step": self.step, "ema": self.ema, **self.total.as_json(), "sets": sets}

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"{self.path}, step {self.step}{AVERAGED * self.ema}"]
        for name, loss in self.sets.items() if len(self.sets) > 1 else []:
            found.append(f"{name}: {loss.total.loss:.4f} nats per token, {_bits(loss)}")
        total = self.total
        tokens = f"{total.num_samples:,} samples, {total.total.num_target_tokens:,} target tokens"
        found.append(f"held-out loss: {total.total.loss:.4f} nats per token, {_bits(total)} ({tokens})")
        if total.shuffled_inputs.loss is not None and total.total.loss:
            change = total.shuffled_inputs.loss / total.total.loss - 1
            found.append(f"with another sample's input: {total.shuffled_inputs.loss:.4f} ({change:+.1%})")
        found += _table("objective", total.by_objective)
        found += _table("tokens of the document", total.by_document_length)
        found += _table("position in the document", total.by_position_in_document)
        return found


def evaluate_stored(
    path: str,
    names: Sequence[str],
    *,
    device: torch.device,
    step: int | str | None = None,
    ema: bool = False,
    num_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Report:
    """Load a model and evaluate it on shard sets; collective.

    Args:
        path: a run folder, a checkpoint inside one, or an exported folder.
        names: folders or addresses of shard sets, or "python-stdlib"; none: the shards that the run was trained on.
        device: where to evaluate.
        step: of a run folder, the step of the checkpoint, or "best".
        ema: whether to take the moving average of its weights, which a checkpoint holds if `train.ema` was set.
        num_samples: samples of each set; None: train.eval_samples of the run.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the model or a shard set cannot be read, or they do not fit together.
    """
    stored = open_stored(path, step, ema=ema)
    config = data_config(stored.settings["data"], str(stored.root))
    tokenizer = ModelTokenizer.open(stored.root / TOKENIZER_FOLDER)
    if not names and not stored.is_checkpoint:
        raise ConfigError("--shards: an exported folder does not say where its shards are; name the folders")
    sets: dict[str, Sources] = {name: open_sources(replace(config, shards=name, sources=[])) for name in names}
    if not names:
        own = ", ".join(source.shards for source in config.sources) or config.shards
        sets = {own: open_sources(config)}
    for name, shards in sets.items():
        if shards.tokenizer.fingerprint != tokenizer.tokenizer.fingerprint:
            raise ConfigError(
                f"--shards: {name} was made with another tokenizer than {path} was trained with; prepare it with "
                f"{stored.root / TOKENIZER_FOLDER}"
            )
    train = stored.settings["train"]
    precision = train.get("precision", "auto")
    in_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    model: CoLT5 | CausalCoLT5 = model_class(stored).from_stored(stored, dtype=dtype, device=device)
    losses = {
        name: evaluate(
            model,
            shards,
            config,
            num_samples=num_samples or train.get("eval_samples", 64),
            micro_batch_size=train.get("micro_batch_size", 8),
            rank=rank,
            world_size=world_size,
        )
        for name, shards in sets.items()
    }
    return Report(path=str(stored.folder), step=stored.step, ema=ema, sets=losses)


def _bits(loss: HeldOutLoss) -> str:
    return "no text" if loss.bits_per_byte is None else f"{loss.bits_per_byte:.4f} bits per byte"


def _table(heading: str, parts: dict[str, Part]) -> list[str]:
    rows = [(name, part) for name, part in parts.items() if part.num_target_tokens]
    width = max(len(heading), *(len(name) for name, _ in rows))
    lines = [f"  {heading:{width}}    loss  target tokens"]
    return lines + [f"  {name:{width}}  {part.loss:.4f}  {part.num_target_tokens:13,}" for name, part in rows]
