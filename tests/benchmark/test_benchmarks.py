"""The benchmarks run on small shapes, and report a wrong result as wrong, without a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import colt5dist.benchmark.generate
import colt5dist.benchmark.layer
import colt5dist.benchmark.local_attention
from colt5dist import benchmark
from colt5dist.errors import ConfigError

LOCAL = ["--batch", "1", "--length", "64", "--heads", "2", "--dim", "16", "--radius", "7", "--repeats", "1"]
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"
LAYER = ["--shapes", "1x128", "--dim", "64", "--repeats", "1"]


def test_local_attention(tmp_path, capsys):
    assert colt5dist.benchmark.local_attention.main([*LOCAL, "--output", str(tmp_path / "here")]) == 0
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert "Triton" in names and "package local-attention" in names
    assert all(row["wall_ms"] > 0 and row["error"] < benchmark.MAX_ERROR for row in results["rows"])
    assert "radius 7" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*sdp_kernel.*:FutureWarning")
def test_layer(capsys):
    compiled = [] if torch.cuda.is_available() else ["--without", "compiled"]
    assert colt5dist.benchmark.layer.main([*LAYER, *compiled]) == 0
    printed = capsys.readouterr().out
    for name in ("conditional block", "colt5-attention, routing in float32", "dense block, flash attention"):
        assert name in printed
    assert "wrong" not in printed


def test_checkpoint(tmp_path, micro_settings):
    script = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"
    places = ["--config", str(script.parents[1] / "configs" / "tiny.yaml"), "--folder", str(tmp_path / "runs")]
    command = [
        sys.executable,
        str(script),
        "checkpoint",
        *micro_settings,
        *places,
        "--output",
        str(tmp_path / "x.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "x.json").read_text())["stage 1"]
    assert figures["bytes"] > 900_000
    for name in ("foreground, again: training waits", "background, again: until it is complete"):
        assert figures[name] > 0 and name in done.stdout


def test_generate(tmp_path, capsys):
    config = SCRIPT.parents[1] / "configs" / "tiny.yaml"
    shape = ["--batch", "2", "--length", "70", "--new-tokens", "6", "--repeats", "1"]
    others = ["--device", "cpu", "--config", str(config), "--without-long-t5", "--output", str(tmp_path / "x.json")]
    assert colt5dist.benchmark.generate.main([*shape, *others]) == 0
    (ours,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert ours["tokens_per_second"] == pytest.approx(12 / ours["seconds"])
    assert min(ours[name] for name in ("encoder_seconds", "step_seconds", "floor_seconds", "seconds")) > 0
    assert "CoLT5 " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--new-tokens: 1; use 4 or more"):
        colt5dist.benchmark.generate.main(["--new-tokens", "1"])


def test_a_wrong_result_has_no_time(monkeypatch, capsys):
    exact = benchmark.local_attention.local_attention

    def off(q, k, v, *, implementation, **others):
        out = exact(q, k, v, implementation=implementation, **others)
        return out * 1.05 if implementation == "windows" else out

    monkeypatch.setattr(benchmark.local_attention, "local_attention", off)
    assert benchmark.local_attention.main(LOCAL) == 1
    lines = {line[:40].strip(): line[40:] for line in capsys.readouterr().out.splitlines()}
    assert "wrong" in lines["fused windows"] and "wrong" not in lines["Triton"]
    row = benchmark.measure("nan", "1", lambda: [torch.zeros(1)], float("nan"), 1)
    assert row.wall_ms is None


def run_script(*arguments, **environment):
    """Run launch/benchmark.py without a GPU and without Triton's interpreter."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    settings.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env={**settings, **environment}, capture_output=True, text=True, timeout=120)


def test_help_has_one_sentence_for_every_benchmark():
    done = run_script("--help")
    assert done.returncode == 0 and done.stderr == ""
    modules = [m for m in Path(benchmark.__file__).parent.glob("[!_]*.py") if "\ndef main(" in m.read_text()]
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert sorted(listed) == sorted(module.stem for module in modules)
    assert all(sentence.endswith(".") and sentence.count(". ") == 0 for sentence in listed.values())


@pytest.mark.parametrize("name", ["local_attention"])
def test_a_benchmark_that_needs_a_gpu_is_one_line_and_status_2_without_one(name):
    done = run_script(name)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: benchmark {name}: needs a GPU") and done.stderr.count("\n") == 1
    assert run_script(name, "--help").returncode == 0


def test_an_unknown_benchmark_is_one_line_and_status_2():
    done = run_script("speed")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "local_attention" in done.stderr


def test_error_is_that_of_all_but_a_few_rows():
    expected = torch.ones(1, 100, 4)
    few, sixteenth = expected.clone(), expected.clone()
    few[0, :2] = 9.0
    sixteenth[0, :6] = 1.5
    assert benchmark.relative_error([few], [expected]) == 0
    assert benchmark.relative_error([expected, sixteenth], [expected, expected]) == pytest.approx(0.5)
    few[0, 0] = float("nan")
    assert benchmark.relative_error([few], [expected]) == float("inf")
