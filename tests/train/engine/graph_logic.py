"""Runs the engine's fast path on a CPU with passes that are repeated in place of CUDA graphs; writes what came out.

    python tests/train/engine/graph_logic.py OUTPUT SETTING...

What a GPU does is in test_fast_path_gpu.py; here it is which form gets a graph, what its memory holds at each call,
that the proof leaves no gradient behind, and what follows when a capture, or what it computes, is wrong.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.model.colt5 import CoLT5Output
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.micro_batch_graph import MicroBatchGraphs
from colt5dist.train.losses import LossSums, count_target_tokens
from colt5dist.train.ranks import finish_process_group, initialise_process_group, ranks_from_environment

sys.path.insert(0, str(Path(__file__).resolve().parent))
STEPS = 4


class Repeated(MicroBatchGraphs):
    """Repeats the passes with the memory that a graph would have."""

    captures = 0
    broken = ""

    def _capture(self, batch: Batch) -> tuple[Callable[[], None], CoLT5Output]:
        self.captures += 1
        if self.broken == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        size = (len(batch["target_ids"]), batch["target_ids"].shape[1])
        output = CoLT5Output(torch.zeros(size), torch.zeros(size), ())
        scale = 2.0 if self.broken == "loss" else 1.0

        def replay() -> None:
            found = self._run(batch, self._num_targets)
            output.token_loss.copy_(found.token_loss * scale)
            output.z_loss.copy_(found.z_loss)

        return replay, output


def train(config: RunConfig, kind: str) -> dict[str, Any]:
    """Train some steps; kind: "plain", "graphs", or what is broken in the graphs."""
    from fast_path import micro_batches

    ranks = ranks_from_environment()
    engine = Engine(config, 1, torch.device("cpu"), flat_gradients=True)
    graphs = Repeated(engine._pass, engine.device)
    graphs.broken = kind
    if kind != "plain":
        engine.forms.begin(engine._pass, engine.gradients, graphs=True)
        engine.forms.graphs, engine.forms.compiled = graphs, True
    losses, news = [], []
    for step in range(1, STEPS + 1):
        batches = engine.arrange(micro_batches(config, step, ranks))
        count = count_target_tokens(batches, engine.device)
        sums = LossSums(("a", "b", "c", "d"), engine.device)
        routing = 0
        for number, batch in enumerate(batches):
            on_device, output = engine.forward_backward(batch, count, collect_routing=number == len(batches) - 1)
            sums.add(on_device, output)
            routing = len(output.routing)
        means = sums.read(on_device=[engine.gradients.summary()])
        assert engine.gradients.are_finite(means.extra)
        _, norm = engine.step(0.003)
        losses.append([means.loss, norm])
        news += engine.forms.news
        engine.forms.news.clear()
    return {
        "losses": losses,
        "news": news,
        "captures": graphs.captures,
        "graphs": engine.forms.graphs is not None,
        "routing": routing,
    }


def main(output: Path, settings: list[str]) -> None:
    """Train every kind."""
    initialise_process_group(ranks_from_environment(), 5)
    own = ["train.global_batch_size=12", "train.micro_batch_size=2", "zero.stage=1"]
    config = load_config(Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml", [*settings, *own])
    results = {kind: train(config, kind) for kind in ("plain", "graphs", "capture", "loss")}
    output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
