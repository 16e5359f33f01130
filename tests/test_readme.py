"""What the README names exists: files, rooms, configuration keys, and the tests of its guarantees."""

import re
from pathlib import Path
from typing import Any

import pytest

from colt5dist.train.config.load import config_leaves
from colt5dist.train.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_named_files_exist() -> None:
    named = set(re.findall(r"(?:tests|configs|launch|colt5dist)/[\w/]+\.(?:py|yaml)", README))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_library_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["out"].shape == (2, 4096, 256)
    assert names["weights"].sum(dim=-1).tolist() == pytest.approx([512.0, 512.0], rel=1e-3)


def test_named_keys_exist() -> None:
    table = README.split("## Configuration")[1].split("\n## ")[0]
    keys = [
        key for row in re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE) for key in re.findall(r"`(.+?)`", row)
    ]
    assert len(keys) > 20
    assert [key for key in keys if key not in config_leaves(RunConfig())] == []


def test_rooms_of_the_map_are_the_rooms_that_are_there() -> None:
    table = README.split("## Where things live")[1].split("\n## ")[0]
    rooms = set(re.findall(r"^\| `([\w/]+)/`", table, flags=re.MULTILINE))
    there = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name in ("launch", "configs", "tests")}
    there |= {f"colt5dist/{p.parent.name}" for p in (ROOT / "colt5dist").glob("*/__init__.py")}
    assert rooms == there
