"""launch/generate.py: one text and files of texts, and one line for wrong input."""

import json

import pytest
import torch
from conftest import TINY_MODEL, load_script

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer

TINY = TINY_MODEL | {"window_size": 16}


@pytest.fixture(scope="module")
def main():
    """`main` of launch/generate.py."""
    return load_script("generate").main


def stored(folder, model_class, only=None, **fields):
    """Folder of an untrained model; one that writes `only` this letter, where it is given."""
    torch.manual_seed(0)
    model = model_class(CoLT5Config(**(TINY | fields)))
    with torch.no_grad():
        model.loss.weight.normal_(std=0.5)
        if only is not None:  # layers that add nothing to embeddings of ones, and one output row that is not zero
            for name, p in model.named_parameters():
                p.fill_(float("norm" in name or "embedding" in name))
            model.loss.weight[ByteTokenizer().encode(only)[0]] = 1.0
    model.save_pretrained(folder)
    ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=10).save(folder / TOKENIZER_FOLDER)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Folder of an untrained encoder-decoder."""
    return stored(tmp_path_factory.mktemp("model"), CoLT5, num_encoder_layers=1)


def printed(capsys):
    """What was printed, without the newline at the end."""
    return capsys.readouterr().out.removesuffix("\n")


def test_a_text_is_written(main, path, capsys):
    common = [path, "--text", "abc", "--device", "cpu", "--max-new-tokens", "8"]
    assert main(common) == 0
    assert printed(capsys)
    drawn = []
    for seed in ("1", "1", "2"):
        assert main([*common, "--temperature", "1", "--top-p", "0.9", "--seed", seed]) == 0
        drawn.append(printed(capsys))
    assert drawn[0] == drawn[1] != drawn[2]


def test_blanks_are_filled(main, path, capsys):
    fill = ["--text", "2 + 2 = ___.", "--fill", "--max-new-tokens", "4", "--num-beams", "2"]
    assert main([path, "--device", "cpu", *fill]) == 0
    captured = capsys.readouterr()
    text = captured.out.removesuffix("\n")
    assert captured.err == "" and text.startswith("2 + 2 = ") and text.endswith(".") and "___" not in text


def test_a_blank_that_still_looks_blank_is_named(main, tmp_path, capsys):
    folder = stored(tmp_path, CoLT5, num_encoder_layers=1, only=" ")
    for options, tokens in (([], 64), (["--max-new-tokens", "3"], 3)):
        assert main([folder, "--device", "cpu", "--fill", "--text", "a ___ b", *options]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"a {' ' * tokens} b\n"
        start = f"note: text 0: <0>: {tokens} tokens, all of them white space, cut at --max-new-tokens; "
        assert captured.err.startswith(start) and captured.err.count("\n") == 1


def test_lines_of_a_file_whatever_the_batch_size(main, path, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"id": number, "question": "é" * (1 + 7 * number)} for number in range(5)]
    source.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    files = ["--input", str(source), "--output", str(target), "--input-key", "question", "--device", "cpu"]
    draws = ["--temperature", "1", "--num-return-sequences", "2", "--max-new-tokens", "6", "--dtype", "fp32"]
    contents = []
    for size in ("1", "3"):
        assert main([path, *files, *draws, "--batch-size", size]) == 0
        contents.append(target.read_text())
    assert contents[0] == contents[1]
    written = [json.loads(line) for line in contents[0].splitlines()]
    assert [{key: record[key] for key in ("id", "question")} for record in written] == records
    assert all(len(record["output"]) == 2 for record in written)


def test_a_decoder_only_model_continues(main, tmp_path, capsys):
    folder = stored(tmp_path, CausalCoLT5, architecture="causal", num_encoder_layers=0)
    assert main([folder, "--text", "abc", "--device", "cpu", "--max-new-tokens", "8"]) == 0
    assert printed(capsys)
    assert main([folder, "--text", "a ___", "--fill", "--device", "cpu"]) == 2
    assert "decoder-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PATH", "--text", " "], "text 0: has no text"),
        (["PATH", "--text", "x", "--top-k", "3"], "top_k: 3 with temperature 0; use a temperature above 0"),
        (["PATH", "--text", "x", "--max-new-tokens", "0"], "max_new_tokens: 0; use 1 or more"),
        (["PATH", "--fill", "--text", "x " + 11 * "___ "], "text 0: has 11 blanks, but the model has 10 sentinels"),
        (["FOLDER/none", "--text", "x"], "none: no such folder"),
        (["PATH", "--input", "FOLDER/none", "--output", "FOLDER/out"], "none: cannot be read"),
        (["PATH", "--input", "FOLDER/bad", "--output", "FOLDER/out"], "bad: line 2 is not JSON"),
        (
            ["PATH", "--input", "FOLDER/other", "--output", "FOLDER/out"],
            "other: line 1 has no text with the key 'input'",
        ),
        (["PATH", "--input", "FOLDER/empty", "--output", "FOLDER/out"], "empty: has no line"),
        (["PATH", "--input", "FOLDER/good", "--output", "FOLDER/no/out"], "out: its folder does not exist"),
    ],
    ids=["empty", "top-k", "length", "blanks", "path", "file", "json", "key", "lines", "folder"],
)
def test_wrong_input_is_one_line_and_status_2(main, path, tmp_path, capsys, arguments, message):
    contents = {"bad": '{"input": "a"}\nnot', "other": '{"text": "a"}', "empty": "\n", "good": '{"input": "a"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    given = [argument.replace("PATH", path).replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert main([*given, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["x"], ["x", "--text", "a", "--input", "b"], ["x", "--input", "b"]], ids=len)
def test_wrong_options_are_one_line_and_status_2(main, capsys, arguments):
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2 and capsys.readouterr().err.startswith("error: arguments: ")
