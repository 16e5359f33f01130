"""The comparison of routings: its intervals, its text, its runs, and that it continues where it was stopped."""

import json
import math
from dataclasses import replace

import pytest
from conftest import ROOT, TRAINER_VARIABLES

from colt5dist.benchmark import compare, interval, learning, loss_at, package_text, t_quantile, verdict
from colt5dist.data import ensure_standard_library_shards
from colt5dist.errors import ConfigError
from colt5dist.train.config.load import load_config


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
    found = compare(first, second, (0.028, 0.056))
    assert found is not None and found["step"] == 400 and found["seeds"] == [0, 1]
    assert found["equal_steps"]["mean"] == pytest.approx(-0.1005) and found["equal_steps"]["verdict"] == "below"
    # in the 11.2 s of the first variant's 400 steps the second one takes 200; 400 * 0.028 / 0.028 is above 400
    assert found["gpu_seconds"] == pytest.approx(11.2)
    assert found["equal_time"]["mean"] == pytest.approx(-0.1005 + slope * math.log(2))
    assert loss_at(first[0], 150) == pytest.approx(slope * math.log(150))
    assert loss_at(first[0], 401) is None and loss_at(first[0], 99) is None
    assert compare(first, {7: {400: 1.0}}, (1.0, 1.0)) is None
    # a dearer variant needs fewer steps: 200 of 0.056 s and the first one's 400 of 0.028 s are the same time
    fewer = {seed: {100: points[100], 200: points[200]} for seed, points in second.items()}
    found = compare(first, fewer, (0.028, 0.056))
    assert found is not None and found["step"] == 200 and found["equal_steps"]["mean"] == pytest.approx(-0.101)
    assert found["gpu_seconds"] == pytest.approx(11.2)
    assert found["equal_time"]["mean"] == pytest.approx(-0.101 + slope * math.log(2))
    unmeasured = compare(first, second, (None, 1.0))
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
        size = package_text.write_packages([str(tmp_path / place)], tmp_path / str(number))
        assert {path.name: path.read_text() for path in (tmp_path / str(number)).iterdir()} == expected
        assert size == sum(map(len, expected.values()))
    with pytest.raises(ConfigError, match="holds no text; give folders or patterns"):
        package_text.write_packages([str(tmp_path / "nothing*")], tmp_path / "none")


def test_tokens_are_bytes_without_a_vocabulary(tmp_path):
    text = "".join(f"line_{number} = {number * number}\n" for number in range(300))
    for package in "abcd":
        (tmp_path / package).mkdir()
        (tmp_path / package / "m.py").write_text(f"# {package}\n{text}")
    shards = package_text.make_shards([str(tmp_path)], None, tmp_path / "out", float("inf"))
    tokenizer = learning.open_shards(str(shards)).validation.tokenizer
    assert tokenizer.vocab_size < 300 and len(tokenizer.encode("# a/m.py")) == len("# a/m.py")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--vocabulary", "-1"], "--vocabulary: -1; use 0 or more"),
        (["--variants", "dynamic"], "--variants: dynamic is unknown"),
        (["--variants", "dense", "dense"], "--variants: dense: give each variant a name of its own"),
        (["--variants", "own:train.steps=3"], "train.steps=3: give key=value, of a key that no option sets"),
        (["--minutes", "0"], "--minutes: 0.0; use a number above 0"),
        (["--timed", "own"], "--timed: own; use some of learned, static"),
        (["--seeds", "0"], "--seeds: 0; use a number from 1 on, or FIRST-LAST"),
        (["--seeds", "5-4"], "--seeds: 5-4; use a number from 1 on"),
        (["--seeds", "-3"], "--seeds: -3; use a number from 1 on"),
        (["--at", "250", "0"], "--at: 0: nothing is evaluated then; use multiples of --eval-every 250, or the last"),
        (["--at", "300"], "--at: 300: nothing is evaluated then"),
        (["--at", "1750"], "--at: 1750: nothing is evaluated then"),
        (
            ["--variants", "own:data.length_schedule=[{step: 9, input_length: 512}]", "--timed", "own"],
            "--timed: own: its steps take different times",
        ),
        (
            ["--timed", "dense", "--set", "data.length_schedule=[{step: 9, input_length: 512}]"],
            "--timed: dense: its steps take different times, as data.length_schedule says; leave it out",
        ),
        (["--steps-of", "dense=0"], "--steps-of: dense=0; use NAME=N"),
        (["--steps-of", "own=3"], "--steps-of: own=3; use NAME=N, with one of learned"),
    ],
)
def test_wrong_options_are_named(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        learning.main([*wrong, "--output", str(tmp_path)])


def test_values_of_an_own_variant_may_hold_commas(tmp_path):
    own = "data.length_schedule=[{step: 9, input_length: 512}]", "model.router_eps=0.5"
    options = learning.parse(["--output", str(tmp_path), "--variants", f"longer:{','.join(own)}"])
    assert options.variants == {"longer": own} and options.timed == []
    options = learning.parse(["--output", str(tmp_path), "--set", "data.length_schedule=[]", "--at", "250", "1500"])
    assert options.timed == list(learning.VARIANTS) and options.at == [250, 1500]


def test_runs_of_a_seed_differ_in_the_routing_only(tmp_path, shard_cache):
    options = learning.parse(["--output", str(tmp_path), "--variants", *learning.VARIANTS, "own:model.router_eps=0.5"])
    timed, curves = learning.jobs_of(options, ensure_standard_library_shards(), 8192)
    assert [job.name for job in timed[:2]] == ["8192/learned-time", "8192/static-time"]
    assert [job.name for job in curves[5:7]] == ["8192/own-0", "8192/learned-1"]
    assert all(job.alone for job in timed) and not any(job.alone for job in curves)
    configs = [load_config(job.command()[3], job.command()[4:]) for job in curves[:7]]
    assert [c.model.routing for c in configs] == ["learned", "static", "random", *["learned"] * 4]
    assert [c.model.encoder for c in configs] == [*["conditional"] * 3, "light", "dense", *["conditional"] * 2]
    assert [c.seed for c in configs] == [0] * 6 + [1] and configs[5].model.router_eps == 0.5
    assert {str(c.data) for c in configs} == {str(configs[0].data)} and {str(c.train) for c in configs} == {
        str(configs[0].train)
    }


def test_lengths_of_a_schedule():
    schedule = "data.length_schedule=[{step: 9, input_length: 512}, {step: 12, micro_batch_size: 1}]"
    assert learning.later_lengths([schedule, "optimizer.lr=1e-3"]) == [(9, 512)]
    assert learning.later_lengths([schedule, "data.length_schedule=[{step: 7, input_length: 1024}]"]) == [(7, 1024)]
    wrong = ("[{step: }", "7", "[7]", "[{step: .inf, input_length: 512}]")
    assert [learning.later_lengths([f"data.length_schedule={value}"]) for value in wrong] == [[]] * 4
    assert learning.later_lengths([]) == []


def test_table_and_curves_of_runs_of_which_one_is_not_finished(tmp_path):
    pytest.importorskip("matplotlib")
    asked = "--variants learned dense --seeds 3 --steps 4 --eval-every 2 --at 2 4 --output unused"
    options = learning.parse(asked.split())

    def by_objective(loss: float) -> dict[str, float]:
        return {"eval/loss/span_3": 2 * loss, "eval/loss/prefix_lm": 7.0}

    kinds = {"time": ["learned-time", "dense-time"], "curve": [f"{v}-{s}" for s in range(3) for v in options.variants]}
    jobs = {
        kind: [learning.Job(name=name, folder=tmp_path / name, settings=(), steps=4) for name in names]
        for kind, names in kinds.items()
    }
    for job in [*jobs["time"], *jobs["curve"]]:
        variant, end = job.name.split("-")
        seconds, loss = (0.5, 3.0) if variant == "learned" else (1.0, 3.5)
        job.folder.mkdir()
        records = [{"step": step, "step_seconds": 9.0 if step < 3 else seconds} for step in (1, 2, 3, 4)]
        if end != "time":
            losses = {2: loss + 1.0 + int(end), 4: loss + int(end), 8: 0.0}  # 8: of a start with more steps
            shuffled = {"learned": 1.25, "dense": 1.5}[variant]
            records = [
                {"step": step, "eval/loss": value, "eval/loss_shuffled_inputs": shuffled * value, **by_objective(value)}
                for step, value in losses.items()
            ]
        last = 1 if job.name == "dense-2" else None
        lines = [json.dumps(record) + "\n" for record in records[:last]]
        (job.folder / "metrics.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "SKIPPED_STEPS", 2)
        result = learning.read_results(options, 8192, jobs["time"], jobs["curve"])
    assert result["step_seconds"] == {"learned": 0.5, "dense": 1.0}
    losses = result["losses"]["eval/loss"]
    assert losses["learned"][2] == {2: 6.0, 4: 5.0} and losses["dense"][2] == {2: 6.5}
    table = learning.table(result)
    assert table[0] == "inputs of 8,192 tokens"
    assert table[2].split() == ["learned", "0.5000", "3", "4", *str(interval([3.0, 4.0, 5.0])).split(), "+25.0%"]
    assert table[3].split()[:4] == ["dense", "1.0000", "2", "4"] and table[3].split()[-1] == "+50.0%"
    # two seeds have step 4; in the 2 s of the learned one's 4 steps the dense one takes 2
    assert table[5].split()[:4] == ["learned", "-", "dense", "2"]
    assert "-0.5000 ± 0.0000 below (4 steps)" in table[5] and "-1.5000 ± 0.0000 below (2 s)" in table[5]
    assert table[6].split() == ["at", "equal", "steps", "span_3", "prefix_lm"]
    assert table[7].split() == (
        "learned - dense -1.0000 ± 0.0000 below (2 of 3 seeds) 0.0000 ± 0.0000 (2 of 3 seeds)".split()
    )
    # after four steps one seed of the dense one is missing
    assert table[8].split() == ["step", "2", "step", "4"] and len(table) == 12
    assert table[9].split() == [
        *("learned", *str(interval([4.0, 5.0, 6.0])).split(), "+25.0%"),
        *(*str(interval([3.0, 4.0, 5.0])).split(), "+25.0%"),
    ]
    assert table[10].endswith(f"{interval([3.5, 4.5])} +50.0% (2 of 3 seeds)")
    assert table[11].split("  ")[0] == "learned - dense" and "-0.5000 ± 0.0000 below  " in table[11]
    assert table[11].endswith("-0.5000 ± 0.0000 below (2 of 3 seeds)")
    axes = learning.plot([result, result]).axes
    assert [axis.get_xlabel() for axis in axes] == ["steps", "GPU seconds", "steps"] * 2
    assert list(axes[0].lines[0].get_xdata()) == [2, 4] and list(axes[1].lines[0].get_xdata()) == [1.0, 2.0]
    assert list(axes[2].lines[1].get_ydata()) == pytest.approx([50.0, 50.0])
    later = {"learned": [(3, 16_384)], "dense": [(3, 16_384)]}
    untimed = {**result, "later_lengths": later, "step_seconds": dict.fromkeys(result["step_seconds"])}
    assert learning.table(untimed)[0] == "inputs of 8,192 tokens, 16,384 from step 3"
    assert [axis.get_xlabel() for axis in learning.plot([untimed]).axes] == ["steps"] * 2
    of_one = {**result, "later_lengths": {"learned": [], "dense": [(3, 16_384)]}}
    assert learning.table(of_one)[0] == "inputs of 8,192 tokens; dense, 16,384 from step 3"


@pytest.mark.parametrize("key", ["eval/loss", "eval/loss_shuffled_inputs"])
def test_a_loss_that_is_no_number_is_left_out(tmp_path, key, shard_cache):
    pytest.importorskip("matplotlib")
    options = learning.parse("--variants dense --seeds 1 --timed --steps 4 --at 4 --output unused".split())
    job = learning.Job(name="dense-0", folder=tmp_path, settings=(), steps=4)
    whole = {"eval/loss": 3.0, "eval/loss_shuffled_inputs": 6.0}
    records = [{"step": 2, **whole}, {"step": 4, **whole, key: None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = learning.read_results(options, 8192, [], [job])
    assert list(learning.plot([result]).axes[1].lines[0].get_ydata()) == [100.0]
    cell = {"eval/loss": "-", "eval/loss_shuffled_inputs": str(interval([3.0])) + " -"}[key]
    assert learning.table(result)[-1].split(maxsplit=1) == ["dense", cell]


def test_curves_of_other_seeds_are_taken_in(tmp_path, shard_cache):
    """Made on another machine: seeds 0 to 2 there, 3 and 4 here."""
    asked = ["--variants", "learned", "static", "--timed", "--eval-every", "2", "--at", "2", "--output", "unused"]
    schedule = "data.length_schedule=[{step: 3, input_length: 512},BREAK{step: 4, input_length: 1024}]"
    first, second = (
        learning.parse([*asked, "--seeds", seeds, "--set", schedule.replace("BREAK", space)])
        for seeds, space in (("3", " "), ("3-4", "\n    "))
    )
    results = []
    for options in (first, second):
        _, jobs = learning.jobs_of(options, ensure_standard_library_shards(), 8192)
        jobs = [replace(job, folder=tmp_path / job.name) for job in jobs]
        for job in jobs:
            variant, seed = job.name.removeprefix("8192/").split("-")
            loss = int(seed) + {"learned": 0.0, "static": 0.25}[variant]
            job.folder.mkdir(parents=True)
            records = [{"step": 2, "eval/loss": loss}, {"step": 4, "eval/loss": loss, "eval/loss/span_3": loss}]
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        results.append(jobs)
    content = {
        **learning.description(first),
        "fingerprint": "f",
        "lengths": [learning.read_results(first, 8192, [], results[0])],
    }
    (tmp_path / "curves.json").write_text(json.dumps(content))
    fingerprint, added = learning.read_added(tmp_path / "curves.json", second, taken := set(second.seeds))
    assert fingerprint == "f" and taken == {0, 1, 2, 3, 4}
    result = learning.read_results(second, 8192, [], results[1], [added[8192]])
    assert result["losses"]["eval/loss"]["static"] == {seed: {2: seed + 0.25, 4: seed + 0.25} for seed in range(5)}
    (pair,) = result["comparisons"]
    assert pair["seeds"] == [0, 1, 2, 3, 4] and pair["equal_steps"]["verdict"] == "below"
    assert pair["equal_steps"]["mean"] == -0.25 == result["comparisons_at"][2][0]["equal_steps"]["mean"]
    for wrong, message in (
        (["--seeds", "2-4"], "has seed 2, which is there already; give other --seeds"),
        (["--seeds", "3-4", "--batch", "8"], "was made with other batch; give the same options"),
        (["--seeds", "3-4", "--set", "seed_of=3"], "was made with other set; give the same options"),
    ):
        options = learning.parse([*asked, "--set", schedule.replace("BREAK", " "), *wrong])
        with pytest.raises(ConfigError, match=message):
            learning.read_added(tmp_path / "curves.json", options, set(options.seeds))
    for wrong in ([], {**content, "lengths": [{"input_length": 8192, "losses": [1]}]}):
        (tmp_path / "curves.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match="is no curves"):
            learning.read_added(tmp_path / "curves.json", second, set())
    with pytest.raises(ConfigError, match=r"nothing\.json: No such file"):
        learning.read_added(tmp_path / "nothing.json", second, set())


@pytest.mark.slow
def test_from_text_to_table_with_the_real_trainer(tmp_path, micro_settings, monkeypatch, capsys):
    monkeypatch.setattr(learning, "TIMED_STEPS", 2)
    monkeypatch.setattr(learning, "SKIPPED_STEPS", 1)
    for name, value in TRAINER_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sizes = [s for s in micro_settings if s.startswith(("model.", "schedule.")) and "vocab_size" not in s]
    shape = ["--lengths", "256", "--target-length", "64", "--batch", "4", "--steps", "4", "--eval-every", "2"]
    text = ["--text", str(ROOT / "colt5dist" / "nn"), "--vocabulary", "300", "--eval-samples", "4"]
    arguments = [*shape, *text, "--variants", "light", "--seeds", "1", "--output", str(tmp_path)]
    arguments += ["--set", *sizes, "train.compile=off", "data.num_workers=0"]
    assert learning.main(arguments) == 0
    (result,) = json.loads((tmp_path / "curves.json").read_text())["lengths"]
    assert result["losses"]["eval/loss"]["light"]["0"].keys() == {"2", "4"} and result["step_seconds"]["light"] > 0
    table = (tmp_path / "table.txt").read_text()
    assert f"{result['losses']['eval/loss']['light']['0']['4']:.4f}" in table and table in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was started with other settings"):
        learning.main([*arguments, "schedule.warmup_steps=9"])
