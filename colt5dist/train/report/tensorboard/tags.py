"""From the keys of metrics.jsonl to TensorBoard's tags: the one table, with a description of every number.

TensorBoard makes a group of all tags that begin alike, and sorts the groups by name. So a group's name begins with a
digit: what is looked at first comes first. A key that no line of the table knows goes to the group that fits its name.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

LOSS, SCORES, ROUTING, SPEED, HEALTH, DATA, OTHER = (
    "1_loss",
    "2_scores",
    "3_routing",
    "4_speed",
    "5_health",
    "6_data",
    "7_other",
)
"""The groups, in the order in which they are shown."""


class Place(NamedTuple):
    """Where TensorBoard shows a number."""

    tag: str
    """The tag; it begins with the group."""
    description: str
    """What the number is, its unit, and what is healthy, as Markdown."""


NATS = "in nats per target token"
TABLE: tuple[tuple[str, str, str], ...] = (
    # loss
    (
        r"loss",
        f"{LOSS}/all/train",
        f"Training loss of the step, {NATS}, over the global batch. Healthy: falls quickly at first, then ever more "
        "slowly, without jumps.",
    ),
    (
        r"loss/(?P<objective>.+)",
        f"{LOSS}/by_objective/{{objective}}/train",
        f"Training loss of the samples of one objective, {NATS}. Objectives differ in difficulty: compare each with "
        "itself.",
    ),
    (
        r"eval/loss",
        f"{LOSS}/all/held_out",
        f"Loss on the held-out samples, {NATS}; the same samples every time. Healthy: near the training loss. Rising "
        "while the training loss falls: the model memorises its text.",
    ),
    (
        r"eval/loss/(?P<objective>[^/]+)",
        f"{LOSS}/by_objective/{{objective}}/held_out",
        f"Held-out loss of the samples of one objective, {NATS}.",
    ),
    (
        r"eval/bits_per_byte",
        f"{LOSS}/bits_per_byte",
        "Held-out loss in bits per byte of target text. Compares runs whose tokenizers differ; lower is better.",
    ),
    (
        r"eval/loss_shuffled_inputs",
        f"{LOSS}/shuffled_inputs",
        f"Held-out loss when the decoder is given the encoder output of another sample, {NATS}. Healthy: above the "
        "held-out loss, and ever further. Equal to it: the decoder does not use the encoder yet.",
    ),
    (
        r"z_loss",
        f"{LOSS}/z_loss",
        "Squared log-normaliser of the output softmax, a mean over target tokens, before its weight `train.z_loss`. "
        "Healthy: stays small. Growing steadily: the logits drift.",
    ),
    (
        r"eval/(?P<set>[^/]+)/loss",
        f"{LOSS}/by_set/{{set}}",
        f"Loss on one validation set, {NATS}. Healthy: falls with the others.",
    ),
    (
        r"eval/(?P<set>[^/]+)/loss/(?P<objective>[^/]+)",
        f"{LOSS}/by_set/{{set}}/{{objective}}",
        f"Loss of the samples of one objective on one validation set, {NATS}.",
    ),
    (
        r"eval/(?P<set>[^/]+)/(?P<name>bits_per_byte|loss_shuffled_inputs)",
        f"{LOSS}/by_set/{{set}}/{{name}}",
        "The figure of the same name on one validation set.",
    ),
    (
        r"eval/(?P<name>[^/]+)",
        f"{SCORES}/{{name}}",
        "A score on held-out samples, measured at an evaluation; for scores of written texts (ROUGE, F1, exact match) "
        "higher is better.",
    ),
    (
        r"eval/(?P<set>[^/]+)/(?P<name>.+)",
        f"{SCORES}/{{name}}/{{set}}",
        "A score on one validation set, measured at an evaluation.",
    ),
    # routing
    (
        r"router/unrouted_share/(?P<router>\w+)",
        f"{ROUTING}/all_layers/unrouted_share/{{router}}",
        "Share of the tokens (0 to 1) that this router picked in no layer, in the last micro-batch of rank 0. Healthy: "
        "well above 0 and below 1 - num_heavy_tokens. At 1 - num_heavy_tokens every layer picks the same tokens.",
    ),
    (
        r"router/layer_(?P<layer>\d+)/(?P<router>\w+)/mean_score",
        f"{ROUTING}/mean_score/{{router}}/layer_{{layer}}",
        "Mean soft score (0 to 1) of the routed tokens of one router in one layer. Healthy: clearly above the share of "
        "routed tokens. Equal to it: the router tells no token from another.",
    ),
    (
        r"router/layer_(?P<layer>\d+)/(?P<router>\w+)/clipped_share",
        f"{ROUTING}/clipped_share/{{router}}/layer_{{layer}}",
        "Share of the tokens (0 to 1) whose soft score is saturated at 1, where it has no gradient. Healthy: at most "
        "half the share of routed tokens. At that share nearly all scores are 0 or 1, and the router learns no more.",
    ),
    (
        r"router/layer_(?P<layer>\d+)/query_key_value_overlap",
        f"{ROUTING}/query_key_value_overlap/layer_{{layer}}",
        "Share of the routed queries (0 to 1) that are also routed as keys/values. Healthy: any value that settles.",
    ),
    (
        r"router/layer_(?P<layer>\d+)/(?P<router>\w+)/positions",
        f"{ROUTING}/positions/{{router}}/layer_{{layer}}",
        "Where in the input the routed tokens are: 0 is the first token, 1 the last valid one. Healthy: spread out. A "
        "single peak: the router picks by position, not by content.",
    ),
    (r"router/(?P<rest>.+)", f"{ROUTING}/{{rest}}", "A statistic of the routers."),
    # speed
    (
        r"tokens_per_second",
        f"{SPEED}/tokens_per_second",
        "Valid input and target tokens per second of all ranks together, since the last logged step. Healthy: constant "
        "as long as the lengths are.",
    ),
    (
        r"step_seconds",
        f"{SPEED}/step_seconds",
        "Seconds per step of the slowest rank, a mean since the last logged step. Healthy: constant.",
    ),
    (
        r"mfu",
        f"{SPEED}/mfu",
        "Executed FLOPs per second as a share (0 to 1) of the devices' dense bf16 peak. Healthy: 0.3 and more for "
        "CoLT5-Base on H100s.",
    ),
    (
        r"peak_memory_bytes",
        f"{SPEED}/peak_memory_bytes",
        "Largest memory of a rank in bytes: on a GPU what PyTorch has reserved, on a CPU resident memory. Healthy: "
        "constant after the first steps.",
    ),
    # health
    (
        r"grad_norm",
        f"{HEALTH}/grad_norm",
        "Norm of the whole gradient before clipping. Healthy: falls from its first values and then stays within a "
        "narrow band. Single peaks are clipped; a steady rise announces that the run diverges.",
    ),
    (r"lr", f"{HEALTH}/learning_rate", "Learning rate of the step, as the schedule gives it."),
    (
        r"skipped_steps",
        f"{HEALTH}/skipped_steps",
        "Steps of the run so far that were left out because a loss or gradient was not finite. Healthy: 0.",
    ),
    (
        r"loss_spikes",
        f"{HEALTH}/loss_spikes",
        "Steps of the run so far whose loss was far above those before them. Healthy: 0, or a few.",
    ),
    (r"rollbacks", f"{HEALTH}/rollbacks", "How often the run went back to a checkpoint after a spike. Healthy: 0."),
    (
        r"bad_records",
        f"{DATA}/bad_records",
        "Damaged records of the run so far, each replaced by the next sample. Healthy: 0.",
    ),
    # data
    (
        r"data_wait_seconds",
        f"{DATA}/wait_seconds",
        "Seconds per step that the slowest reader made its rank wait. Healthy: near 0; otherwise raise "
        "`data.num_workers`.",
    ),
    (r"input_tokens", f"{DATA}/input_tokens", "Valid input tokens of the step, over all ranks. Healthy: constant."),
    (r"target_tokens", f"{DATA}/target_tokens", "Valid target tokens of the step, over all ranks. Healthy: constant."),
    # keys that have no line of their own
    (r"(?P<name>.*loss.*)", f"{LOSS}/{{name}}", "A part of the training loss."),
    (
        r"(?P<name>.*(seconds|per_second|flops|memory|bytes).*)",
        f"{SPEED}/{{name}}",
        "Time, work or memory of a step.",
    ),
    (
        r"(?P<name>.*(norm|grad|update|weight|logit|clip|skipped|spike|rollback|entropy|momentum).*)",
        f"{HEALTH}/{{name}}",
        "A number that shows whether training is stable.",
    ),
    (r"(?P<name>.*(token|record|sample|epoch|pass).*)", f"{DATA}/{{name}}", "A count of the data that was read."),
    (r"(?P<name>.*)", f"{OTHER}/{{name}}", "A number of metrics.jsonl."),
)
"""Patterns of keys, of which the first that fits counts, with tag and description."""
LINES = tuple((re.compile(pattern), tag, description) for pattern, tag, description in TABLE)
EMA = "eval/ema/"
"""Beginning of the keys that are measured with averaged weights; they are shown beside those of the weights."""


def place(key: str) -> Place:
    """Where TensorBoard shows a number of metrics.jsonl.

    Args:
        key: its key there; also `router/layer_LL/ROUTER/positions`, the name of a histogram.
    """
    if key.startswith(EMA):
        plain = place(f"eval/{key.removeprefix(EMA)}")
        return Place(f"{plain.tag}/ema", f"{plain.description} Measured with the average of the weights over steps.")
    for pattern, tag, description in LINES:
        if found := pattern.fullmatch(key):
            return Place(tag.format(**found.groupdict()), description)
    raise AssertionError(key)  # the last pattern fits every key


CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "1 loss": {
        "training and held-out loss": (rf"{LOSS}/all/(train|held_out)(/ema)?$",),
        "held-out loss by objective": (rf"{LOSS}/by_objective/[^/]+/held_out(/ema)?$",),
        "training loss by objective": (rf"{LOSS}/by_objective/[^/]+/train$",),
        "loss by validation set": (rf"{LOSS}/by_set/[^/]+(/ema)?$",),
        "held-out loss with another sample's input": (rf"{LOSS}/all/held_out$", rf"{LOSS}/shuffled_inputs$"),
    },
    "2 scores": {"scores of written texts": (rf"{SCORES}/[^/]+(/ema)?$",)},
    "3 routing": {
        "tokens that no layer routes": (rf"{ROUTING}/all_layers/unrouted_share/",),
        **{
            f"{title} by layer: {router.replace('_', ' ')}": (rf"{ROUTING}/{name}/{router}/",)
            for name, title in (("mean_score", "mean score"), ("clipped_share", "saturated share"))
            for router in ("feed_forward", "query", "key_value")
        },
        "queries that are also keys/values, by layer": (rf"{ROUTING}/query_key_value_overlap/",),
    },
    "4 speed": {
        "tokens per second": (rf"{SPEED}/tokens_per_second$",),
        "seconds per step, and of them waiting for data": (rf"{SPEED}/step_seconds$", rf"{DATA}/wait_seconds$"),
        "share of the devices' peak (MFU)": (rf"{SPEED}/mfu$",),
    },
    "5 health": {
        "gradient norm": (rf"{HEALTH}/grad_norm$",),
        "learning rate": (rf"{HEALTH}/learning_rate$",),
        "skipped steps, spikes, rollbacks, damaged records": (
            rf"{HEALTH}/(skipped_steps|loss_spikes|rollbacks)$",
            rf"{DATA}/bad_records$",
        ),
    },
}
"""Charts of several tags for the page "Custom Scalars": category -> chart -> patterns of the tags in it."""


def layout(tags: Iterable[str]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """The charts all of whose patterns fit a tag, as `SummaryWriter.add_custom_scalars` takes them.

    Args:
        tags: the tags that the run has written.
    """
    there = list(tags)
    charts = {
        category: {
            title: ("Multiline", list(patterns))
            for title, patterns in charts.items()
            if all(any(re.match(pattern, tag) for tag in there) for pattern in patterns)
        }
        for category, charts in CHARTS.items()
    }
    return {category: shown for category, shown in charts.items() if shown}
