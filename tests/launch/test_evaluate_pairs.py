"""launch/evaluate.py --pairs: the scores and predictions, the same on two processes, and one line for wrong input."""

import json

import pytest
from conftest import ROOT, load_script
from stored_runs import write_run

import colt5dist
from colt5dist.pretrained.metrics import mean_scores, score_text
from colt5dist.pretrained.write_texts import write_texts

INPUTS = ["Who?", "A question about a longer text. " * 12, "When was it?", "é", "Where, then?"]
SHORT = ("--max-new-tokens", "6", "--batch-size", "2")


@pytest.fixture(scope="module")
def main():
    """`main` of launch/evaluate.py."""
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of random weights."""
    folder = tmp_path_factory.mktemp("pairs") / "run"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, run_dir):
    """A file of pairs: the second reference of two inputs is what the model writes."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    own = written(run_dir)
    records = [{"id": f"q{n}", "pid": f"q{n}_0", "input": text, "output": "a text"} for n, text in enumerate(INPUTS)]
    records += [{"id": f"q{n}", "pid": f"q{n}_1", "input": INPUTS[n], "output": own[n]} for n in (1, 4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def written(run_dir):
    """What the model writes for each input alone."""
    model, tokenizer = colt5dist.load(run_dir)
    return [write_texts(model, tokenizer, [text], max_new_tokens=6)[0][0] for text in INPUTS]


def test_scores_and_predictions_on_one_and_two_processes(main, fork, run_dir, pairs, tmp_path, capsys):
    own = written(run_dir)
    references = [["a text", own[number]] if number in (1, 4) else ["a text"] for number in range(5)]
    scores = [score_text(text, right) for text, right in zip(own, references, strict=True)]
    arguments = [str(run_dir), "--pairs", str(pairs), "--json", *SHORT, "--predictions"]
    assert main([*arguments, str(tmp_path / "one.jsonl")]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["step"] == 4 and found["num_samples"] == 5 and found["num_references"] == 7
    assert {name: found[name] for name in mean_scores(scores)} == mean_scores(scores)
    assert found["exact_match"] == 2 / 5
    lines = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == own and [line["id"] for line in lines] == [
        f"q{number}" for number in range(5)
    ]
    assert [line["references"] for line in lines] == references
    assert [{name: line[name] for name in scores[0]} for line in lines] == scores
    done = fork(ROOT / "launch" / "evaluate.py", [*arguments, str(tmp_path / "two.jsonl")], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_an_input_that_one_of_two_processes_cannot_read(fork, run_dir, tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"input": text, "output": "x"} for text in ("long " * 9, "long " * 8, "<extra_id_99>", "a")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = fork(ROOT / "launch" / "evaluate.py", [str(run_dir), "--pairs", str(path), *SHORT], 2)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: input of line 3 or 4: <extra_id_99>: the model has ")


def test_beams_some_metrics_and_the_first_samples(main, run_dir, pairs, capsys):
    chosen = ["--metrics", "f1", "exact_match", "--samples", "2", "--num-beams", "2"]
    assert main([str(run_dir), "--pairs", str(pairs), *SHORT, *chosen]) == 0
    printed = capsys.readouterr().out
    assert "2 samples, 3 references" in printed and "exact_match" in printed and "rouge" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "FOLDER/none"], "none: cannot be read (No such file or directory)"),
        (["--pairs", "FOLDER/empty"], "empty: has no line"),
        (["--pairs", "FOLDER/half"], "half: line 2 has no text with the key 'output'"),
        (["--pairs", "PAIRS", "--input-key", "question"], "line 1 has no text with the key 'question'"),
        (["--pairs", "PAIRS", "--metrics", "f1", "bleu"], "metrics: 'bleu' is unknown; use some of rouge, f1,"),
        (["--pairs", "PAIRS", "--predictions", "FOLDER/no/out"], "no/out: its folder does not exist; make it first"),
        (["--pairs", "PAIRS", "--num-beams", "500"], "num_beams: 500 of 384 ids; use 192 or fewer"),
        (["--pairs", "PAIRS", "--step", "3"], "no whole checkpoint in"),
    ],
    ids=["file", "empty", "target", "key", "metric", "folder", "beams", "step"],
)
def test_wrong_input_is_one_line_and_status_2(main, run_dir, pairs, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "half").write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n')
    given = [argument.replace("PAIRS", str(pairs)).replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert main([str(run_dir), *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "x", "--shards", "y"], "not allowed with argument"),
        (["--num-beams", "2", "--id-key", "i"], "--id-key, --num-beams: of no use without --pairs"),
        (["--pairs", "x", "--batch-size", "0"], "'0' is no whole number of 1 or more"),
    ],
    ids=["both", "without-pairs", "zero"],
)
def test_wrong_options_are_one_line_and_status_2(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as status:
        main(["path", *arguments])
    assert status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: arguments: ") and message in line
