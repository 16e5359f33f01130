"""counter_uniform: a pure function of its arguments, uniform, and independent from key to key and stream to stream."""

from functools import partial

import pytest
import torch

from colt5dist.errors import ConfigError
from colt5dist.ops.counter_random import counter_keys, counter_uniform, counter_words

EXTREMES = torch.tensor([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])


def mix(word):
    word = ((word ^ word >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    word = ((word ^ word >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return word ^ word >> 16


def in_python_integers(key, position, stream, seed):
    """The definition, in integers that cannot overflow."""
    first, second = 0x243F6A88, 0x85A308D3
    for number in (seed, stream, key):
        for word in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF):
            first = mix(first ^ word)
            second = mix(second + first & 0xFFFFFFFF)
    return (mix(mix(position ^ first) + second & 0xFFFFFFFF) >> 8) / 2**24


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("stream", "seed"), [(0, 0), (7, 2**31), (2**40, -5)])
@pytest.mark.parametrize("num", [3, 2100])
def test_triton_computes_the_same_words_and_keys(stream, seed, num, device):
    keys = EXTREMES.to(device)
    for function in (partial(counter_words, num=num), counter_keys):
        reference, triton = (
            function(keys, stream=stream, seed=seed, implementation=implementation)
            for implementation in ("reference", "triton")
        )
        assert torch.equal(triton, reference) and triton.dtype == torch.int64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("stream", "seed"), [(0, 0), (7, 2**31), (2**40, -5)])
def test_is_its_definition_bit_for_bit(stream, seed, device):
    actual = counter_uniform(EXTREMES.to(device), 5, stream=stream, seed=seed).cpu()
    expected = [[in_python_integers(key, position, stream, seed) for position in range(5)] for key in EXTREMES.tolist()]
    assert actual.dtype == torch.float32 and actual.tolist() == expected


def test_a_row_does_not_depend_on_the_others_or_on_its_length():
    keys = torch.arange(40)
    together = counter_uniform(keys, 100, stream=3, seed=9)
    assert torch.equal(counter_uniform(keys[17:18], 60, stream=3, seed=9), together[17:18, :60])
    assert torch.equal(counter_uniform(keys.flip(0), 100, stream=3, seed=9).flip(0), together)


def test_is_uniform():
    values = counter_uniform(torch.arange(100), 10_000, stream=0, seed=0)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 256, 0, 1)
    expected = values.numel() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 160 < chi_square < 370  # 255 degrees of freedom: seven standard deviations to either side are smaller


def test_neighbours_are_uncorrelated():
    num = 50_000
    grids = {
        "positions": counter_uniform(torch.arange(2), num + 1, stream=0, seed=0)[0].unfold(0, 2, 1).T,
        "keys": counter_uniform(torch.arange(2), num, stream=0, seed=0),
        "streams": torch.cat([counter_uniform(torch.arange(1), num, stream=stream, seed=0) for stream in (0, 1)]),
        "seeds": torch.cat([counter_uniform(torch.arange(1), num, stream=0, seed=seed) for seed in (0, 1)]),
    }
    for name, pair in grids.items():
        correlation = torch.corrcoef(pair)[0, 1].abs()
        assert correlation < 5 / num**0.5, name


def test_no_numbers():
    assert counter_uniform(torch.arange(3), 0, stream=0, seed=0).shape == (3, 0)
    assert counter_uniform(torch.arange(0), 4, stream=0, seed=0).shape == (0, 4)


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match=r"^keys:"):
        counter_uniform(torch.zeros(3), 4, stream=0, seed=0)
    with pytest.raises(ConfigError, match=r"^keys:"):
        counter_uniform(torch.zeros(3, 2, dtype=torch.int64), 4, stream=0, seed=0)
    with pytest.raises(ConfigError, match=r"^num:"):
        counter_uniform(torch.arange(3), -1, stream=0, seed=0)
