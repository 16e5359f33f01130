"""The copy with whole weights that writes texts at ZeRO stage 3: it computes what the model computes.

That a run at stage 3 on two processes scores the answers of one process is in tests/train/test_fine_tuning.py.
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_MODEL

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.train.engine.whole_model import NoRoomError, whole_copy


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
    copy = whole_copy(model, torch.device("cpu"))
    assert copy is not None and not copy.training and not any(p.requires_grad for p in copy.parameters())
    ids = torch.randint(3, 300, (2, 70))
    number = {"sample_index": torch.tensor([4, 9])}
    expected = model.generate(ids, max_new_tokens=12, seed=0, **number)
    assert torch.equal(copy.generate(ids, max_new_tokens=12, seed=0, **number), expected)
    assert len(set(expected.flatten().tolist())) > 3


def test_a_rank_that_wants_no_copy_gets_none(alone: None) -> None:
    assert whole_copy(sharded(CoLT5), torch.device("cpu"), wanted=False) is None


def test_no_room_is_an_error_of_its_own(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how much memory is missing, and what to set."""
    monkeypatch.setattr(CoLT5, "to_empty", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    model = sharded(CoLT5)
    gib = sum(p.numel() for p in model.parameters()) * 4 / 2**30
    with pytest.raises(
        NoRoomError, match=f"zero.stage=3 each GPU needs {gib:.1f} GiB more .*; set 0, or lower"
    ) as found:
        whole_copy(model, torch.device("cpu"))
    assert found.value.gib == gib
