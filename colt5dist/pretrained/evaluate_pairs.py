"""What `launch/evaluate.py --pairs` does: the model writes a text for each input, which is scored against the targets.

The batches are the same for any number of processes, so the texts and scores are too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer
from colt5dist.errors import ConfigError
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.pretrained.load import AVERAGED, model_class
from colt5dist.pretrained.metrics import METRICS, check_metrics, mean_scores, score_text
from colt5dist.pretrained.pairs import PairSample, read_pairs
from colt5dist.pretrained.processes import gather_over_processes
from colt5dist.pretrained.write_texts import write_objects, write_texts
from colt5dist.storage.stored_model import open_stored


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model wrote for a sample."""

    sample: PairSample
    """The sample."""
    text: str
    """The text."""
    scores: dict[str, float]
    """Its scores by name, from 0 to 1."""

    def as_json(self) -> dict[str, Any]:
        """As a file of predictions has it; the input, which may be long, is left out."""
        named = {} if self.sample.id is None else {"id": self.sample.id}
        references = list(self.sample.references)
        return {"line": self.sample.line, **named, "prediction": self.text, "references": references, **self.scores}


@dataclass(frozen=True, kw_only=True)
class PairsReport:
    """The scores of one model on one file of pairs."""

    path: str
    """The checkpoint or the exported folder."""
    step: int
    """Steps that the model was trained for."""
    ema: bool
    """Whether its weights are the moving average."""
    pairs: str
    """The file."""
    predictions: list[Prediction]
    """Of each sample, in the order of the file."""

    def as_json(self) -> dict[str, Any]:
        """One object: the mean scores, and of how many samples."""
        means = mean_scores([prediction.scores for prediction in self.predictions])
        num_references = sum(len(prediction.sample.references) for prediction in self.predictions)
        counts = {"num_samples": len(self.predictions), "num_references": num_references}
        return {"path": self.path, "step": self.step, "ema": self.ema, "pairs": self.pairs, **means, **counts}

    def lines(self) -> list[str]:
        """For a person."""
        found = self.as_json()
        counts = f"{found['num_samples']:,} samples, {found['num_references']:,} references"
        scores = [name for name in found if isinstance(found[name], float)]
        width = max(map(len, scores))
        table = [f"  {name:{width}}  {found[name]:.4f}" for name in scores]
        return [
            f"{self.path}, step {self.step}{AVERAGED * self.ema}",
            f"{self.pairs}: {counts}; scores from 0 to 1",
            *table,
        ]


def evaluate_stored_pairs(
    path: str,
    pairs: Path,
    *,
    device: torch.device,
    step: int | str | None = None,
    ema: bool = False,
    num_samples: int | None = None,
    predictions: Path | None = None,
    input_key: str = "input",
    target_key: str = "output",
    id_key: str = "id",
    rank: int = 0,
    world_size: int = 1,
    max_new_tokens: int = 256,
    **settings: Any,
) -> PairsReport:
    """Load a model and evaluate it on a file of pairs; collective.

    Args:
        path: a run folder, a checkpoint inside one, or an exported folder.
        pairs: the file, as `read_pairs` takes it.
        device: where to evaluate: in bf16 on a GPU, in fp32 on the CPU.
        step: of a run folder, the step of the checkpoint, or "best".
        ema: whether to take the moving average of its weights, which a checkpoint holds if `train.ema` was set.
        num_samples: only so many samples, the first ones; None: all.
        predictions: file for what was written, which process 0 writes; None: none.
        input_key: key of the input.
        target_key: key of the target.
        id_key: key that is the same in all pairs of one input.
        rank: number of this process.
        world_size: number of processes, which are joined where there are several.
        max_new_tokens: most tokens of a text.
        settings: `metrics`, `batch_size`, and others of `CoLT5.generate`, as `evaluate_pairs` takes them.

    Raises:
        ConfigError: the model, the file, a pair or a setting is wrong.
    """
    check_metrics(settings.get("metrics", ()))
    if predictions and not predictions.absolute().parent.is_dir():
        raise ConfigError(f"{predictions}: its folder does not exist; make it first")
    samples = read_pairs(pairs, input_key=input_key, target_key=target_key, id_key=id_key)[:num_samples]
    stored = open_stored(path, step, ema=ema)
    tokenizer = ModelTokenizer.open(stored.root / TOKENIZER_FOLDER)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model_class(stored).from_stored(stored, dtype=dtype, device=device)
    settings["max_new_tokens"] = max_new_tokens
    found = evaluate_pairs(model, tokenizer, samples, rank=rank, world_size=world_size, **settings)
    if predictions and rank == 0:
        write_objects(predictions, [prediction.as_json() for prediction in found])
    return PairsReport(path=str(stored.folder), step=stored.step, ema=ema, pairs=str(pairs), predictions=found)


def evaluate_pairs(
    model: CoLT5 | CausalCoLT5,
    tokenizer: ModelTokenizer,
    samples: Sequence[PairSample],
    *,
    metrics: Sequence[str] = tuple(METRICS),
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> list[Prediction]:
    """Write a text for each sample and score it; collective.

    Samples of like length share a batch, the longest first, so that little is padded and too large a batch fails at
    once. Process r handles the batches r, r + world_size, and so on.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        samples: one or more, the same in all processes.
        metrics: names of `metrics.METRICS`.
        batch_size: samples at a time.
        rank: number of this process.
        world_size: number of processes, which are joined where there are several.
        settings: `max_new_tokens` and the other settings of `CoLT5.generate`, for one text of each sample.

    Returns:
        The predictions in the order of `samples`, the same in all processes.

    Raises:
        ConfigError: a text or a setting is wrong.
    """
    check_metrics(metrics)
    order = sorted(range(len(samples)), key=lambda number: -len(samples[number].text))
    found: list[tuple[int, str, dict[str, float]]] = []
    failure = ""
    for first in range(rank * batch_size, len(samples), world_size * batch_size):
        numbers = order[first : first + batch_size]
        batch = [samples[number] for number in numbers]
        try:
            written = write_texts(model, tokenizer, [s.text for s in batch], first_index=first, **settings)
        except ValueError as error:  # told to the other processes, which would wait for this one
            failure = str(error).splitlines()[0]
            if isinstance(error, ConfigError):  # the fault of a text
                failure = f"input of line {' or '.join(str(sample.line) for sample in batch)}: {failure}"
            break
        for number, sample, (text,) in zip(numbers, batch, written, strict=True):
            found.append((number, text, score_text(text, sample.references, metrics)))
    by_process = gather_over_processes({"failure": failure, "found": found})
    for answer in by_process:
        if answer["failure"]:
            known = ConfigError(answer["failure"])
            known.known_to_all = True
            raise known
    return [
        Prediction(sample=samples[number], text=text, scores=scores)
        for number, text, scores in sorted(chain.from_iterable(answer["found"] for answer in by_process))
    ]
