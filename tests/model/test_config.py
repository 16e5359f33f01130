"""The model's configuration: sizes as published, and wrong values named."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from colt5dist.model import CoLT5, CoLT5Config

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def read(name):
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(CoLT5Config), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    )


def num_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CoLT5(config).parameters())


@pytest.mark.parametrize(("name", "millions"), [("base", 433), ("large", 1462), ("xl", 5297)])
def test_published_sizes(name, millions):
    config = read(name)
    assert config.problems() == []
    assert num_parameters(config) == pytest.approx(millions * 1e6, rel=0.01)


def test_base_is_the_default():
    assert read("base") == CoLT5Config()


def test_tiny_is_a_few_million_parameters():
    assert 2e6 < num_parameters(read("tiny")) < 5e6


def test_dense_baseline_is_smaller_and_controls_own_no_router():
    base = num_parameters(CoLT5Config())
    # T5.1.1-Base has 248 million; here one key/value head serves the twelve of each cross-attention
    shared_heads = 12 * 2 * 768 * 11 * 64
    assert num_parameters(CoLT5Config(encoder="dense")) == pytest.approx(248e6 - shared_heads, rel=0.01)
    for routing in ("static", "random"):
        assert base - num_parameters(CoLT5Config(routing=routing)) == 12 * 3 * 768


@pytest.mark.parametrize(
    ("fields", "multiple", "length", "routed"),
    [
        ({}, 8, 4096, (512, 512, 1024)),
        ({"num_heavy_tokens": 0.0625}, 16, 16384, (1024, 1024, 2048)),
        ({"num_heavy_tokens": 0.1}, 10, 50, (5, 5, 10)),
        ({"heavy_key_value_ratio": 1.5}, 16, 64, (8, 8, 12)),
        ({"heavy_key_value_ratio": 8.0}, 8, 64, (8, 8, 64)),
        ({"num_heavy_tokens": 1.0, "heavy_key_value_ratio": 1.0}, 1, 7, (7, 7, 7)),
        # a share times a ratio has a denominator above that of either
        ({"num_heavy_tokens": 1 / 4096, "heavy_key_value_ratio": 0.5}, 8192, 8192, (2, 2, 1)),
        ({"num_heavy_tokens": 1 / 4095, "heavy_key_value_ratio": 1.5}, 8190, 8190, (2, 2, 3)),
        ({"num_heavy_tokens": 1 / 3, "heavy_key_value_ratio": 3.0}, 3, 6, (2, 2, 6)),
        ({"encoder": "dense"}, 1, 7, (0, 0, 0)),
        ({"encoder": "light"}, 1, 7, (0, 0, 0)),
    ],
)
def test_budgets_are_whole_numbers(fields, multiple, length, routed):
    config = CoLT5Config(**fields)
    assert config.problems() == []
    assert config.input_multiple == multiple
    assert config.num_routed(length) == routed
    if multiple > 1:
        with pytest.raises(ValueError, match="multiple"):
            config.num_routed(length + 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 32100),
        ("vocab_size", 0),
        ("d_model", 0),
        ("num_encoder_layers", 0),
        ("head_dim", 63),
        ("num_heavy_heads", -1),
        ("encoder", "sparse"),
        ("light_positions", "alibi"),
        ("routing", "hash"),
        ("num_heavy_tokens", 0.0),
        ("num_heavy_tokens", 1e-5),
        ("num_heavy_tokens", 512.0),
        ("num_heavy_tokens", float("nan")),
        ("heavy_key_value_ratio", 9.0),
        ("heavy_key_value_ratio", 0.0),
        ("heavy_key_value_ratio", 1e-5),
        ("heavy_key_value_ratio", float("inf")),
        ("light_radius", 0),
        ("fetch_k_ratio", 0.9),
        ("fetch_k_ratio", float("inf")),
        ("router_scores", "hard"),
        ("router_eps", 0.0),
        ("router_eps", float("inf")),
        ("router_n_iters", 0),
        ("router_eps_init", -1.0),
        ("router_eps_init", float("inf")),
        ("router_eps_decay", 1.1),
        ("router_solver", "sinkhorn"),
        ("router_implementation", "cuda"),
        ("router_noise", -0.5),
        ("router_noise", float("inf")),
        ("rope_theta", 0.0),
        ("norm_eps", -1e-6),
        ("initializer_range", 0.0),
        ("embedding_init_std", -1.0),
    ],
)
def test_wrong_values_are_named_with_what_to_use(field, value):
    config = CoLT5Config(**{field: value})
    (problem,) = config.problems()
    assert problem.startswith(f"model.{field}: ") and "use " in problem
    with pytest.raises(ValueError, match=f"model.{field}"), torch.device("meta"):
        CoLT5(config)


def test_a_solver_that_an_implementation_lacks_is_refused():
    (problem,) = CoLT5Config(router_solver="newton", router_implementation="reference").problems()
    assert problem.startswith("model.router_implementation: ") and "use " in problem


def test_all_problems_are_listed():
    assert len(CoLT5Config(vocab_size=1, routing="hash", num_heavy_tokens=0.0).problems()) == 3


def test_structured_by_omegaconf():
    merged = OmegaConf.merge(
        OmegaConf.structured(CoLT5Config), OmegaConf.from_dotlist(["router_eps_init=4", "routing=random"])
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, CoLT5Config) and config.router_eps_init == 4.0 and config.routing == "random"
