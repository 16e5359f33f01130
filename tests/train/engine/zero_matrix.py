"""Trains, saves and loads at ZeRO stages (0123, say) and writes the losses as JSON; started by test_zero_stages.py.

    torchrun --nproc-per-node 2 tests/train/engine/zero_matrix.py OUTPUT FOLDER STAGES [OPTION...] SETTING...

With --flat, stages 1-3 sum gradients by FlatGradients and ShardedGradients also on CPUs. AdamW is then one pass over
memory in every step of an odd number, and torch's own in the others. With --hosts each process says that it is on a
host of its own.

Saves a checkpoint a stage in FOLDER where there is none, goes back to earlier ones, and loads those that are there at
every stage; with --loads=02,13 it loads by these pairs of stages (--loads=: by none) and never goes back. With
--load-micro-batch=N those that are loaded go on with micro-batches of that size.
"""

import gc
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from colt5dist.data.read.batch import Batch
from colt5dist.train.checkpoint import (
    Saver,
    TrainerState,
    load_checkpoint,
    read_fragments,
    read_index,
    step_folder,
)
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.compile import LAYERS
from colt5dist.train.engine.engine import Engine, num_elements, parameter_shapes
from colt5dist.train.engine.fragments import refresh_parameters
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.engine.micro_batch_graph import to_device
from colt5dist.train.engine.sharded_gradients import ShardedGradients
from colt5dist.train.losses import LossSums, count_target_tokens
from colt5dist.train.optimizer.adamw import can_step_in_one_pass
from colt5dist.train.ranks import finish_process_group, initialise_process_group, ranks_from_environment

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
LEARNING_RATE = 0.01


def micro_batches(config: RunConfig, step: int, rank: int, world_size: int) -> list[Batch]:
    """This rank's part of a global batch of random tokens with targets of very different lengths."""
    generator = torch.Generator().manual_seed(step)
    size, n, t = config.train.global_batch_size, config.data.input_length, config.data.target_length
    inputs = torch.randint(3, 250, (size, n), generator=generator)
    targets = torch.randint(3, 250, (size, t), generator=generator)
    lengths = torch.randint(2, t, (size, 1), generator=generator)
    whole = Batch(
        input_ids=inputs,
        input_mask=torch.ones(size, n, dtype=torch.bool),
        decoder_input_ids=targets.roll(1, dims=1),
        target_ids=targets,
        target_mask=torch.arange(t) < lengths,
        objective=torch.arange(size) % 4,
        sample_index=torch.arange(size) + step * size,
        target_bytes=lengths.squeeze(1),
    )
    mine = {name: tensor[rank::world_size] for name, tensor in whole.items()}
    width = config.train.micro_batch_size
    starts = range(0, size // world_size, width)
    return [Batch(**{name: tensor[i : i + width] for name, tensor in mine.items()}) for i in starts]


def train_step(engine: Engine, config: RunConfig, step: int, *, spoil: bool = False) -> tuple[float, float, bool]:
    """One step; with `spoil` the last rank's loss is NaN. Returns loss, gradient norm and whether it was applied."""
    ranks = ranks_from_environment()
    batches = micro_batches(config, step, ranks.rank, ranks.world_size)
    count = count_target_tokens(batches, engine.device)
    sums = LossSums(("a", "b", "c", "d"), engine.device)
    for batch in batches:
        on_device = to_device(batch, engine.device)
        output = engine.forward(on_device)
        loss = output.token_loss.sum() / count
        if spoil and ranks.rank == ranks.world_size - 1:
            loss = loss * float("nan")
        engine.backward(loss)
        sums.add(on_device, output)
    loss = sums.read().loss
    if isinstance(engine.gradients, GradientSums) and can_step_in_one_pass(engine.torch_optimizer):
        engine.gradients.one_pass = step % 2 == 1
    applied, norm = engine.step(LEARNING_RATE)
    return loss, norm, applied


def watch_gathered(engine: Engine) -> list[int]:
    """Number of layers whose weights are there, whenever a layer begins its forward pass; [] where all always are."""
    counts: list[int] = []
    if isinstance(engine.gradients, ShardedGradients):
        weights = engine.gradients.weights
        for layer in engine.module.modules():
            if isinstance(layer, LAYERS):
                layer.register_forward_pre_hook(lambda *_: counts.append(sum(u.is_gathered for u in weights.units)))
    return counts


def live_bytes() -> int:
    """Bytes of all tensors' memory in this process, each piece counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout is torch.strided and thing.device.type != "meta":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def go_back(engine: Engine, source: Path) -> None:
    """As a rollback does, but for the trainer's state."""
    load_checkpoint(source, engine)
    refresh_parameters(engine)


def main(output: Path, folder: Path, stages: list[int], settings: list[str]) -> None:
    """Run the matrix."""
    if "--hosts" in settings:
        os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    flat = True if "--flat" in settings else None
    chosen = [setting.partition("=")[2].split(",") for setting in settings if setting.startswith("--loads=")]
    after_load = [
        f"train.micro_batch_size={setting.partition('=')[2]}"
        for setting in settings
        if setting.startswith("--load-micro-batch=")
    ]
    settings = [setting for setting in settings if not setting.startswith("--")]
    results: dict[str, object] = {}
    for stage in stages:
        config = load_config(TINY, [*settings, f"zero.stage={stage}"])
        root = folder / f"stage{stage}"
        if not root.exists():
            engine = Engine(config, ranks.world_size, device, flat_gradients=flat if stage else None)
            counts = watch_gathered(engine)
            fresh = Saver(folder / f"fresh{stage}", engine, config.checkpoint, run_id="matrix")
            fresh.save(TrainerState(step=1, optimizer_step=0, samples_consumed=8))
            steps = [train_step(engine, config, step) for step in (1, 2)]
            if isinstance(engine.gradients, ShardedGradients):
                left = sum(unit.is_gathered for unit in engine.gradients.weights.units)
                results[f"gathered {stage}"] = {"most": max(counts), "left": left}
            *spoilt, applied = train_step(engine, config, 3, spoil=True)
            results[f"nan {stage}"] = {"applied": applied, "finite": math.isfinite(spoilt[0])}
            state = TrainerState(step=3, optimizer_step=2, samples_consumed=24, skipped_steps=1)
            Saver(root, engine, config.checkpoint, run_id="matrix").save(state)
            steps += [train_step(engine, config, step) for step in (4, 5)]
            results[f"train {stage}"] = [(loss, norm) for loss, norm, _ in steps]
            if chosen:
                continue  # rollbacks are not asked for
            memory = [live_bytes()]
            for _ in range(10):
                go_back(engine, step_folder(root, 3))
            again = [train_step(engine, config, 4)[:2]]
            memory.append(live_bytes())
            go_back(engine, step_folder(folder / f"fresh{stage}", 1))
            memory.append(live_bytes())
            results[f"memory {stage}"] = memory
            results[f"again {stage}"] = again
            results[f"anew {stage}"] = [train_step(engine, config, 1)[:2]]
            results[f"moments {stage}"] = 8 * sum(num_elements(s) for s in parameter_shapes(config).values())
    for written in stages:
        for stage in stages:
            if chosen and f"{written}{stage}" not in chosen[0]:
                continue
            config = load_config(TINY, [*settings, *after_load, f"zero.stage={stage}"])
            engine = Engine(config, ranks.world_size, device, flat_gradients=flat if stage else None)
            source = step_folder(folder / f"stage{written}", 3)
            state = load_checkpoint(source, engine)
            refresh_parameters(engine)
            assert state.optimizer_step == 2
            index = read_index(source)
            num_bytes = 4 * sum(math.prod(entry["shape"]) for entry in index.values())
            results[f"share read {written} {stage}"] = read_fragments(source, index, engine) / num_bytes
            results[f"load {written} {stage}"] = [train_step(engine, config, step)[:2] for step in (4, 5)]
    dist.barrier()
    if ranks.is_first:
        output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(stage) for stage in sys.argv[3]], sys.argv[4:])
