"""Writes a held-out sample at ZeRO stages 1 and 3, with and without room for it; started by test_whole_model.py.

    torchrun --nproc-per-node 2 tests/train/engine/held_out_ranks.py OUTPUT SETTING...

OUTPUT gets as JSON, for each case, what each rank has got, and the sum of a collective that follows. On GPUs there is
one case more: a rank whose GPU would be left too little memory.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from zero_matrix import TINY, micro_batches

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.read.batch import Batch
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.model.colt5 import CoLT5
from colt5dist.train.config.load import load_config
from colt5dist.train.engine import whole_model
from colt5dist.train.engine.engine import Engine
from colt5dist.train.ranks import (
    finish_process_group,
    gather_objects,
    initialise_process_group,
    ranks_from_environment,
)
from colt5dist.train.report.held_out_view import what_is_written

TOKENIZER = ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=6)
CASES: dict[str, tuple[Any, str, int]] = {
    "no room for the copy": (CoLT5, "to_empty", 0),
    "no room to help": (whole_model, "allocate_buffers", -1),
    "no room to write": (CoLT5, "generate", 0),
}
"""What runs out of memory: where it is, its name, and the rank (-1: the last one)."""


@contextmanager
def without_room(where: Any, name: str, *, fails: bool) -> Iterator[None]:
    """Have a function run out of memory on this rank; giving memory back takes none."""
    own: Callable[..., Any] = getattr(where, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        if fails and settings.get("device") != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments, **settings)

    with patch.object(where, name, call):
        yield


def main(output: Path, settings: list[str]) -> None:
    """Run all cases."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    results: dict[str, object] = {}

    def case(name: str, engine: Engine, sample: Batch) -> None:
        passages, note = what_is_written(engine, sample, TOKENIZER, wanted=ranks.is_first)
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones)
        results[name] = {
            "written": gather_objects([passage.model for passage in passages]),
            "notes": gather_objects(note),
            "sum": int(ones),
        }

    configs = {stage: load_config(TINY, [*settings, f"zero.stage={stage}"]) for stage in (1, 3)}
    batch: Any = micro_batches(configs[1], 1, 0, 1)[0]
    sample: Any = {name: tensor[:1] for name, tensor in batch.items()}
    engines = {stage: Engine(config, ranks.world_size, device) for stage, config in configs.items()}
    for stage, engine in engines.items():
        engine.train(False)
        with torch.no_grad():
            case(f"stage {stage}", engine, sample)
    engine = engines[3]
    with engine.writer(wanted=ranks.is_first) as model:
        has_weights = model is not None and not any(p.is_meta for p in model.parameters())
    is_freed = model is None or all(p.is_meta for p in model.parameters())
    results["copy"] = {"has weights": gather_objects(has_weights), "is freed": gather_objects(is_freed)}
    with torch.no_grad():
        for name, (where, function, rank) in CASES.items():
            with without_room(where, function, fails=ranks.rank == rank % ranks.world_size):
                case(name, engine, sample)
        if device.type == "cuda":
            spare = 1 << 60 if ranks.rank == ranks.world_size - 1 else whole_model.SPARE_BYTES
            with patch.object(whole_model, "SPARE_BYTES", spare):
                case("too little left", engine, sample)
        case("room again", engine, sample)
    if ranks.is_first:
        output.write_text(json.dumps(results))
    for engine in engines.values():
        engine.close()
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
