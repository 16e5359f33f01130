"""TensorBoard's tags: every key of metrics.jsonl has one of its own, in a group that sorts by weight."""

import re
from pathlib import Path

import pytest

from colt5dist.train.report.tensorboard.hyperparameters import METRICS
from colt5dist.train.report.tensorboard.tags import TABLE, layout, place

ROOT = Path(__file__).resolve().parents[4]
GROUPS = ["1_loss", "2_scores", "3_routing", "4_speed", "5_health", "6_data", "7_other"]
NOTES = {"step", "skipped_batch", "not_finite_samples"}
"""What a record has beside numbers."""


def documented_keys() -> list[str]:
    """Keys of the table in the room's page, with the variable parts filled in."""
    page = (ROOT / "colt5dist/train/report/README.md").read_text().split("## metrics.jsonl")[1].split("\n## ")[0]
    keys = [key for line in re.findall(r"^\| (`.+?) \|", page, re.MULTILINE) for key in re.findall(r"`(.+?)`", line)]
    names = {"OBJECTIVE": "span_3", "LL": "00", "ROUTER": "query"}
    for name, value in names.items():
        keys = [key.replace(name, value) for key in keys]
    return [key for key in keys if key not in NOTES]


def test_every_documented_key_has_a_line_and_a_tag_of_its_own() -> None:
    keys = documented_keys()
    assert len(keys) > 20
    places = [place(key) for key in keys]
    assert len({found.tag for found in places}) == len(keys)
    fallbacks = {description for pattern, _, description in TABLE if pattern.startswith("(?P<name>")}
    assert not {found.description for found in places} & fallbacks


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        ("loss", "1_loss/all/train"),
        ("eval/loss", "1_loss/all/held_out"),
        ("eval/loss/prefix_lm", "1_loss/by_objective/prefix_lm/held_out"),
        ("eval/books/loss", "1_loss/by_set/books"),
        ("eval/books/loss/prefix_lm", "1_loss/by_set/books/prefix_lm"),
        ("eval/books/bits_per_byte", "1_loss/by_set/books/bits_per_byte"),
        ("eval/ema/loss", "1_loss/all/held_out/ema"),
        ("eval/ema/books/loss", "1_loss/by_set/books/ema"),
        ("eval/rouge1", "2_scores/rouge1"),
        ("eval/books/f1", "2_scores/f1/books"),
        ("router/layer_11/key_value/mean_score", "3_routing/mean_score/key_value/layer_11"),
        ("router/new/statistic", "3_routing/new/statistic"),
        ("checkpoint_seconds", "4_speed/checkpoint_seconds"),
        ("update_norm/decoder", "5_health/update_norm/decoder"),
        ("documents_of_epoch", "6_data/documents_of_epoch"),
        ("aux_loss", "1_loss/aux_loss"),
        ("something", "7_other/something"),
    ],
)
def test_tags(key: str, tag: str) -> None:
    assert place(key).tag == tag and place(key).description


def test_groups_sort_by_weight_and_are_few() -> None:
    used = {tag.split("/")[0] for _, tag, _ in TABLE}
    assert sorted(used) == GROUPS


def test_every_number_has_a_sentence_and_those_to_watch_say_what_is_healthy() -> None:
    assert all(description.endswith(".") for _, _, description in TABLE)
    for key in (*METRICS, "tokens_per_second", "router/layer_00/query/clipped_share", "skipped_steps"):
        if key != "eval/bits_per_byte":
            assert "Healthy:" in place(key).description, key
    assert "average of the weights" in place("eval/ema/loss").description


def test_charts_join_what_belongs_together_and_only_what_is_there() -> None:
    keys = ["loss", "eval/loss", "grad_norm", "router/layer_00/query/mean_score", "router/layer_01/query/mean_score"]
    tags = [place(key).tag for key in keys]
    charts = {title: patterns for of in layout(tags).values() for title, (_, patterns) in of.items()}
    shown = {
        title: [tag for tag in tags if any(re.match(p, tag) for p in patterns)] for title, patterns in charts.items()
    }
    assert shown == {
        "training and held-out loss": tags[:2],
        "gradient norm": tags[2:3],
        "mean score by layer: query": tags[3:],
    }
    more = layout([*tags, place("eval/books/loss").tag, place("eval/f1").tag])
    assert "loss by validation set" in more["1 loss"] and "2 scores" in more
