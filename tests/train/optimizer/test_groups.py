"""Which parameters are decayed and are Muon's, by their names and shapes in each kind of model."""

from pathlib import Path

import pytest

from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import OptimizerConfig
from colt5dist.train.engine.engine import build_model
from colt5dist.train.optimizer.groups import build_optimizer, muon_matrices, num_moments

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
    muon = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.3))
    groups = {bool(group.get("is_muon")): {names[id(p)] for p in group["params"]} for group in muon.param_groups}
    assert groups == {True: by_decay[0.3], False: by_decay[0.0]}
    for rule in ("adamw", "muon"):
        faster = build_optimizer(model, OptimizerConfig(name=rule, weight_decay=0.3, router_lr_factor=4.0))
        by_factor = [(g.get("lr_factor", 1.0), {names[id(p)] for p in g["params"]}) for g in faster.param_groups]
        routers = {parameter for parameter in names.values() if "router" in parameter}
        expected = [(1.0, by_decay[0.3]), (1.0, by_decay[0.0] - routers), (4.0, routers)]
        assert by_factor == (expected if routers else expected[:2])
        assert bool(routers) == (not {"model.encoder=dense", "model.encoder=light"} & set(settings))
    matrices = muon_matrices(model)
    assert set(matrices) == by_decay[0.3]
    for parameter, matrix in matrices.items():
        part = parameter.split(".")[-2]
        assert (matrix.rows, matrix.columns) == model.get_parameter(parameter).shape
        assert matrix.num_maps == {"to_qkv": 3, "to_kv": 2, "to_hidden": 2}.get(part, 1)
        heads = model.get_submodule(parameter.rsplit(".", 2)[0]).heads if "heavy_attn.to_kv" in parameter else 1
        assert matrix.outer == heads
    shapes = {parameter: tuple(p.shape) for parameter, p in model.named_parameters()}
    total, of_muon = sum(p.numel() for p in model.parameters()), sum(m.num_elements for m in matrices.values())
    assert num_moments(shapes, OptimizerConfig(name="muon")) == 2 * total - of_muon
    assert num_moments(shapes, OptimizerConfig()) == 2 * total
