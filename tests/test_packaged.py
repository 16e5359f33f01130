"""What is installed beside the modules: the commands, and the configurations found by name; a wheel holds both."""

import importlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from colt5dist import packaged
from colt5dist.__main__ import main
from colt5dist.packaged import CONFIGS, SCRIPTS, command_files, config_names, find_config, job_files, pretrain_target
from colt5dist.train import run_directory

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {f"colt5dist-{path.stem}": f"colt5dist.launch.{path.stem}:command" for path in ROOT.glob("launch/*.py")}


def test_the_package_holds_links_and_no_copies() -> None:
    assert (SCRIPTS, CONFIGS) == (ROOT / "launch", ROOT / "configs")
    assert pretrain_target() == "launch/pretrain.py"


def test_each_script_is_a_command() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == COMMANDS
    for path in command_files():
        assert len(path.read_text().splitlines()) < 100, path


def test_a_command_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_ctrl_c = signal.getsignal(signal.SIGINT)  # which pretrain changes for its process
    for name, home in COMMANDS.items():
        monkeypatch.setattr(sys, "argv", [name, "--no-such-option"])
        module, _, function = home.partition(":")
        try:
            status = getattr(importlib.import_module(module), function)()
        except SystemExit as ended:
            status = ended.code
        finally:
            signal.signal(signal.SIGINT, of_ctrl_c)
        assert (status, capsys.readouterr().err[:7]) == (2, "error: "), name


def test_the_list_names_every_command_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  colt5dist-"))
    assert set(listed) == set(COMMANDS)
    # what the command does, without how a checkout starts it
    assert not [text for text in listed.values() if "`" in text or not text]
    assert f"  {', '.join(sorted(path.stem for path in ROOT.glob('configs/*.yaml')))}" in lines
    assert len(job_files()) == 2 and {f"  {path}" for path in job_files()} <= set(lines)


def test_python_s_own_files_are_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has them in launch/, as has a checkout whose scripts were imported."""
    for name in ("slurm/pretrain.sbatch", "__pycache__/pretrain.cpython-311.pyc"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setattr(packaged, "SCRIPTS", tmp_path)
    assert job_files() == [tmp_path / "slurm" / "pretrain.sbatch"]


def test_the_list_takes_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: arguments: 'pretrain'") and printed.err.count("\n") == 1


@pytest.mark.parametrize("name", ["base", "base.yaml", "configs/base.yaml", "configs/base"])
def test_a_configuration_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()  # no file
    assert find_config(name) == ROOT / "configs" / "base.yaml"
    own = tmp_path / name
    if name != "base":
        own.parent.mkdir(exist_ok=True)
        own.write_text("seed: 1\n")
        assert find_config(name) == Path(name)


@pytest.mark.parametrize("name", ["./base.yaml", "../base.yaml", "~/base.yaml", "/base.yaml", "x/base.yaml", "", "."])
def test_other_names_are_left_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_config(name) == Path(name).expanduser()


def test_names_never_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/../../pyproject.toml") == Path("configs/../../pyproject.toml")
    assert config_names() and not [name for name in config_names() if find_config(name).parent != CONFIGS]


def test_a_run_names_no_commit_of_a_repository_that_only_surrounds_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    (tmp_path / "run_directory.py").touch()
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "run_directory.py"))
    assert run_directory._commit() is None
    git("add", "run_directory.py")
    git("commit", "-m", "second")
    assert run_directory._commit() == git("rev-parse", "HEAD")


def test_a_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    checkout, site, elsewhere = tmp_path / "checkout", tmp_path / "site", tmp_path / "elsewhere"
    without = shutil.ignore_patterns("__pycache__")
    for name in ("colt5dist", "launch", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=without, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    shutil.rmtree(checkout)
    for name in ("launch/*.py", "launch/[!_]*/pretrain.*", "configs/**/*.yaml", "colt5dist/**/*.py"):
        files = [str(path.relative_to(ROOT)).removeprefix("colt5dist/") for path in ROOT.glob(name)]
        assert files and [file for file in files if not (site / "colt5dist" / file).is_file()] == []
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    assert {entry.name: entry.value for entry in distribution.entry_points} == COMMANDS

    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    # as the installed command starts, which finds its default configuration
    entry = "import sys; from colt5dist.launch.pretrain import command; sys.exit(command())"
    start = [sys.executable, "-c", entry, "train.steps=7", "--print-config"]
    done = subprocess.run(start, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run_dir: runs/tiny\n" in done.stdout and "  steps: 7\n" in done.stdout
    target = "from colt5dist.packaged import pretrain_target; print(pretrain_target())"
    for start, expected in (
        (["-m", "colt5dist"], f"in {site / 'colt5dist' / 'configs'}:\n"),
        (["-c", target], "--module colt5dist.launch.pretrain\n"),
    ):
        command = [sys.executable, *start]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
        assert expected in done.stdout
