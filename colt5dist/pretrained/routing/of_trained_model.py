"""What `launch/evaluate.py --routing-map` does: the pictures of what a stored model routes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from colt5dist.data import data_problems, held_out_batches, open_sources
from colt5dist.errors import ConfigError
from colt5dist.files import write_whole
from colt5dist.pretrained.evaluation import data_config, run_batch
from colt5dist.pretrained.load import load
from colt5dist.pretrained.routing.document import document_routing
from colt5dist.pretrained.routing.pictures import draw_kinds, draw_map
from colt5dist.storage.stored_model import open_stored


@dataclass(frozen=True)
class Pictures:
    """The files of the two pictures."""

    map: Path
    """Where in the document tokens are routed."""
    kinds: Path
    """Which kinds of tokens are routed."""

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"routing_map": str(self.map), "routing_kinds": str(self.kinds)}

    def lines(self) -> list[str]:
        """For a person."""
        return [f"routing map: {self.map}", f"kinds of tokens that are routed: {self.kinds}"]


def draw_trained(
    path: str | Path,
    file: Path,
    shards: Sequence[str] = (),
    *,
    step: int | str | None = None,
    ema: bool = False,
    sample: int = 0,
    device: torch.device | None = None,
    is_first: bool = True,
) -> Pictures:
    """Draw where in a held-out document a trained model routes tokens, and which kinds of tokens.

    Args:
        path: a run folder, a checkpoint inside one, or an exported folder.
        file: PNG file of the map; the other picture is beside it, with `_kinds` in its name.
        shards: one shard set; none: the run's own.
        step: of a run folder, the step of the checkpoint, or "best"; None: the newest.
        ema: whether to take the averaged weights of a checkpoint.
        sample: number of the held-out sample.
        device: where to run the model; None: the CPU.
        is_first: whether this process writes the files.

    Returns:
        The two files.

    Raises:
        ConfigError: the model or the shards cannot be read, the model has no routers, or a file cannot be written.
    """
    if len(shards) > 1:
        raise ConfigError(f"--shards: {len(shards)} shard sets, but --routing-map draws one document; name one of them")
    stored = open_stored(path, step)
    config = data_config(stored.settings["data"], str(stored.root))
    if shards:
        config = replace(config, shards=shards[0], sources=[])
    elif not stored.is_checkpoint:
        raise ConfigError("--shards: an exported folder does not say where its shards are; name the folder")
    model, tokenizer = load(path, step=step, ema=ema, device=device)
    sources = open_sources(config)
    if sources.tokenizer.fingerprint != tokenizer.tokenizer.fingerprint:
        raise ConfigError(f"--shards: {config.shards} was made with another tokenizer than {path} was trained with")
    if problems := data_problems(config, sources, model.config.vocab_size):
        raise ConfigError("\n".join(problems))
    batch = held_out_batches(sources, config, num_samples=sample + 1, micro_batch_size=1, rank=0, world_size=1)[sample]
    output = run_batch(model, batch, collect_routing=True)
    if not output.routing:
        raise ConfigError(f"{path}: model.encoder {model.config.encoder} has no routers, so nothing is routed")
    document = document_routing(output.routing, batch, 0, tokenizer)
    title = f"{path}, step {stored.step:,}, held-out sample {sample}"
    pictures = Pictures(file, file.with_name(f"{file.stem}_kinds{file.suffix}"))
    if is_first:
        _write(pictures.map, draw_map(document, title))
        _write(pictures.kinds, draw_kinds(document, title))
    return pictures


def _write(file: Path, png: bytes) -> None:
    try:
        write_whole(file, png)
    except OSError as error:
        raise ConfigError(f"--routing-map: {file} cannot be written ({error.strerror}); name another file") from None
