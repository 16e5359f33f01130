"""Speed, memory and exactness of the data pipeline, compared with the tokenizer alone and webdataset's own loader.

`python launch/benchmark.py data [PART ...]`; the parts are read, plan, shuffle, prepare, memory, masks, order, epoch
(default: all). Each part makes its own data in a temporary folder. Work of one process is measured in CPU time, so that
other work on the machine disturbs it less; the loader, and `prepare` with workers, in wall-clock time.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from math import comb
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from colt5dist.data.config import DataConfig
from colt5dist.data.inputs.documents import read_items
from colt5dist.data.inputs.files import find_inputs
from colt5dist.data.order.mixture import MIXTURES, lengths_of_mixture
from colt5dist.data.order.objectives import Objective, sample_lengths, span_counts
from colt5dist.data.order.plan import Plan
from colt5dist.data.order.random_numbers import Stream, random_bits
from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.prepare import prepare
from colt5dist.data.prepare.settings import PrepareConfig
from colt5dist.data.prepare.tokenize_texts import Document
from colt5dist.data.prepare.train_tokenizer import train_tokenizer
from colt5dist.data.read.batch import make_batch
from colt5dist.data.read.denoise import denoise
from colt5dist.data.read.loader import training_batches
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import TokenReader
from colt5dist.data.standard_library import make_documents, read_sources
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer

Figures = dict[str, float]

INPUT_LENGTH, TARGET_LENGTH = 4096, 910


def synthetic_shards(folder: Path, num_tokens: int, *, mean_length: float, seed: int = 0) -> ShardSet:
    """Write and open shards of random ids, with log-normal document lengths, much like those of real corpora.

    Args:
        folder: folder to be made.
        num_tokens: tokens in all.
        mean_length: mean tokens per document.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    writer = CorpusWriter(folder, ByteTokenizer(), validation_fraction=1e-3, shard_bytes=1 << 28)
    left = num_tokens
    while left > 0:
        length = int(max(1, min(left, rng.lognormal(np.log(mean_length) - 0.5, 1.0))))
        tokens = rng.integers(3, 259, length).astype(np.uint16)
        writer.add_document(Document(tokens, int(rng.integers(0, 1 << 63)) * 2, b""))
        left -= length
    writer.close({})
    return open_shards(folder)


def measure_read(folder: Path, scale: float) -> Figures:
    """Tokens per second read from shards, as samples, as batches of the loader, and by webdataset's own loader."""
    import webdataset

    shards = synthetic_shards(folder / "read", int(60e6 * scale), mean_length=4000)
    begin = time.process_time()
    reader = TokenReader(shards, cache_bytes=1)
    for start in range(0, shards.num_tokens, 1 << 20):
        reader.read(start, min(start + (1 << 20), shards.num_tokens))
    figures = {"read, tokens/s": shards.num_tokens / (time.process_time() - begin)}

    config = DataConfig(input_length=INPUT_LENGTH, target_length=TARGET_LENGTH, num_workers=0)
    samples = Samples(shards, config, seed=0)
    num_batches = int(400 * scale) + 10
    make_batch(samples, range(8))
    begin = time.process_time()
    tokens = sum(
        int(make_batch(samples, range(8 * number, 8 * number + 8))["input_mask"].sum()) for number in range(num_batches)
    )
    figures["samples with corruption, input tokens/s"] = tokens / (time.process_time() - begin)
    for workers in (1,):
        config = DataConfig(input_length=INPUT_LENGTH, target_length=TARGET_LENGTH, num_workers=workers)
        batches = training_batches(
            shards,
            config,
            seed=0,
            global_batch_size=8,
            micro_batch_size=8,
            rank=0,
            world_size=1,
            first_sample=0,
        )
        next(batches)
        begin = time.perf_counter()
        tokens = sum(int(next(batches)[0]["input_mask"].sum()) for _ in range(num_batches))
        figures[f"loader with {workers} worker, input tokens/s"] = tokens / (time.perf_counter() - begin)
        batches.close()

    urls = [str(shards.folder / entry.file) for entry in shards.manifest.shards]
    begin = time.process_time()
    tokens = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        tokens += len(np.frombuffer(sample["tokens"], dtype=np.uint16))
    figures["webdataset's own loader on our shards, no samples made, tokens/s"] = tokens / (time.process_time() - begin)
    reader = TokenReader(shards, cache_bytes=1 << 24)
    ends = shards.index.document_ends[:4000].tolist()
    documents = [reader.read(start, stop).tobytes() for start, stop in pairwise([0, *ends])]
    figures["webdataset's own loader, one document per member, tokens/s"] = _webdataset_documents(folder, documents)
    if find_spec("streaming"):
        figures["mosaicml-streaming, one document per sample, tokens/s"] = _streaming_documents(folder, documents)
    else:
        print("no figure of mosaicml-streaming, which is not installed", file=sys.stderr)
    return figures


def _webdataset_documents(folder: Path, documents: list[bytes]) -> float:
    """Tokens per second of documents in the usual form: one per tar member."""
    import webdataset

    path = folder / "documents.tar"
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for number, content in enumerate(documents):
            tar.write({"__key__": f"{number:08d}", "tokens": content})
    begin = time.process_time()
    tokens = 0
    for sample in webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False):
        tokens += len(np.frombuffer(sample["tokens"], dtype=np.uint16))
    return tokens / (time.process_time() - begin)


def _streaming_documents(folder: Path, documents: list[bytes]) -> float:
    """Tokens per second of the same documents in mosaicml-streaming's format, in its shuffled order."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "bytes"}) as writer:
        for content in documents:
            writer.write({"tokens": content})
    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=1)
    begin = time.process_time()
    tokens = sum(len(np.frombuffer(sample["tokens"], dtype=np.uint16)) for sample in dataset)
    return tokens / (time.process_time() - begin)


def measure_plan(folder: Path, scale: float) -> Figures:
    """Memory of the plan of 10,000,000 documents, and seconds from a fresh start to any sample of the run."""
    num_documents = int(10_000_000 * scale)
    rng = np.random.default_rng(0)
    path = folder / "documents.bin"
    np.cumsum(np.maximum(rng.lognormal(np.log(1500) - 0.5, 1.0, num_documents), 1).astype(np.int64)).tofile(path)
    ends = np.memmap(path, dtype=np.int64, mode="r")
    raw_lengths = [length.raw_tokens for length in lengths_of_mixture("colt5", INPUT_LENGTH, TARGET_LENGTH)]
    begin = time.perf_counter()
    plan = Plan(ends, raw_lengths, seed=0)
    plan.sample(123_456_789)
    figures = {"documents": float(num_documents), "resume at sample 123,456,789, seconds": time.perf_counter() - begin}
    begin = time.perf_counter()
    for number in range(1000):
        plan.sample(10_000_000 * number)
    figures["find a sample anywhere in the run, seconds"] = (time.perf_counter() - begin) / 1000
    tracemalloc.start()
    plan = Plan(ends, raw_lengths, seed=0)
    for number in range(100):
        plan.sample(10_000_000 * number)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {**figures, "memory of the plan, bytes": float(kept), "most memory while it is made, bytes": float(peak)}


def _anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measure_shuffle(folder: Path, scale: float) -> Figures:
    """Quality of the shuffle: how far apart in the set the texts of neighbouring samples are (perfect shuffle: 1/3)."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(np.maximum(rng.lognormal(np.log(3000), 1.0, int(400_000 * scale)), 1).astype(np.int64))
    raw_lengths = [length.raw_tokens for length in lengths_of_mixture("colt5", INPUT_LENGTH, TARGET_LENGTH)]
    plan = Plan(ends, raw_lengths, seed=0)
    count = min(20_000, plan.epoch_samples(0))
    samples = [plan.sample(number) for number in range(count)]
    places = np.array([int(sample.chunk.starts[0]) for sample in samples]) / ends[-1]
    batch = 256
    batches = places[: count // batch * batch].reshape(-1, batch)
    blocks = np.array([sample.block for sample in samples])[: batches.size].reshape(-1, batch)
    return {
        "mean distance of neighbours (perfect: 0.333)": float(np.abs(np.diff(places)).mean()),
        "mean of a batch of 256, standard deviation (perfect: 0.018)": float(batches.mean(axis=1).std()),
        "samples of a batch from the same block as another": float(
            np.mean([batch - len(set(row.tolist())) for row in blocks]) / batch
        ),
    }


def measure_prepare(folder: Path, scale: float) -> Figures:
    """Tokens per second of prepare with a 32,000-piece tokenizer, and of that tokenizer alone on the same texts."""
    texts = list(make_documents(read_sources()))[: max(5, int(150 * scale))]
    (folder / "text").mkdir()
    with open(folder / "text/a.jsonl", "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    files = find_inputs([str(folder / "text")]).files
    content = train_tokenizer(files, vocab_size=32_000, text_key="text", held_out_below=0)
    (folder / "tokenizer.json").write_bytes(content)
    tokens = 0

    def tokenizer_alone() -> float:
        """Tokens per CPU second of a new tokenizer, since prepare also makes a new one."""
        nonlocal tokens
        tokenizer = JsonTokenizer(folder / "tokenizer.json")
        begin = time.process_time()
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        return tokens / (time.process_time() - begin)

    alone = [tokenizer_alone()]
    figures = {}
    for workers in (0, 1, 2):
        settings = PrepareConfig(
            input=[str(folder / "text")],
            output=folder / f"prepared-{workers}",
            tokenizer=folder / "tokenizer.json",
            workers=workers,
        )
        begin, cpu = time.perf_counter(), _cpu_seconds()
        prepare(settings)
        rate = tokens / (_cpu_seconds() - cpu)
        figures[f"prepare, workers={workers}, tokens per second"] = tokens / (time.perf_counter() - begin)
        figures[f"prepare, workers={workers}, tokens per CPU second"] = rate
        # relative to the measurements before and after it: the speed of a shared machine changes
        alone.append(tokenizer_alone())
        figures[f"prepare, workers={workers}, share of the speed of the tokenizer alone"] = rate / (sum(alone[-2:]) / 2)
    figures["tokenizer alone, tokens per CPU second"] = sum(alone) / len(alone)
    begin = time.perf_counter()
    size = sum(len(item.text or "") for file in files for item in read_items(file, text_key="text"))
    figures["reading the jsonl, characters/s"] = size / (time.perf_counter() - begin)
    return figures


def _cpu_seconds() -> float:
    """Seconds of all cores that this process and its ended children have used."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure_memory(folder: Path, scale: float) -> Figures:
    """Resident memory of one reader after a few samples, and after 200,000."""
    shards = synthetic_shards(folder / "memory", int(8e6 * min(1, 4 * scale)), mean_length=2000)
    config = DataConfig(input_length=512, target_length=114, num_workers=0)
    samples = Samples(shards, config, seed=0)
    total = int(200_000 * scale)
    figures = {}
    for number in range(0, total, 8):
        make_batch(samples, range(number, number + 8))
        if number in (total // 20 // 8 * 8, total // 2 // 8 * 8):
            figures[f"anonymous memory after {number:,} samples, bytes"] = float(_anonymous_bytes())
    figures[f"anonymous memory after {total:,} samples, bytes"] = float(_anonymous_bytes())
    return figures


def measure_masks(folder: Path, scale: float) -> Figures:
    """Denoise 100,000 random cases, from which the text must be recovered; chi-square of the masks of short texts."""
    rng = np.random.default_rng(0)
    objectives = [objective for group in MIXTURES.values() for objective in group]
    cases = int(100_000 * scale)
    for number in range(cases):
        objective = objectives[int(rng.integers(len(objectives)))]
        n, t = int(rng.integers(20, 600)), int(rng.integers(8, 600))
        lengths = sample_lengths(objective, n, t)
        first_sentinel = int(rng.integers(8, 60_000)) + 3
        tokens = rng.integers(2, first_sentinel - 3, lengths.raw_tokens)
        inputs, targets = np.zeros(n, dtype=np.int64), np.zeros(t, dtype=np.int64)
        bits = random_bits(number, 0, Stream.DENOISE)
        sizes = denoise(
            tokens, objective, bits, first_sentinel=first_sentinel, eos_id=1, inputs=inputs, targets=targets
        )
        text = _reassemble(objective, inputs[: sizes[0]], targets[: sizes[1]], first_sentinel)
        # prefix-LM may have lost its first tokens
        if not np.array_equal(text, tokens[len(tokens) - len(text) :]) or (
            len(text) < len(tokens) and (objective.mean_span is not None or objective.is_next_token)
        ):
            raise AssertionError(f"the text cannot be recovered from {objective}: case {number}")
    figures = {"cases from which the text is recovered": float(cases)}
    objective = Objective("spans", 0.3, 2)
    noise, spans = span_counts(14, objective, 100)
    kinds = comb(noise - 1, spans - 1) * comb(14 - noise - 1, spans - 1)
    counts: Counter[bytes] = Counter()
    draws = int(2000 * kinds * scale)
    for number in range(draws):
        inputs, targets = np.zeros(30, dtype=np.int64), np.zeros(30, dtype=np.int64)
        bits = random_bits(number, 1, Stream.DENOISE)
        denoise(np.arange(2, 16), objective, bits, first_sentinel=100, eos_id=1, inputs=inputs, targets=targets)
        counts[targets.tobytes()] += 1
    expected = draws / kinds
    square = sum((count - expected) ** 2 / expected for count in counts.values()) + expected * (kinds - len(counts))
    figures[f"masks, chi-square minus its mean, in standard deviations ({kinds} masks)"] = (square - (kinds - 1)) / (
        2 * (kinds - 1)
    ) ** 0.5
    return figures


def _reassemble(objective: Objective, inputs: np.ndarray, targets: np.ndarray, first_sentinel: int) -> np.ndarray:
    """The text that inputs and targets were made from."""
    if objective.is_next_token:
        return targets
    body, written = inputs[objective.mode is not None : -1], targets[:-1]
    if objective.mean_span is None:
        return np.concatenate([body, written])
    spans = np.split(written, np.flatnonzero(written >= first_sentinel))[1:]
    kept = np.split(body, np.flatnonzero(body >= first_sentinel))
    pieces = [kept[0]]
    for span, text in zip(spans, kept[1:], strict=True):
        pieces += [span[1:], text[1:]]
    return np.concatenate(pieces)


def measure_order(folder: Path, scale: float) -> Figures:
    """Check that a run of 2000 steps has the same samples in the same order however it is divided.

    World sizes 1, 2, 4 and 8 are combined with 0, 1 and 3 workers, each with an accumulation of 1, 2 or 4. A last run
    is killed at ten steps.
    """
    shards = synthetic_shards(folder / "order", 2_000_000, mean_length=800)
    steps = max(20, int(2000 * scale))
    cuts = [
        (world_size, workers, (1, 2, 4)[(row + column) % 3])
        for row, world_size in enumerate((1, 2, 4, 8))
        for column, workers in enumerate((0, 1, 3))
    ]
    found = {}
    for cut in cuts:
        digest = hashlib.sha256()
        for content in _steps(shards, 0, steps, *cut):
            digest.update(content)
        found[cut] = digest.hexdigest()
        print(
            f"order: world size {cut[0]}, workers {cut[1]}, accumulation {cut[2]}: {found[cut][:12]}", file=sys.stderr
        )
    digest = hashlib.sha256()
    kills = np.random.default_rng(0).choice(np.arange(1, steps), 10, replace=False)
    bounds = [0, *sorted(kills.tolist()), steps]
    for number, (first, stop) in enumerate(pairwise(bounds)):
        _read_and_kill(shards, first, stop, cuts[5 * number % len(cuts)], digest)
    found[0, 0, 0] = digest.hexdigest()
    print(f"order: killed after steps {bounds[1:-1]}: {digest.hexdigest()[:12]}", file=sys.stderr)
    if len(set(found.values())) != 1:
        raise AssertionError(f"the order depends on how the run is divided: {found}")
    return {
        "divisions with the same order and content": float(len(found)),
        "steps": float(steps),
        "kills": float(len(kills)),
    }


ORDER_BATCH = 32


def _steps(
    shards: ShardSet, first: int, stop: int, world_size: int, workers: int, accumulation: int
) -> Iterator[bytes]:
    """Sample numbers and token ids of each step, in the order of the global batch."""
    config = DataConfig(input_length=64, target_length=32, num_workers=workers)
    ranks = [
        training_batches(
            shards,
            config,
            seed=3,
            global_batch_size=ORDER_BATCH,
            micro_batch_size=ORDER_BATCH // world_size // accumulation,
            rank=rank,
            world_size=world_size,
            first_sample=first * ORDER_BATCH,
        )
        for rank in range(world_size)
    ]
    for _ in range(first, stop):
        step = [next(rank) for rank in ranks]
        assert all(len(batches) == accumulation for batches in step), "another accumulation"
        columns = [
            # (samples per rank, ranks, ids): the global batch, see data/order/batch_layout.py
            np.stack([np.concatenate([batch[name].numpy() for batch in batches]) for batches in step], axis=1)
            for name in ("sample_index", "input_ids", "target_ids")
        ]
        yield b"".join(column.tobytes() for column in columns)
    for rank in ranks:
        rank.close()


def _read_and_kill(shards: ShardSet, first: int, stop: int, cut: tuple[int, int, int], digest: Any) -> None:
    """Take steps first..stop-1 from a process that would read without end, then kill it and its readers."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        os.setpgrp()
        for content in _steps(shards, first, 1 << 40, *cut):
            sender.send_bytes(content)

    process = context.Process(target=run)
    process.start()
    sender.close()  # so that reading ends when the process does
    for _ in range(first, stop):
        digest.update(receiver.recv_bytes())
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def measure_epoch(folder: Path, scale: float) -> Figures:
    """How often an epoch over 10,000 documents shows each token: in the plan, and in the rows of causal samples."""
    rng = np.random.default_rng(0)
    writer = CorpusWriter(folder / "epoch", ByteTokenizer(), validation_fraction=1e-3)
    for length in np.maximum(rng.lognormal(np.log(2000) - 0.5, 1.0, int(10_010 * scale)), 1).astype(int).tolist():
        ids = rng.integers(3, 259, length).astype(np.uint16)
        writer.add_document(Document(ids, int(rng.integers(0, 1 << 63)) * 2, b""))
    writer.close({})
    shards = open_shards(folder / "epoch")
    figures = {"documents": float(shards.num_documents), "tokens": float(shards.num_tokens)}
    for name, config in (
        ("colt5", DataConfig(input_length=INPUT_LENGTH, target_length=TARGET_LENGTH, num_workers=0)),
        ("causal", DataConfig(input_length=0, target_length=2048, num_workers=0, mixture="causal")),
    ):
        samples = Samples(shards, config, seed=0)
        shown = np.zeros(shards.num_tokens, dtype=np.int64)
        number = 0
        while (planned := samples.planned(number)).epoch == 0:
            for start, stop in zip(planned.chunk.starts.tolist(), planned.chunk.stops.tolist(), strict=True):
                shown[start:stop] += 1
            number += 1
        if shown.max() != 1:
            raise AssertionError(f"{name}: a token is shown {shown.max()} times in an epoch")
        figures[f"{name}: samples of the epoch"] = float(number)
        figures[f"{name}: tokens shown once, share"] = float(shown.mean())
        figures[f"{name}: tokens left over, at most one sample's per block, share"] = float(1 - shown.mean())
    # the last configuration, causal, shows its text unchanged
    tokens = TokenReader(shards, cache_bytes=1 << 20).read(0, shards.num_tokens)
    expected = np.bincount(tokens[shown == 1], minlength=259)
    found = np.zeros(259, dtype=np.int64)
    for first in range(0, number, 8):
        batch = make_batch(samples, range(first, min(first + 8, number)))
        found += np.bincount(batch["target_ids"][batch["target_mask"]].numpy(), minlength=259)
    found[shards.tokenizer.eos_id] = 0  # between documents
    if not np.array_equal(found, expected):
        raise AssertionError("the rows of an epoch hold other tokens than its plan")
    figures["causal: ids of the rows that differ from those of the plan"] = 0.0
    return figures


PARTS: dict[str, Callable[[Path, float], Figures]] = {
    "read": measure_read,
    "plan": measure_plan,
    "shuffle": measure_shuffle,
    "prepare": measure_prepare,
    "memory": measure_memory,
    "masks": measure_masks,
    "order": measure_order,
    "epoch": measure_epoch,
}


def main(arguments: list[str]) -> int:
    """Print a table and, with `--output`, write the figures as JSON; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the work; 1 (default) is that of the README")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for the figures")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        print(f"error: part {unknown[0]!r} is unknown; use some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version()}
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[part](Path(folder), options.scale)
        results[part] = figures
        for name, value in figures.items():
            print(f"{part:<8} {name:<75} {value:>16,.3f}", flush=True)
    results["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    return 0
