"""Shows a sample as the model sees it: its ids as text, its objective, where its text comes from, and its rank."""

from collections.abc import Iterable

import numpy as np

from colt5dist.data.open_shard_sets import open_sources
from colt5dist.data.order.batch_layout import BatchLayout
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.data.order.objectives import MODES
from colt5dist.data.order.skip import SkipList
from colt5dist.data.read.batch import make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.tokenizer import Tokenizer
from colt5dist.errors import ConfigError
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.wording import count

SENTINEL, SPECIAL, PLAIN = "\033[1;33m", "\033[1;36m", "\033[0m"
SHOWN_PIECES = 5


def show_sample(path: str, settings: list[str], number: int, *, world_size: int, colour: bool) -> list[str]:
    """Describe a sample of the run that a configuration describes.

    Args:
        path: a configuration file of launch/pretrain.py.
        settings: `key=value`, which replace those of the file.
        number: number of the sample in the run, from 0.
        world_size: number of GPUs, which decides the rank that gets the sample.
        colour: whether sentinels, mode tokens and end tokens are coloured.

    Returns:
        Lines to print.

    Raises:
        ConfigError: the configuration or the shards are wrong, or no step has the sample.
    """
    config = load_config(path, settings)
    if problems := config.batch_problems(world_size):
        raise ConfigError("\n".join(problems))
    step, position = find_step(config, number)
    stage = config.stage_number(step)
    lengths = config.stages[stage]
    sources = open_sources(config.data)
    samples = Samples(sources, lengths.data, seed=config.seed, stage=stage)
    batch = make_batch(samples, [number])
    planned = samples.planned(number)
    layout = BatchLayout(world_size=world_size, micro_batch_size=lengths.micro_batch_size(world_size))
    place = layout.place(position)
    shards = sources.parts[planned.source]
    lines = [
        f"sample {number}: step {step}, rank {place.rank} of {world_size}, micro-batch {place.micro_batch}, "
        f"row {place.row}",
        f"objective: {parse_mixture(config.data.mixture).names[int(batch['objective'][0])]}",
        f"shards: {shards.remote.address('') if shards.remote else shards.folder}, epoch {planned.epoch}, "
        f"block {planned.block}, {count(planned.chunk.num_tokens, 'token')} of text",
    ]
    lines += [f"replaced by the next sample: {line}" for line in samples.new_bad_records()]
    starts, stops = planned.chunk.starts.tolist(), planned.chunk.stops.tolist()
    ends = shards.index.document_ends
    for start, stop in list(zip(starts, stops, strict=True))[:SHOWN_PIECES]:
        document = int(np.searchsorted(ends, start, side="right"))
        offset = start - (int(ends[document - 1]) if document else 0)
        shard = int(shards.index.members[shards.index.member_at(start)]["shard"])
        name = shards.manifest.shards[shard].file
        lines.append(f"  document {document} of {name}: tokens {offset} to {offset + stop - start - 1}")
    if len(starts) > SHOWN_PIECES:
        lines.append(f"  and {count(len(starts) - SHOWN_PIECES, 'more document')}")
    for title, ids, mask in (
        ("inputs", batch["input_ids"], batch["input_mask"]),
        ("targets", batch["target_ids"], batch["target_mask"]),
    ):
        valid = ids[0][mask[0]].tolist()
        num_sentinels = sum(token >= samples.first_sentinel for token in valid)
        sentinels = f", {num_sentinels} of them sentinels" if num_sentinels else ""
        lines.append(f"{title}, {count(len(valid), 'token')}{sentinels}:")
        lines.append(render(valid, sources.tokenizer, samples.first_sentinel, colour))
    lines.append("(sentinels and end tokens in the targets count in the loss, but are no bytes of text)")
    return lines


def find_step(config: RunConfig, number: int) -> tuple[int, int]:
    """Return the step that has a sample, and the sample's position in the global batch.

    Raises:
        ConfigError: data.skip leaves it out, or there is no such number.
    """
    skip = SkipList(config.data.skip)
    if number < 0:
        raise ConfigError(f"--sample: {number} is negative; samples are numbered from 0")
    if passed := skip.passed(number, number + 1):
        raise ConfigError(f"--sample: {number} is in data.skip ({passed}); no step has it")
    before = number - sum(stop - first for first, stop in skip.passed(0, number))
    step, position = divmod(before, config.train.global_batch_size)
    return step + 1, position


def render(ids: Iterable[int], tokenizer: Tokenizer, first_sentinel: int, colour: bool) -> str:
    """Decode ids to text; <k> is sentinel k, <R> a mode token, </s> the end token, <unk> unknown text.

    Args:
        ids: token ids.
        tokenizer: tokenizer of the shards.
        first_sentinel: smallest id of a sentinel.
        colour: whether special tokens are coloured.
    """
    parts: list[str] = []
    text: list[int] = []

    def add(name: str, paint: str) -> None:
        parts.append(tokenizer.decode(text))
        text.clear()
        parts.append(f"{paint}{name}{PLAIN}" if colour else name)

    for token in ids:
        if token >= first_sentinel:
            add(f"<{token - first_sentinel}>", SENTINEL)
        elif token >= tokenizer.vocab_size:
            add(f"<{MODES[token - tokenizer.vocab_size]}>", SPECIAL)
        elif token == tokenizer.eos_id:
            add("</s>", SPECIAL)
        elif token == tokenizer.unk_id:
            add("<unk>", SPECIAL)
        else:
            text.append(token)
    parts.append(tokenizer.decode(text))
    return "".join(parts)
