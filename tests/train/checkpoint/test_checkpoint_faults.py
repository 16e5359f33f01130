"""Saves that fail and damaged checkpoints: one clear error on all ranks, nothing is lost, no damage goes unnoticed."""

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colt5dist.data import open_sources
from colt5dist.errors import ConfigError
from colt5dist.storage import complete_file
from colt5dist.train.checkpoint import find_checkpoints, read_complete, size_problem, unfinished_folders
from colt5dist.train.checkpoint.commit import (
    Retention,
    delete_old,
    rename_aside,
    rename_damaged,
    wait_for_deletions,
)
from colt5dist.train.checkpoint.save import HostCopy
from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import parameter_shapes
from colt5dist.train.engine.fragments import Fragment
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.resume import StartPlan, plan_start

SCRIPT = Path(__file__).with_name("save_faults.py")
TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
WHOLE = [f"step_{step:08d}" for step in (1, 2, 3, 4)]
CHECKPOINT_BYTES = 1_000_000
"""Approximate size of a checkpoint of the micro model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def full_disk(folder: Path) -> Iterator[str]:
    """A run directory with its checkpoints on a tmpfs with space for one and a half; "-" if mounting is not allowed."""
    root = folder / "full" / "checkpoints"
    root.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={CHECKPOINT_BYTES * 3 // 2}", "tmpfs", str(root)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    except OSError:
        mounted = False
    yield str(root.parent) if mounted else "-"
    if mounted:
        subprocess.run(["umount", str(root)], check=True)


@pytest.fixture(scope="module")
def results(
    folder: Path, full_disk: str, run_ranks: Callable[..., str], micro_settings: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Results of save_faults.py on two processes."""
    output = folder / "results.json"
    run_ranks(SCRIPT, str(output), str(folder), full_disk, *micro_settings, processes=2)
    return json.loads(output.read_text())


def one_error(result: dict[str, Any]) -> str:
    """Return the error that both ranks raised."""
    first, second = result["outcomes"]
    assert first == second and first.startswith("SaveError: ") and "\n" not in first
    return first


@pytest.mark.parametrize("way", ["continue", "background"])
def test_the_run_continues_and_its_last_checkpoint_must_be_whole(results: dict[str, dict[str, Any]], way: str) -> None:
    result = results[way]
    assert "checkpoint of step 4 is not written: rank 1: " in one_error(result) and "File too large" in one_error(
        result
    )
    assert "warning: checkpoint of step 3 is not written: rank 1: " in result["printed"]
    assert result["losses"] == results["whole"]["losses"]
    assert result["folders"] == WHOLE[:2]


@pytest.mark.parametrize("way", ["stop", "background stop"])
def test_the_run_stops_at_the_failed_save(results: dict[str, dict[str, Any]], way: str) -> None:
    result = results[way]
    assert "checkpoint of step 3 is not written: rank 1: " in one_error(result)
    assert result["losses"][:3] == results["whole"]["losses"][:3]
    assert result["folders"] == WHOLE[:2]


def test_a_folder_without_write_permission(results: dict[str, dict[str, Any]]) -> None:
    """The old checkpoint is deleted only once its successor is whole (keep_last 1)."""
    result = results["read-only"]
    assert "rank 1: " in one_error(result) and "Permission denied" in one_error(result)
    assert result["folders"] == WHOLE[:1]
    assert result["after"] == ["returns None"] * 2 and result["left"] == WHOLE[1:2]


def test_the_last_checkpoint_before_skipped_steps_stays(results: dict[str, dict[str, Any]]) -> None:
    """It is kept beyond keep_last, because the weights in newer checkpoints may be the cause of the skipped steps."""
    assert results["read-only"]["beside skipped steps"] == WHOLE[1:3]


def test_a_full_disk(results: dict[str, dict[str, Any]], full_disk: str) -> None:
    if full_disk == "-":
        pytest.skip("mounting a small tmpfs needs root; the tests with a limited file size are similar")
    result = results["full"]
    assert "checkpoint of step 2 is not written: " in one_error(result)
    assert "No space left on device" in one_error(result)
    assert result["folders"] == WHOLE[:1]
    assert size_problem(Path(full_disk) / "checkpoints" / WHOLE[0]) is None


def test_a_changed_byte_is_found_and_the_older_checkpoint_taken(results: dict[str, dict[str, Any]]) -> None:
    result = results["damaged"]
    assert result["outcomes"] == ["returns 0"] * 2
    assert "step_00000002: rank_00001.safetensors was changed after it was written" in result["printed"]
    assert "resuming from" in result["printed"] and "step_00000001" in result["printed"]
    assert result["folders"] == [*WHOLE[:2], "step_00000002.damaged", *WHOLE[2:]]
    assert result["losses"] == results["whole"]["losses"]


def test_a_start_uses_the_last_checkpoint_of_the_run_before_it(results: dict[str, dict[str, Any]]) -> None:
    """Although it made its first plan before that checkpoint was written; no record is lost."""
    result = results["late"]
    assert result["outcomes"] == ["returns 0"] * 2
    assert "resuming from" in result["printed"] and "step_00000002:" not in result["printed"]
    assert f"{WHOLE[3]}\n" in result["printed"] and result["folders"] == [*WHOLE, "step_00000005"]
    assert result["losses"][:4] == results["whole"]["losses"] and len(result["losses"]) == 5


def test_an_unreadable_checkpoint_gets_another_name_than_a_damaged_one(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may work again later: then a user can give the checkpoint its name back."""

    def unreadable(path: Path, *arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    folder = run_dir / "checkpoints" / WHOLE[3]
    with monkeypatch.context() as patches:
        patches.setattr(complete_file, "open", unreadable, raising=False)
        damage = complete_file.find_difference(folder, lambda number, name: name.startswith("rank"))
    assert damage is not None and damage.description == "rank_00000.safetensors cannot be read (Input/output error)"
    assert rename_damaged(folder, damage).endswith("step_00000004.unread") and not folder.exists()
    os.rename(folder.with_name("step_00000004.unread"), folder)
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    damage = complete_file.find_difference(folder, lambda number, name: True)
    assert damage is not None and "was changed after it was written" in damage.description
    assert rename_damaged(folder, damage).endswith("step_00000004.damaged") and not folder.exists()


def test_no_start_at_step_0_beside_renamed_checkpoints(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    for name, ending in zip(WHOLE, ("damaged", "damaged-1", "replaced", "unread"), strict=True):
        os.rename(run_dir / "checkpoints" / name, run_dir / "checkpoints" / f"{name}.{ending}")
    with pytest.raises(ConfigError, match=r"step_00000003.replaced: was renamed .*resume_allow=\[from_zero\]"):
        plan(run_dir, micro_settings)
    assert plan(run_dir, micro_settings, "resume_allow=[from_zero]").resume_from is None


def test_saves_by_time(results: dict[str, dict[str, Any]]) -> None:
    assert results["clock"]["folders"] == WHOLE[2:]


def test_a_save_in_the_background_writes_the_weights_of_its_step(
    results: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Every file is written after the next step has changed the weights, and equals the foreground's to the bit."""
    assert results["beside"]["folders"] == results["whole"]["folders"] == WHOLE
    for name in WHOLE:
        one, other = (read_complete(folder / run / "checkpoints" / name) for run in ("whole", "beside"))
        assert one.files == other.files and one.run_id != other.run_id


def test_the_host_copy_is_independent_of_its_source() -> None:
    source = torch.arange(10.0)
    (copy,) = HostCopy().take([Fragment("p", "weight", 0, (10,), source)])
    source.zero_()
    assert copy.tensor.tolist() == list(range(10))


def test_the_status_of_a_run_without_its_last_checkpoint(
    results: dict[str, dict[str, Any]], run_pretrain: Callable[..., Any], tmp_path: Path
) -> None:
    """Exit status 74 and one line, also with a request to stop by file; the request counts once."""

    def ask_for_a_stop() -> None:
        while not read_metrics(tmp_path / "run") and not ended.wait(0.05):
            pass
        (tmp_path / "run" / "STOP").touch()

    ended = threading.Event()
    asking = threading.Thread(target=ask_for_a_stop)
    asking.start()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT_BYTES // 2, before[1]))  # inherited by the run
    try:
        done = run_pretrain(tmp_path / "run", "train.steps=1000000", launcher="python", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        ended.set()
        asking.join()
    assert done.returncode == 74, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "checkpoint" in line]
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert line.startswith(f"error: checkpoint of step {last} is not written: rank 0: ") and "File too large" in line
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "STOP").exists()


@pytest.fixture
def run_dir(results: dict[str, dict[str, Any]], folder: Path, tmp_path: Path) -> Path:
    """Copy of a run with four whole checkpoints."""
    shutil.copytree(folder / "whole", tmp_path / "run")
    return tmp_path / "run"


def plan(run_dir: Path, settings: tuple[str, ...], *more: str) -> StartPlan:
    """Plan the next start of the run."""
    saves = ("checkpoint.every_steps=1", "checkpoint.keep_last=9", "checkpoint.keep_every=2", "train.steps=8")
    config = load_config(TINY, [*settings, *saves, f"run_dir={run_dir}", *more])
    shards = open_sources(config.data)
    return plan_start(config, shards.fingerprint, shards.tokenizer.fingerprint, parameter_shapes(config))


def test_weights_of_a_run_with_another_tokenizer_are_refused(
    run_dir: Path, results: dict[str, dict[str, Any]], micro_settings: tuple[str, ...], tmp_path: Path
) -> None:
    """Its ids mean something else."""
    config = load_config(TINY, [*micro_settings, f"run_dir={tmp_path / 'new'}", f"init_from={run_dir}"])
    shards = open_sources(config.data)
    shapes = parameter_shapes(config)
    taken = plan_start(config, shards.fingerprint, shards.tokenizer.fingerprint, shapes)
    assert taken.init_from is not None and taken.state.tokenizer_fingerprint == shards.tokenizer.fingerprint
    with pytest.raises(
        ConfigError, match=r"^init_from: .* was trained with another tokenizer than that of data\.shards"
    ):
        plan_start(config, shards.fingerprint, "another", shapes)


def damage(checkpoint: Path, kind: str, other: Path) -> str:
    """Damage a checkpoint; returns the message about it."""
    if kind == "no COMPLETE":
        (checkpoint / "COMPLETE").unlink()
        return "COMPLETE is missing"
    if kind == "truncated":
        os.truncate(checkpoint / "rank_00001.safetensors", 1000)
        return "rank_00001.safetensors has 1000 bytes"
    if kind == "missing":
        (checkpoint / "rank_00000.safetensors").unlink()
        return "rank_00000.safetensors cannot be read"
    if kind == "changed JSON":
        path = checkpoint / "trainer.json"
        path.write_text(path.read_text().replace('"optimizer_step": ', '"optimizer_step":9'))
        return "trainer.json was changed after it was written"
    if kind == "COMPLETE truncated":
        os.truncate(checkpoint / "COMPLETE", 200)
        return "COMPLETE is damaged"
    if kind == "outside":
        path = checkpoint / "COMPLETE"
        path.write_text(path.read_text().replace('"rank_00000.safetensors"', '"../step_00000001/trainer.json"'))
        return "COMPLETE is damaged"
    if kind == "another step":
        shutil.copy(checkpoint.with_name(WHOLE[0]) / "COMPLETE", checkpoint)
        shutil.copytree(checkpoint.with_name(WHOLE[0]), checkpoint, dirs_exist_ok=True)
        return "COMPLETE is of step 1"
    assert kind == "another run"
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)
    return "it is of run "


KINDS = (
    "no COMPLETE",
    "truncated",
    "missing",
    "changed JSON",
    "COMPLETE truncated",
    "outside",
    "another step",
    "another run",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    kind: str, run_dir: Path, folder: Path, micro_settings: tuple[str, ...]
) -> None:
    newest = run_dir / "checkpoints" / WHOLE[3]
    expected = damage(newest, kind, folder / "beside" / "checkpoints" / WHOLE[3])
    start = plan(run_dir, micro_settings)
    assert start.resume_from == run_dir / "checkpoints" / WHOLE[2] and start.state.step == 3
    assert any(note.startswith(f"passed over {newest}: {expected}") for note in start.notes)
    assert newest.exists()


@pytest.mark.parametrize("kind", ["no COMPLETE", "truncated", "another run"])
def test_no_start_at_step_0_beside_damaged_checkpoints_unless_allowed(
    kind: str, run_dir: Path, folder: Path, micro_settings: tuple[str, ...]
) -> None:
    for name in WHOLE:
        expected = damage(run_dir / "checkpoints" / name, kind, folder / "beside" / "checkpoints" / name)
    with pytest.raises(ConfigError) as raised:
        plan(run_dir, micro_settings)
    assert "\n" not in str(raised.value) and f"step_00000004: {expected}" in str(raised.value)
    assert str(raised.value).endswith("'resume_allow=[from_zero]'")
    with pytest.raises(ConfigError, match="resume: no whole checkpoint"):
        plan(run_dir, micro_settings, "resume=must", "resume_allow=[from_zero]")
    start = plan(run_dir, micro_settings, "resume_allow=[from_zero]")
    assert start.resume_from is None and start.state.step == 0
    assert any("starting at step 0" in note for note in start.notes)


def test_an_interrupted_save_is_named_and_does_not_count(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    """A run that was killed in its first save starts anew: no folder has the name of a checkpoint."""
    root = run_dir / "checkpoints"
    for name in WHOLE[1:]:
        shutil.rmtree(root / name)
    os.rename(root / WHOLE[0], root / f".{WHOLE[0]}.tmp")
    start = plan(run_dir, micro_settings)
    assert start.resume_from is None
    assert any(".step_00000001.tmp" in note for note in start.notes) and "starting at step 0" in start.notes[-1]


def test_without_its_run_id_a_run_does_not_resume(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    run_id = read_complete(run_dir / "checkpoints" / WHOLE[3]).run_id
    (run_dir / "run_id").unlink()
    with pytest.raises(ConfigError, match=f"run_id: missing beside checkpoints; .* {run_id}$"):
        plan(run_dir, micro_settings)


def test_a_clock_that_was_set_back_has_no_effect(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    """The newest checkpoint is that of the highest step, whatever the modification times are."""
    for age, name in enumerate(WHOLE):
        for path in [run_dir / "checkpoints" / name, *(run_dir / "checkpoints" / name).iterdir()]:
            os.utime(path, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    assert plan(run_dir, micro_settings).state.step == 4
    delete_old(
        run_dir / "checkpoints", (run_dir / "run_id").read_text().strip(), 4, Retention(keep_last=1, keep_every=0)
    )
    wait_for_deletions()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == WHOLE[3:]


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    run_dir: Path, micro_settings: tuple[str, ...]
) -> None:
    config = load_config(TINY, [*micro_settings, f"run_dir={run_dir}"])
    (problem,) = config.batch_problems(16)
    assert problem.startswith("train.global_batch_size: 8 does not divide among 16 devices")


def test_retention() -> None:
    steps = list(range(1, 11))
    assert Retention(keep_last=2, keep_every=0).to_delete(steps) == steps[:8]
    assert Retention(keep_last=2, keep_every=4).to_delete(steps) == [1, 2, 3, 5, 6, 7]
    assert Retention(keep_last=20, keep_every=0).to_delete(steps) == []


def test_only_whole_checkpoints_of_the_run_count_as_kept(run_dir: Path, folder: Path) -> None:
    """One whole checkpoint is kept, however many damaged or foreign ones are newer."""
    root = run_dir / "checkpoints"
    damage(root / WHOLE[3], "truncated", root)
    damage(root / WHOLE[2], "another run", folder / "beside" / "checkpoints" / WHOLE[2])
    delete_old(root, (run_dir / "run_id").read_text().strip(), 4, Retention(keep_last=1, keep_every=0))
    wait_for_deletions()
    assert [path.name for path in sorted(root.iterdir())] == WHOLE[1:]
    assert find_checkpoints(root, (run_dir / "run_id").read_text().strip())[0] == [root / WHOLE[1]]


def test_the_next_deletion_finishes_an_interrupted_one(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    for name in (WHOLE[0], "step_00000009"):
        left = root / f".{name}.deleted"
        left.mkdir()
        (left / "rank_00000.safetensors").write_bytes(b"left")
    delete_old(root, (run_dir / "run_id").read_text().strip(), 4, Retention(keep_last=3, keep_every=0))
    wait_for_deletions()
    assert [path.name for path in sorted(root.iterdir())] == WHOLE[1:]


def test_only_the_link_of_a_linked_checkpoint_is_deleted(run_dir: Path, tmp_path: Path) -> None:
    root = run_dir / "checkpoints"
    os.rename(root / WHOLE[0], tmp_path / "archived")
    os.symlink(tmp_path / "archived", root / WHOLE[0])
    delete_old(root, (run_dir / "run_id").read_text().strip(), 4, Retention(keep_last=3, keep_every=0))
    assert [path.name for path in sorted(root.iterdir())] == WHOLE[1:]
    assert size_problem(tmp_path / "archived") is None


def test_files_of_the_user_beside_checkpoints_are_left_alone(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    for name in (".step_00000004.bak", ".step_00000004.tmp", ".step_00000003.deleted"):
        (root / name).mkdir()
    (root / ".step_00000005.tmp").write_text("a note")
    assert [path.name for path in unfinished_folders(root)] == [".step_00000003.deleted", ".step_00000004.tmp"]


def test_foreign_files_are_refused_before_anything_changes(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    """Each with one line that names the file."""
    before = (run_dir / "config.yaml").read_bytes()
    metrics = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(metrics.replace('{"step": 2', '{"step": "2"'))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is not a record of a step; [^\n]*$"):
        plan(run_dir, micro_settings)
    (run_dir / "metrics.jsonl").write_text(metrics)
    shutil.rmtree(run_dir / "tensorboard")
    (run_dir / "tensorboard").write_text("a note")
    with pytest.raises(ConfigError, match=r"tensorboard is a file; [^\n]*$"):
        plan(run_dir, micro_settings)
    with pytest.raises(ConfigError, match=r"run_id cannot be read \(Not a directory\); [^\n]*$"):
        plan(run_dir / "config.yaml", micro_settings)
    (run_dir / "run_id").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"run_id cannot be read \(not UTF-8\); [^\n]*$"):
        plan(run_dir, micro_settings)
    assert (run_dir / "config.yaml").read_bytes() == before


def test_init_from_an_older_checkpoint_is_reported(run_dir: Path, micro_settings: tuple[str, ...]) -> None:
    (run_dir / "checkpoints" / WHOLE[3] / "COMPLETE").unlink()
    start = plan(run_dir.with_name("another"), micro_settings, f"init_from={run_dir}")
    assert start.init_from == run_dir / "checkpoints" / WHOLE[2]
    assert f"passed over {run_dir / 'checkpoints' / WHOLE[3]}: COMPLETE is missing" in start.notes


def test_a_renamed_checkpoint_is_never_overwritten(run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    first = rename_aside(root / WHOLE[0], "replaced")
    shutil.copytree(root / WHOLE[1], root / WHOLE[0])
    second = rename_aside(root / WHOLE[0], "replaced")
    assert (first.name, second.name) == ("step_00000001.replaced", "step_00000001.replaced-1")
    assert replace(read_complete(second), run_id="") == replace(read_complete(root / WHOLE[1]), run_id="")
