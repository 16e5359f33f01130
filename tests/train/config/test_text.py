"""What is typed for a text key is that text, on the command line, in a file, in an included piece and in a list."""

from pathlib import Path

import pytest

from colt5dist.train.config.load import config_to_yaml, load_config
from colt5dist.train.config.text import TEXT_KEYS

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
TYPED = ["1234_56", "1.10", "007", "1e3", "yes", "off", "12:30", "2026-11-28", "0x10", ".5", "0o7", "-1", "a b"]


@pytest.mark.parametrize("text", TYPED)
def test_on_the_command_line(text: str) -> None:
    config = load_config(TINY, [f"run_dir={text}", f"data.sources=[{{shards: {text}}}]"])
    assert config.run_dir == text and config.data.sources[0].shards == text


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


def test_words_that_yaml_takes_for_truth_values_are_words() -> None:
    assert load_config(TINY, ["train.compile=off"]).train.compile == "off"


def test_numbers_and_truth_values_stay_what_they_are() -> None:
    config = load_config(TINY, ["train.steps=1_000", "optimizer.lr=1e-3", "train.deterministic=yes"])
    assert (config.train.steps, config.optimizer.lr, config.train.deterministic) == (1000, 0.001, True)


def test_which_keys_are_texts() -> None:
    assert {"run_dir", "init_from", "data.shards", "data.sources[].shards", "resume_allow[]"} <= TEXT_KEYS
    assert not TEXT_KEYS & {"train.steps", "seed", "data.mixture", "zero.stage", "model.num_heavy_tokens"}
