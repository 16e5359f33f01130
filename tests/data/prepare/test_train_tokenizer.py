"""A tokenizer from the inputs: it ends on Ctrl-C, in bounded time, and says when it has fewer ids."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from colt5dist.data.inputs.files import find_inputs
from colt5dist.data.prepare import train_tokenizer as module
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.train_tokenizer import _cut_long_words, _pieces, train_tokenizer
from colt5dist.errors import ConfigError

SCRIPT = Path(__file__).parents[3] / "launch" / "prepare.py"


def config(tmp_path: Path, text: str, ids: int) -> PrepareConfig:
    """Settings that train a tokenizer on two files."""
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("the cat sat on the mat. " * 50)
    return PrepareConfig(input=[str(tmp_path / "*.txt")], output=tmp_path / "shards", train_tokenizer=ids)


def test_fewer_ids_than_asked_for_are_said(tmp_path: Path) -> None:
    """In the first call and in a second one; not where the number was reached."""
    wanted = config(tmp_path, "a dog. " * 100, 2000)
    for _ in range(2):
        (note,) = prepare(wanted).notes
        assert "ids, not 2,000: the text has no more pieces that repeat" in note
    assert not prepare(PrepareConfig(input=wanted.input, output=tmp_path / "few", train_tokenizer=262)).notes


def test_text_without_blanks_is_cut_into_words_of_bounded_length() -> None:
    """No character is lost; ordinary text stays as it is."""
    rng = random.Random(0)
    text = "plain text, " + "".join(rng.choices("ab日", k=1000)) + " end " + " " * 700 + "1" * 300 + "\n" + "!" * 257
    short, long = _cut_long_words(text)
    assert all(len(part) <= module.LONG_WORD for part in long)
    assert sorted("".join([*short, *long])) == sorted(text) and short[0] == "plain text, "
    assert _cut_long_words("plain text " * 1000) == (["plain text " * 1000], [])


def test_long_texts_are_trained_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before blanks where there are some, and nothing is lost."""
    monkeypatch.setattr(module, "WINDOW_BYTES", 64)
    for text in ("some wörds " * 100, "日" * 1000, "a\n" + "b" * 300):
        pieces = list(_pieces(text.encode()))
        assert "".join(pieces) == text and all(len(piece.encode()) <= 64 for piece in pieces)
    assert all(piece.startswith(" ") for piece in list(_pieces(b"some words " * 100))[1:])


def test_the_time_grows_with_the_length(tmp_path: Path) -> None:
    """Of text without blanks: eight times as much takes far less than 64 times as long."""
    seconds = []
    for size in (50_000, 400_000):
        text = "".join(random.Random(0).choices("abcdefghijklmnop", k=size))
        wanted = config(tmp_path, text, 400)
        begin = time.process_time()
        files = find_inputs(wanted.input).files
        train_tokenizer(files, vocab_size=400, text_key="text", held_out_below=0)
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 24 * seconds[0]


def test_ctrl_c_ends_the_training(tmp_path: Path) -> None:
    """At once, with status 130 and one line; no process is left, and the same command works afterwards."""
    (tmp_path / "in.jsonl").write_text(
        "".join(
            json.dumps({"text": "".join(random.Random(n).choices("abcdefgh", k=256))}) + "\n" for n in range(10_000)
        )
    )
    command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "s")]
    process = subprocess.Popen([*command, "--train-tokenizer", "60000"], stderr=subprocess.PIPE, start_new_session=True)
    children: list[psutil.Process] = []
    # in the training itself, after the texts were read
    while not children or sum(child.cpu_times().user for child in children) < 1:
        assert process.poll() is None
        time.sleep(0.05)
        children = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.startswith(b"stopped; the same command resumes ")
    assert said.count(b"\n") == 1 and not psutil.wait_procs(children, timeout=5)[1]


def test_a_killed_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out."""
    monkeypatch.setattr(module, "train_tokenizer", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        ConfigError, match="--train-tokenizer: the process that trains was killed, perhaps because memory"
    ):
        prepare(config(tmp_path, "text " * 100, 300))
