"""Which parameters are decayed, by their names and shapes in each kind of model."""

from pathlib import Path

import pytest
from colt5dist.train.engine.optimizer import build_optimizer

from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import OptimizerConfig
from colt5dist.train.engine.engine import build_model

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MATRICES = ("to_qkv.weight", "to_q.weight", "to_kv.weight", "to_hidden.weight", "to_out.weight")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny", []),
        ("tiny", ["model.light_positions=relative"]),
        ("tiny", ["model.encoder=dense"]),
        ("tiny", ["model.encoder=light"]),
        ("causal_tiny", []),
    ],
    ids=["rotary", "relative", "dense", "light", "causal"],
)
def test_only_the_projections_are_decayed(name: str, settings: list[str]) -> None:
    """Not norms, embeddings, routing vectors, and the biases of relative positions."""
    model = build_model(load_config(CONFIGS / f"{name}.yaml", settings))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(p): parameter for parameter, p in model.named_parameters()}
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert by_decay[0.3] == {parameter for parameter in names.values() if parameter.endswith(MATRICES)}
    assert by_decay[0.0] == set(names.values()) - by_decay[0.3]
    assert ("model.light_positions=relative" in settings) == any("relative_bias" in n for n in by_decay[0.0])
