"""Files and settings from others cannot run code: nothing is unpickled, evaluated, or given to a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "colt5dist").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pty", "code"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "runpy.run_path",
}
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True}


def faults(source: str) -> list[str]:
    """What a module does that could run a stranger's code, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [f"{node.lineno}: from {name}" for name in names if name in MODULES | CALLS]
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                found.append(f"{node.lineno}: {ast.unparse(node.func)}")
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_ARGUMENTS:
                    allowed = ast.Constant(not FORBIDDEN_ARGUMENTS[keyword.arg])
                    if ast.dump(keyword.value) != ast.dump(allowed):
                        found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def test_the_package_has_none() -> None:
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=loader)",
        "eval(text)",
        "os.system(f'ls {name}')",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=option)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_each_way_would_be_seen(source: str) -> None:
    assert faults(source)
