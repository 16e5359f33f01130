"""A model small enough for every test, and a batch for it."""

import pytest
import torch

from colt5dist.model import CoLT5, CoLT5Config

SMALL = {
    "vocab_size": 128,
    "d_model": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "head_dim": 8,
    "num_heads": 4,
    "num_light_heads": 1,
    "num_heavy_heads": 3,
    "light_ff_dim": 24,
    "heavy_ff_dim": 64,
    "ff_dim": 48,
    "light_radius": 5,
    "router_n_iters": 20,
}


@pytest.fixture
def build():
    """build(activation_checkpointing=..., **config fields) -> a small CoLT5 with the same weights every time."""

    def make(activation_checkpointing="none", seed=0, **fields):
        torch.manual_seed(0)
        return CoLT5(CoLT5Config(**(SMALL | fields)), activation_checkpointing=activation_checkpointing, seed=seed)

    return make


@pytest.fixture
def batch():
    """Four samples of 64 and 12 tokens: a full one, two with padding, one wholly padded."""
    generator = torch.Generator().manual_seed(1)
    input_mask = torch.arange(64)[None] < torch.tensor([[64], [40], [3], [0]])
    target_mask = torch.arange(12)[None] < torch.tensor([[12], [7], [1], [0]])
    ids = [torch.randint(1, 128, shape, generator=generator) for shape in ((4, 64), (4, 12), (4, 12))]
    return {
        "input_ids": ids[0] * input_mask,
        "decoder_input_ids": ids[1] * target_mask,
        "target_ids": ids[2] * target_mask,
        "input_mask": input_mask,
        "target_mask": target_mask,
        "sample_index": torch.tensor([5, 6, 7, -1]),
    }
