"""The package as a library: its public names, and how a script beside the checkout imports it."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import colt5dist

ROOT = Path(__file__).resolve().parents[2]


def test_dir_lists_the_public_names():
    assert set(colt5dist.__all__) <= set(dir(colt5dist))
    for name in colt5dist.__all__:
        assert getattr(colt5dist, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        colt5dist.no_such_name  # noqa: B018


def test_type_checkers_and_python_know_the_same_public_names():
    imports = {}
    for node in ast.walk(ast.parse((ROOT / "colt5dist" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("colt5dist."):
            imports |= {alias.asname: node.module for alias in node.names}
    assert imports == colt5dist._HOMES


def test_star_import_gives_the_public_names():
    names = {}
    exec("from colt5dist import *", names)
    assert set(colt5dist.__all__) <= set(names)


def test_script_beside_the_checkout_imports_the_package(tmp_path):
    """A checkout called colt5dist is a namespace package to a script beside it: the editable install has to win."""
    checkout, site = tmp_path / "colt5dist", tmp_path / "site"
    checkout.mkdir()
    shutil.copytree(ROOT / "colt5dist", checkout / "colt5dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (tmp_path / "x.py").write_text(
        f"import site; site.addsitedir({str(site)!r}); import colt5dist; print(colt5dist.__file__)"
    )
    # -E, -S: without PYTHONPATH and this environment's own packages, among which colt5dist may be
    ran = subprocess.run([sys.executable, "-ES", "x.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(ran.stdout.strip()) == checkout / "colt5dist" / "__init__.py"
