"""What is typed for a text key is that text, on the command line, in a file, in an included piece and in a list."""

from pathlib import Path

import pytest

from colt5dist.errors import ConfigError
from colt5dist.train.config.load import config_leaves, config_to_yaml, load_config, saved_leaves
from colt5dist.train.config.text import TEXT_KEYS

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
TYPED = ["1234_56", "1.10", "007", "1e3", "yes", "off", "12:30", "2026-11-28", "0x10", ".5", "0o7", "-1", "a b"]


@pytest.mark.parametrize("text", TYPED)
def test_on_the_command_line(text: str) -> None:
    config = load_config(TINY, [f"run_dir={text}", f"data.sources=[{{shards: {text}}}]"])
    assert config.run_dir == text and config.data.sources[0].shards == text


@pytest.mark.parametrize("text", ["a #b", "a: b", "[a]", "{a: 1}", "*a", "@a", "!a", "- a", "%a", "'a' b", "a\\b", "'"])
def test_signs_of_yaml_on_the_command_line(text: str, tmp_path: Path) -> None:
    """They mean nothing in a text that is typed there, and the printed configuration has the same text."""
    config = load_config(TINY, [f"run_dir={text}"])
    assert config.run_dir == text
    saved = tmp_path / "saved.yaml"
    saved.write_text(config_to_yaml(config))
    assert load_config(saved, []) == config


@pytest.mark.parametrize("text", TYPED)
def test_in_a_file_and_in_a_piece_and_when_read_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "piece.yaml").write_text(f"shards: {text}\n")
    file = tmp_path / "run.yaml"
    file.write_text(f"include:\n  data: piece.yaml\nrun_dir: {text}\ninit_from: {text}\n")
    config = load_config(file, [])
    assert (config.run_dir, config.init_from, config.data.shards) == (text, text, text)
    saved = tmp_path / "saved.yaml"
    saved.write_text(config_to_yaml(config))
    assert load_config(saved, []) == config


def test_null_quotes_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(TINY, ["run_dir=~/runs/x", 'data.shards="~/s"', "init_from=null"])
    assert config.run_dir == f"{tmp_path}/runs/x" and config.data.shards == f"{tmp_path}/s" and config.init_from is None
    assert load_config(TINY, ["run_dir=null"]).run_dir == "runs/tiny"


def test_an_interpolation_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives is a text, also if that looks like another one; printed and read again, it is the same."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed, expected in {
        "${oc.env:FOLDER}": "${seed}/x",
        r"\${seed}/y": "${seed}/y",
        r"\\${seed}": "\\0",
        "~/${seed}": f"{tmp_path}/0",
        "${data.shards}": f"{tmp_path}/shards",
    }.items():
        monkeypatch.setenv("FOLDER", "${seed}/x")
        config = load_config(TINY, [f"run_dir={typed}", "data.shards=~/shards"])
        assert config.run_dir == expected
        assert config_leaves(config)["run_dir"] == expected
        saved = tmp_path / "saved.yaml"
        saved.write_text(config_to_yaml(config))
        assert load_config(saved, []) == config
        assert saved_leaves(saved) == config_leaves(config)


def test_home_in_a_piece_in_a_list_and_in_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "piece.yaml").write_text("sources: [{shards: ~/a}, {shards: ./~b}]\n")
    (tmp_path / "run.yaml").write_text("include: {data: ~/piece.yaml}\ninit_from: ~/other\n")
    config = load_config("~/run.yaml", [])
    assert [source.shards for source in config.data.sources] == [f"{tmp_path}/a", "./~b"]
    assert config.init_from == f"{tmp_path}/other"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.steps=010", "train.steps: YAML reads 010 as a number in base 8; write it in base 10"),
        ("train.max_minutes=1:30", "train.max_minutes: YAML reads 1:30 as a number in base 60"),
        ("optimizer.lr=-1:30.5", "optimizer.lr: YAML reads -1:30.5 as a number in base 60"),
        ("data.skip=[[010, 20]]", "data.skip: YAML reads 010 as a number in base 8"),
        ("deepspeed.steps_per_print=010", "deepspeed.steps_per_print: YAML reads 010 as a number in base 8"),
        ("train.steps=2026-11-28", "train.steps: "),
        ("train.steps=yes", "train.steps: "),
        ("optimizer.lr=no", "optimizer.lr: "),
        ("train.deterministic=2", "train.deterministic: 2 is neither true nor false"),
        ("train.deterministic=0.5", "train.deterministic: 0.5 is neither true nor false"),
    ],
)
def test_what_only_looks_like_a_number_is_refused(setting: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TINY, [setting])
    assert str(raised.value).startswith(problem) and str(raised.value).endswith("(command line)")
    key, _, value = setting.partition("=")
    file = tmp_path / "run.yaml"
    file.write_text(
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(key.split(".")))[:-1] + f" {value}\n"
    )
    with pytest.raises(ConfigError, match=r"run\.yaml") as raised:
        load_config(file, [])
    assert problem in str(raised.value)


def test_what_is_merged_is_typed_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: &d\n  shards: 1_0\n  sources: [{<<: {shards: 007}, weight: 2}]\n")
    config = load_config(file, [])
    assert config.data.shards == "1_0" and config.data.sources[0].shards == "007"


def test_words_that_yaml_takes_for_truth_values_are_words() -> None:
    assert load_config(TINY, ["train.compile=off"]).train.compile == "off"


def test_numbers_and_truth_values_stay_what_they_are() -> None:
    config = load_config(TINY, ["train.steps=1_000", "optimizer.lr=1e-3", "train.deterministic=yes"])
    assert (config.train.steps, config.optimizer.lr, config.train.deterministic) == (1000, 0.001, True)


def test_which_keys_are_texts() -> None:
    assert {"run_dir", "init_from", "data.shards", "data.sources[].shards", "resume_allow[]"} <= TEXT_KEYS
    assert not TEXT_KEYS & {"train.steps", "seed", "data.mixture", "zero.stage", "model.num_heavy_tokens"}
