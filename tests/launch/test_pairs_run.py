"""Training on pairs: the same losses on one and two processes and after a stop; the ids of the model it starts from."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from colt5dist.data import DataConfig, ModelTokenizer, model_tokenizer
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.train.config.load import load_config
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.report.show_sample import show_sample
from colt5dist.train.run_directory import tokenizer_of_run

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")
Pretrain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_text: Callable[[random.Random, int], str]) -> Path:
    """Pairs of about the lengths of the micro model; about a sixth of the inputs is too long."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(2)
    pairs = [{"input": make_text(rng, rng.randint(20, 300)), "output": make_text(rng, 20)} for _ in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"input": [str(folder / "pairs.jsonl")], "output": folder / "shards", "validation_fraction": 0.1}
    prepare(PrepareConfig(pairs=True, **settings))  # type: ignore[arg-type]
    return folder / "shards"


def test_one_process_and_two_and_a_stop_give_the_same_losses(
    run_pretrain: Pretrain, shards: Path, tmp_path: Path
) -> None:
    """Also the held-out loss, which is over each held-out pair once although more samples are asked for."""
    settings = (f"data.shards={shards}", "data.mixture=pairs", "train.eval_every=2", "train.eval_samples=500")
    done = run_pretrain(tmp_path / "one", *settings)
    for line in (" pairs; 4 steps read 32: 0.", "note: data.input_length: ", "which are cut at their end"):
        assert line in done.stdout
    records = read_metrics(tmp_path / "one")
    assert records[1]["eval/loss"] == records[1]["eval/loss/pairs"] != records[3]["eval/loss"]
    two = tmp_path / "two"
    run_pretrain(two, *settings, "train.steps=2", "zero.stage=3", "data.num_workers=2", processes=2)
    run_pretrain(two, *settings, "train.micro_batch_size=2")
    for name in ("loss", "eval/loss", "input_tokens"):
        there, expected = ([record.get(name, 0) for record in run] for run in (read_metrics(two), records))
        assert there == pytest.approx(expected, rel=2e-5)
    # the model has the ids that pretraining with the default mixture would have given it
    usual = model_tokenizer(ByteTokenizer(), DataConfig(input_length=256, target_length=64))
    assert ModelTokenizer.open(tmp_path / "one/tokenizer").names == usual.names


def test_a_sample_is_shown_as_the_model_sees_it(shards: Path) -> None:
    settings = [f"data.shards={shards}", "data.mixture=pairs"]
    lines = show_sample(TINY, settings, 3, world_size=1, colour=False)
    assert lines[1] == "objective: pairs" and len([line for line in lines if line.endswith("</s>")]) == 2


def test_a_run_on_pairs_keeps_the_ids_of_the_model_that_it_starts_from(tmp_path: Path) -> None:
    """Of a run folder or a checkpoint inside it; and its own when it is resumed, wherever that run is then."""
    before = ModelTokenizer(ByteTokenizer(), num_modes=3, num_sentinels=40)
    before.save(tmp_path / "pretrained/tokenizer")
    run_dir = tmp_path / "run"
    for start in ("pretrained", "pretrained/checkpoints/step_00000004"):
        config = load_config(TINY, ["data.mixture=pairs", f"init_from={tmp_path / start}"])
        kept = tokenizer_of_run(run_dir, config, ByteTokenizer())
        assert kept.names == before.names and kept.first_sentinel == before.first_sentinel
    kept.save(run_dir / "tokenizer")
    config = load_config(TINY, ["data.mixture=pairs", f"init_from={tmp_path / 'gone'}"])
    assert tokenizer_of_run(run_dir, config, ByteTokenizer()).names == before.names
    # pretraining has the ids of its own mixture; there are no more sentinels than rows of the embedding
    config = load_config(TINY, [f"init_from={tmp_path / 'pretrained'}"])
    assert tokenizer_of_run(tmp_path / "new", config, ByteTokenizer()).num_modes == 0
    config = load_config(
        TINY, ["data.mixture=pairs", "model.vocab_size=384", "data.input_length=4096", "data.target_length=910"]
    )
    assert tokenizer_of_run(tmp_path / "new", config, ByteTokenizer()).num_sentinels == 384 - 259
