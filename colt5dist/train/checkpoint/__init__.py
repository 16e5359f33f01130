"""Checkpoints: one format for every ZeRO stage and number of ranks, safetensors and JSON only.

A checkpoint is a folder `step_00001000/` with
- `rank_00000.safetensors`, ...: flat float32 fragments named `parameter|key|offset`, one file per rank;
- `index.json`: for each parameter and key its full shape and its fragments, with file, offset and length;
- `trainer.json`: the trainer's few integers (`TrainerState`);
- `COMPLETE`: written last: the run, the step, and size and hashes of every file.

It is written as `.step_00001000.tmp` and renamed once COMPLETE is in it, so a folder with the final name was whole
once. Loading reads only the slices that a rank needs now, whatever number of ranks and ZeRO stage wrote them.
"""

from colt5dist.storage.checkpoints import (
    checkpoint_folders,
    find_checkpoints,
    folder_step,
    is_whole,
    read_index,
    step_folder,
)
from colt5dist.storage.complete_file import COMPLETE, Damage, json_problem, read_complete, size_problem
from colt5dist.train.checkpoint.best import early_stop, is_best, judge, name_best
from colt5dist.train.checkpoint.commit import rename_damaged
from colt5dist.train.checkpoint.folders import (
    checkpoint_bytes,
    has_average,
    model_problems,
    optimizer_problems,
    read_state,
    renamed_folders,
    unfinished_folders,
)
from colt5dist.train.checkpoint.read import find_damage, load_checkpoint, load_weights, read_fragments
from colt5dist.train.checkpoint.save import Saver
from colt5dist.train.checkpoint.trainer_state import TrainerState

__all__ = [
    "COMPLETE",
    "Damage",
    "Saver",
    "TrainerState",
    "checkpoint_bytes",
    "checkpoint_folders",
    "early_stop",
    "find_checkpoints",
    "find_damage",
    "folder_step",
    "has_average",
    "is_best",
    "is_whole",
    "json_problem",
    "judge",
    "load_checkpoint",
    "load_weights",
    "model_problems",
    "name_best",
    "optimizer_problems",
    "read_complete",
    "read_fragments",
    "read_index",
    "read_state",
    "rename_damaged",
    "renamed_folders",
    "size_problem",
    "step_folder",
    "unfinished_folders",
]
