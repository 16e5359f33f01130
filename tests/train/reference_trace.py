"""Trains the micro model with train.deterministic=true on the CPU and writes the loss and gradient norm of each step.

    python tests/train/reference_trace.py tests/train/reference_trace.json      # overwrites the committed trace

A change of the trace means that a run computes something else: overwrite it only if that is intended, and say so in
CHANGELOG.md. `--steps N` trains fewer than 50 steps.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colt5dist.train.report.monitor import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Return what the rounding of float32 sums depends on."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": models[0] if models else "unknown",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def train(folder: Path, steps: int) -> list[list[float]]:
    """Train in a new folder, on text that is the same everywhere; returns loss and gradient norm of each step."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "launch")]
    from conftest import MICRO_SETTINGS, write_short_texts
    from pretrain import main

    shards = write_short_texts(folder / "shards", 400)
    settings = [f"run_dir={folder / 'run'}", f"data.shards={shards}", *MICRO_SETTINGS]
    settings += ["train.deterministic=true", f"train.steps={steps}", "train.eval_samples=2", "train.routing_every=0"]
    assert main(settings) == 0
    return [[record["loss"], record["grad_norm"]] for record in read_metrics(folder / "run")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = train(Path(folder), options.steps)
    rows = ",\n  ".join(json.dumps(row) for row in trace)
    options.output.write_text(
        f'{{\n "environment": {json.dumps(environment())},\n "loss_and_gradient_norm": [\n  {rows}\n ]\n}}\n'
    )
