"""How long a save blocks training, and how long a start takes to read the checkpoint back.

`torchrun --nproc-per-node N launch/benchmark.py checkpoint [key=value ...]`, or `python` for one process. For each ZeRO
stage, the model of the configuration with random optimizer moments is saved in the foreground and in the background
(twice each; the first save in the background also allocates its host memory), then compared with its hashes and
loaded. The file system matters much: with `--folder`, name a folder on the one that a run would write to.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from colt5dist.benchmark import device_line
from colt5dist.storage.checkpoints import WEIGHT
from colt5dist.train.checkpoint import Saver, TrainerState, find_damage, load_checkpoint, read_complete, step_folder
from colt5dist.train.checkpoint.commit import wait_for_deletions
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.engine import Engine, parameter_shapes
from colt5dist.train.engine.fragments import create_optimizer_state, owned_fragments, refresh_parameters
from colt5dist.train.ranks import (
    barrier,
    finish_process_group,
    gather_objects,
    initialise_process_group,
    ranks_from_environment,
)
from colt5dist.wording import count

Figures = dict[str, float]


def measure_stage(config: RunConfig, folder: Path, device: torch.device, say: Callable[[str], None]) -> Figures:
    """Measure each part at the ZeRO stage of the configuration.

    Args:
        config: whose model is saved.
        folder: where the checkpoints are written.
        device: device of this rank.
        say: prints a line on rank 0.

    Returns:
        Seconds per part, of the slowest rank, and the size of the checkpoint under "bytes".
    """
    ranks = ranks_from_environment()
    engine = Engine(config, ranks.world_size, device)
    shapes = {(name, key): s for name, s in parameter_shapes(config).items() for key in ("exp_avg", "exp_avg_sq")}
    create_optimizer_state(engine, 1, shapes)
    for fragment in owned_fragments(engine):
        if fragment.key != WEIGHT:  # a file system could compress zeros
            fragment.tensor.normal_().abs_()
    figures: Figures = {}

    def measure(name: str, call: Callable[[], object]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        barrier()
        begin = time.perf_counter()
        call()
        figures[name] = max(gather_objects(time.perf_counter() - begin))
        say(f"{f'stage {config.zero.stage}':<8} {name:<52} {figures[name]:>9.2f}")

    state = TrainerState(optimizer_step=1)
    for kind, asynchronous in (("foreground", False), ("background", True)):
        settings = replace(config.checkpoint, asynchronous=asynchronous, keep_last=1, on_error="stop")
        saver = Saver(folder, engine, settings, run_id="benchmark", say=lambda line: None)
        for time_name in ("first", "again"):
            state.step += 1
            measure(f"{kind}, {time_name}: training waits", lambda: saver.save(state))  # noqa: B023
            if asynchronous:
                measure(f"{kind}, {time_name}: until it is complete", saver.finish)
    newest = step_folder(folder, state.step)
    figures["bytes"] = float(read_complete(newest).num_bytes)

    def compare() -> None:
        problem = find_damage(newest, ranks)
        assert problem is None, problem

    measure("start: hashes are compared", compare)
    measure("start: states are loaded", lambda: load_checkpoint(newest, engine))
    measure("start: weights are refreshed", lambda: refresh_parameters(engine))
    return figures


def main(arguments: list[str]) -> int:
    """Print a table of seconds and, with `--output`, write the figures as JSON; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--config", default="configs/base.yaml", help="its model is saved (default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[1], help="ZeRO stages (default: 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmark"), help="folder for the checkpoints; emptied at the end"
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the figures")
    options = parser.parse_args(arguments)
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 10)

    def say(line: str) -> None:
        if ranks.is_first:
            print(line, flush=True)

    say(f"{device_line()}, {count(ranks.world_size, 'process', 'processes')}; seconds")
    results: dict[str, object] = {"device": device_line(), "world_size": ranks.world_size, "config": options.config}
    for stage in options.stages:
        config = load_config(options.config, [*options.settings, f"zero.stage={stage}"])
        folder = options.folder / f"stage{stage}"
        figures = measure_stage(config, folder, device, say)
        say(f"{f'stage {stage}':<8} {'size of the checkpoint, GB':<52} {figures['bytes'] / 1e9:>9.2f}")
        results[f"stage {stage}"] = figures
        barrier()
        if ranks.is_first:
            wait_for_deletions()
            shutil.rmtree(folder)
    if ranks.is_first and options.output:
        options.output.write_text(json.dumps(results, indent=1))
    finish_process_group()
    return 0
