"""Counts the operators and host reads of one optimizer step on a CPU; started by test_step_budget.py.

python tests/train/step_budget.py OUTPUT SETTING...
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import Engine
from colt5dist.train.losses import LossSums, count_target_tokens
from colt5dist.train.ranks import finish_process_group, initialise_process_group, ranks_from_environment

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/train/engine"))

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
"""Operators that give a number of a tensor to Python; `tolist` is counted beside them."""


class Count(TorchDispatchMode):
    """Counts operators below autograd by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def main(output: Path, settings: list[str]) -> None:
    """Take a step, count in the next one."""
    from zero_matrix import TINY, micro_batches

    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    results = {}
    for stage in (1, 2):
        config = load_config(TINY, [*settings, f"zero.stage={stage}"])
        engine = Engine(config, ranks.world_size, device, flat_gradients=True)
        reads = 0

        def counted(tensor: torch.Tensor, tolist: Any = torch.Tensor.tolist) -> Any:
            nonlocal reads
            reads += 1
            return tolist(tensor)

        for step in (1, 2):
            batches = micro_batches(config, step, 0, 1)
            reads = 0
            with Count() as count, patch.object(torch.Tensor, "tolist", counted):
                num_targets = count_target_tokens(batches, device)
                sums = LossSums(("a", "b", "c", "d"), device)
                for batch in batches:
                    sums.add(*engine.forward_backward(batch, num_targets))
                means = sums.read(on_device=[engine.gradients.summary()])
                assert engine.gradients.are_finite(means.extra)
                engine.step(0.001)
        scalars = sum(count.names[name] for name in READS)
        results[str(stage)] = {
            "micro_batches": len(batches),
            "operators": sum(count.names.values()),
            "reads": reads + scalars,
            "names": dict(count.names.most_common(12)),
        }
    output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
