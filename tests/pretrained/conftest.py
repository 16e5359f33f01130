"""A tiny model with its tokenizer, untrained."""

import pytest
import torch
from conftest import TINY_MODEL

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer


@pytest.fixture
def tokenizer():
    """Bytes, no mode tokens, ten sentinels from 259 on."""
    return ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=10)


@pytest.fixture
def tiny():
    """tiny(**config fields) -> a model that writes something else for each input."""

    def make(**fields):
        torch.manual_seed(0)
        causal = fields.get("architecture") == "causal"
        config = CoLT5Config(**(TINY_MODEL | {"num_encoder_layers": 0 if causal else 1} | fields))
        model = (CausalCoLT5 if causal else CoLT5)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
        return model.eval()

    return make
