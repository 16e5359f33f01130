"""launch/evaluate.py gives the run's own held-out loss, and says in one line what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Fork, Pretrain, load_script, write_short_texts

from colt5dist import CoLT5, load
from colt5dist.errors import ConfigError
from colt5dist.pretrained.export import export
from colt5dist.train.report.monitor import read_metrics

Main = Callable[[list[str]], int]

SCHEDULE = "data.length_schedule=[{step: 3, input_length: 128, micro_batch_size: 2, num_heavy_tokens: 0.25}]"
SETTINGS = (
    "train.eval_every=2",
    "checkpoint.every_steps=2",
    "train.eval_shuffled_inputs=true",
    "train.eval_samples=7",
    "train.ema=0.15",
    SCHEDULE,
)


@pytest.fixture(scope="module")
def main() -> Main:
    """`main` of launch/evaluate.py."""
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, run_pretrain: Pretrain) -> Path:
    """A run of four steps with an evaluation and a checkpoint after the second and the last, of other lengths."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    run_pretrain(folder, *SETTINGS)
    return folder


def evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Records of the run's evaluations by step."""
    return {record["step"]: record for record in read_metrics(run_dir) if "eval/loss" in record}


def check(found: dict[str, Any], record: dict[str, Any]) -> None:
    """The figures are those of the run's own evaluation."""
    assert found["loss"] == pytest.approx(record["eval/loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(record["eval/bits_per_byte"], rel=1e-6)
    assert found["loss_shuffled_inputs"] == pytest.approx(record["eval/loss_shuffled_inputs"], rel=1e-6)
    own = {key.removeprefix("eval/loss/"): loss for key, loss in record.items() if key.startswith("eval/loss/")}
    assert {name: part["loss"] for name, part in found["by_objective"].items()} == pytest.approx(own, rel=1e-6)
    for parts in ("by_objective", "by_document_length", "by_position_in_document"):
        tokens = [part["num_target_tokens"] for part in found[parts].values()]
        losses = [part["loss"] for part in found[parts].values()]
        assert sum(tokens) == found["num_target_tokens"]
        assert sum(n * loss for n, loss in zip(tokens, losses, strict=True)) == pytest.approx(
            found["loss"] * found["num_target_tokens"]
        )


@pytest.mark.parametrize("step", [2, 4], ids=str)
def test_the_loss_is_that_of_the_run(main: Main, run_dir: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "--step", str(step), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 7 and found["step"] == step
    check(found, evaluations(run_dir)[step])


def test_the_loss_of_the_average_is_that_of_the_run(
    main: Main, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a folder that was exported with --ema, which says so in its card."""
    record = evaluations(run_dir)[4]
    assert main([str(run_dir), "--ema", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ema"] and found["loss"] == pytest.approx(record["eval/ema/loss"], rel=1e-6)
    assert record["eval/ema/loss"] != pytest.approx(record["eval/loss"], rel=1e-5)
    exported = export(run_dir, tmp_path / "averaged", ema=True).folder
    assert main([str(exported), "--json", "--shards", "python-stdlib"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(record["eval/ema/loss"], rel=1e-6)
    card = (exported / "README.md").read_text()
    assert "exponential moving average" in card and f"{record['eval/ema/loss']:.4f}" in card
    average, _ = load(run_dir, ema=True)
    again, _ = load(exported)
    assert all(map(torch.equal, average.parameters(), again.parameters()))
    with pytest.raises(ConfigError, match="is an exported folder, which holds one kind of weights"):
        load(exported, ema=True)
    with pytest.raises(TypeError, match="ema: 'yes' is no bool"):
        load(run_dir, ema="yes")  # type: ignore[arg-type]


def test_two_processes_give_the_same(fork: Fork, run_dir: Path) -> None:
    done = fork(ROOT / "launch" / "evaluate.py", [str(run_dir), "--json"], 2)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), evaluations(run_dir)[4])


def test_shard_sets_by_name_and_a_saved_model(
    main: Main, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = str(write_short_texts(tmp_path / "short", 100))
    sets = ["python-stdlib", short]
    assert main([str(run_dir), "--json", "--shards", *sets, "--samples", "7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sets"]) == sets and found["num_samples"] == 14
    check(found["sets"]["python-stdlib"], evaluations(run_dir)[4])
    total = sum(part["loss"] * part["num_target_tokens"] for part in found["sets"].values())
    assert found["loss"] == pytest.approx(total / found["num_target_tokens"])
    assert list(found["sets"][short]["by_document_length"]) == ["256-1023"]
    saved = export(run_dir, tmp_path / "saved").folder
    assert main([str(saved), "--json", "--shards", "python-stdlib"]) == 0
    check(json.loads(capsys.readouterr().out), evaluations(run_dir)[4])
    assert main([str(run_dir), "--shards", *sets]) == 0
    printed = capsys.readouterr().out
    assert "held-out loss: " in printed and "position in the document" in printed


def test_a_finished_run_without_a_tokenizer_gets_it(run_dir: Path, run_pretrain: Pretrain, tmp_path: Path) -> None:
    """Runs of earlier versions have none; the command that finds nothing to do writes it."""
    old = tmp_path / "old"
    shutil.copytree(run_dir, old, ignore=shutil.ignore_patterns("tokenizer"))
    done = run_pretrain(old, *SETTINGS)
    assert "nothing to do" in done.stdout
    for path in (run_dir / "tokenizer").iterdir():
        assert path.read_bytes() == (old / "tokenizer" / path.name).read_bytes()


def test_wrong_input_is_one_line(main: Main, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    CoLT5.from_pretrained(run_dir).save_pretrained(tmp_path / "bare")
    export(run_dir, tmp_path / "saved")
    cases = {
        ("nowhere",): "nowhere: no such folder",
        (str(tmp_path / "empty"),): "holds no trained model",
        (str(run_dir), "--step", "3"): "no whole checkpoint in",
        (str(run_dir), "--shards", "nowhere"): "nowhere",
        (str(tmp_path / "bare"),): "vocabulary.json: cannot be read",
        (str(tmp_path / "saved"),): "--shards: an exported folder does not say where its shards are",
    }
    for arguments, words in cases.items():
        assert main(list(arguments)) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line
    for wrong in (["--samples", "0"], []):
        with pytest.raises(SystemExit) as ended:
            main([str(run_dir), *wrong] if wrong else [])
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_routed_is_drawn(
    main: Main, run_dir: Path, short_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "map.png", tmp_path / "map_kinds.png"]
    assert main([str(run_dir), "--shards", str(short_texts), "--routing-map", str(files[0])]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"routing map: {files[0]}", f"kinds of tokens that are routed: {files[1]}"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    absent = tmp_path / "absent" / "map.png"
    assert main([str(run_dir), "--shards", str(short_texts), "--routing-map", str(absent)]) == 2
    assert f"--routing-map: {absent} cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(run_dir), "--routing-map", str(absent), "--samples", "3"])
    assert ended.value.code == 2 and "leave --pairs and --samples out" in capsys.readouterr().err
