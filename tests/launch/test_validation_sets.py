"""Validation sets by name: what a run measures of them, on one or two processes, and what a start refuses."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from conftest import random_text
from tokenizers import models

from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from colt5dist.train.report.monitor import read_metrics

Pretrain = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[[list[str]], int]


def write_set(folder: Path, seed: int, tokenizer: Tokenizer | None = None) -> Path:
    """Shards of forty documents."""
    rng = random.Random(seed)
    writer = CorpusWriter(folder, tokenizer or ByteTokenizer(), validation_fraction=0.2)
    for _ in range(40):
        writer.add(random_text(rng, rng.randint(200, 400)))
    writer.close({})
    return folder


def figures(run_dir: Path, step: int) -> dict[str, float]:
    """The held-out figures of a step."""
    (record,) = (record for record in read_metrics(run_dir) if record["step"] == step)
    return {key: value for key, value in record.items() if key.startswith("eval/")}


def test_a_loss_for_each_set(run_pretrain: Pretrain, short_texts: Path, tmp_path: Path) -> None:
    """Of a source with a name and of further sets; the same on 1 process and on 2 at ZeRO stage 3.

    A resumed run may name other sets. A source that is the run's only text has the figures of the run.
    """
    books = write_set(tmp_path / "books", 2)
    sets = f"data.validation=[{{name: books, shards: {books}}}]"
    settings = (f"data.sources=[{{shards: {short_texts}, name: short}}]", "train.eval_samples=6", "train.eval_every=2")
    done = run_pretrain(tmp_path / "one", *settings, sets, "train.steps=2")
    one = figures(tmp_path / "one", 2)
    assert {key.split("/")[1] for key in one if key.count("/") > 1} == {"loss", "short", "books"}
    for name in ("short", "books"):
        assert one[f"eval/{name}/bits_per_byte"] > one[f"eval/{name}/loss"] > 0
        assert sum(key.startswith(f"eval/{name}/loss/") for key in one) == 4
        assert f"{name} {one[f'eval/{name}/loss']:.4f}" in done.stdout
    assert one["eval/short/loss"] == one["eval/loss"] != one["eval/books/loss"]

    run_pretrain(tmp_path / "two", *settings, sets, "train.steps=2", "zero.stage=3", processes=2)
    assert figures(tmp_path / "two", 2) == pytest.approx(one, rel=2e-5)

    other = f"data.validation=[{{name: same-books, shards: {books}}}]"
    run_pretrain(tmp_path / "two", *settings, other, "train.steps=4")
    later = figures(tmp_path / "two", 4)
    assert "eval/same-books/loss" in later and "eval/books/loss" not in later


CASES = {
    "missing": ("[{name: a, shards: /nowhere}]", "data.validation[0].shards: /nowhere/manifest.json: is missing"),
    "tokenizer": ("[{name: a, shards: OTHER}]", "OTHER was made with another tokenizer than the training text"),
    "twice": ("[{name: a, shards: SAME}, {name: a, shards: SAME}]", "data.validation[1].name: a is the name of data.v"),
    "of a source": ("[{name: s, shards: SAME}]", "data.validation[0].name: s is the name of data.sources[0], too"),
    "characters": ("[{name: a/b, shards: SAME}]", "data.validation[0].name: 'a/b' has other characters"),
    "metric": ("[{name: loss, shards: SAME}]", "data.validation[0].name: loss is the name of a metric"),
    "no name": ("[{shards: SAME}]", "data.validation[0].name: is empty"),
    "no shards": ("[{name: a}]", "data.validation[0].shards: is empty"),
    "unknown key": ("[{nam: a, shards: SAME}]", "data.validation"),
}


@pytest.mark.parametrize(("case", "dry"), [*((case, False) for case in CASES), ("missing", True), ("tokenizer", True)])
def test_wrong_sets(
    case: str, dry: bool, pretrain_main: Main, short_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 2, also by --dry-run."""
    value, message = CASES[case]
    if "OTHER" in value:
        words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
        words.save(str(tmp_path / "t.json"))
        write_set(tmp_path / "OTHER", 3, JsonTokenizer(tmp_path / "t.json"))
    value = value.replace("SAME", str(short_texts)).replace("OTHER", str(tmp_path / "OTHER"))
    settings = [f"data.validation={value}", f"data.sources=[{{name: s, shards: {short_texts}}}]"]
    settings.append(f"run_dir={tmp_path / 'run'}")
    assert pretrain_main([*settings, *(["--dry-run"] if dry else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_set_whose_documents_are_all_too_short(
    pretrain_main: Main, short_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and the limit to set."""
    writer = CorpusWriter(tmp_path / "tiny", ByteTokenizer(), validation_fraction=0.2)
    for number in range(20):
        writer.add(f"text {number}")
    writer.close({})
    sets = f"data.validation=[{{name: tiny, shards: {tmp_path / 'tiny'}}}]"
    settings = [sets, f"data.shards={short_texts}", "data.min_document_tokens=100", f"run_dir={tmp_path / 'run'}"]
    assert pretrain_main([*settings, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "data.min_document_tokens: 100 leaves out all held-out documents of tiny (the longest has 7" in error
