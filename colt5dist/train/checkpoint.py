"""Checkpoints: one format for every ZeRO stage and world size, safetensors and JSON only.

A checkpoint is a folder `step_00001000/` with
- `rank_00000.safetensors`, ...: flat float32 fragments named `parameter|key|offset`, one file a rank that wrote;
- `index.json`: for each parameter and key its full shape and the fragments, with file, offset and length;
- `trainer.json`: the trainer's few integers (`TrainerState`);
- `COMPLETE`: written last, names every file with its size. A folder without it, or with other sizes, is not used.

Loading reads the slices that overlap what a rank owns now, whatever world size and stage wrote them.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colt5dist.errors import ConfigError
from colt5dist.files import fsync_path, write_whole
from colt5dist.train import fragments
from colt5dist.train.config import OptimizerConfig
from colt5dist.train.engine import Engine
from colt5dist.train.runtime import barrier

FORMAT_VERSION = 1
COMPLETE = "COMPLETE"


@dataclass
class TrainerState:
    """What a run knows beside weights and moments. Nothing in training draws from a generator with a state."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    samples_consumed: int = 0
    """Number of the next sample in the run's order: the position in the data. data.skip counts as read."""
    optimizer_step: int = 0
    """Steps that were applied."""
    skipped_steps: int = 0
    """Steps that were dropped because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those of them since the last applied step."""
    skipped_from: int = 0
    """Number of the first sample of the steps that were skipped in a row."""
    data_fingerprint: str = ""
    """Fingerprint of the shards' manifest."""
    skipped_samples: list[list[int]] = field(default_factory=list)
    """Ranges of samples that data.skip left out on the way here."""
    bad_records: int = 0
    """Damaged records that were replaced, counted by each rank and each start that met them."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last health.spike_window applied steps, oldest first."""
    spikes: int = 0
    """Loss spikes, those that were rolled back included."""
    rollbacks: int = 0
    """How often a spike took the run back to a checkpoint."""
    rolled_back_samples: list[list[int]] = field(default_factory=list)
    """Ranges of samples around those spikes: with data.skip they are what the order of the samples leaves out."""
    first_held_out_loss: float | None = None
    """Held-out loss before the first step, nats a token."""


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return root / f"step_{step:08d}"


def is_whole(folder: Path) -> bool:
    """Whether COMPLETE is there and every file has the size that it names."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text())["files"]
        named = {"index.json", "trainer.json"} <= set(sizes)
        return named and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoints(root: Path) -> tuple[list[Path], list[Path]]:
    """Whole checkpoints, oldest first, and folders that are unfinished or damaged. Other names are not looked at."""
    folders = sorted(p for p in root.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name)) if root.is_dir() else []
    whole = [p for p in folders if is_whole(p)]
    return whole, [p for p in folders if p not in whole]


def read_state(folder: Path) -> TrainerState:
    """The trainer's integers of a checkpoint."""
    return TrainerState(**json.loads((folder / "trainer.json").read_text())["state"])


def read_index(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Shape and fragments by (parameter name, key)."""
    content = json.loads((folder / "index.json").read_text())
    if content["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{folder}: checkpoint format {content['format_version']}, this version reads {FORMAT_VERSION}; "
            "load it with the version that wrote it"
        )
    return {(entry["name"], entry["key"]): entry for entry in content["tensors"]}


def save_checkpoint(root: Path, engine: Engine, state: TrainerState, keep_last: int) -> Path:
    """Write a checkpoint; every rank calls this. Older ones beyond `keep_last` go once the new one is whole."""
    final = step_folder(root, state.step)
    temporary = root / f".{final.name}.tmp"
    first = engine.deepspeed.global_rank == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    rank_file = temporary / f"rank_{engine.deepspeed.global_rank:05d}.safetensors"
    tensors = {
        f"{f.name}|{f.key}|{f.offset}": f.tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for f in fragments.owned_fragments(engine)
    }
    save_file(tensors, rank_file, metadata={"shapes": json.dumps(_shapes(engine))})
    rank_file.chmod(0o666 & ~_umask())  # safetensors lets only the owner read
    fsync_path(rank_file)
    del tensors
    barrier()
    if first:
        _write_index(temporary)
        content = {"format_version": FORMAT_VERSION, "state": asdict(state)}
        write_whole(temporary / "trainer.json", json.dumps(content, indent=1).encode())
        fsync_path(temporary)
        if final.exists():  # left unfinished by an interrupted save of the same step
            delete_checkpoint(final)
        os.replace(temporary, final)
        fsync_path(root)
        sizes = {p.name: p.stat().st_size for p in sorted(final.iterdir())}
        write_whole(final / COMPLETE, json.dumps({"step": state.step, "files": sizes}, indent=1).encode())
        for old in find_checkpoints(root)[0][:-keep_last]:
            delete_checkpoint(old)
    barrier()
    return final


def load_checkpoint(folder: Path, engine: Engine, *, weights_only: bool = False) -> TrainerState:
    """Fill the masters and moments from a checkpoint, in place, each rank reading only what it needs.

    `fragments.refresh_parameters` has to follow, on all ranks, once all have read their part.

    Args:
        folder: a whole checkpoint.
        engine: an engine of the same model, before its first step.
        weights_only: leave the optimizer fresh.

    Raises:
        ConfigError: the checkpoint is of another model or another optimizer.
    """
    index = read_index(folder)
    state = read_state(folder)
    if not weights_only and state.optimizer_step:
        shapes = {key: tuple(entry["shape"]) for key, entry in index.items()}
        fragments.create_optimizer_state(engine, state.optimizer_step, shapes)
    with _OpenFiles(folder) as files:
        for fragment in fragments.needed_fragments(engine):
            if weights_only and fragment.key != fragments.WEIGHT:
                continue
            _read_fragment(folder, index, files, fragment)
    return state


def model_problems(folder: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Differences between the parameters of a checkpoint and those of a model."""
    saved = {name: tuple(e["shape"]) for (name, key), e in read_index(folder).items() if key == fragments.WEIGHT}
    found = [f"{folder}: parameter {name} is missing" for name in shapes if name not in saved]
    found += [f"{folder}: parameter {name} is not in this model" for name in saved if name not in shapes]
    found += [
        f"{folder}: parameter {name} has shape {saved[name]}, this model needs {shape}"
        for name, shape in shapes.items()
        if name in saved and saved[name] != shape
    ]
    if not found:
        return []
    more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
    return [f"{found[0]}{more}; use the model.* of the run that wrote it"]


def optimizer_problems(folder: Path, config: OptimizerConfig) -> list[str]:
    """Whether the checkpoint's optimizer states are those of another optimizer, as one line."""
    keys = {key for _, key in read_index(folder)} - {fragments.WEIGHT}
    if not keys or ("exp_avg" in keys) == (config.name == "adamw"):
        return []
    return [
        f"optimizer.name: {config.name} cannot go on from the states of another optimizer in {folder}; set it back, or "
        "start another run with init_from"
    ]


def checkpoint_bytes(num_parameters: int) -> int:
    """Size of a checkpoint with AdamW's two moments, up to its JSON: three float32 numbers a parameter."""
    return 12 * num_parameters


def remove_unfinished(root: Path) -> None:
    """Remove the temporary folders of saves that were interrupted."""
    for folder in root.glob(".step_*.tmp"):
        shutil.rmtree(folder)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its marker first, so that an interrupted deletion leaves nothing that looks whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    fsync_path(folder)
    shutil.rmtree(folder)


def _shapes(engine: Engine) -> dict[str, list[int]]:
    return {f"{f.name}|{f.key}": list(f.shape) for f in fragments.owned_fragments(engine)}


def _write_index(folder: Path) -> None:
    """Collect the fragments that the ranks wrote; fail if they do not cover every tensor once."""
    shapes: dict[str, list[int]] = {}
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes.update(json.loads(file.metadata()["shapes"]))
            for tensor_name in file.keys():  # noqa: SIM118 (not a dict)
                name, offset = tensor_name.rsplit("|", 1)
                length = file.get_slice(tensor_name).get_shape()[0]
                parts[name].append({"file": path.name, "offset": int(offset), "length": length})
    tensors = []
    for name in sorted(shapes):
        pieces = sorted(parts[name], key=lambda part: part["offset"])
        end = 0
        for piece in pieces:
            assert piece["offset"] == end, f"{name}: fragments overlap or leave a hole at element {end}"
            end += piece["length"]
        assert end == torch.Size(shapes[name]).numel(), f"{name}: fragments end at element {end} of {shapes[name]}"
        parameter, key = name.rsplit("|", 1)
        tensors.append({"name": parameter, "key": key, "shape": shapes[name], "fragments": pieces})
    content = {"format_version": FORMAT_VERSION, "tensors": tensors}
    write_whole(folder / "index.json", json.dumps(content).encode())


def _read_fragment(
    folder: Path, index: dict[tuple[str, str], dict[str, Any]], files: "_OpenFiles", fragment: fragments.Fragment
) -> None:
    entry = index.get((fragment.name, fragment.key))
    if entry is None or tuple(entry["shape"]) != fragment.shape:
        raise ConfigError(
            f"{folder}: {fragment.key} of parameter {fragment.name} with shape {list(fragment.shape)} is not in it; "
            "use the model.* and optimizer.name of the run that wrote it"
        )
    first, last = fragment.offset, fragment.offset + fragment.tensor.numel()
    for part, low, high in _overlaps(entry["fragments"], first, last):
        source = files[part["file"]].get_slice(f"{fragment.name}|{fragment.key}|{part['offset']}")
        values = source[low - part["offset"] : high - part["offset"]]
        fragment.tensor[low - first : high - first].copy_(values)


def _overlaps(parts: Iterable[dict[str, Any]], first: int, last: int) -> Iterator[tuple[dict[str, Any], int, int]]:
    for part in parts:
        low, high = max(first, part["offset"]), min(last, part["offset"] + part["length"])
        if low < high:
            yield part, low, high


def _umask() -> int:
    """Permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _OpenFiles:
    """The rank files of a checkpoint, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "_OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def __getitem__(self, name: str) -> Any:
        if name not in self.files:
            if Path(name).name != name:
                raise ConfigError(f"{self.folder}: index.json names a file outside the folder: {name}; do not use it")
            try:
                self.files[name] = safe_open(self.folder / name, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self.folder / name}: cannot be read ({error}); use another checkpoint") from None
        return self.files[name]
