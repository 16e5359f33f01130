"""launch/plan.py and `--dry-run --gpus`: the plan, the command to type, and one line for wrong input."""

import shlex
from collections.abc import Callable

import pytest
from conftest import ROOT, load_script

Main = Callable[[list[str]], int]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def main() -> Main:
    """`main` of launch/plan.py."""
    return load_script("plan").main


def test_the_command_that_it_prints_can_be_typed(
    main: Main, pretrain_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", TINY, "zero.stage=2", "run_dir=runs/a b", "train.global_batch_size=64"]
    assert main([*given, "--gpus", "16", "--tokens", "1e9", "--gpu-memory", "24", "--gpu", "L4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plan: 16 GPUs (L4, 24 GiB each) on 2 hosts, ")
    (marked,) = [line.split() for line in lines if line.startswith("* ")]
    assert marked[1:4] == ["2", "none", "4"] and marked[-3] == "yes"
    assert any(line.startswith("checkpoint: ") for line in lines)
    command = shlex.split(lines[-1])
    assert command[:4] == ["deepspeed", "-H", "hostfile", "launch/pretrain.py"]
    assert "run_dir=runs/a b" in command and command.count("zero.stage=2") == 1
    assert pretrain_main([*command[4:], "--print-config"]) == 0
    assert "micro_batch_size: 4" in capsys.readouterr().out


def test_the_command_has_each_key_once(main: Main, pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    free = ["deepspeed={dump_state: true}", "deepspeed={wall_clock_breakdown: true}"]
    given = ["zero.offload=optimizer", "seed=1", *free, "zero.stage=1", "seed=2", "zero.stage=2"]
    assert main(["--config", TINY, "--gpus", "8", *given]) == 0
    out = capsys.readouterr().out
    assert "note: zero.offload: optimizer is left out of the plan, which is slower and not needed" in out
    command = shlex.split(out.splitlines()[-1])
    settings = [text for text in command if "=" in text]
    assert settings[:3] == ["seed=2", *free]
    keys = [text.split("=")[0] for text in settings[3:]]
    assert sorted(keys) == ["train.activation_checkpointing", "train.micro_batch_size", "zero.offload", "zero.stage"]
    assert "zero.offload=none" in settings and "zero.stage=2" in settings
    assert pretrain_main([*command[4:], "--print-config"]) == 0


def test_dry_run_goes_on_where_there_is_no_plan(pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    adafactor = ["optimizer.name=adafactor", "zero.stage=0", "train.precision=fp32"]
    for gpus, settings, reason in (
        ("2", adafactor, "optimizer.name: a plan is for adamw or muon, not adafactor"),
        ("9", ["train.global_batch_size=9"], "--gpus: 9 GPUs do not divide among 2 hosts"),
    ):
        settings = [*settings, "train.micro_batch_size=1", "data.shards=not-there"]
        assert pretrain_main(["--dry-run", "--gpus", gpus, *settings]) == 0
        lines = capsys.readouterr().out.splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.startswith("no plan: ")]
        assert lines[place].startswith(f"no plan: {reason}")
        assert any(line.startswith("parameters: ") for line in lines[:place])
        assert lines[place + 1].startswith("note: data.shards: not-there not there")  # of the checks


def test_dry_run_shows_the_plan_of_other_gpus(pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain_main(["--dry-run", "--gpus", "8", "zero.stage=1", "train.activation_checkpointing=none"]) == 0
    out = capsys.readouterr().out
    assert "8 samples = 8 devices x 1 micro-batch x 1" in out
    assert "plan: 8 GPUs (H100, 80 GiB each) on 1 host" in out and "recommended (*): ZeRO stage 1" in out
    assert "<0.001 s per step, under a minute\n" in out


def test_what_is_tight_says_what_it_needs(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["zero.stage=1", "train.micro_batch_size=16", "train.activation_checkpointing=none"]
    assert main(["--gpus", "1", "--gpu-memory", "35", *fixed]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "nothing fits with a reserve" in line]
    assert "if 34.0 GiB turn out too much" in note


def test_nothing_fits(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", TINY, "--gpus", "1", "--gpu-memory", "0.1", "train.micro_batch_size=4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing fits: use more GPUs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "train.global_batch_size: 8 does not divide among 3 devices"),
        (["--gpus", "many"], "arguments: argument --gpus: invalid int value: 'many'"),
        ([], "arguments: the following arguments are required: --gpus"),
        (["--gpus", "1", "--tokens", "-5"], "--tokens: -5.0 is not positive"),
        (["--gpus", "1", "--tokens", "inf"], "--tokens: inf is not a finite number"),
        (["--gpus", "1", "--tokens", "1e-9"], "--tokens: 1e-09 is less than one"),
        (["--gpus", "1", "optimizer.name=adafactor", "zero.stage=0"], "optimizer.name: a plan is for adamw"),
        (["--gpus", "1", "optimizer.name=adafactor"], "optimizer.name: a plan is for adamw"),
        (["--gpus", "1", "zero.stage=7"], "zero.stage: "),
        (["--gpus", "1", "zero.offload=disk"], "zero.offload: "),
        (["--gpus", "1", "train.stepps=3"], "train.stepps: no such key"),
        (["--gpus", "2", "--hosts", "0"], "--gpus: 2 GPUs do not divide among 0 hosts"),
        (["--gpus", "1", "--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
    ids=[
        "batch",
        "no number",
        "missing",
        "tokens",
        "infinite tokens",
        "few tokens",
        "optimizer",
        "optimizer alone",
        "stage",
        "offload",
        "key",
        "hosts",
        "file",
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "--config" in arguments else ["--config", TINY, *arguments]
    try:
        status = main(given)
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_run_takes_its_gpus_from_the_launcher(pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain_main(["--gpus", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpus: goes with --dry-run only, a run has the launcher's GPUs")
    assert pretrain_main(["--dry-run", "--gpus", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpus: 0 is not positive; use 1 or more")
