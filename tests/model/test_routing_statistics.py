"""Routing statistics against counting in Python."""

import pytest
import torch

from colt5dist.model import routed_position_histograms, routing_statistics

ROUTERS = ("feed_forward", "query", "key_value")


def routed_sets(tokens, mask):
    """For each sample the set of valid positions that were picked."""
    return [{i for i in row if mask[b][i]} for b, row in enumerate(tokens.indices.tolist())]


@pytest.mark.parametrize(
    "fields", [{}, {"routing": "static"}, {"heavy_key_value_ratio": 8.0}], ids=["learned", "static", "all keys"]
)
@pytest.mark.parametrize("masked", [True, False])
def test_equal_naive_counting(build, batch, fields, masked):
    if not masked:
        batch["input_mask"] = None
    # scores wide enough that some saturate
    model = build(**fields)
    for name, parameter in model.named_parameters():
        if "routing_tokens" in name:
            parameter.data.mul_(6)
    routing = model(**batch, collect_routing=True).routing
    input_mask = batch["input_mask"]
    statistics = routing_statistics(routing, input_mask)
    histograms = routed_position_histograms(routing, input_mask, num_bins=5)
    mask = (torch.ones(4, 64, dtype=torch.bool) if input_mask is None else input_mask).tolist()
    num_valid = sum(map(sum, mask))
    seen = {name: [set() for _ in mask] for name in ROUTERS}
    expected_keys = {f"router/unrouted_share/{name}" for name in ROUTERS}
    for number, layer in enumerate(routing):
        prefix = f"router/layer_{number:02d}"
        expected_keys |= {f"{prefix}/query_key_value_overlap"}
        for name in ROUTERS:
            tokens = getattr(layer, name)
            expected_keys |= {f"{prefix}/{name}/mean_score", f"{prefix}/{name}/clipped_share"}
            routed = routed_sets(tokens, mask)
            soft = tokens.soft_scores.tolist()
            scores = [soft[b][i] for b, positions in enumerate(routed) for i in positions]
            clipped = sum(soft[b][i] >= 1 for b in range(4) for i in range(64) if mask[b][i])
            bins = [0] * 5
            for b, positions in enumerate(routed):
                seen[name][b] |= positions
                for i in positions:
                    bins[i * 5 // sum(mask[b])] += 1
            assert statistics[f"{prefix}/{name}/mean_score"].item() == pytest.approx(
                sum(scores) / len(scores), rel=1e-5
            )
            assert statistics[f"{prefix}/{name}/clipped_share"].item() == pytest.approx(clipped / num_valid, rel=1e-5)
            assert histograms[f"{prefix}/{name}/positions"].tolist() == bins
        query, key_value = (routed_sets(tokens, mask) for tokens in (layer.query, layer.key_value))
        both = sum(len(q & k) for q, k in zip(query, key_value, strict=True))
        share = both / sum(map(len, query))
        assert statistics[f"{prefix}/query_key_value_overlap"].item() == pytest.approx(share, rel=1e-5)
    for name in ROUTERS:
        unrouted = 1 - sum(map(len, seen[name])) / num_valid
        assert statistics[f"router/unrouted_share/{name}"].item() == pytest.approx(unrouted, abs=1e-6)
    assert set(statistics) == expected_keys
    if not fields:
        assert 0 < statistics["router/layer_00/query/clipped_share"].item() < 1


def test_wholly_masked_batch_is_finite(build, batch):
    batch["input_mask"] = torch.zeros_like(batch["input_mask"])
    routing = build()(**batch, collect_routing=True).routing
    statistics = routing_statistics(routing, batch["input_mask"])
    assert all(value.item() == 0 for value in statistics.values())
    histograms = routed_position_histograms(routing, batch["input_mask"])
    assert all(counts.shape == (64,) and counts.sum() == 0 for counts in histograms.values())


def test_dense_encoder_has_none(build, batch):
    routing = build(encoder="dense")(**batch, collect_routing=True).routing
    assert routing == () and routing_statistics(routing) == {} and routed_position_histograms(routing) == {}
