"""The copy with whole weights that writes texts at ZeRO stage 3: it computes what the model computes.

That a run at stage 3 on two processes scores the answers of one process is in tests/train/test_fine_tuning.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_MODEL, torchrun

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.train.engine.whole_model import NoRoomError, whole_copy

SCRIPT = Path(__file__).with_name("held_out_ranks.py")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(kind: Any, routing: str = "learned") -> Any:
    """A model with the shares that DeepSpeed leaves to one rank, with padding at their ends."""
    causal = kind is CausalCoLT5
    layers = {"architecture": "causal", "num_encoder_layers": 0} if causal else {"num_encoder_layers": 2}
    torch.manual_seed(0)
    model = kind(CoLT5Config(**TINY_MODEL, **layers, routing=routing), seed=5).eval()
    model.pad_id, model.eos_id = 0, 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            padding = torch.full((3,), 7.0)
            parameter.ds_tensor = torch.cat([parameter.view(-1), padding])
    return model


@pytest.mark.parametrize(("kind", "routing"), [(CoLT5, "learned"), (CoLT5, "random"), (CausalCoLT5, "learned")])
def test_the_copy_writes_what_the_model_writes(kind: Any, routing: str, alone: None) -> None:
    """Also with random routing, which depends on the seed of the run."""
    model = sharded(kind, routing)
    copy = whole_copy(model, torch.device("cpu"), torch.ones(1))
    assert copy is not None and not copy.training and not any(p.requires_grad for p in copy.parameters())
    ids = torch.randint(3, 300, (2, 70))
    number = {"sample_index": torch.tensor([4, 9])}
    expected = model.generate(ids, max_new_tokens=12, seed=0, **number)
    assert torch.equal(copy.generate(ids, max_new_tokens=12, seed=0, **number), expected)
    assert len(set(expected.flatten().tolist())) > 3


ON_GPUS = pytest.param("GPUs", marks=[pytest.mark.gpu, pytest.mark.xdist_group("whole_model_gpu")])


@pytest.fixture(scope="module", params=["CPU processes", ON_GPUS])
def written(
    request: pytest.FixtureRequest,
    run_ranks: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    micro_settings: tuple[str, ...],
) -> dict[str, dict[str, Any]]:
    """What two processes, or one where there is but one GPU, get of a held-out sample, with and without room."""
    output = tmp_path_factory.mktemp("written") / "out.json"
    if request.param == "GPUs":
        torchrun(SCRIPT, str(output), *micro_settings, processes=min(2, torch.cuda.device_count()))
    else:
        run_ranks(SCRIPT, str(output), *micro_settings, processes=2)
    return json.loads(output.read_text())


def test_the_first_rank_writes_at_stage_3_what_it_writes_at_stage_1(written: dict[str, dict[str, Any]]) -> None:
    """The other one helps it to its copy, has none itself, and nothing of the copy is left."""
    (passage,), *others = written["stage 1"]["written"]
    assert others in ([[]], []) and len(set(passage)) > 3
    for case in ("stage 3", "room again"):
        assert written[case] == written["stage 1"]
    ranks = 1 + len(others)
    assert written["stage 1"]["notes"] == [""] * ranks
    assert written["copy"] == {"has weights": [True, False][:ranks], "is freed": [True] * ranks}


@pytest.mark.parametrize("case", ["no room for the copy", "no room to help", "no room to write", "too little left"])
def test_a_rank_without_room_is_a_note_and_no_rank_waits_for_another(
    written: dict[str, dict[str, Any]], case: str
) -> None:
    """The collective after it has every rank's part."""
    if case == "too little left" and case not in written:
        pytest.skip("how much memory is left is asked of GPUs only")
    found = written[case]
    ranks = len(found["notes"])
    assert found["sum"] == ranks
    assert found["written"] == [[None], []][:ranks]
    words = "the GPU has no room for it" if case == "no room to write" else "a GPU has no room for them"
    assert f"{words}; lower train.micro_batch_size" in found["notes"][0]


def test_the_error_says_how_much_memory_is_missing() -> None:
    assert "whole weights, with which texts are written, take 3 GiB more" in str(NoRoomError(3 * 2**30))
    assert "take 0.0098 GiB more" in str(NoRoomError(10 * 2**20))
