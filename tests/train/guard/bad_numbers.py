"""Trains with bad numbers on purpose, at several ZeRO stages, and writes the records; started by test_bad_numbers.py.

    torchrun --nproc-per-node 2 tests/train/guard/bad_numbers.py OUTPUT FOLDER VARIANT... -- SETTING...

A variant is PRECISION-OFFLOAD-STAGE, for instance bf16-optimizer-2. Steps 1 and 7 are good. Step 2: a loss of the last
rank is NaN and all gradients are finite. Step 3: a loss of the first rank is infinite. Step 4: one gradient of the last
rank is NaN. Step 5: one element of one gradient of the first rank is infinite; step 6: it is 1e20, whose square
overflows float32. The losses of steps 4 to 6 are good.

The variant "given up", at stage 3, has one gradient of the last rank NaN from step 2 on, and allows two such steps.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from colt5dist.errors import TrainingFault
from colt5dist.train.checkpoint import Saver, TrainerState
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine import fragments
from colt5dist.train.engine.engine import Engine
from colt5dist.train.guard.heartbeat import Heartbeat
from colt5dist.train.guard.stop import StopRequests
from colt5dist.train.loop import train
from colt5dist.train.pretrain import open_run_shards
from colt5dist.train.ranks import Ranks, finish_process_group, initialise_process_group, ranks_from_environment
from colt5dist.train.report.accounting import step_flops
from colt5dist.train.report.meter import Meter
from colt5dist.train.report.monitor import Monitor, read_metrics
from colt5dist.train.run import Run

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
SCHEDULE = {2: "NaN loss", 3: "infinite loss", 4: "NaN gradient", 5: "infinite gradient", 6: "large gradient"}
ALWAYS = dict.fromkeys(range(2, 100), "NaN gradient")
PARAMETER = "encoder.layers.0.feed_forward.light_ff.to_hidden.weight"
"""Parameter whose gradient is made bad."""


def weights_and_moments(engine: Engine) -> list[torch.Tensor]:
    """Copy everything that this rank would save."""
    return [f.tensor.clone() for f in fragments.owned_fragments(engine)]


@contextmanager
def bad_numbers(engine: Engine, state: TrainerState, ranks: Ranks, schedule: dict[int, str]) -> Iterator[list[bool]]:
    """Put bad numbers into this rank's steps; yields a list that tells for each step whether it changed nothing."""
    first, last = ranks.is_first, ranks.rank == ranks.world_size - 1
    forward, step = engine.forward, engine.step
    unchanged: list[bool] = []

    def bad_forward(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        bad = torch.zeros_like(output.token_loss)
        if last and schedule.get(state.step + 1) == "NaN loss":
            bad[0, 0] = float("nan")
        if first and schedule.get(state.step + 1) == "infinite loss":
            bad[1, 1] = float("inf")
        return output._replace(token_loss=output.token_loss + bad)

    def bad_gradient(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if last and schedule.get(state.step + 1) == "NaN gradient":
            gradient.fill_(float("nan"))
        if first and schedule.get(state.step + 1) == "infinite gradient":
            gradient.view(-1)[3] = float("inf")
        if first and schedule.get(state.step + 1) == "large gradient":
            gradient.view(-1)[3] = 1e20
        return gradient

    def watched_step(rate: float) -> tuple[bool, float]:
        before = weights_and_moments(engine)
        done = step(rate)
        after = weights_and_moments(engine)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        unchanged.append(same)
        return done

    hook = dict(engine.module.named_parameters())[PARAMETER].register_hook(bad_gradient)
    with patch.object(engine, "forward", bad_forward), patch.object(engine, "step", watched_step):
        yield unchanged
    hook.remove()


def train_badly(
    config: RunConfig, run_dir: Path, ranks: Ranks, device: torch.device, schedule: dict[int, str]
) -> dict[str, Any]:
    """Train in `run_dir`; returns records, log lines, state, and which steps changed nothing on each rank."""
    engine = Engine(config, ranks.world_size, device)
    state = TrainerState(first_held_out_loss=0.0)
    run_dir.mkdir(parents=True, exist_ok=True)
    monitor = Monitor(run_dir, is_first=ranks.is_first, first_step=0, num_steps=config.train.steps)
    lines: list[str] = []
    with monitor, patch.object(monitor, "say", lines.append), bad_numbers(engine, state, ranks, schedule) as unchanged:
        run = Run(
            config=config,
            run_dir=run_dir,
            ranks=ranks,
            shards=open_run_shards(config),
            readers=None,
            engine=engine,
            state=state,
            monitor=monitor,
            meter=Meter(device, ["here"] * ranks.world_size, step_flops(config)),
            stop=StopRequests(run_dir, watch_files=False, max_minutes=None),
            heartbeat=Heartbeat(ranks, ["here"] * ranks.world_size, run_dir, start_seconds=300, timeout_seconds=300),
            saver=Saver(run_dir / "checkpoints", engine, config.checkpoint, run_id="bad numbers"),
        )
        try:
            train(run)
            fault = None
        except TrainingFault as error:
            fault = str(error)
    everywhere: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everywhere, unchanged)
    return {
        "records": read_metrics(run_dir) if ranks.is_first else [],
        "lines": lines,
        "state": vars(state),
        "unchanged": everywhere,
        "fault": fault,
    }


def main(output: Path, folder: Path, variants: list[str], settings: list[str]) -> None:
    """Train each variant."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    results = {}
    for variant in variants:
        precision, offload, stage = variant.split("-")
        own = [f"train.precision={precision}", f"zero.offload={offload}", f"zero.stage={stage}"]
        config = load_config(TINY, [*settings, *own])
        results[variant] = train_badly(config, folder / variant, ranks, device, SCHEDULE)
    config = load_config(TINY, [*settings, "zero.stage=3", "health.max_skipped=2"])
    results["given up"] = train_badly(config, folder / "given-up", ranks, device, ALWAYS)
    if ranks.is_first:
        output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    cut = sys.argv.index("--")
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:cut], sys.argv[cut + 1 :])
