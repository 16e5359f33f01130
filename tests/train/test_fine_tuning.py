"""Fine-tuning on pairs: dropout, scores of generated answers, the best checkpoint, the early stop."""

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MICRO_SETTINGS, random_text

import colt5dist
from colt5dist.data.inputs.pairs import Pair
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.tokenize_texts import encode_document
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.pretrained.evaluate_pairs import evaluate_pairs
from colt5dist.pretrained.metrics import mean_scores
from colt5dist.pretrained.pairs import PairSample
from colt5dist.train.checkpoint import find_checkpoints
from colt5dist.train.config.evaluation_keys import TEXT_KEYS
from colt5dist.train.report.monitor import read_metrics

Pretrain = Callable[..., subprocess.CompletedProcess[str]]
CUT_SHORT = Path(__file__).with_name("stopped_evaluation.py")
KEY = "eval/rouge1"


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Every fifth is held out."""
    rng = random.Random(2)
    answers = ("aa bb", "aa bb", "aa bb", "aa cc")
    return [Pair(random_text(rng, rng.randint(20, 60)), answers[number % 4]) for number in range(100)]


@pytest.fixture(scope="module")
def settings(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of runs on the pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "shards"
    writer = CorpusWriter(folder, ByteTokenizer(), validation_fraction=0.2, pairs=True)
    for number, pair in enumerate(pairs):
        writer.add_document(replace(encode_document(ByteTokenizer(), pair), held_out=number % 5 == 0))
    writer.close({})
    return (
        f"data.shards={folder}",
        "data.mixture=pairs",
        "data.input_length=64",
        "data.target_length=8",
        "model.dropout=0.1",
        "optimizer.lr=0.02",
        "schedule.name=constant",
        "train.steps=8",
        "train.eval_every=2",
        "train.eval_generate_samples=20",
        "train.routing_every=0",
        "checkpoint.every_steps=0",
        "checkpoint.keep_last=1",
        f"checkpoint.keep_best={KEY}",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings: tuple[str, ...], run_pretrain: Pretrain) -> Path:
    """Eight steps on one process."""
    run_dir = tmp_path_factory.mktemp("fine-tuning") / "run"
    run_pretrain(run_dir, *settings)
    return run_dir


def results(run_dir: Path) -> list[dict[str, Any]]:
    """The records without what depends on time."""
    timed = ("tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes", "mfu")
    return [{key: value for key, value in r.items() if key not in timed} for r in read_metrics(run_dir)]


def best(run_dir: Path) -> dict[str, Any]:
    """What best.json says."""
    return json.loads((run_dir / "checkpoints" / "best.json").read_text())


def kept(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return [int(folder.name.removeprefix("step_")) for folder in find_checkpoints(run_dir / "checkpoints")[0]]


def test_the_best_evaluation_has_a_checkpoint_that_is_kept(undisturbed: Path) -> None:
    evaluations = [record for record in results(undisturbed) if "eval/loss" in record]
    assert [record["step"] for record in evaluations] == [2, 4, 6, 8]
    assert all(0 <= record[key] <= 1 for record in evaluations for key in TEXT_KEYS)
    highest = max(record[KEY] for record in evaluations)
    first = next(record["step"] for record in evaluations if record[KEY] == highest)
    assert best(undisturbed) == {"step": first, "key": KEY, "value": highest}
    assert kept(undisturbed) == sorted({first, 8})


def test_the_scores_are_those_of_the_stored_model_on_the_same_pairs(
    undisturbed: Path, pairs: list[Pair], settings: tuple[str, ...]
) -> None:
    model, tokenizer = colt5dist.load(undisturbed, step="best")
    assert model.origin.step == best(undisturbed)["step"]
    held_out = [PairSample(line=1, id=None, text=pair.input, references=(pair.target,)) for pair in pairs[::5]]
    found = evaluate_pairs(model, tokenizer, held_out, max_new_tokens=8)
    record = next(r for r in results(undisturbed) if r["step"] == model.origin.step)
    expected = mean_scores([prediction.scores for prediction in found])
    assert tuple(f"eval/{name}" for name in expected) == TEXT_KEYS
    assert [record[key] for key in TEXT_KEYS] == pytest.approx(list(expected.values()), rel=1e-12)


@pytest.mark.slow
def test_cut_otherwise_the_run_is_the_same(
    undisturbed: Path, settings: tuple[str, ...], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    """The masks of dropout, and the answers, do not depend on ranks, micro-batches, ZeRO stage or recomputation."""
    cut = ("train.micro_batch_size=2", "zero.stage=3", "train.activation_checkpointing=full", "train.steps=4")
    run_pretrain(tmp_path / "run", *settings, *cut, processes=2)
    for here, there in zip(results(tmp_path / "run"), results(undisturbed)[:4], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert {key: here.get(key) for key in TEXT_KEYS} == {key: there.get(key) for key in TEXT_KEYS}


def test_stopped_in_an_evaluation_and_resumed_it_decides_the_same(
    undisturbed: Path, settings: tuple[str, ...], fork: Callable[..., Any], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    """The evaluation of step 4 is cut short by the file STOP, and made up for by the next start."""
    run_dir = tmp_path / "run"
    done = fork(CUT_SHORT, ("4", f"run_dir={run_dir}", *MICRO_SETTINGS, *settings), 1)
    assert done.returncode == 0 and "the evaluation of step 4 is left out" in done.stdout, done.stdout + done.stderr
    assert "eval/loss" not in results(run_dir)[-1] and results(run_dir)[-1]["step"] == 4
    again = run_pretrain(run_dir, *settings, "resume=must")
    assert "evaluated step 4" in again.stdout
    assert [dict(sorted(r.items())) for r in results(run_dir)] == [
        dict(sorted(r.items())) for r in results(undisturbed)
    ]
    assert best(run_dir) == best(undisturbed) and kept(run_dir) == kept(undisturbed)


def test_the_last_evaluation_is_made_up_for_where_nothing_depends_on_it(
    undisturbed: Path, settings: tuple[str, ...], fork: Callable[..., Any], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    """Without it the run would count as finished, and its last held-out loss would never be known."""
    run_dir, own = tmp_path / "run", (*settings, "checkpoint.keep_best=null")
    done = fork(CUT_SHORT, ("8", f"run_dir={run_dir}", *MICRO_SETTINGS, *own), 1)
    assert done.returncode == 0 and "the evaluation of step 8 is left out" in done.stdout, done.stdout
    assert "eval/loss" not in results(run_dir)[-1] and results(run_dir)[-1]["step"] == 8
    assert "evaluated step 8" in run_pretrain(run_dir, *own).stdout
    assert dict(sorted(results(run_dir)[-1].items())) == dict(sorted(results(undisturbed)[-1].items()))


def test_an_early_stop_finishes_the_run(
    undisturbed: Path, settings: tuple[str, ...], run_pretrain: Pretrain, tmp_path: Path
) -> None:
    """At a tiny rate the texts stay as they are, and no evaluation is better than the first."""
    run_dir = tmp_path / "run"
    early = (*settings, f"init_from={undisturbed}", "model.dropout=0.3", "optimizer.lr=1e-9")
    early += ("train.early_stopping_patience=2", "train.eval_generate_samples=4")
    done = run_pretrain(run_dir, *early)
    last = results(undisturbed)[-1]["eval/loss"]
    assert f"held-out loss before the first step: {last:.4f}" in done.stdout
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["step"], results(run_dir)[-1]["step"]) == ("finished", 6, 6)
    assert status["reason"].startswith("train.early_stopping_patience: 2 evaluations without a better eval/rouge1")
    assert f"finished at step 6 ({status['reason']})" in done.stdout
    (run_dir / "checkpoints" / "best.json").unlink()  # as if killed before it was written
    again = run_pretrain(run_dir, *early)
    assert "nothing to do" in again.stdout and json.loads((run_dir / "status.json").read_text()) == status
    assert best(run_dir)["step"] == 2 and kept(run_dir) == [2, 6]
