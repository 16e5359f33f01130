"""Wrong input ends with status 2 and one line per problem that names the key or file, before a device is touched."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import Pretrain, free_port

from colt5dist.data import ensure_standard_library_shards

Main = Callable[[list[str]], int]

CASES = {
    "unknown key": (["train.stepps=3"], "train.stepps: no such key; did you mean train.steps?"),
    "unknown section": (["trian.steps=3"], "did you mean train.steps?"),
    "no key is near": (["foo.bar=3"], "foo.bar: no such key; --print-config lists all keys"),
    "section for value": (["train=3"], "train: is a section"),
    "not key=value": (["train.steps"], "not of the form key=value"),
    "not an integer": (["train.steps=many"], "train.steps: Value 'many'"),
    "not a number": (["optimizer.lr=fast"], "optimizer.lr: Value 'fast'"),
    "not a choice": (["zero.stage=4"], "zero.stage: "),
    "unknown schedule": (["schedule.name=linear"], "schedule.name: "),
    "unknown routing": (["model.routing=hashed"], "model.routing: "),
    "no port": (["train.heartbeat_port=70000"], "train.heartbeat_port: 70000 is not a port; use 0 to 65535"),
    "negative steps": (["train.steps=-1"], "train.steps: -1 is not positive"),
    "micro-batch does not divide": (["train.micro_batch_size=3"], "train.micro_batch_size: 3 does not divide"),
    "input length not a multiple": (["data.input_length=257"], "data.input_length: 257 is not a multiple of 8"),
    "vocabulary not a multiple": (["model.vocab_size=500"], "model.vocab_size: 500 is not a multiple of 128"),
    "vocabulary too small": (["model.vocab_size=256"], "model.vocab_size: "),
    "too few sentinels": (["data.num_sentinels=2"], "data.num_sentinels: 2"),
    "offload without stage 3": (["zero.offload=parameters", "zero.stage=2"], "zero.offload: parameters needs"),
    "offload at stage 0": (["zero.offload=optimizer", "zero.stage=0"], "zero.offload: optimizer needs"),
    "muon with offload": (["optimizer.name=muon", "zero.offload=optimizer"], "optimizer.name: muon cannot work on"),
    "an average of one weight": (["train.ema=1"], "train.ema: 1.0 is outside (0, 1)"),
    "adafactor under ZeRO": (["optimizer.name=adafactor", "zero.stage=2"], "optimizer.name: adafactor"),
    "cosine without horizon": (["schedule.name=cosine"], "schedule.total_steps: cosine needs a horizon"),
    "missing shards": (["data.shards=nowhere"], "nowhere"),
    "resume must": (["resume=must"], "resume: no whole checkpoint"),
    "init from nothing": (["init_from=nowhere"], "init_from: no whole checkpoint in nowhere"),
    "missing config file": (["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    "unknown option": (["--confg", "x.yaml"], "arguments: "),
    "deepspeed owns its batch size": (["deepspeed.train_batch_size=3"], "train.global_batch_size"),
    "unknown deepspeed section": (
        ["deepspeed.zero_optimisation.stage=3"],
        "deepspeed.zero_optimisation: is not among the keys that may be given; did you mean zero_optimization?",
    ),
    "deepspeed compile": (
        ["deepspeed.compile.deepcompile=true"],
        "deepspeed.compile: has its own key here; set train.",
    ),
    "deepspeed activation checkpointing": (
        ["deepspeed.activation_checkpointing.cpu_checkpointing=true"],
        "deepspeed.activation_checkpointing: has its own key here; set train.activation_checkpointing instead",
    ),
    "deepspeed autotuning": (
        ["deepspeed.autotuning.enabled=true"],
        "deepspeed.autotuning: DeepSpeed's autotuner does not run here; choose train.micro_batch_size, zero.stage",
    ),
    "deepspeed aio": (
        ["deepspeed.aio.block_size=1048576"],
        "deepspeed.aio: nothing is offloaded to disk here; set zero.offload=",
    ),
    "deepspeed owns a key of ZeRO": (
        ["deepspeed.zero_optimization.stage=3"],
        "deepspeed.zero_optimization.stage: has its own key here; set zero.stage instead",
    ),
    "key of ZeRO without effect": (
        ["deepspeed.zero_optimization.elastic_checkpoint=true"],
        "deepspeed.zero_optimization.elastic_checkpoint: only DeepSpeed's own checkpoints use it",
    ),
    "unknown key of ZeRO": (
        ["deepspeed.zero_optimization.overlap_com=true"],
        "deepspeed.zero_optimization.overlap_com: is not among the keys that may be given; did you mean "
        "zero_optimization.overlap_comm?",
    ),
    "type of a key of ZeRO": (
        ["deepspeed.zero_optimization.sub_group_size=many"],
        "deepspeed.zero_optimization.sub_group_size: 'many' is not of type int",
    ),
    "profile window": (["profile.steps=[5]"], "profile.steps: "),
    "no minutes": (["checkpoint.every_minutes=0"], "checkpoint.every_minutes: 0.0 is not within a year"),
    "negative retention": (["checkpoint.keep_every=-1"], "checkpoint.keep_every: -1 is negative"),
    "unknown policy": (["checkpoint.on_error=ignore"], "checkpoint.on_error: "),
    "unknown permission": (["resume_allow=[from_one]"], "resume_allow: no such key from_one"),
    "head dimension": (["model.head_dim=7"], "model.head_dim: 7 is odd"),
    "too large a batch": (["train.global_batch_size=1000000000000000000000000000000"], "train.global_batch_size: 1000"),
    "skip beyond all samples": (["data.skip=[[0, 10000000000000000000000000]]"], "data.skip: [0, 1000"),
    "too many workers": (["data.num_workers=100000"], "data.num_workers: 100000 processes per rank are too many"),
    "no time to start": (["train.timeout_minutes=1e-9"], "train.timeout_minutes: 1e-09 is too short"),
    "bucket of one": (["zero.bucket_size=1"], "zero.bucket_size: 1 is outside"),
    "empty folder": (["run_dir="], "run_dir: is empty"),
}


def problem_lines(main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run and expect status 2; returns the lines on stderr."""
    try:
        status = main(arguments)
    except SystemExit as end:  # raised by argparse
        status = end.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert "Traceback" not in captured.err
    assert not dist.is_initialized()
    return captured.err.splitlines()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_one_line_and_status_2(
    case: str, tmp_path: Path, pretrain_main: Main, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, expected = CASES[case]
    options = settings[:2] if settings[0].startswith("--") else []
    rest = [] if options else settings
    lines = problem_lines(pretrain_main, [*options, f"run_dir={tmp_path}/run", *micro_settings, *rest], capsys)
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert lines[0].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_all_problems_at_once(
    pretrain_main: Main, tmp_path: Path, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["optimizer.lr=-1", "data.input_length=257", "checkpoint.keep_last=0"]
    lines = problem_lines(pretrain_main, [f"run_dir={tmp_path}/run", *micro_settings, *wrong], capsys)
    assert [line.split(":")[1].strip() for line in lines] == [
        "optimizer.lr",
        "checkpoint.keep_last",
        "data.input_length",
    ]


@pytest.mark.parametrize("damage", ["truncated shard", "no manifest", "not JSON", "foreign"])
def test_damaged_shards(
    damage: str,
    pretrain_main: Main,
    tmp_path: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(ensure_standard_library_shards(), shards)
    manifest = shards / "manifest.json"
    if damage == "truncated shard":
        os.truncate(shards / "000000.tar", 5000)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "not JSON":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({"someone": "else's"}))
    lines = problem_lines(pretrain_main, [f"run_dir={tmp_path}/run", *micro_settings, f"data.shards={shards}"], capsys)
    assert len(lines) == 1 and str(shards) in lines[0]


def test_no_space_for_a_checkpoint(
    pretrain_main: Main,
    tmp_path: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    lines = problem_lines(pretrain_main, [f"run_dir={tmp_path}/run", *micro_settings], capsys)
    assert len(lines) == 1 and "free space" in lines[0]


def test_never_in_a_folder_that_holds_a_run(
    pretrain_main: Main, tmp_path: Path, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    lines = problem_lines(pretrain_main, [f"run_dir={tmp_path}", *micro_settings, "resume=never"], capsys)
    assert len(lines) == 1 and "already holds a run" in lines[0]


def test_batch_that_does_not_divide_among_processes(
    pretrain_main: Main,
    tmp_path: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    lines = problem_lines(pretrain_main, [f"run_dir={tmp_path}/run", *micro_settings], capsys)
    assert len(lines) == 1 and "train.global_batch_size: 8 does not divide among 3 devices" in lines[0]


def test_a_problem_of_one_host_is_printed_there(
    pretrain_main: Main,
    tmp_path: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the first rank of that host, because rank 0 cannot know of it."""
    monkeypatch.setattr("colt5dist.train.ranks.time.sleep", lambda seconds: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, local_rank in ((2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        settings = [f"run_dir={tmp_path}/run", *micro_settings, "data.shards=nowhere"]
        lines = problem_lines(pretrain_main, settings, capsys)
        if local_rank == 0:
            (line,) = lines
            assert line.startswith(f"error: host {socket.gethostname()}: nowhere/manifest.json: is missing; ")
        else:
            assert not lines


def test_processes_that_do_not_connect(
    pretrain_main: Main,
    tmp_path: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another host may have found wrong input, or was not started."""
    port = free_port()
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**places, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    settings = [f"run_dir={tmp_path}/run", *micro_settings, "train.timeout_minutes=0.1"]
    (line,) = problem_lines(pretrain_main, settings, capsys)
    assert line.startswith(f"error: MASTER_ADDR, MASTER_PORT: 2 processes did not connect at 127.0.0.1:{port} (")
    assert not (tmp_path / "run").exists()


def test_a_heartbeat_port_that_is_not_free(tmp_path: Path, run_pretrain: Pretrain) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_pretrain(tmp_path, f"train.heartbeat_port={port}", processes=2, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert line.startswith(f"error: train.heartbeat_port: {port} cannot be opened on ")


PLACES = {
    "no number": ({"RANK": "abc"}, "RANK=abc: not an integer of 0 or more; "),
    "no processes": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: not an integer of 1 or more; "),
    "empty": ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=: not an integer of 1 or more; "),
    "beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: not below WORLD_SIZE=2; "),
    "beyond the host": (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
        "LOCAL_RANK=1: not below LOCAL_WORLD_SIZE=1; ",
    ),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2: LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; "),
    "one of two": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; "),
}


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.replace(" ", "-"))
def test_environment_that_no_launcher_sets(
    case: str,
    tmp_path: Path,
    pretrain_main: Main,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables, expected = PLACES[case]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (line,) = problem_lines(pretrain_main, [f"run_dir={tmp_path}/run", *micro_settings], capsys)
    assert line.startswith(f"error: {expected}")
