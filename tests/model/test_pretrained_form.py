"""Models from files: the weights are those that were stored, to the bit, whatever form and type they are stored in."""

import json
from pathlib import Path

import pytest
import torch
from stored_runs import write_run
from torch import Tensor

import colt5dist
from colt5dist import CausalCoLT5, CoLT5
from colt5dist.errors import ConfigError
from colt5dist.storage import exported
from colt5dist.storage.stored_model import settings_at
from colt5dist.train.config.load import config_leaves, load_config, saved_leaves

CAUSAL = (
    "model.d_model=32 model.num_decoder_layers=2 model.head_dim=8 model.num_light_heads=1 model.num_heavy_heads=3 "
    "model.light_ff_dim=32 model.heavy_ff_dim=64 model.ff_dim=32 model.window_size=32 model.memory_size=32"
).split()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(first: torch.nn.Module, second: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """All parameters and buffers are equal to the bit, those of the second rounded to `dtype`."""
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        kept = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert found[name].dtype == kept.dtype and torch.equal(found[name], kept), name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8, and another share of routed tokens from step 6 on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    schedule = "data.length_schedule=[{step: 6, input_length: 128, num_heavy_tokens: 0.25, micro_batch_size: 2}]"
    write_run(folder, schedule, "model.light_positions=relative", "seed=3", steps=(4, 8))
    return folder


def test_every_form_gives_the_same_model(run_dir: Path, tmp_path: Path) -> None:
    newest = CoLT5.from_pretrained(run_dir)
    assert not newest.training and newest.seed == 3 and newest.config.num_heavy_tokens == 0.25
    assert_same(newest, CoLT5.from_pretrained(run_dir / "checkpoints" / "step_00000008"))
    assert_same(newest, CoLT5.from_pretrained(str(run_dir), step=8))
    newest.save_pretrained(tmp_path / "saved")
    again = CoLT5.from_pretrained(tmp_path / "saved")
    assert_same(newest, again)
    assert (again.config, again.seed, again.origin.step) == (newest.config, 3, 8)
    ids = torch.randint(3, 259, (2, 64))
    assert torch.equal(newest.encode(ids)[0], again.encode(ids)[0])


def test_a_step_is_found_with_its_settings(run_dir: Path) -> None:
    earlier, tokenizer = colt5dist.load(run_dir, step=4)
    assert isinstance(earlier, CoLT5) and earlier.config.num_heavy_tokens == 0.125
    assert not torch.equal(earlier.embedding.weight, CoLT5.from_pretrained(run_dir).embedding.weight)
    assert tokenizer.encode("ab<extra_id_1>").tolist() == [100, 101, 260]


@pytest.mark.parametrize("step", [5, 6, 9], ids=str)
def test_settings_at_a_step_are_those_of_its_stage(run_dir: Path, step: int) -> None:
    config = load_config(run_dir / "config.yaml", [])
    stage = config_leaves(config.stage_at(step))
    found = settings_at(_nested(run_dir), step)
    for section in ("model", "data", "train"):
        for key, value in found[section].items():
            assert value == stage[f"{section}.{key}"], key


def _nested(run_dir: Path) -> dict[str, dict[str, object]]:
    """config.yaml as sections."""
    nested: dict[str, dict[str, object]] = {"model": {}, "data": {}, "train": {}}
    for key, value in saved_leaves(run_dir / "config.yaml").items():
        section, _, name = key.partition(".")
        if section in nested:
            nested[section][name] = value
    return nested


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_types(run_dir: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = CoLT5.from_pretrained(run_dir)
    rounded = CoLT5.from_pretrained(run_dir, dtype=dtype)
    assert_same(model, rounded, dtype)
    rounded.save_pretrained(tmp_path / "saved")
    assert_same(rounded, CoLT5.from_pretrained(tmp_path / "saved"), dtype)


def test_the_same_bytes_again_and_in_several_files(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CoLT5.from_pretrained(run_dir)
    model.save_pretrained(tmp_path / "one")
    CoLT5.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    monkeypatch.setattr(exported, "FILE_BYTES", 100_000)
    model.save_pretrained(tmp_path / "cut")
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same(model, CoLT5.from_pretrained(tmp_path / "cut"))


def test_decoder_only(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", *CAUSAL, "model.routing=random", "seed=5", config="causal_tiny")
    read, _ = colt5dist.load(tmp_path / "run")
    assert isinstance(read, CausalCoLT5) and read.seed == 5
    assert_same(model, read)
    with pytest.raises(ConfigError, match=r"holds a CausalCoLT5, not a CoLT5; use CausalCoLT5.from_pretrained"):
        CoLT5.from_pretrained(tmp_path / "run")


def _break(run_dir: Path, what: str) -> dict[str, object]:
    """Damage a run folder; returns further arguments."""
    newest = run_dir / "checkpoints" / "step_00000004"
    rank_file = newest / "rank_00001.safetensors"
    if what == "changed byte":
        content = bytearray(rank_file.read_bytes())
        content[-1] ^= 1
        rank_file.write_bytes(content)
    elif what == "cut short":
        rank_file.write_bytes(rank_file.read_bytes()[:-1])
    elif what == "no config":
        (run_dir / "config.yaml").unlink()
    elif what == "another size":
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(text.replace("  d_model: 32", "  d_model: 64"))
    elif what == "unknown key":
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(text.replace("  d_model: 32", "  d_model: 32\n  magic: 1"))
    elif what == "no such step":
        return {"step": 5}
    return {}


@pytest.mark.parametrize(
    "what, words",
    [
        ("changed byte", "rank_00001.safetensors was changed after it was written"),
        ("cut short", "no whole checkpoint in it (step_00000004: rank_00001.safetensors has"),
        ("no config", "config.yaml: is missing"),
        ("another size", "has shape (384, 32), its configuration needs (384, 64)"),
        ("unknown key", "model.magic is unknown to this version"),
        ("no such step", "no whole checkpoint in"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, what: str, words: str) -> None:
    write_run(tmp_path / "run")
    arguments = _break(tmp_path / "run", what)
    with pytest.raises(ConfigError) as error:
        CoLT5.from_pretrained(tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_no_model(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; name a run folder"):
        colt5dist.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no trained model"):
        colt5dist.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="is not a model of colt5dist"):
        colt5dist.load(tmp_path)
    with pytest.raises(TypeError, match="dtype: 'bf16' is no floating-point type"):
        CoLT5.from_pretrained(run_dir, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step"):
        CoLT5.from_pretrained(run_dir, step="4")  # type: ignore[arg-type]
