"""The rooms of the package: imports go one way, there is no circle, and no room has too many files to look over."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "colt5dist").rglob("*.py"))
}
FLOORS = ["benchmark", "train", "pretrained", "model", "storage", "nn", "ops"]
"""Rooms from the top down: a room imports from those after it only; `data` imports from none of them."""
TRAIN_FLOORS = ["guard", "report", "checkpoint", "engine", "optimizer", "config"]
"""The same inside `train`; what lies beside the rooms is ordered by the modules' own imports."""
DATA_FLOORS = ["prepare", "inputs", "read", "order"]
MOST_FILES = 14
MOST_LINES = 500


def imported_modules(name: str) -> set[str]:
    """Modules of the package that a module names in any import, also in functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {module for module in found if module in MODULES}


IMPORTS = {name: imported_modules(name) for name in MODULES}


def test_no_import_goes_round_in_a_circle() -> None:
    # the package's own names are loaded when they are first used: its imports are for type checkers only
    graph = {name: imports - {"colt5dist"} for name, imports in IMPORTS.items() if name != "colt5dist"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "parent, floors",
    [("colt5dist", FLOORS), ("colt5dist.train", TRAIN_FLOORS), ("colt5dist.data", DATA_FLOORS)],
    ids=["package", "train", "data"],
)
def test_imports_only_go_down(parent: str, floors: list[str]) -> None:
    for above, below in ((a, b) for number, a in enumerate(floors) for b in floors[number + 1 :]):
        upwards = {
            f"{name} imports {imported}"
            for name, imports in IMPORTS.items()
            if f"{name}.".startswith(f"{parent}.{below}.")
            for imported in imports
            if f"{imported}.".startswith(f"{parent}.{above}.")
        }
        assert not upwards


def test_data_knows_no_model() -> None:
    for name, imports in IMPORTS.items():
        if name.startswith("colt5dist.data"):
            assert not {i for i in imports if i.split(".")[1:2] and i.split(".")[1] in FLOORS}


def test_files_on_disk_are_read_without_the_layers() -> None:
    for name, imports in IMPORTS.items():
        if name.startswith("colt5dist.storage"):
            assert {i.split(".")[1] for i in imports} <= {"storage", "errors", "files"}


def test_a_trained_model_needs_no_deepspeed() -> None:
    command = (
        "import sys, colt5dist, colt5dist.pretrained.evaluate_shards, colt5dist.pretrained.evaluate_pairs;"
        "import colt5dist.pretrained.export;"
        "colt5dist.load, colt5dist.CoLT5, colt5dist.CausalCoLT5;"
        "print(sorted(name for name in sys.modules if name.startswith(('deepspeed', 'colt5dist.train'))))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_rooms_and_files_are_not_too_large() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
    for path in (*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "launch").glob("*.py")):
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_floors_are_the_rooms() -> None:
    for parent, floors in (("", [*FLOORS, "data"]), ("train", TRAIN_FLOORS), ("data", DATA_FLOORS)):
        rooms = {path.parent.name for path in (ROOT / "colt5dist" / parent).glob("*/__init__.py")}
        assert rooms == set(floors)
    assert all(above != below for above, below in pairwise(FLOORS))
