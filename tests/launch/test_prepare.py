"""launch/prepare.py as a user calls it: its output, its exit status, and its one-line errors."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from colt5dist.data.read.shards import open_shards
from colt5dist.launch.prepare import main

SCRIPT = Path(__file__).parents[2] / "launch" / "prepare.py"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def call_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Call the script's `main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([*map(str, arguments)])
        except SystemExit as end:  # argparse ends so
            status = int(str(end.code))
    return subprocess.CompletedProcess([], status, out.getvalue(), err.getvalue())


def test_text_to_shards(tmp_path: Path) -> None:
    """It prints what was made and left out; a second call prints that it was already there."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 50)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    done = call("--input", tmp_path / "*.txt", "--output", tmp_path / "out/shards", "--validation-fraction", "0.1")
    assert done.returncode == 0 and done.stderr == ""
    shards = open_shards(tmp_path / "out/shards")
    assert shards.num_documents + shards.validation.num_documents == 20
    assert f"training: {shards.num_documents} documents, {shards.num_tokens:,} tokens, 1 shard\n" in done.stdout
    assert f"held out: {shards.validation.num_documents} document, " in done.stdout
    assert f"left out, not UTF-8: 1 ({tmp_path / 'bad.txt'})" in done.stdout
    assert "512 to 1,023" in done.stdout and done.stdout.endswith(f"written: {tmp_path / 'out/shards'}\n")
    again = call_here(
        "--input", tmp_path / "*.txt", "--output", tmp_path / "out/shards", "--validation-fraction", "0.1"
    )
    assert again.returncode == 0 and again.stdout.endswith(f"was already there: {tmp_path / 'out/shards'}\n")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """Names of the output folder and of a file that is left out: printed with the invalid bytes escaped."""
    folder = os.fsencode(tmp_path)
    for name, content in ((b"a\xe9.txt", b"some text"), (b"b\xe9.txt", b"\xff")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(content)
    done = call("--input", tmp_path / "*.txt", "--output", os.fsdecode(folder + b"/out\xe9"))
    assert done.returncode == 0
    warnings = done.stderr.splitlines()
    assert warnings[0] == "WARNING: 1 of 3 documents (33%) are left out because of problems; see above"
    assert len(warnings) == 2 and warnings[1].startswith("WARNING: all text is one document, so its last 44% are held")
    assert "b\\udce9.txt)" in done.stdout and done.stdout.endswith("out\\udce9\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{0}/*.none", "--output", "{0}/shards"], "--input: "),
        (["--input", "{0}/a.txt", "--output", "{0}"], "--output: "),
        (["--input", "{0}/a.txt", "--output", "{0}/s", "--tokenizer", "{0}/a.txt"], "{0}/a.txt: is not a Hugging Face"),
        (["--input", "{0}/a.txt", "--output", "{0}/s", "--validation-fraction", "2"], "--validation-fraction: "),
        (["--input", "{0}/a.txt", "--output", "{0}/s", "--validation-fraction", "x"], "argument --validation-fraction"),
        (["--output", "{0}/s"], "the following arguments are required: --input"),
        (["--input", "{0}/b.jsonl", "--output", "{0}/s", "--strict"], "{0}/b.jsonl:2: is not JSON"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    """The error is on stderr, without a traceback."""
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
    done = call_here(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: " + message.format(tmp_path)) and done.stderr.count("\n") == 1


def test_verify_info_and_show(tmp_path: Path) -> None:
    """Status 0 undamaged, 1 damaged, 2 no shards; what the shards hold; and a sample as the model sees it."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / f"in/{number}.txt").write_text(f"document {number} tells of many things, and ends. " * 40)
    shards = tmp_path / "shards"
    assert call_here("--input", tmp_path / "in", "--output", shards, "--workers", 1).returncode == 0
    verified = call_here("verify", shards)
    assert verified.returncode == 0 and verified.stdout.endswith(": undamaged\n") and verified.stderr == ""
    info = call_here("info", shards)
    assert info.returncode == 0
    for line in ("tokenizer: bytes, 259 ids (uint16), pad 0, end 1", "made with files: 40", "1,024 to 2,047"):
        assert line in info.stdout
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    unread = subprocess.run([sys.executable, str(SCRIPT), "info", str(shards)], stdout=writing, stderr=subprocess.PIPE)
    assert unread.returncode == 0 and unread.stderr == b""
    tiny = SCRIPT.parent.parent / "configs/tiny.yaml"
    settings = ("data.skip=[[0, 2]]", 'data.mixture=["span_corruption(8, 0.15)"]')
    shown = call_here(
        "show", shards, "--config", tiny, "--sample", 21, "--world-size", 4, "--colour", "always", *settings
    )
    assert shown.returncode == 0, shown.stderr
    # samples 0 and 1 are left out: 21 is the twentieth of steps of 8
    assert shown.stdout.startswith("sample 21: step 3, rank 3 of 4, micro-batch 0, row 0\n")
    assert "document" in shown.stdout and "</s>" in shown.stdout and "\033[1;3" in shown.stdout
    targets = shown.stdout.split("\ntargets, ")[1]
    num_sentinels = targets.count("\033[1;33m")
    assert num_sentinels > 9 and f" tokens, {num_sentinels} of them sentinels:\n" in targets
    assert "is in data.skip" in call_here("show", shards, "--config", tiny, "--sample", 1, "data.skip=[[0, 2]]").stderr
    content = bytearray((shards / "000000.tar").read_bytes())
    content[3000] ^= 1
    (shards / "000000.tar").write_bytes(content)
    damaged = call_here("verify", shards)
    assert damaged.returncode == 1 and f"damaged: {shards}/000000.tar: at byte" in damaged.stdout
    assert call_here("verify", tmp_path / "none").returncode == 2
