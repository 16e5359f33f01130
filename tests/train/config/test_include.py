"""Files that build on others, and what is said of a file that is missing, empty or no YAML."""

from pathlib import Path

import pytest

from colt5dist.errors import ConfigError
from colt5dist.train.config.load import config_leaves, load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TINY = CONFIGS / "tiny.yaml"


def problem(path: Path) -> str:
    """What is wrong with a file."""
    with pytest.raises(ConfigError) as raised:
        load_config(path, [])
    return str(raised.value)


def test_three_lines_build_on_a_whole_configuration(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"include: {TINY}\ntrain:\n  steps: 7\n")
    expected = config_leaves(load_config(TINY, ["train.steps=7", "run_dir=runs/mine"]))
    assert config_leaves(load_config(mine, [])) == expected


def test_a_file_elsewhere_builds_on_one_that_comes_with_the_package(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("include: [configs/tiny.yaml, {zero: configs/zero/stage3.yaml}]\n")
    expected = config_leaves(load_config(TINY, ["zero.stage=3", "run_dir=runs/mine"]))
    assert config_leaves(load_config(mine, [])) == expected
    # a folder configs beside the file wins, and a name without that folder is only looked for beside the file
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("seed: 7\n")
    assert load_config(mine, []).seed == 7
    mine.write_text("include: tiny.yaml\n")
    assert problem(mine).startswith(f"{mine}: include: tiny.yaml is missing")


def test_the_later_file_wins_and_the_file_itself_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain: {steps: 1, log_every: 1}\ninclude: pieces/c.yaml\n")
    (tmp_path / "b.yaml").write_text("train: {steps: 2}\n")
    (tmp_path / "pieces").mkdir()
    # names start at the file that includes, not at the one that is loaded
    (tmp_path / "pieces" / "c.yaml").write_text("include: {zero: z.yaml}\ntrain: {eval_every: 3, log_every: 3}\n")
    (tmp_path / "pieces" / "z.yaml").write_text("include: y.yaml\nstage: 2\n")
    (tmp_path / "pieces" / "y.yaml").write_text("stage: 3\nbucket_size: 5000\n")
    (tmp_path / "run.yaml").write_text("include: [a.yaml, b.yaml, {zero: pieces/y.yaml}]\nseed: 9\nzero: {stage: 1}\n")
    config = load_config(tmp_path / "run.yaml", [])
    assert (config.seed, config.train.steps, config.train.log_every, config.train.eval_every) == (9, 2, 1, 3)
    assert (config.zero.stage, config.zero.bucket_size) == (1, 5000)


def test_a_missing_file_is_named_with_the_one_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "small.yaml").write_text("seed: 1\n")
    for include, key in (("pieces/smal.yaml", "include"), ("{model: pieces/smal.yaml}", "include.model")):
        (tmp_path / "run.yaml").write_text(f"include: {include}\n")
        assert problem(tmp_path / "run.yaml") == (
            f"{tmp_path}/run.yaml: {key}: pieces/smal.yaml is missing; looked for {tmp_path}/pieces/smal.yaml, because "
            "a name starts at the folder of the file that includes it; did you mean small.yaml?"
        )


def test_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert f"include: goes round in a circle ({tmp_path}/a.yaml includes {tmp_path}/b.yaml includes" in problem(
        tmp_path / "a.yaml"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": is empty; "),
        ("# nothing\n---\n", ": is empty; "),
        ("- seed\n", ": is not a mapping of keys to values; "),
        ("seed\n", ": is not a mapping of keys to values; "),
        ("train:\n  steps: 1\n  log_every: 2\n  steps: 3\n", ":4: the key steps is there a second time; "),
        ("seed: 1\nseed: 1\n", ":2: the key seed is there a second time; "),
        ("seed: 1\ntrain: {steps: 5\n", ":3: not valid YAML ("),
        ("seed: 1\n\tsteps: 5\n", ":2: not valid YAML ("),
        ("seed: 1\nrun_dir: a\x07b\n", ":2: not valid YAML (the character U+0007 is not allowed); "),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML ("),
        ("include: 3\n", ": include: 3 is not the name of a file; "),
        ("include: {model: [a]}\n", ": include.model: ['a'] is not the name of a file; "),
        ("seed: 1\ntrain:\n  steps: 010\n", ":3: train.steps: YAML reads 010 as a number in base 8; "),
    ],
)
def test_a_wrong_file_gets_one_line_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    line = problem(tmp_path / "run.yaml")
    assert line.startswith(f"{tmp_path}/run.yaml{said}") and "\n" not in line
    # and so does a piece
    (tmp_path / "outer.yaml").write_text("include: run.yaml\n")
    assert problem(tmp_path / "outer.yaml") == line


def test_where_a_relative_name_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem(Path("nowhere.yaml")) == (
        f"nowhere.yaml: no such configuration file; looked for {tmp_path}/nowhere.yaml; name one that exists, or one "
        "that comes with the package: base, causal_tiny, finetune_base, finetune_tiny, large, "
        "tiny, xl"
    )
