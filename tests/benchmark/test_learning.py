"""The comparison of routings: its intervals, its text, its runs, and that it continues where it was stopped."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from colt5dist.benchmark import interval, learning, t_quantile, verdict
from colt5dist.errors import ConfigError
from colt5dist.train.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (30, 2.04227)]
)
def test_quantiles_of_student_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_says_whether_a_difference_is_beyond_seed_noise():
    # mean -0.03, standard deviation 0.01, four seeds: half of the interval is 3.18245 * 0.01 / 2
    differences = [-0.03 + 0.01 * x * math.sqrt(0.75) for x in (-1, -1, 1, 1)]
    found = interval(differences)
    assert found == pytest.approx((-0.03, 0.0159122), abs=1e-6)
    assert verdict(found) == "below" and verdict(interval([-d for d in differences])) == "above"
    assert verdict(interval([d + 0.02 for d in differences])) == "not told apart"
    assert verdict(interval([-1.0])) == "one seed: no interval"


def test_variants_are_compared_seed_by_seed_at_equal_steps_and_equal_gpu_time():
    slope, steps = -1.0, (100, 200, 400)
    first = {seed: {step: seed + slope * math.log(step) for step in steps} for seed in range(3)}
    # seeds differ by more than the variants: only differences by seed show that the second is higher by about 0.1
    second = {
        seed: {step: loss + 0.1 + 0.001 * seed for step, loss in points.items()} for seed, points in first.items()
    }
    del second[2][400]
    found = learning.compare(first, second, (0.5, 1.0))
    assert found is not None and found["step"] == 400 and found["seeds"] == [0, 1]
    assert found["equal_steps"]["mean"] == pytest.approx(-0.1005) and found["equal_steps"]["verdict"] == "below"
    # in the 200 s of the first variant's 400 steps the second one takes 200 steps
    assert found["gpu_seconds"] == 200
    assert found["equal_time"]["mean"] == pytest.approx(-0.1005 + slope * math.log(2))
    assert learning.loss_at(first[0], 150) == pytest.approx(slope * math.log(150))
    assert learning.loss_at(first[0], 401) is None and learning.loss_at(first[0], 99) is None
    assert learning.compare(first, {7: {400: 1.0}}, (1.0, 1.0)) is None
    unmeasured = learning.compare(first, second, (None, 1.0))
    assert unmeasured is not None and unmeasured["equal_time"] is None


def test_a_package_is_one_document_without_copies_and_vendored_folders(tmp_path):
    for name, content in {
        "a/b.py": "x = 1\n",
        "a/inner/c.py": "y = 2\n",
        "d/copy.py": "x = 1\n",
        "d/own.py": "z = 3\n",
        "d/_vendor/e/f.py": "w = 4\n",
        "d/empty.py": "",
        "g.py": "v = 5\n",
    }.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(content)
    (tmp_path / "site" / "a" / "latin1.py").write_bytes(b"\xe9")
    expected = {
        "a.txt": "# a/b.py\nx = 1\n\n# a/inner/c.py\ny = 2\n\n",
        "d.txt": "# d/own.py\nz = 3\n\n",
        "g.txt": "# g.py\nv = 5\n\n",
    }
    for number, place in enumerate(("site", "site/**/*.py")):
        size = learning.write_packages([str(tmp_path / place)], tmp_path / str(number))
        assert {path.name: path.read_text() for path in (tmp_path / str(number)).iterdir()} == expected
        assert size == sum(map(len, expected.values()))
    with pytest.raises(ConfigError, match="holds no text; give folders or patterns"):
        learning.write_packages([str(tmp_path / "nothing*")], tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--variants", "dynamic"], "--variants: dynamic is unknown"),
        (["--variants", "dense", "dense"], "--variants: dense: give each variant a name of its own"),
        (["--variants", "own:train.steps=3"], "train.steps=3: give key=value, of a key that no option sets"),
        (["--seeds", "0"], "--seeds: 0; use 1 or more"),
        (["--minutes", "0"], "--minutes: 0.0; use a number above 0"),
    ],
)
def test_wrong_options_are_named(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        learning.main([*wrong, "--output", str(tmp_path)])


def test_runs_of_a_seed_differ_in_the_routing_only(tmp_path, shard_cache):
    from colt5dist.data import ensure_standard_library_shards

    options = learning.parse(["--output", str(tmp_path), "--variants", *learning.VARIANTS, "own:model.router_eps=0.5"])
    timed, curves = learning.jobs_of(options, ensure_standard_library_shards(), 8192)
    assert [job.name for job in timed[:2]] == ["8192/learned-time", "8192/static-time"]
    assert [job.name for job in curves[5:7]] == ["8192/own-0", "8192/learned-1"]
    configs = [load_config(job.command()[3], job.command()[4:]) for job in curves[:7]]
    assert [c.model.routing for c in configs] == ["learned", "static", "random", *["learned"] * 4]
    assert [c.model.encoder for c in configs] == [*["conditional"] * 3, "light", "dense", *["conditional"] * 2]
    assert [c.seed for c in configs] == [0] * 6 + [1] and configs[5].model.router_eps == 0.5
    assert {str(c.data) for c in configs} == {str(configs[0].data)} and {str(c.train) for c in configs} == {
        str(configs[0].train)
    }
    learning.check_unchanged({"a": ["x=1", "y=2"]}, tmp_path / "settings.json")
    with pytest.raises(ConfigError, match=r"a was started with other settings \(x=1, x=3\)"):
        learning.check_unchanged({"a": ["x=3", "y=2"]}, tmp_path / "settings.json")


@pytest.mark.slow
def test_two_variants_stopped_and_continued(tmp_path, micro_settings):
    sizes = [s for s in micro_settings if s.startswith(("model.", "schedule.")) and "vocab_size" not in s]
    shape = ["--lengths", "256", "--target-length", "64", "--batch", "4", "--steps", "40", "--eval-every", "20"]
    text = ["--text", str(ROOT / "colt5dist"), "--vocabulary", "300", "--eval-samples", "4"]
    output = tmp_path / "out"
    chosen = ["--variants", "learned", "light", "--seeds", "1", "--parallel", "2", "--output", str(output)]
    command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "learning", *shape, *text, *chosen]
    command += ["--set", *sizes, "train.compile=off", "data.num_workers=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)

    stopped = run("--minutes", "0.2")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((output / "curves.json").read_text())["lengths"]
    for name in ("learned", "light"):
        assert result["held_out_loss"][name]["0"].keys() == {"20", "40"} and result["step_seconds"][name] > 0
    (comparison,) = result["comparisons"]
    losses = [result["held_out_loss"][name]["0"]["40"] for name in ("learned", "light")]
    assert comparison["equal_steps"]["mean"] == losses[0] - losses[1]
    assert "learned - light" in (output / "table.txt").read_text() and (output / "table.txt").read_text() in done.stdout
    assert (output / "curves.png").stat().st_size > 1000 or "no plot" in done.stdout
    changed = run("--batch", "8")
    assert changed.returncode == 2 and "was started with other settings" in changed.stderr
