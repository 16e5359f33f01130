"""Draws: their distribution, top_k and top_p, and what they depend on."""

import pytest
import torch

from colt5dist.model.generation.sampling import draw
from colt5dist.model.generation.settings import GenerationSettings

SHARES = torch.tensor([0.05, 0.4, 0.0, 0.15, 0.3, 0.1], dtype=torch.float64)
NUM_DRAWS = 10_000


def shares_of(probabilities, **settings):
    """How often each token is drawn with uniform numbers that are spread evenly."""
    uniform = ((torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS).unsqueeze(1)
    tokens = draw(probabilities.log().expand(NUM_DRAWS, -1), uniform, **settings)
    return tokens.bincount(minlength=len(probabilities)) / NUM_DRAWS


def test_tokens_are_drawn_by_their_probabilities():
    torch.testing.assert_close(shares_of(SHARES, temperature=1.0).double(), SHARES, rtol=0, atol=2 / NUM_DRAWS)


def test_temperature_is_an_exponent():
    expected = SHARES**2 / (SHARES**2).sum()
    torch.testing.assert_close(shares_of(SHARES, temperature=0.5).double(), expected, rtol=0, atol=2 / NUM_DRAWS)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 4, 3]),
        ({"top_k": 100}, [1, 4, 3, 5, 0]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.41}, [1, 4]),
        ({"top_p": 0.71}, [1, 4, 3]),
        ({"top_p": 1.0}, [1, 4, 3, 5, 0]),
        # of the two likeliest the first has 4/7 = 0.571
        ({"top_k": 2, "top_p": 0.57}, [1]),
        ({"top_k": 2, "top_p": 0.58}, [1, 4]),
    ],
    ids=str,
)
def test_only_the_likeliest_are_drawn(settings, kept):
    expected = torch.zeros_like(SHARES)
    expected[kept] = SHARES[kept] / SHARES[kept].sum()
    actual = shares_of(SHARES, temperature=1.0, **settings).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 / NUM_DRAWS)


def test_numbers_of_draws_are_a_function_of_seed_sample_sequence_and_step():
    settings = {"temperature": 1.0, "seed": 5, "num_return_sequences": 3}
    draws = GenerationSettings(max_new_tokens=50, **settings).draws(torch.tensor([7, 2**40]))
    alone = GenerationSettings(max_new_tokens=20, **settings | {"num_return_sequences": 2}).draws(torch.tensor([2**40]))
    assert torch.equal(draws[3:5, :20], alone)
    assert len(draws.unique()) == draws.numel()
    assert 0.4 < draws.mean() < 0.6 and draws.min() >= 0 and draws.max() < 1
