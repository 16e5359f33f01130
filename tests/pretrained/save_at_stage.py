"""Loads the weights of a run's checkpoint at a ZeRO stage, and saves them as a checkpoint of another run folder.

    torchrun --nproc-per-node 2 tests/pretrained/save_at_stage.py RUN_DIR NEW_RUN_DIR STAGE

Started by test_export.py.
"""

import shutil
import sys
from pathlib import Path

from colt5dist.storage.checkpoints import CHECKPOINTS
from colt5dist.storage.stored_model import open_stored
from colt5dist.train.checkpoint import Saver, TrainerState, load_weights
from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.fragments import refresh_parameters
from colt5dist.train.ranks import barrier, finish_process_group, initialise_process_group, ranks_from_environment


def main(run_dir: Path, new: Path, stage: str) -> None:
    """Load and save."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    stored = open_stored(run_dir)
    config = load_config(run_dir / "config.yaml", [f"zero.stage={stage}"])
    engine = Engine(config, ranks.world_size, device)
    load_weights(stored.folder, engine)
    refresh_parameters(engine)
    if ranks.is_first:
        shutil.copytree(run_dir, new, ignore=shutil.ignore_patterns(CHECKPOINTS))
    barrier()
    Saver(new / CHECKPOINTS, engine, config.checkpoint, run_id="again").save(TrainerState(step=stored.step))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
