"""README.md of an exported folder: what the model is, what it was trained on, and how to open it."""

import json
from pathlib import Path
from typing import Any

import colt5dist
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.model.pretrained_form import TRANSFORMERS_CLASSES
from colt5dist.storage.checkpoints import read_json
from colt5dist.storage.complete_file import STATE
from colt5dist.storage.stored_model import StoredModel

HELD_OUT = {
    "eval/loss": "held-out loss (nats per target token)",
    "eval/bits_per_byte": "held-out bits per byte of target text",
    "eval/loss_shuffled_inputs": "held-out loss with another sample's input",
}
"""Figures of the card, by their keys in metrics.jsonl."""
HELD_OUT_OF_AVERAGE = {"eval/ema/loss": HELD_OUT["eval/loss"]}
"""The same, where the weights are the moving average."""


def model_card(stored: StoredModel, model: CoLT5 | CausalCoLT5) -> str:
    """Text of the card.

    Args:
        stored: a checkpoint in its run folder.
        model: the model that was read from it.
    """
    _, auto = TRANSFORMERS_CLASSES[model.architecture]
    data = stored.settings["data"]
    number = sum(p.numel() for p in model.parameters())
    rows = [("parameters", f"{number:,}"), ("optimizer steps", f"{stored.step:,}")]
    if stored.is_average:
        rows.append(("weights", "their exponential moving average"))
    try:
        state = read_json(stored.folder / STATE, fix="use another checkpoint").get("state", {})
    except ConfigError:
        state = {}
    if state.get("samples_consumed"):
        rows.append(("samples", f"{state['samples_consumed']:,}"))
    rows.append(("lengths", f"{data.get('input_length')} input and {data.get('target_length')} target tokens"))
    rows.append(("objectives (`data.mixture`)", _objectives(data.get("mixture"))))
    if state.get("data_fingerprint"):
        rows.append(("fingerprint of the training text", f"`{state['data_fingerprint']}`"))
    record = last_evaluation(stored.root / "metrics.jsonl", stored.step)
    figures = HELD_OUT_OF_AVERAGE if stored.is_average else HELD_OUT
    rows += [(label, f"{record[key]:.4f}") for key, label in figures.items() if record.get(key) is not None]
    rows += [(name, str(version)) for name, version in _versions(stored.root / "environment.json").items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    kind = "decoder-only CausalCoLT5" if model.architecture == "causal" else "CoLT5 encoder-decoder"
    return f"""---
library_name: transformers
tags: [colt5, long-document]
---

# A {kind}

It was trained with colt5dist {colt5dist.__version__}, whose layers it needs: `pip install '/path/to/colt5dist[hf]'`,
where the path is that of a checkout of colt5dist, or of a wheel of it.

```python
FOLDER = "."  # the folder of this file

from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

or, without transformers, `model, tokenizer = colt5dist.load(FOLDER)`.

| | |
|---|---|
{table}
"""


def last_evaluation(path: Path, step: int) -> dict[str, Any]:
    """The record of a run's last evaluation up to a step; empty where there is none that can be read.

    Args:
        path: metrics.jsonl.
        step: the step.
    """
    found: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("eval/loss") is not None and record.get("step", step + 1) <= step:
            found = record
    return found


def _objectives(mixture: Any) -> str:
    """The mixture, and behind the name of one the objectives that it stands for."""
    try:
        names = ", ".join(parse_mixture(mixture).names)
    except (ConfigError, TypeError):
        return str(mixture)
    return mixture if mixture == names else f"{mixture}: {names} (span_N: spans of about N tokens are removed)"


def _versions(path: Path) -> dict[str, Any]:
    """Versions of the packages that the run used."""
    try:
        packages = read_json(path, fix="").get("packages", {})
    except ConfigError:
        return {}
    return {name: packages[name] for name in ("torch", "deepspeed", "triton") if packages.get(name)}
