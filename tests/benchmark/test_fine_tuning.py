"""Fine-tuning against answers without a model: questions on held-out packages, scores, and the whole on a GPU."""

import json
from dataclasses import replace

import pytest
from conftest import MICRO_SETTINGS

from colt5dist.benchmark import fine_tuning, package_text
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.tokenize_texts import encode_document
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.errors import ConfigError


def write_site(folder, packages=("first", "second", "third")):
    """Packages of a module each, with a docstring that only they have, and one that all have."""
    for number, package in enumerate(packages):
        functions = [
            f'def f{i}(x):\n    """Return the {i}-th thing of {package}."""\n    return x + {number * 100 + i}\n'
            for i in range(6)
        ]
        (folder / package).mkdir(parents=True)
        shared = 'def same(x):\n    """Do what all of them do."""\n    return x\n'
        (folder / package / "code.py").write_text("\n\n".join([*functions, shared]))
    return folder


def test_questions_are_held_out_with_their_package(tmp_path):
    site = write_site(tmp_path / "site")
    package_text.write_packages([str(site)], tmp_path / "text")
    tokenizer = ByteTokenizer()
    writer = CorpusWriter(tmp_path / "shards", tokenizer, validation_fraction=0.3)
    for path in sorted((tmp_path / "text").iterdir()):
        document = encode_document(tokenizer, path.read_text())
        writer.add_document(replace(document, held_out=path.stem == "second"))
    writer.close({})
    held_out = package_text.held_out_packages(tmp_path / "shards")
    assert held_out == {"second"}
    package_text.write_questions([str(site)], held_out, tmp_path / "pairs", 4)
    train, asked = (
        [json.loads(line) for line in (tmp_path / "pairs" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert len(train) == 14 and len(asked) == 4
    assert all("second.code.f" in pair["input"] and "of second" in pair["output"] for pair in asked)
    assert not any("second" in pair["output"] for pair in train)
    found = fine_tuning.answers_without_a_model(tmp_path / "pairs")
    # the module's first docstring answers at most one of its questions
    assert found["commonest answer"]["exact_match"] == 0 and found["first docstring"]["exact_match"] <= 0.25
    assert found["first docstring"]["f1"] > 0.5
    with pytest.raises(ConfigError, match="no held-out questions"):
        package_text.write_questions([str(site)], set(), tmp_path / "none", 4)


def test_the_first_docstring_is_the_one_after_the_question():
    assert package_text.first_docstring('What does """a""" do?\n\ndef f():\n    """ Say it. Or not.\n') == "Say it"
    cut = 'What does f do?\n\n    end of one.\n    """\n    return 1\n\nclass A(B):\n    r"""Do\n    it."""\n'
    assert package_text.first_docstring(cut) == "Do"
    assert package_text.first_docstring("What does f do?\n\ndef f(): pass") == ""


@pytest.mark.parametrize("option", ["--minutes", "--tuning-steps", "--questions"])
def test_wrong_options_are_named(tmp_path, option):
    with pytest.raises(ConfigError, match=f"{option}: 0"):
        fine_tuning.main(["--output", str(tmp_path), option, "0"])


def test_seconds_of_training_are_those_of_the_steps():
    records = [{"step": 1, "step_seconds": 9.0}, {"step": 100, "step_seconds": 0.1}, {"step": 150, "step_seconds": 0.2}]
    assert fine_tuning.seconds_of(records) == pytest.approx(9 + 9.9 + 10)
    assert fine_tuning.seconds_of([]) == 0


@pytest.mark.gpu
def test_the_whole_and_again(tmp_path, capsys):
    """A small model, a few steps; the second start trains nothing."""
    site = write_site(tmp_path / "site", [f"package{i}" for i in range(30)])
    sizes = [s for s in MICRO_SETTINGS if s.startswith("model.") and "vocab" not in s]
    arguments = ["--output", str(tmp_path / "out"), "--text", str(site), "--steps", "3", "--tuning-steps", "3"]
    arguments += ["--batch", "2", "--set", *sizes, "train.compile=off"]
    printed = []
    for _ in range(2):
        assert fine_tuning.main(arguments) == 0
        printed.append(capsys.readouterr().out)
    found = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())
    assert found["pretrained"]["steps"] == 3
    assert set(found["scores"]) == {"tuned", "not tuned", "commonest answer", "first docstring"}
    assert printed[0].splitlines()[-5:] == printed[1].splitlines()[-5:]
