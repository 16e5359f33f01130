"""Ranks that were started with different settings, text, versions or code are refused by name before the first step."""

import shutil
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import free_port, write_short_texts

from colt5dist.data import open_sources
from colt5dist.errors import ConfigError
from colt5dist.train import ranks
from colt5dist.train.config.load import load_config
from colt5dist.train.guard import compare_ranks
from colt5dist.train.guard.compare_ranks import check_ranks_alike, differences, what_decides_a_step
from colt5dist.train.ranks import Meeting, Ranks, describe_ranks

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"


def place(rank: int, world_size: int = 2) -> Ranks:
    """A rank on a host of its own."""
    return Ranks(rank=rank, local_rank=0, world_size=world_size, local_world_size=1)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, which the environment names as a launcher would."""
    number = free_port()
    monkeypatch.setattr(ranks, "MEETINGS", Counter())
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}.items():
        monkeypatch.setenv(name, str(value))
    return number


def outcome(rank: int, settings: list[str]) -> ConfigError | None:
    """What a rank learns that was started with some settings."""
    config = load_config(TINY, settings)
    try:
        check_ranks_alike(config, open_sources(config.data), place(rank), Meeting(place(rank), 1))
    except ConfigError as error:
        return error
    return None


def outcomes(one: list[str], two: list[str]) -> list[ConfigError | None]:
    """The same of two ranks, which meet by TCP."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(outcome, (0, 1), (one, two)))


def test_alike_although_paths_and_readers_differ(port: int, short_texts: Path, tmp_path: Path) -> None:
    shutil.copytree(short_texts, tmp_path / "copy")
    first, second = outcomes(
        [f"data.shards={short_texts}", "run_dir=a", "data.num_workers=1"],
        [f"data.shards={tmp_path / 'copy'}", "run_dir=/mnt/a", "data.num_workers=4"],
    )
    assert first is None and second is None


def test_different_settings_are_named_on_all_ranks(port: int, short_texts: Path) -> None:
    shards = f"data.shards={short_texts}"
    errors = outcomes([shards, "optimizer.lr=1e-3"], [shards, "optimizer.lr=1e-1", "deepspeed.dump_state=true"])
    host = socket.gethostname()
    for error in errors:
        assert error is not None
        assert str(error).splitlines() == [
            f"optimizer.lr: 0.001 on rank 0 (host {host}), 0.1 on rank 1 (host {host}); start all hosts with the same "
            "settings",
            f"deepspeed.dump_state: not set on rank 0 (host {host}), True on rank 1 (host {host}); start all hosts "
            "with the same settings",
        ]
    assert errors[0] and errors[1] and errors[0].known_to_all and not errors[1].known_to_all


def test_different_text_is_named(port: int, short_texts: Path, tmp_path: Path) -> None:
    other = write_short_texts(tmp_path / "other", 100)
    for error in outcomes([f"data.shards={short_texts}"], [f"data.shards={other}"]):
        (line,) = str(error).splitlines()
        assert line.startswith("data.shards: text ") and line.endswith("; give all hosts the same shards")


def test_a_rank_that_does_not_come_is_named(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(no word from ranks 1-2\); see the output of the other"):
        Meeting(place(0, world_size=3), 0.02).gather("word", "hello")


def test_a_port_that_is_taken(port: int) -> None:
    with socket.create_server(("", port)), pytest.raises(ConfigError, match=r"in use .* --master_port \d+"):
        Meeting(place(0), 0.02)


def test_versions_code_and_variables(short_texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the description of four ranks on three hosts."""
    config = load_config(TINY, [f"data.shards={short_texts}"])
    shards = open_sources(config.data)
    usual = what_decides_a_step(config, shards, 4)
    assert {"package triton", "package torch", "code of colt5dist: train/step.py", "device"} <= usual.keys()
    assert "Python" not in usual
    named = what_decides_a_step(config, shards, 4, {"books": shards})
    assert {*named} - {*usual} == {"shards of the validation set books"}
    monkeypatch.setattr(compare_ranks, "package_versions", lambda: {"torch": "2.11.0", "triton": "3.7.1"})
    digests = {**compare_ranks.code_digests(), "train/step.py": "0", "train/new.py": "1"}
    monkeypatch.setattr(compare_ranks, "code_digests", lambda: digests)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    other = {**usual, **what_decides_a_step(config, shards, 4)}
    other["package triton"] = usual["package triton"]
    assert differences([usual] * 4, list("abcd")) == []
    version = usual["package torch"][1]
    assert differences([usual, other, other, usual], ["a", "b", "b", "c"]) == [
        f"package torch: {version} on ranks 0, 3 (hosts a, c), 2.11.0 on ranks 1-2 (host b); install the same version "
        "on all hosts",
        "NVIDIA_TF32_OVERRIDE: not set on ranks 0, 3 (hosts a, c), 1 on ranks 1-2 (host b); set it alike on all hosts",
        "code of colt5dist: train/step.py and 1 more not the same on ranks 0, 3 (hosts a, c) than on ranks 1-2 (host "
        "b); install the same code on all hosts",
    ]


def test_pythons_version_counts_where_its_library_is_the_text() -> None:
    config = load_config(TINY, ["data.shards=python-stdlib"])
    assert what_decides_a_step(config, open_sources(config.data), 1)["Python"][0] == "version"


def test_ranks_in_words() -> None:
    assert describe_ranks([3]) == "rank 3"
    assert describe_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
