"""A rank that is lost, fails or hangs is named by the other, which ends in time; two processes over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colt5dist.marks import KEEPS_RESULT
from colt5dist.train.config.differences import marked_keys
from colt5dist.train.config.load import load_config
from colt5dist.train.guard.failures import memory_advice, record_failures
from colt5dist.train.guard.heartbeat import _Message
from colt5dist.train.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("heartbeat_ranks.py")
TINY = ROOT / "configs" / "tiny.yaml"
TIMEOUT_SECONDS = 12.0
LOST = "is lost: killed (out of memory?) or paused, or its host is down or cut off"


WAYS = {
    "kill": (0, f"rank 1 on host-b {LOST}"),
    "malformed-kill": (0, f"rank 1 on host-b {LOST}"),
    "kill-first": (1, f"rank 0 on host-a {LOST}"),
    "raise": (0, "rank 1 on host-b failed: ValueError: an error of this rank only"),
    "memory": (0, "rank 1 on host-b failed: RuntimeError"),
    "pause": (0, f"rank 1 on host-b {LOST}"),
    "pause-collective": (0, f"rank 1 on host-b {LOST}"),
    "wait": (
        0,
        "no progress for 12 s (rank 0 on host-a: agreeing on the step, step 3; rank 1 on host-b: training",
    ),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float, int, str]]:
    """By way: folder of the run, seconds until the other rank ended, its exit status and output. All run at once."""
    root = tmp_path_factory.mktemp("heartbeat")
    survivors = {**{way: survivor for way, (survivor, _) in WAYS.items()}, "slow-save": 0, "slow-step": 0}
    command = [sys.executable, str(SCRIPT), str(root), str(TIMEOUT_SECONDS)]
    done = subprocess.run(
        [*command, *(f"{way}={rank}" for way, rank in survivors.items())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {
        way: (root / way, seconds, status, (root / way / f"stderr_{survivors[way]}").read_text())
        for way, (status, seconds) in json.loads(done.stdout).items()
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_other_rank_ends_and_names_the_failed_one(way: str, ended: dict[str, tuple[Path, float, int, str]]) -> None:
    survivor, message = WAYS[way]
    run_dir, _, status, printed = ended[way]
    assert status not in (0, -signal.SIGKILL)
    assert message in printed
    assert message in (run_dir / "failures" / f"rank_{survivor}.txt").read_text()
    # rank 0 writes it, or rank 1 if rank 0 cannot
    written = json.loads((run_dir / "status.json").read_text())
    assert (written["status"] == "failed" and "an error of" in written["reason"]) or message in written["reason"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"7",
        b"null",
        b"[" * 100_000,
        b'{"count": 1}',
        b'{"count": "1", "place": "a", "step": 1, "failed": null}',
        b'{"count": 1, "place": "a", "step": 1, "failed": [], "more": 1}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_malformed_message_is_none(content: bytes) -> None:
    assert _Message.from_json(content) is None


def test_a_message_comes_back() -> None:
    message = _Message(3, "training", 7, "ValueError: wrong")
    assert _Message.from_json(message.to_json()) == message


@pytest.mark.parametrize("way", ["slow-save", "slow-step"])
def test_a_save_or_a_first_step_may_take_longer(way: str, ended: dict[str, tuple[Path, float, int, str]]) -> None:
    """One rank takes longer than train.timeout_seconds to write, or to compile for new lengths; the other waits."""
    run_dir, seconds, status, printed = ended[way]
    assert (status, printed) == (0, "") and seconds > 1.25 * TIMEOUT_SECONDS
    assert not (run_dir / "failures").exists() and not (run_dir / "status.json").exists()


def test_a_failed_allocation_says_what_to_lower(tmp_path: Path) -> None:
    config = load_config(TINY, [f"run_dir={tmp_path}", "zero.stage=1"])
    ranks = Ranks(rank=0, local_rank=0, world_size=2, local_world_size=2)
    with pytest.raises(RuntimeError), record_failures(config, ranks, ["a", "b"], lambda error: ""):
        torch.empty(2**58, dtype=torch.uint8)
    text = (tmp_path / "failures" / "rank_0.txt").read_text()
    assert "train.micro_batch_size 4, data.input_length 512, data.target_length 114" in text
    for fix in ("lower train.micro_batch_size (for instance to 2)", "full_keep_routing", "raise zero.stage (to 2)"):
        assert fix in text
    assert "Traceback" in text


@pytest.mark.gpu
def test_a_full_gpu_says_what_to_lower(tmp_path: Path) -> None:
    config = load_config(TINY, [f"run_dir={tmp_path}"])
    ranks = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1)
    with pytest.raises(torch.OutOfMemoryError), record_failures(config, ranks, ["a"], lambda error: ""):
        torch.empty(2**48, dtype=torch.uint8, device="cuda")
    assert "out of memory with train.micro_batch_size 4" in (tmp_path / "failures" / "rank_0.txt").read_text()


def test_what_is_already_low_is_not_advised() -> None:
    settings = ["zero.stage=3", "zero.offload=parameters", "train.micro_batch_size=1", "train.global_batch_size=8"]
    config = load_config(TINY, [*settings, "train.activation_checkpointing=full"])
    advice = memory_advice(config, 2, 1)
    assert advice.endswith("; use more or larger devices; --dry-run estimates what is needed")


SCHEDULE = "data.length_schedule=[{step: 5, input_length: 4096, micro_batch_size: 3}]"


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["zero.stage=0", "train.global_batch_size=18", "train.micro_batch_size=9"],
        ["zero.stage=3", "zero.offload=optimizer"],
        ["zero.stage=0", "optimizer.name=adafactor", "train.global_batch_size=12", "train.micro_batch_size=6"],
        [SCHEDULE, "train.global_batch_size=12", "train.micro_batch_size=2"],
    ],
    ids=["default", "odd share", "offloaded", "adafactor", "schedule"],
)
def test_all_that_is_advised_may_be_changed_on_resume(settings: list[str]) -> None:
    """Each piece of advice, followed, is a valid configuration, and its key carries the mark."""
    config = load_config(TINY, settings)
    advice = memory_advice(config, 2, 10).split("; ")[1]
    for fix in advice.split(", or "):
        match = re.fullmatch(r"(?:lower|raise|set) ([\w.\[\]]+)(?:=| \(for instance to | \(to )(\w+)\)?", fix)
        assert match, fix
        key, value = match.groups()
        assert re.sub(r"\[\d+\]", "[]", key) in marked_keys(KEEPS_RESULT)
        if key.startswith("data.length_schedule"):
            changed = [SCHEDULE.replace("micro_batch_size: 3", f"micro_batch_size: {value}"), *settings[1:]]
        else:
            changed = [*settings, f"{key}={value}"]
        assert load_config(TINY, changed).batch_problems(2) == []
