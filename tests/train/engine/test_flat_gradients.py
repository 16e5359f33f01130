"""`FlatGradients` and `ShardedGradients` train as DeepSpeed's own hooks do: ZeRO 1-3, on one and two CPU processes.

This also probes the semi-private places of DeepSpeed that flat_gradients.py, sharded_gradients.py and
sharded_weights.py in colt5dist/train/engine rely on. Steps of an odd number are AdamW in one pass over memory, the
others torch's own, so that each way goes on from the other.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colt5dist.train.engine.flat_gradients import FlatGradients

SCRIPT = Path(__file__).with_name("zero_matrix.py")
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3}
"""Relative, of losses and gradient norms; bf16 has 8 bits, and sums are made in another order."""


LOADS = {
    "fp32": [(0, 1), (0, 2), (0, 3), (1, 2), (2, 1), (1, 0), (2, 0), (3, 0), (1, 1), (2, 2), (3, 3)],
    "bf16": [(0, 1), (0, 3), (1, 2), (2, 0), (3, 3)],
}
"""Stages that a checkpoint was written and loaded at: in bf16 each of them once as written, and once as loaded."""
RELEASED = "deepspeed.zero_optimization.stage3_max_live_parameters=0"
"""Layers are released between their forward and backward passes, although the model is small."""


@pytest.fixture(scope="module", params=[("fp32", 2), ("bf16", 1), ("bf16", 2)], ids=str)
def trained(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    micro_settings: tuple[str, ...],
) -> tuple[str, dict[str, Any]]:
    """Precision, and the matrix of stages 0 (by DeepSpeed), 1, 2 and 3 (flat)."""
    precision, processes = request.param
    folder = tmp_path_factory.mktemp("flat")
    loads = ",".join(f"{written}{stage}" for written, stage in LOADS[precision])
    own = ("train.micro_batch_size=2", f"train.precision={precision}", RELEASED, f"--loads={loads}")
    if precision == "fp32":
        own = (*own, "--load-micro-batch=4")  # that they add up is tested by what trained; here it would take time only
    settings = (*micro_settings, *own)
    run_ranks(SCRIPT, str(folder / "out.json"), str(folder), "0123", "--flat", *settings, processes=processes)
    return precision, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_and_norms_are_those_of_deepspeed(trained: tuple[str, dict[str, Any]], stage: int) -> None:
    """Of two steps, and of two after a skipped one."""
    precision, results = trained
    for got, expected in zip(results[f"train {stage}"], results["train 0"], strict=True):
        assert got == pytest.approx(expected, rel=TOLERANCE[precision])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped(trained: tuple[str, dict[str, Any]], stage: int) -> None:
    assert trained[1][f"nan {stage}"] == {"applied": False, "finite": True}


def test_checkpoints_are_the_same(trained: tuple[str, dict[str, Any]]) -> None:
    """One that DeepSpeed's path wrote goes on on the flat path, and the other way round."""
    precision, results = trained
    for written, stage in LOADS[precision]:
        for got, expected in zip(results[f"load {written} {stage}"], results[f"train {written}"][2:], strict=True):
            assert got == pytest.approx(expected, rel=TOLERANCE[precision]), (written, stage)


def test_stage_3_gathers_one_layer_at_a_time(trained: tuple[str, dict[str, Any]]) -> None:
    """On several ranks; the last layer stays for the backward pass, which begins with it."""
    gathered = trained[1]["gathered 3"]
    assert gathered["left"] == 0 and gathered["most"] <= 2


def test_stage_3_runs_layers_again(
    run_ranks: Callable[..., str], tmp_path: Path, micro_settings: tuple[str, ...]
) -> None:
    """Activation checkpointing, on two ranks: losses and norms are those of stage 0."""
    own = (
        "--loads=",
        "train.micro_batch_size=2",
        "model.num_encoder_layers=4",
        "train.activation_checkpointing=full_keep_routing",
        RELEASED,
    )
    run_ranks(SCRIPT, str(tmp_path / "out.json"), str(tmp_path), "03", "--flat", *micro_settings, *own, processes=2)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["gathered 3"]["left"] == 0 and 1 <= results["gathered 3"]["most"] <= 2
    for got, expected in zip(results["train 3"], results["train 0"], strict=True):
        assert got == pytest.approx(expected, rel=TOLERANCE["fp32"])


def test_how_stage_3_gathers_and_sends_changes_no_number(
    run_ranks: Callable[..., str], tmp_path: Path, micro_settings: tuple[str, ...]
) -> None:
    """By default all layers of a small model stay until their backward pass; hosts sum in float32 before they send."""
    found = {}
    for name, own in {"released": (RELEASED,), "stay": (), "hosts": ("--hosts",)}.items():
        folder = tmp_path / name
        folder.mkdir()
        settings = (*micro_settings, "train.micro_batch_size=2", "train.precision=bf16", "--loads=", *own)
        run_ranks(SCRIPT, str(folder / "out.json"), str(folder), "3", "--flat", *settings, processes=2)
        found[name] = json.loads((folder / "out.json").read_text())
    assert found["stay"]["train 3"] == found["released"]["train 3"] == found["hosts"]["train 3"]
    assert found["stay"]["gathered 3"] == {"most": 3, "left": 0}
    assert found["released"]["gathered 3"]["most"] <= 2


def test_how_much_is_summed_at_once_changes_no_number(
    run_ranks: Callable[..., str], tmp_path: Path, micro_settings: tuple[str, ...]
) -> None:
    """Stages 1 and 2 sum all gradients at once here by default; with buckets of 1000 elements, piece by piece."""
    found = {}
    for name, own in {"at once": (), "in pieces": ("zero.bucket_size=1000",)}.items():
        settings = (*micro_settings, "train.micro_batch_size=2", "--loads=", *own)
        folder = tmp_path / name
        folder.mkdir()
        run_ranks(SCRIPT, str(folder / "out.json"), str(folder), "12", "--flat", *settings, processes=2)
        found[name] = json.loads((folder / "out.json").read_text())
    assert found["in pieces"]["train 1"] == found["at once"]["train 1"]
    assert found["in pieces"]["train 2"] == found["at once"]["train 2"]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_sums_in_pieces_take_the_memory_of_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks, both with the same gradients; a stand-in for the collectives says what it was given."""
    places: dict[int, int] = {}

    def seen(*tensors: torch.Tensor) -> None:
        places.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors})

    def all_reduce(sent: torch.Tensor) -> None:
        seen(sent)
        sent *= 2

    def reduce_scatter(reduced: torch.Tensor, sent: torch.Tensor) -> None:
        seen(reduced, sent)
        reduced.copy_(2 * sent[1])

    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
    gradients = object.__new__(FlatGradients)
    gradients.world_size, gradients.rank = 2, 1
    gradients.bucket_size, gradients.reduce_dtype = 8, torch.float32
    whole = torch.arange(20.0)
    found = torch.empty(10)
    for piece, reduced in gradients._reduced_pieces(whole):
        found[piece] = reduced
    assert torch.equal(found, 2 * whole[10:])
    assert sorted(places.values()) == {"gloo": [4 * 8], "nccl": [4 * 4, 4 * 8]}[backend]
