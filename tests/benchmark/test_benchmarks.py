"""The benchmarks run, on small shapes, and say of a wrong result that it is wrong, not how long it took."""

import json

import pytest
import torch

import colt5dist.benchmark.layer
import colt5dist.benchmark.local_attention
from colt5dist import benchmark

LOCAL = ["--batch", "1", "--length", "64", "--heads", "2", "--dim", "16", "--radius", "7", "--repeats", "1"]
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


def test_error_is_that_of_all_but_a_few_rows():
    expected = torch.ones(1, 100, 4)
    few, sixteenth = expected.clone(), expected.clone()
    few[0, :2] = 9.0
    sixteenth[0, :6] = 1.5
    assert benchmark.relative_error([few], [expected]) == 0
    assert benchmark.relative_error([expected, sixteenth], [expected, expected]) == pytest.approx(0.5)
    few[0, 0] = float("nan")
    assert benchmark.relative_error([few], [expected]) == float("inf")
