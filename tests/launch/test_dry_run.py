"""`--dry-run` and `--print-config`, which need no shards, GPU and process group; and what a start would refuse."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from colt5dist.train.config.load import config_leaves, load_config

Main = Callable[[list[str]], int]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(("name", "millions"), [("base", 433), ("large", 1462), ("xl", 5297)])
def test_parameter_counts_are_those_of_the_paper(
    name: str, millions: int, pretrain_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """CoLT5 2303.09752, table 7."""
    assert pretrain_main(["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run", "data.shards=not-there"]) == 0
    printed = capsys.readouterr().out
    (count,) = re.findall(r"^parameters: ([\d,]+)$", printed, flags=re.MULTILINE)
    assert int(count.replace(",", "")) / 1e6 == pytest.approx(millions, rel=0.01)
    for word in ("tokens per step", "FLOPs per step", "ZeRO stage", "checkpoint"):
        assert word in printed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_printed_config_is_the_config(path: Path, pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has every key, and loads as the same configuration."""
    assert pretrain_main(["--config", str(path), "--print-config", "seed=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    config = load_config(path, ["seed=7"])
    assert printed["seed"] == 7
    assert printed["run_dir"] == f"runs/{path.stem}"
    for key, value in config_leaves(config).items():
        node = printed
        for part in key.split("."):
            node = node[part]
        assert node == value


def test_tokens_of_a_run_with_a_schedule(pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps of 8 samples of 512/114, then ten of 1024/228; a decoder-only model has no input."""
    schedule = "data.length_schedule=[{step: 11, input_length: 1024, target_length: 228}]"
    assert pretrain_main(["--dry-run", "train.steps=20", schedule]) == 0
    out = capsys.readouterr().out
    assert f"tokens of the run: {80 * 1536:,} input, at most {80 * 342:,} target, in 20 steps" in out
    assert "8 samples = 1 device x 2 micro-batches x 4 (1 device: this process alone; --gpus N for " in out
    assert pretrain_main(["--dry-run", "--config", str(CONFIGS / "causal_tiny.yaml"), "train.steps=1"]) == 0
    assert "tokens of the run: at most 16,384 target, in 1 step\n" in capsys.readouterr().out


def test_it_says_what_a_start_would_do(
    pretrain_main: Main,
    tmp_path: Path,
    short_texts: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And changes nothing."""
    run_dir = tmp_path / "run"
    settings = [f"run_dir={run_dir}", *micro_settings, "--dry-run"]
    assert pretrain_main([*settings, f"data.shards={short_texts}"]) == 0
    assert f"a start would train from step 1 on, in {run_dir}" in capsys.readouterr().out
    assert not run_dir.exists()
    assert pretrain_main([*settings, "data.shards=not-there"]) == 0
    assert "note: data.shards: not-there not there (a start would refuse that); neither" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", ["truncated shard", "small vocabulary", "no weights", "a file", "in use", "other settings"]
)
def test_it_refuses_what_a_start_refuses(
    fault: str,
    pretrain_main: Main,
    tmp_path: Path,
    short_texts: Path,
    micro_settings: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(short_texts, shards)
    settings = [f"run_dir={run_dir}", *micro_settings, f"data.shards={shards}", "--dry-run"]
    run_dir.mkdir()
    with ExitStack() as stack:
        if fault == "truncated shard":
            os.truncate(next(shards.glob("*.tar")), 1000)
            expected = ".tar: has 1000 bytes, the manifest says "
        elif fault == "small vocabulary":
            settings.append("model.vocab_size=256")
            expected = "model.vocab_size: 256 is too small for the 259 ids"
        elif fault == "no weights":
            settings.append("init_from=nowhere")
            expected = "init_from: no whole checkpoint in nowhere"
        elif fault == "a file":
            run_dir.rmdir()
            run_dir.write_text("")
            expected = f"run_dir: {run_dir} is a file"
        elif fault == "in use":
            command = "from colt5dist.files import *; print(lock_for_life(Path(sys.argv[1])), flush=True); input()"
            other = subprocess.Popen(
                [sys.executable, "-c", f"import sys; {command}", str(run_dir / ".lock")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(other)
            assert other.stdout is not None and other.stdout.readline() == b"True\n"
            expected = f"run_dir: another process trains in {run_dir}; "
        else:
            (run_dir / "config.yaml").write_text("seed: 0\n")
            settings.append("resume=never")
            expected = f"run_dir: {run_dir} already holds a run"
        assert pretrain_main(settings) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert expected in line
        if fault == "in use":
            other.communicate(b"\n")


def test_the_last_of_a_repeated_key_wins() -> None:
    assert load_config(CONFIGS / "tiny.yaml", ["train.steps=5", "train.steps=7"]).train.steps == 7


def test_flags_and_settings_may_be_in_any_order(pretrain_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain_main(["seed=3", "--print-config", "--local_rank=0", "train.steps=9"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["train"]["steps"]) == (3, 9)
