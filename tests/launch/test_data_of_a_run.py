"""The data of complete runs: a length schedule on one or two processes, samples left out, damage on one rank."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from colt5dist.data import DataConfig
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.train.report.monitor import read_metrics

Pretrain = Callable[..., subprocess.CompletedProcess[str]]
SCHEDULE = (
    "data.length_schedule="
    "[{step: 3, input_length: 128, target_length: 32, micro_batch_size: 1, num_heavy_tokens: 0.25},"
    "{step: 5, input_length: 512, micro_batch_size: 2}]"
)
SKIP = "data.skip=[[9, 12], [40, 44]]"


def state(run_dir: Path, step: int) -> dict[str, object]:
    """Read the trainer's integers in a checkpoint."""
    return json.loads((run_dir / f"checkpoints/step_{step:08d}/trainer.json").read_text())["state"]


def test_lengths_change_in_a_run(run_pretrain: Pretrain, tmp_path: Path) -> None:
    """Three stages on 1 process; on 2 at ZeRO stage 3, stopped between two stages and resumed on 1 at ZeRO stage 1."""
    settings = (SCHEDULE, SKIP, "train.routing_every=1")
    done = run_pretrain(tmp_path / "one", *settings, "train.steps=6", "zero.stage=2")
    records = read_metrics(tmp_path / "one")
    # span corruption fills an input, prefix-LM nearly
    for record, length in zip(records, (256, 256, 128, 128, 512, 512), strict=True):
        assert 0.8 * 8 * length < record["input_tokens"] <= 8 * length
    share = [record["router/unrouted_share/feed_forward"] for record in records]
    assert share[2] < share[1] - 0.05  # a quarter of the tokens is routed, not an eighth
    for line in (
        "from step 1 on: 256 input",
        "from step 3 on: 128 input and 32 target tokens, 1 samples ",
    ):
        assert line in done.stdout
    two = tmp_path / "two"
    run_pretrain(two, *settings, "train.steps=2", "zero.stage=3", "data.num_workers=2", processes=2)
    run_pretrain(two, *settings, "train.steps=6", "zero.stage=1", "train.micro_batch_size=2")
    assert [r["loss"] for r in read_metrics(two)] == pytest.approx([r["loss"] for r in records], rel=2e-5)
    # 48 samples were used, 7 left out
    assert state(two, 6)["samples_consumed"] == state(tmp_path / "one", 6)["samples_consumed"] == 55
    assert state(two, 6)["skipped_samples"] == [[9, 12], [40, 44]]


@pytest.fixture
def shards(short_texts: Path, tmp_path: Path) -> ShardSet:
    """A copy of documents that give about one sample each, which a test may damage."""
    return open_shards(shutil.copytree(short_texts, tmp_path / "shards"))


def damage_sample(shards: ShardSet, number: int) -> None:
    """Flip a bit in the middle of the text that a sample is made from."""
    samples = Samples(shards, DataConfig(input_length=256, target_length=64), seed=0)
    chunk = samples.planned(number).chunk
    piece = int((chunk.stops - chunk.starts).argmax())
    position = int(chunk.starts[piece] + chunk.stops[piece]) // 2
    index = shards.index
    member = index.member_at(position)
    header = 512 + 4 + 4 * len(index.record_lengths(member))
    place = int(index.members[member]["offset"]) + header + 2 * (position - index.member_start(member))
    path = shards.folder / "000000.tar"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damage_on_one_rank(run_pretrain: Pretrain, shards: ShardSet, tmp_path: Path) -> None:
    """Rank 1 reads sample 17 in step 3: both ranks stop after step 2 with a checkpoint, or it is replaced and named."""
    damage_sample(shards, 17)
    settings = (f"data.shards={shards.folder}", "train.steps=4", "train.eval_samples=2")
    done = run_pretrain(tmp_path / "stopped", *settings, "data.max_bad_records=0", processes=2, check=False)
    assert done.returncode != 0
    assert f"error: {shards.folder}/000000.tar: at byte" in done.stderr
    assert json.loads((tmp_path / "stopped/status.json").read_text())["status"] == "failed"
    assert state(tmp_path / "stopped", 2)["step"] == 2
    done = run_pretrain(tmp_path / "whole", *settings, processes=2)
    assert "rank 1: damaged record: " in done.stderr
    assert [record["bad_records"] for record in read_metrics(tmp_path / "whole")] == [0, 1, 1, 1]
