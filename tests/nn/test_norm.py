"""RMSNorm in the form of colt5-attention and in T5's."""

import pytest
import torch
from colt5_attention import transformer_block as reference

from colt5dist.nn.norm import RMSNorm


def test_default_is_that_of_colt5_attention_also_for_a_zero_vector():
    ours, theirs = RMSNorm(12).double(), reference.RMSNorm(12).double()
    theirs.gamma.data.uniform_(0.5, 2.0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    x[0, 0] = 0
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)


def test_epsilon_is_added_to_the_mean_square():
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(RMSNorm(6, eps=0.1).double()(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_mean_square_is_taken_in_float32(dtype):
    x = (torch.randn(2, 4096) * 200).to(dtype)
    wide = x.float()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = RMSNorm(4096, eps=1e-6).to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
