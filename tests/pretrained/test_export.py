"""Exported folders: what is in them, that nothing is lost on the way, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_script
from stored_runs import write_run

import colt5dist
from colt5dist import CoLT5
from colt5dist.errors import ConfigError
from colt5dist.pretrained.export import export
from colt5dist.train.checkpoint import TrainerState
from colt5dist.train.config.load import load_config
from colt5dist.train.resume import plan_start

SCRIPT = Path(__file__).with_name("save_at_stage.py")
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_colt5dist.py",
    "tokenizer",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, and records of two evaluations."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    write_run(folder, "seed=3")
    records = [{"step": 2, "eval/loss": 5.5}, {"step": 4, "eval/loss": 4.25}, {"step": 6, "eval/loss": 3.5}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    """The run, exported."""
    return export(run_dir, run_dir.with_name("exported")).folder


def test_what_is_in_it(run_dir: Path, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    model, tokenizer = colt5dist.load(run_dir)
    again, its_tokenizer = colt5dist.load(exported)
    for (name, expected), (its_name, found) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == its_name and torch.equal(expected, found)
    assert (again.config, again.seed, again.origin.step, again.eos_id) == (model.config, 3, 4, tokenizer.eos_id)
    assert its_tokenizer.names == tokenizer.names
    card = (exported / "README.md").read_text()
    assert "| held-out loss (nats per target token) | 4.2500 |" in card and "AutoModelForSeq2SeqLM" in card
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card
    assert "pip install '/path/to/colt5dist[hf]'" in card and "colt5: prefix_lm, span_3, span_8, span_64 (" in card
    config = (exported / "config.json").read_text()
    assert "python-stdlib" not in config and str(run_dir) not in config


def test_exported_again_it_has_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    again = export(exported, tmp_path / "again").folder
    for path in (path for path in exported.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(exported)).read_bytes(), path.name


def test_stages_and_processes_give_the_same_bytes(
    run_dir: Path, exported: Path, run_ranks: Callable[..., str], tmp_path: Path
) -> None:
    for stage, processes in (("1", 1), ("3", 2)):
        saved = tmp_path / f"stage{stage}"
        run_ranks(SCRIPT, str(run_dir), str(saved), stage, processes=processes)
        files = list((saved / "checkpoints" / "step_00000004").glob("rank_*"))
        assert len(files) == processes
        found = export(saved, tmp_path / f"exported{stage}").folder
        for name in FILES - {"README.md", "tokenizer"}:  # the card says how many samples the run has read
            assert (found / name).read_bytes() == (exported / name).read_bytes(), name


def test_in_bf16(run_dir: Path, tmp_path: Path) -> None:
    main = load_script("export").main
    assert main([str(run_dir), "--output", str(tmp_path / "small"), "--dtype", "bf16"]) == 0
    model = CoLT5.from_pretrained(tmp_path / "small")
    expected = CoLT5.from_pretrained(run_dir, dtype=torch.bfloat16)
    assert torch.equal(model.embedding.weight, expected.embedding.weight)
    assert model.embedding.weight.dtype == torch.bfloat16
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size < 0.6 * 4 * sum(p.numel() for p in model.parameters())


def test_another_run_starts_from_it(exported: Path, tmp_path: Path, micro_settings: tuple[str, ...]) -> None:
    def plan(*settings: str, fingerprint: str) -> TrainerState:
        path = Path(__file__).parents[2] / "configs" / "tiny.yaml"
        config = load_config(path, [*micro_settings, f"run_dir={tmp_path / 'new'}", f"init_from={exported}", *settings])
        shapes = {name: tuple(p.shape) for name, p in CoLT5(config.model).named_parameters()}
        start = plan_start(config, "0" * 64, fingerprint, shapes)
        assert start.init_from == exported
        return start.state

    fingerprint = json.loads((exported / "tokenizer" / "vocabulary.json").read_text())["fingerprint"]
    assert plan(fingerprint=fingerprint).step == 0
    with pytest.raises(ConfigError, match="was trained with another tokenizer"):
        plan(fingerprint="f" * 64)
    with pytest.raises(ConfigError, match=r"parameter embedding\.weight has shape \(384, 32\), this model needs"):
        plan("model.d_model=64", fingerprint=fingerprint)


def test_wrong_input_is_one_line(
    run_dir: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_script("export").main
    cases = {
        (str(run_dir), "--output", str(exported)): "is there already; name a new folder",
        (str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")): "no such folder",
        (str(run_dir), "--output", str(tmp_path / "out"), "--step", "3"): "no whole checkpoint in",
        (str(exported), "--output", str(tmp_path / "out"), "--step", "4"): "which holds one step; leave it out",
        (str(run_dir), "--output", "/proc/out"): "/proc/out cannot be written",
    }
    for arguments, words in cases.items():
        assert main(list(arguments)) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words in line
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        main([str(run_dir), "--output", str(tmp_path / "out"), "--dtype", "int8"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_damaged_folders_are_one_line(exported: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = export(exported, tmp_path / name).folder
        change(folder)
        with pytest.raises(ConfigError) as error:
            colt5dist.load(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def other_width(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"d_model": 32', '"d_model": 64'))

    def newer(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))

    assert "model.safetensors: cannot be read" in broken("cut", cut)
    assert "its configuration needs" in broken("width", other_width)
    assert "has format 9" in broken("newer", newer)
    assert "index.json: cannot be read" in broken("none", lambda folder: (folder / "model.safetensors").unlink())
    vocabulary = Path("tokenizer", "vocabulary.json")
    assert f"{vocabulary}: cannot be read" in broken("tokenizer", lambda folder: (folder / vocabulary).unlink())
