"""One held-out sample at an evaluation: what the model writes beside the truth, and two pictures of what is routed."""

import re
from typing import Any, NamedTuple, cast

import torch

from colt5dist.data import ModelTokenizer
from colt5dist.data.read.batch import Batch
from colt5dist.model.causal_colt5 import CausalCoLT5
from colt5dist.model.colt5 import CoLT5
from colt5dist.model.generation import Constraint
from colt5dist.pretrained.fill import answers_in, text_ids
from colt5dist.pretrained.routing import document_routing, draw_kinds, draw_map
from colt5dist.pretrained.write_texts import until_end
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.micro_batch_graph import to_device
from colt5dist.train.engine.whole_model import NoRoomError
from colt5dist.train.report.monitor import Monitor
from colt5dist.train.report.tensorboard.texts import literal

SAMPLE_TAG = "held_out/sample"
SHOWN_BLANKS = 4
"""Blanks of the sample that are filled."""
ANSWER_TOKENS = 12
"""Most tokens that are written for a blank."""
CONTINUED_TOKENS = 48
"""Tokens that are written where there is no blank."""
CONTEXT_TOKENS = 40
"""Tokens that are shown before and after a blank."""
PROMPT_TOKENS = 512
"""Most tokens that a decoder-only model continues."""
MAP_DESCRIPTION = (
    "Which tokens of one held-out document each layer routes: tokens along x, layers down y, one map for the feed-"
    "forward, the queries and the keys/values; brightness is the soft score. Healthy: columns and places that stand "
    "out. Even brightness: nothing is learnt yet. Only the first or last tokens: routing by position."
)
KINDS_DESCRIPTION = (
    "Which kinds of tokens each layer routes in the same document: the share of a kind among the routed tokens divided "
    "by its share among all. 1 is no preference, 2 twice as often as chance. Healthy: leaves 1 as training goes on."
)


class Written(NamedTuple):
    """A passage that the model writes, and the truth."""

    before: str
    """Text before it."""
    after: str
    """Text after it."""
    truth: str
    """What is in the target."""
    model: str | None
    """What the model writes; None where it does not write."""


def show_held_out(
    monitor: Monitor, engine: Engine, batch: Batch, tokenizer: ModelTokenizer, step: int, objectives: tuple[str, ...]
) -> None:
    """Show a sample of a micro-batch of rank 0 in TensorBoard, and its pictures also as files; collective.

    Neither the weights nor any random state changes. At ZeRO stage 3, where no rank has the weights whole, rank 0 has a
    copy meanwhile. Where a GPU has no room for that, or to write, the text says so.

    Args:
        monitor: writes; on rank 0 only.
        engine: the engine; the model is in training mode again afterwards.
        batch: a micro-batch of held-out samples; every rank gives one.
        tokenizer: the model's tokenizer.
        step: number of the step.
        objectives: names of the objectives.
    """
    row = row_to_show(batch, tokenizer)
    tensors = cast(dict[str, torch.Tensor], batch)
    sample = cast(Batch, {name: tensor[row : row + 1] for name, tensor in tensors.items()})
    engine.train(False)
    try:
        with torch.no_grad():  # on every rank: at stage 3 each layer's weights are gathered from all of them
            output = engine.forward(to_device(sample, engine.device), collect_routing=True)
            passages, note = what_is_written(engine, sample, tokenizer, wanted=monitor.is_first)
    finally:
        engine.train(True)
    if not monitor.is_first:
        return
    objective = objectives[int(sample["objective"][0])]
    loss = float(output.token_loss.sum()) / max(int(sample["target_mask"].sum()), 1)
    monitor.text(step, SAMPLE_TAG, sample_text(passages, f"objective {objective}, loss {loss:.4f}", note))
    if output.routing:
        document = document_routing(output.routing, sample, 0, tokenizer)
        title = f"step {step:,}"
        monitor.picture(step, "map", draw_map(document, title), MAP_DESCRIPTION)
        monitor.picture(step, "kinds", draw_kinds(document, title), KINDS_DESCRIPTION)


def row_to_show(batch: Batch, tokenizer: ModelTokenizer) -> int:
    """The first row whose target has sentinels, or else the first one; the same at every evaluation."""
    has_sentinels = (batch["target_ids"] >= tokenizer.first_sentinel).any(dim=1)
    return int(has_sentinels.to(torch.int8).argmax())


def what_is_written(
    engine: Engine, sample: Batch, tokenizer: ModelTokenizer, *, wanted: bool
) -> tuple[list[Written], str]:
    """Have the model write on the rank that wants it; collective at ZeRO stage 3.

    Args:
        engine: the engine.
        sample: a micro-batch of one row, on the host.
        tokenizer: the model's tokenizer.
        wanted: whether this rank wants it.

    Returns:
        The passages, none where they are not wanted; and why the model has not written, or an empty text.
    """
    try:
        with engine.writer(wanted=wanted) as model:
            if model is None:
                return [], ""
            try:
                return write_passages(model, sample, tokenizer), ""
            except torch.OutOfMemoryError:  # only of this rank's own work, so that the ranks' collectives stay in order
                note = "the GPU has no room for it; lower train.micro_batch_size, or set monitor.held_out_sample=false"
    except NoRoomError as error:
        note = str(error)
    return (write_passages(None, sample, tokenizer) if wanted else []), f"The model did not write: {note}."


def write_passages(model: CoLT5 | CausalCoLT5 | None, sample: Batch, tokenizer: ModelTokenizer) -> list[Written]:
    """Have a model write greedily, a few tokens.

    Args:
        model: the model with whole weights; None: only the truth is given.
        sample: a micro-batch of one row, on the host.
        tokenizer: the model's tokenizer.
    """
    if model is not None:
        model.pad_id, model.eos_id = tokenizer.pad_id, tokenizer.eos_id
    target = until_end(sample["target_ids"][0][sample["target_mask"][0]].tolist(), tokenizer.eos_id)
    inputs = sample["input_ids"][0][sample["input_mask"][0]].tolist()
    if not target:
        return []
    if target[0] >= tokenizer.first_sentinel:
        return _fill(model, sample, tokenizer, inputs, answers_in(target, tokenizer)[:SHOWN_BLANKS])
    if inputs:
        given, rest = until_end(inputs, tokenizer.eos_id), target
        ids, mask = sample["input_ids"], sample["input_mask"]
    else:
        half = max(min(len(target) // 2, PROMPT_TOKENS), 1)
        given, rest = target[: half - 1], target[half - 1 :]
        ids, mask = sample["decoder_input_ids"][:, :half], None
    own = None
    if model is not None:
        written = _generate(model, ids, mask, max_new_tokens=CONTINUED_TOKENS)
        own = tokenizer.decode(until_end(written, tokenizer.eos_id))
    before = tokenizer.decode(given[-2 * CONTEXT_TOKENS :])
    return [Written(before, "", tokenizer.decode(rest[:CONTINUED_TOKENS]), own)]


def _fill(
    model: CoLT5 | CausalCoLT5 | None,
    sample: Batch,
    tokenizer: ModelTokenizer,
    inputs: list[int],
    answers: list[list[int]],
) -> list[Written]:
    """The first blanks of a sample of span corruption, each with the text around it."""
    own = None
    if model is not None:
        device = next(model.parameters()).device
        written = _generate(
            model,
            sample["input_ids"],
            sample["input_mask"],
            max_new_tokens=len(answers) * (1 + ANSWER_TOKENS) + 1,
            constraint=Constraint(
                torch.tensor([len(answers)], device=device),
                answer_tokens=ANSWER_TOKENS,
                is_text=text_ids(tokenizer, model.config.vocab_size).to(device),
                first_sentinel=tokenizer.first_sentinel,
                eos_id=tokenizer.eos_id,
            ),
        )
        own = answers_in(until_end(written, tokenizer.eos_id), tokenizer)
    found = []
    for number, truth in enumerate(answers):
        place = inputs.index(tokenizer.sentinel_id(number))
        found.append(
            Written(
                _with_blanks(inputs[max(place - CONTEXT_TOKENS, 0) : place], tokenizer),
                _with_blanks(inputs[place + 1 : place + 1 + CONTEXT_TOKENS], tokenizer),
                tokenizer.decode(truth[:ANSWER_TOKENS]) + ("…" if len(truth) > ANSWER_TOKENS else ""),
                None if own is None else tokenizer.decode(own[number]) if number < len(own) else "",
            )
        )
    return found


def _with_blanks(ids: list[int], tokenizer: ModelTokenizer) -> str:
    """Text of ids, with [1] for the second blank."""
    return re.sub(r"<[a-z0-9_]*_(\d+)>", r"[\1]", tokenizer.decode(ids))


def _generate(model: CoLT5 | CausalCoLT5, ids: torch.Tensor, mask: torch.Tensor | None, **settings: Any) -> list[int]:
    """What the model writes for one row; so little that a CUDA graph of its own would not pay."""
    device = next(model.parameters()).device
    mask = None if mask is None else mask.to(device)
    if isinstance(model, CoLT5):
        settings["cuda_graph"] = False
    return model.generate(ids.to(device), input_mask=mask, seed=0, **settings)[0].tolist()


def sample_text(passages: list[Written], heading: str, note: str) -> str:
    """A table in Markdown: each passage with the text around it, the truth, and what the model writes.

    Args:
        passages: the passages; the column of the model is left out where it does not write.
        heading: what stands above.
        note: what stands below; may be empty.
    """
    writes = any(passage.model is not None for passage in passages)
    lines = [f"**{literal(heading)}**", "", f"| text | truth |{' model |' if writes else ''}"]
    lines.append(f"|---|---|{'---|' if writes else ''}")
    for passage in passages:
        cells = [f"{literal(passage.before)} **[ ]** {literal(passage.after)}", literal(passage.truth, space="␣")]
        cells += [literal(passage.model or "", space="␣")] if writes else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", literal(note)])
