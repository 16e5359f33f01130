"""Evaluation by generated texts: answers to the inputs of held-out pairs, scored against their targets.

The pairs and their batches are the same for any number of ranks, and so are the texts and the scores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from colt5dist.data import held_out_batches
from colt5dist.data.model_tokenizer import TOKENIZER_FOLDER, ModelTokenizer
from colt5dist.data.read.batch import FILLER, Batch
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.pretrained.metrics import mean_scores, score_text
from colt5dist.pretrained.write_texts import until_end
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.evaluation import CutShortError
from colt5dist.train.ranks import errors_on_all_ranks, gather_objects
from colt5dist.train.report.monitor import Record
from colt5dist.train.run import Run

BATCH_SIZE = 8
"""Pairs whose answers are generated together; not the micro-batch, which may differ from start to start."""


def evaluate_texts(run: Run, stage: RunConfig, stop_wanted: Callable[[], bool]) -> Record:
    """Generate answers, greedily, for the first train.eval_generate_samples held-out pairs, and score them; collective.

    An input is cut as in training. An answer has at most data.target_length tokens, to which the target is cut, too.

    Args:
        run: the run; its model is in training mode again afterwards.
        stage: the configuration of the step.
        stop_wanted: called before each round of batches; must return the same on all ranks.

    Returns:
        `eval/rouge1` and so on, from 0 to 1, the same on all ranks; empty if no texts are to be generated.

    Raises:
        ConfigError: on all ranks, if some rank cannot read the pairs.
        CutShortError: on all ranks, if `stop_wanted` returns True.
    """
    number = stage.train.eval_generate_samples
    if not number:
        return {}
    rank, world_size = run.ranks.rank, run.ranks.world_size
    with errors_on_all_ranks():
        tokenizer = ModelTokenizer.open(run.run_dir / TOKENIZER_FOLDER)
        batches = held_out_batches(
            run.shards, stage.data, num_samples=number, micro_batch_size=BATCH_SIZE, rank=0, world_size=1
        )
    found: list[tuple[int, dict[str, float]]] = []
    with run.engine.writer() as model:
        assert model is not None
        model.pad_id, model.eos_id = tokenizer.pad_id, tokenizer.eos_id
        for first in range(0, len(batches), world_size):
            if stop_wanted():
                raise CutShortError
            for place in range(first + rank, min(first + world_size, len(batches)), world_size):
                batch = batches[place]
                rows = batch["sample_index"] != FILLER
                written = answer(model, batch, rows, run.engine.device, max_new_tokens=stage.data.target_length)
                targets = batch["target_ids"][rows]
                for row, (text, target) in enumerate(zip(written.tolist(), targets.tolist(), strict=True)):
                    own, right = (tokenizer.decode(until_end(ids, tokenizer.eos_id)) for ids in (text, target))
                    found.append((place * BATCH_SIZE + row, score_text(own, [right])))
    of_all = sorted((entry for part in gather_objects(found) for entry in part), key=lambda entry: entry[0])
    return {f"eval/{name}": score for name, score in mean_scores([scores for _, scores in of_all]).items()}


def answer(
    model: CoLT5 | CausalCoLT5, batch: Batch, rows: Tensor, device: torch.device, *, max_new_tokens: int
) -> Tensor:
    """Generate answers greedily.

    No collective: ranks may call it differently often.

    Args:
        model: the model, with whole weights.
        batch: a micro-batch, on the host.
        rows: (b,) bool, rows of the batch that are samples.
        device: where the model is.
        max_new_tokens: most tokens of an answer, the end token included.

    Returns:
        (samples, new tokens) int64, as `CoLT5.generate` gives them.
    """
    ids, mask, numbers = (batch[name][rows].to(device) for name in ("input_ids", "input_mask", "sample_index"))
    # pays where many tokens are written
    graph: dict[str, Any] = {"cuda_graph": True} if isinstance(model, CoLT5) else {}
    return model.generate(ids, input_mask=mask, sample_index=numbers, max_new_tokens=max_new_tokens, seed=0, **graph)
