"""launch/pretrain.py from start to end, with the real launchers, on CPU processes."""

import json
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colt5dist.train.checkpoint import find_checkpoints, read_index
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.report.tensorboard.tags import place

Pretrain = Callable[..., subprocess.CompletedProcess[str]]

CONTRACT_KEYS = (
    "step loss grad_norm lr input_tokens target_tokens tokens_per_second step_seconds data_wait_seconds mfu "
    "skipped_steps peak_memory_bytes"
).split()


def losses(run_dir: Path) -> list[float]:
    """Return the training loss of every step."""
    return [record["loss"] for record in read_metrics(run_dir)]


def status(run_dir: Path) -> dict[str, Any]:
    """Return how the run ended."""
    return json.loads((run_dir / "status.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, run_pretrain: Pretrain) -> tuple[Path, str]:
    """An undisturbed run of 8 steps in one process without a launcher, and what it printed."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    settings = ("train.steps=8", "checkpoint.every_steps=4", "train.eval_every=4", "train.eval_shuffled_inputs=true")
    done = run_pretrain(run_dir, *settings, launcher="python")
    return run_dir, done.stdout


def test_files_of_the_run_directory(reference: tuple[Path, str]) -> None:
    run_dir, printed = reference
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "status.json",
        "tokenizer",
    ):
        assert (run_dir / name).exists()
    for step in (4, 8):
        assert (run_dir / "checkpoints" / f"step_{step:08d}" / "COMPLETE").exists()
    assert status(run_dir) == {"status": "finished", "step": 8}
    for words in ("held-out loss", "unigram entropy", "tokens/s", str(run_dir), "tensorboard --logdir"):
        assert words in printed


def test_metrics_have_the_contract_keys(reference: tuple[Path, str]) -> None:
    records = read_metrics(reference[0])
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert all(key in record for key in CONTRACT_KEYS)
        objectives = [key for key in record if key.startswith("loss/")]
        assert objectives and all(math.isfinite(record[key]) for key in objectives)
    evaluations = [record for record in records if "eval/loss" in record]
    assert [record["step"] for record in evaluations] == [4, 8]
    for record in evaluations:
        assert sum(key.startswith("eval/loss/") for key in record) == 4
        assert record["eval/bits_per_byte"] > 0 and record["eval/loss_shuffled_inputs"] > 0


def test_routing_is_recorded(reference: tuple[Path, str]) -> None:
    record = read_metrics(reference[0])[1]
    for key in ("router/layer_00/query/mean_score", "router/unrouted_share/feed_forward"):
        assert 0 <= record[key] <= 2


def test_tensorboard_has_the_same_numbers(reference: tuple[Path, str]) -> None:
    events = EventAccumulator(str(reference[0] / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("1_loss/all/train")] == pytest.approx(losses(reference[0]))
    assert [event.step for event in events.Scalars("1_loss/all/train")] == list(range(1, 9))
    assert "3_routing/positions/query/layer_01" in events.Tags()["histograms"]


@pytest.mark.parametrize(
    ("processes", "settings"), [(1, ()), (2, ("zero.stage=3", "train.micro_batch_size=2"))], ids=["one", "stage3-two"]
)
def test_showing_a_held_out_sample_changes_nothing(
    processes: int, settings: tuple[str, ...], reference: tuple[Path, str], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    """The text and the pictures are there; also at stage 3, where the first process has a whole copy to write with."""
    run_dir = tmp_path / "run"
    run_pretrain(run_dir, *SAME, "monitor.held_out_sample=true", *settings, processes=processes)
    if processes == 1:
        assert losses(run_dir) == losses(reference[0])
        assert [r["grad_norm"] for r in read_metrics(run_dir)] == [r["grad_norm"] for r in read_metrics(reference[0])]
    else:
        assert losses(run_dir) == pytest.approx(losses(reference[0]), rel=2e-5)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for step, event in zip((4, 8), events.Tensors("held_out/sample"), strict=True):
        text = event.tensor_proto.string_val[0].decode()
        assert event.step == step and "| text | truth | model |" in text and "did not write" not in text
    for name in ("map", "kinds"):
        assert [event.step for event in events.Images(f"3_routing/all_layers/{name}")] == [4, 8]
        for step in (4, 8):
            assert (run_dir / "routing" / f"step_{step:08d}_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("launcher", "processes", "settings"),
    [
        ("forks", 2, ("zero.stage=0", "train.micro_batch_size=1")),
        ("deepspeed", 2, ("zero.stage=1", "train.micro_batch_size=2", "data.num_workers=2")),
        ("forks", 2, ("zero.stage=2", "train.activation_checkpointing=full")),
        ("torchrun", 2, ("zero.stage=3", "train.activation_checkpointing=full_keep_routing")),
        ("forks", 1, ("zero.stage=2", "zero.offload=optimizer", "train.micro_batch_size=8")),
    ],
    ids=["stage0-accumulate4", "stage1-accumulate2-workers2", "stage2-full", "stage3-keep-routing", "offload"],
)
def test_batch_division_stage_and_checkpointing_do_not_change_the_losses(
    launcher: str,
    processes: int,
    settings: tuple[str, ...],
    reference: tuple[Path, str],
    run_pretrain: Pretrain,
    tmp_path: Path,
) -> None:
    run_pretrain(tmp_path / "run", *settings, launcher=launcher, processes=processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0])[:4], rel=2e-5)


def test_three_processes_train_like_one(run_pretrain: Pretrain, tmp_path: Path) -> None:
    """Their partitions of the weights are padded, unlike those of 2, 4 or 8 processes."""
    settings = ("train.steps=2", "train.global_batch_size=6", "train.micro_batch_size=2")
    run_pretrain(tmp_path / "one", *settings)
    run_pretrain(tmp_path / "three", *settings, "zero.stage=2", processes=3)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


@pytest.fixture
def half(reference: tuple[Path, str], tmp_path: Path) -> Path:
    """The reference run as if it had been killed some steps after its checkpoint of step 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(reference[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000008")
    (run_dir / "status.json").unlink()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # cut off by the kill
    return run_dir


SAME = ("train.steps=8", "checkpoint.every_steps=4", "train.eval_every=4", "train.eval_shuffled_inputs=true")


def test_a_killed_run_resumes_to_the_bit(reference: tuple[Path, str], half: Path, run_pretrain: Pretrain) -> None:
    run_pretrain(half, *SAME)
    assert losses(half) == losses(reference[0])
    gradient_norms = [[r["grad_norm"] for r in read_metrics(d)] for d in (half, reference[0])]
    assert gradient_norms[0] == gradient_norms[1]
    events = EventAccumulator(str(half / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("1_loss/all/train")] == list(range(1, 9))


def test_a_longer_run_is_the_same_run(reference: tuple[Path, str], run_pretrain: Pretrain, tmp_path: Path) -> None:
    """4 steps and then 4 more equal 8 steps, and a third start reports that the run is finished."""
    run_dir = tmp_path / "run"
    four = ("train.steps=4", *SAME[1:])
    run_pretrain(run_dir, *four)
    run_pretrain(run_dir, *SAME)
    assert losses(run_dir) == losses(reference[0])
    done = run_pretrain(run_dir, *SAME)
    assert "finished" in done.stdout
    assert losses(run_dir) == losses(reference[0])


def test_it_resumes_with_another_number_of_processes_and_stage(
    reference: tuple[Path, str], half: Path, run_pretrain: Pretrain
) -> None:
    """And with other settings that keep the result, without a word in `resume_allow`."""
    assert "ema" not in {key for _, key in read_index(half / "checkpoints" / "step_00000004")}
    other = (
        "train.ema=0.5",
        "train.activation_checkpointing=full",
        "model.router_implementation=reference",
        "train.eval_samples=4",
    )
    done = run_pretrain(half, *SAME, "zero.stage=3", "train.micro_batch_size=2", *other, processes=2)
    assert "note: train.eval_samples: 4 here, 8 before; earlier held-out losses are of other samples" in done.stdout
    assert "step_00000004 holds no average; it begins at the weights of this checkpoint" in done.stdout
    assert read_metrics(half)[-1]["eval/ema/loss"] > 0
    assert losses(half)[:4] == losses(reference[0])[:4]
    assert losses(half)[4:] == pytest.approx(losses(reference[0])[4:], rel=2e-5)


def test_another_setting_is_refused_and_can_be_allowed(half: Path, run_pretrain: Pretrain) -> None:
    refused = run_pretrain(half, *SAME, "optimizer.lr=0.1", launcher="deepspeed", check=False)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert "optimizer.lr: 0.1 here, 0.002 in the run that is resumed" in line
    assert "Traceback" not in refused.stderr
    run_pretrain(half, *SAME, "optimizer.lr=0.1", "resume_allow=[optimizer.lr]")


Main = Callable[[list[str]], int]


def refusal(main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a start is refused, before any device is touched."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_optimizer_is_refused_and_changes_nothing(
    half: Path, pretrain_main: Main, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (half / "config.yaml").read_text()
    for name, stage in (("adafactor", 0), ("muon", 1)):
        other = [f"optimizer.name={name}", f"zero.stage={stage}"]
        for allowed in ([], ["resume_allow=[optimizer.name]"]):
            line = refusal(pretrain_main, [*micro_settings, *SAME, f"run_dir={half}", *other, *allowed], capsys)
            assert f"optimizer.name: {name} cannot continue from the states of another optimizer" in line
    assert (half / "config.yaml").read_text() == before


def test_a_run_with_only_a_damaged_checkpoint_does_not_start_anew(
    half: Path, pretrain_main: Main, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = half / "checkpoints" / "step_00000004"
    os.truncate(checkpoint / "rank_00000.safetensors", 100)
    line = refusal(pretrain_main, [*micro_settings, *SAME, f"run_dir={half}"], capsys)
    assert str(checkpoint.parent) in line and f"{checkpoint.name}: rank_00000.safetensors has 100 bytes" in line
    assert line.endswith("'resume_allow=[from_zero]'")
    assert read_metrics(half)


def test_a_checkpoint_of_another_model_is_refused(
    half: Path, pretrain_main: Main, micro_settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["model.ff_dim=96", "resume_allow=[model.ff_dim]"]
    line = refusal(pretrain_main, [*micro_settings, *SAME, f"run_dir={half}", *other], capsys)
    assert "has shape" in line and "use the model.* of the run that wrote it" in line


def test_copies_of_checkpoints_are_left_alone(half: Path, run_pretrain: Pretrain) -> None:
    copy = half / "checkpoints" / "step_00000004.bak"
    shutil.copytree(half / "checkpoints" / "step_00000004", copy)
    leftover = half / "checkpoints" / ".step_00000007.tmp"
    leftover.mkdir()
    run_pretrain(half, *SAME, "checkpoint.keep_last=1", "profile.steps=[7,20]")
    assert (copy / "COMPLETE").exists() and not leftover.exists()
    assert sorted(p.name for p in (half / "checkpoints").iterdir()) == ["step_00000004.bak", "step_00000008"]
    assert (half / "profile" / "trace.json").stat().st_size  # the steps of the window that the run trained


def test_adafactor_resumes_to_the_bit(run_pretrain: Pretrain, tmp_path: Path) -> None:
    settings = ("optimizer.name=adafactor", "zero.stage=0")
    run_pretrain(tmp_path / "four", *settings)
    run_pretrain(tmp_path / "two", *settings, "train.steps=2")
    run_pretrain(tmp_path / "two", *settings)
    assert losses(tmp_path / "two") == losses(tmp_path / "four")


def test_muon_and_the_average_resume_to_the_bit(
    run_pretrain: Pretrain,
    pretrain_main: Main,
    micro_settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, momentum and average; an average that a start would not continue is named."""
    settings = ("optimizer.name=muon", "zero.stage=2", "train.ema=0.9")
    four, two = tmp_path / "four", tmp_path / "two"
    run_pretrain(four, *settings)
    run_pretrain(two, *settings, "train.steps=2")
    arguments = [*micro_settings, *settings[:2], f"run_dir={two}", "--dry-run"]
    assert pretrain_main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step_00000002 holds does not go on" in printed and "muon   2 times encoder.layers.*.attention" in printed
    run_pretrain(two, *settings)
    assert losses(two) == losses(four)
    files = [d / "checkpoints" / "step_00000004" / "rank_00000.safetensors" for d in (two, four)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_init_from_takes_the_weights_only(reference: tuple[Path, str], run_pretrain: Pretrain, tmp_path: Path) -> None:
    """The schedule starts anew; the first held-out loss and the first step are printed at once."""
    run_dir = tmp_path / "run"
    done = run_pretrain(run_dir, f"init_from={reference[0]}", "train.steps=2", "train.log_every=2")
    (record,) = read_metrics(run_dir)
    before = json.loads((run_dir / "checkpoints" / "step_00000002" / "trainer.json").read_text())["state"]
    assert before["first_held_out_loss"] == pytest.approx(read_metrics(reference[0])[-1]["eval/loss"], rel=1e-6)
    assert record["step"] == 2 and record["lr"] == pytest.approx(0.002 * 2 / 4)
    first = f"held-out loss before the first step: {before['first_held_out_loss']:.4f} "
    assert done.stdout.index(first) < done.stdout.index("step 1/2 | loss ") < done.stdout.index("step 2/2 | loss ")


def test_the_file_stop(run_pretrain: Pretrain, tmp_path: Path) -> None:
    """The run saves a checkpoint after the current step and ends with status 0."""
    run_dir = tmp_path / "run"

    def ask_for_a_stop() -> None:
        while not read_metrics(run_dir) and not ended.wait(0.05):
            pass
        (run_dir / "STOP").touch()

    ended = threading.Event()
    asking = threading.Thread(target=ask_for_a_stop)
    asking.start()
    try:
        run_pretrain(run_dir, "train.steps=100000")  # with status 0
    finally:
        ended.set()
        asking.join()
    last = read_metrics(run_dir)[-1]["step"]
    assert status(run_dir)["status"] == "stopped" and status(run_dir)["step"] == last
    assert (run_dir / "checkpoints" / f"step_{last:08d}" / "COMPLETE").exists()
    assert not (run_dir / "STOP").exists()


def test_max_minutes_stops_with_75(run_pretrain: Pretrain, tmp_path: Path) -> None:
    done = run_pretrain(tmp_path / "run", "train.max_minutes=0.001", check=False)
    assert done.returncode == 75
    assert status(tmp_path / "run")["reason"] == "train.max_minutes"


def checkpoints(run_dir: Path) -> list[int]:
    """Return the steps of the whole checkpoints; there must be no others."""
    whole, damaged = find_checkpoints(run_dir / "checkpoints")
    assert not damaged
    return [int(folder.name.removeprefix("step_")) for folder in whole]


def test_the_file_save(run_pretrain: Pretrain, tmp_path: Path) -> None:
    """One checkpoint of the next step is whole before training continues; only rank 0 looks for the file."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "SAVE").touch()
    settings = ("checkpoint.every_steps=0", "checkpoint.keep_last=9", "checkpoint.asynchronous=true")
    done = run_pretrain(run_dir, *settings, processes=2)
    assert checkpoints(run_dir) == [1, 4] and not (run_dir / "SAVE").exists()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("checkpoint of step 1: ")]
    assert "written in the background" not in line
    assert status(run_dir) == {"status": "finished", "step": 4}


def test_which_checkpoints_are_kept_and_what_a_resumed_run_records(run_pretrain: Pretrain, tmp_path: Path) -> None:
    """Multiples of keep_every are kept; records after the checkpoint that is resumed from are replaced by new ones."""
    run_dir = tmp_path / "run"
    settings = ("train.steps=6", "checkpoint.every_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2")
    run_pretrain(run_dir, *settings)
    assert checkpoints(run_dir) == [2, 4, 6]
    before = read_metrics(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    run_pretrain(run_dir, *settings, "optimizer.lr=0.1", "resume_allow=[optimizer.lr]")
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[:4] == before[:4]
    assert [record["lr"] for record in records[4:]] != [record["lr"] for record in before[4:]]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for name in ("loss", "lr"):
        scalars = events.Scalars(place(name).tag)
        assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in scalars] == pytest.approx([record[name] for record in records])


@pytest.mark.parametrize("model", ["model.routing=static", "model.routing=random", "model.encoder=dense"])
def test_controls_and_baseline_train(
    model: str, reference: tuple[Path, str], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    run_pretrain(tmp_path / "run", model, "train.steps=2", "zero.stage=3")
    values = losses(tmp_path / "run")
    assert all(math.isfinite(value) for value in values)
    assert values != losses(reference[0])[:2]
