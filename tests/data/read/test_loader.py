"""Batches: the same samples on any number of ranks and workers, right masks and shifts, workers that ignore signals."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from colt5dist.data.config import DataConfig
from colt5dist.data.order.mixture import parse_mixture
from colt5dist.data.read import loader
from colt5dist.data.read.batch import Batch, make_batch
from colt5dist.data.read.held_out import held_out_batches, unigram_entropy
from colt5dist.data.read.loader import DataWorkerError, start_readers, training_batches
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import DamagedShardError, TokenReader

GLOBAL_BATCH, STEPS = 8, 3
Row = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def config(num_workers: int = 0, **settings: Any) -> DataConfig:
    """Small samples."""
    return DataConfig(input_length=96, target_length=40, num_workers=num_workers, **settings)


def rows(batch: Batch) -> list[Row]:
    """Each sample of a batch, in a form that can be compared."""
    columns = (batch["input_ids"], batch["decoder_input_ids"], batch["target_ids"])
    return [
        (
            int(batch["sample_index"][row]),
            int(batch["objective"][row]),
            *(tuple(column[row].tolist()) for column in columns),
            int(batch["target_bytes"][row]),
        )
        for row in range(len(batch["sample_index"]))
    ]


def read_run(
    shards: ShardSet,
    *,
    world_size: int,
    num_workers: int,
    micro_batch_size: int,
    first_sample: int,
    steps: int,
    **settings: Any,
) -> list[Row]:
    """The samples of a run's steps, in the order of their numbers."""
    samples: list[Row] = []
    ranks = [
        training_batches(
            shards,
            config(num_workers, **settings),
            seed=5,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            first_sample=first_sample,
        )
        for rank in range(world_size)
    ]
    for _ in range(steps):
        per_rank = []
        for rank in ranks:
            step = next(rank)
            assert [len(batch["sample_index"]) for batch in step] == [micro_batch_size] * len(step)
            per_rank.append([row for batch in step for row in rows(batch)])
        # rank r has samples r, r + world_size, ...
        samples += [row for group in zip(*per_rank, strict=True) for row in group]
    for rank in ranks:
        rank.close()
    return samples


@pytest.fixture(scope="module")
def undisturbed(shards: ShardSet) -> list[Row]:
    """A run of one rank without workers."""
    return read_run(shards, world_size=1, num_workers=0, micro_batch_size=8, first_sample=0, steps=STEPS)


@pytest.mark.parametrize(
    ("world_size", "num_workers", "micro_batch_size"),
    [
        (1, 0, 1),
        (1, 1, 4),
        (1, 2, 2),
        (2, 0, 4),
        (2, 0, 1),
        (2, 1, 2),
        (2, 2, 1),
        (4, 0, 2),
        (4, 0, 1),
        (4, 1, 1),
        (8, 0, 1),
    ],
)
def test_any_world_size_gives_the_same_samples(
    shards: ShardSet, undisturbed: list[Row], world_size: int, num_workers: int, micro_batch_size: int
) -> None:
    """World size, workers, micro-batches, and a resume after any step do not change the samples."""
    assert [row[0] for row in undisturbed] == list(range(GLOBAL_BATCH * STEPS))
    run = read_run(
        shards,
        world_size=world_size,
        num_workers=num_workers,
        micro_batch_size=micro_batch_size,
        first_sample=0,
        steps=1,
    )
    run += read_run(
        shards,
        world_size=world_size,
        num_workers=num_workers,
        micro_batch_size=micro_batch_size,
        first_sample=GLOBAL_BATCH,
        steps=STEPS - 1,
    )
    assert run == undisturbed


def test_batches_are_what_the_model_takes(shards: ShardSet) -> None:
    """Types, masks, shift, end tokens, and the bytes of the targets."""
    batch = make_batch(Samples(shards, config(), seed=1), [*range(40), -1])
    for name in ("input_ids", "decoder_input_ids", "target_ids", "objective", "sample_index", "target_bytes"):
        assert batch[name].dtype == torch.int64  # type: ignore[literal-required]
    assert batch["input_mask"].dtype == batch["target_mask"].dtype == torch.bool
    assert batch["input_ids"].shape == batch["input_mask"].shape == (41, 96)
    assert batch["target_ids"].shape == batch["target_mask"].shape == batch["decoder_input_ids"].shape == (41, 40)
    assert set(batch["objective"].tolist()) == set(range(len(parse_mixture("colt5").names)))
    eos, pad = shards.tokenizer.eos_id, shards.tokenizer.pad_id
    for row in range(40):
        for ids, mask in ((batch["input_ids"], batch["input_mask"]), (batch["target_ids"], batch["target_mask"])):
            length = int(mask[row].sum())
            assert length >= 2 and mask[row, :length].all()
            assert ids[row, length - 1] == eos and (ids[row, length:] == pad).all()
            assert (ids[row, :length] != pad).all()
        length = int(batch["target_mask"][row].sum())
        targets, decoder = batch["target_ids"][row], batch["decoder_input_ids"][row]
        assert decoder[0] == pad and torch.equal(decoder[1:length], targets[: length - 1])
        assert (decoder[length:] == pad).all()
        text = [token for token in targets[:length].tolist() if 3 <= token < 259]
        assert batch["target_bytes"][row] == len(text)
    filler = [batch[name][40] for name in ("input_mask", "target_mask", "input_ids", "target_bytes")]  # type: ignore[literal-required]
    assert not any(tensor.any() for tensor in filler) and batch["sample_index"][40] == -1


def test_short_rows_are_the_exception(shards: ShardSet) -> None:
    """Span corruption fills every input exactly, prefix-LM on average."""
    batch = make_batch(Samples(shards, config(), seed=1), range(400))
    lengths = batch["input_mask"].sum(dim=1)
    prefix = batch["objective"] == 0
    assert (lengths[~prefix] == 96).all()
    assert lengths[prefix].float().mean() > 85
    shares = torch.bincount(batch["objective"], minlength=4) / 400
    assert (shares - 0.25).abs().max() < 0.1


def test_the_loader_leaves_the_random_state_alone(shards: ShardSet) -> None:
    """The random generator of the trainer is not used."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read_run(shards, world_size=1, num_workers=1, micro_batch_size=8, first_sample=0, steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_reaches_the_trainer_as_one_line(shards: ShardSet, tmp_path: Path, num_workers: int) -> None:
    """A damaged record stops the run with an error that names it, also in a worker."""
    copy = open_shards(shutil.copytree(shards.folder, tmp_path / "copy"))
    for entry in copy.manifest.shards:
        content = bytearray((copy.folder / entry.file).read_bytes())
        content[10_000] ^= 1
        (copy.folder / entry.file).write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"\.tar: at byte .* is damaged") as error:
        settings = {"num_workers": num_workers, "max_bad_records": 0}
        read_run(copy, world_size=1, micro_batch_size=8, first_sample=0, steps=60, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_held_out_samples(shards: ShardSet, world_size: int) -> None:
    """The same samples for every world size, equally many batches per rank, equal shares of the objectives."""
    per_rank = [
        held_out_batches(shards, config(), num_samples=20, micro_batch_size=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = sorted(row for batches in per_rank for batch in batches for row in rows(batch) if row[0] >= 0)
    alone = held_out_batches(shards, config(), num_samples=20, micro_batch_size=20, rank=0, world_size=1)
    assert found == rows(alone[0])
    assert [row[1] for row in found] == [0, 1, 2, 3] * 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_inputs_of_the_previous_sample(shards: ShardSet, world_size: int) -> None:
    """Each sample has the input of the one before it, whatever rank that is on, and the first that of the last."""
    own, other = (
        {
            int(number): (ids.tolist(), targets.tolist())
            for rank in range(world_size)
            for batch in held_out_batches(
                shards,
                config(),
                num_samples=8,
                micro_batch_size=2,
                rank=rank,
                world_size=world_size,
                inputs_of_previous=shifted,
            )
            for number, ids, targets in zip(batch["sample_index"], batch["input_ids"], batch["target_ids"], strict=True)
            if number >= 0
        }
        for shifted in (False, True)
    )
    assert sorted(other) == list(range(8))
    for number, (ids, targets) in other.items():
        assert targets == own[number][1]
        assert ids == own[(number - 1) % 8][0]


def test_held_out_text_is_not_trained_on(shards: ShardSet) -> None:
    """No held-out sample shares a passage of its text with the training documents."""
    texts = {}
    for name, part in (("training", shards), ("held out", shards.validation)):
        tokens = TokenReader(part, cache_bytes=1 << 20).read(0, part.num_tokens)
        texts[name] = (tokens - 3).astype(np.uint8).tobytes()
    batch = held_out_batches(shards, config(), num_samples=40, micro_batch_size=40, rank=0, world_size=1)[0]
    checked = 0
    for ids, objective in zip(batch["target_ids"].tolist(), batch["objective"].tolist(), strict=True):
        passage = bytes(token - 3 for token in ids if 3 <= token < 259)
        if objective == 0 and len(passage) > 20 and ids.count(shards.tokenizer.eos_id) == 1:
            assert passage in texts["held out"] and passage not in texts["training"]
            checked += 1
    assert checked >= 3


def test_unigram_entropy(make_shards: Callable[..., ShardSet], shards: ShardSet) -> None:
    """It is the cross-entropy of the target frequencies, over the samples that are evaluated."""
    batch = held_out_batches(shards, config(), num_samples=24, micro_batch_size=24, rank=0, world_size=1)[0]
    tokens = batch["target_ids"][batch["target_mask"]]
    frequencies = torch.bincount(tokens).double() / len(tokens)
    expected = -frequencies[tokens].log().mean()
    assert unigram_entropy(shards, config(), num_samples=24) == pytest.approx(float(expected), rel=1e-12)


def test_one_small_document_gives_all_objectives(make_shards: Callable[..., ShardSet]) -> None:
    """A held-out text shorter than a sample is shown by every objective, each time with other masks."""
    shards = make_shards(["".join(chr(97 + number % 26) for number in range(300))])
    settings = DataConfig(input_length=512, target_length=128)
    batch = held_out_batches(shards, settings, num_samples=16, micro_batch_size=16, rank=0, world_size=1)[0]
    assert batch["objective"].tolist() == [0, 1, 2, 3] * 4
    assert (batch["input_mask"].sum(dim=1) >= 2).all() and (batch["target_mask"].sum(dim=1) >= 2).all()
    assert len({row[2] for row in rows(batch)}) > 8
    training = make_batch(Samples(shards, settings, seed=0), range(16))
    assert torch.bincount(training["objective"]).tolist() == [4, 4, 4, 4]


WORKERS = """
import os, signal, sys, time
from colt5dist.data import DataConfig, open_shards, training_batches
config = DataConfig(input_length=96, target_length=40, num_workers=2)
batches = training_batches(open_shards(sys.argv[1]), config, seed=1, global_batch_size=2,
    micro_batch_size=1, rank=0, world_size=1, first_sample=0)
next(batches)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
time.sleep(0.3)
for _ in range(30):
    next(batches)
print("read on", time.monotonic(), flush=True)
raise SystemExit(3) if sys.argv[2] == "exit" else RuntimeError("a fault while the iterator is alive")
"""


@pytest.mark.parametrize(("how", "status"), [("exit", 3), ("raise", 1)])
def test_workers_ignore_signals_and_end_with_the_trainer(shards: ShardSet, how: str, status: int) -> None:
    """They keep reading after SIGTERM to the whole group; a process that exits while they run does not hang."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKERS, str(shards.folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
        end = time.monotonic()  # of the same clock in all processes
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    words, moment = output.decode().rsplit(maxsplit=1)
    assert words == "read on" and process.returncode == status
    assert end - float(moment) < 20
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_killed_worker_is_a_named_error(shards: ShardSet) -> None:
    """Not a hang, and not an error from a signal handler in the middle of something else."""
    others = psutil.Process().children()  # of other tests
    batches = training_batches(
        shards,
        config(num_workers=1),
        seed=5,
        global_batch_size=2,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        first_sample=0,
    )
    next(batches)
    (starter,) = set(psutil.Process().children()) - set(others)
    (worker,) = starter.children()
    worker.kill()
    with pytest.raises(DataWorkerError, match=r"a reader process of rank 0 ended \(.*\); if it was killed because"):
        for _ in range(100):
            next(batches)


WITHOUT_SHARED_MEMORY = """
import os, resource, sys
from colt5dist.data import DataConfig, open_shards, training_batches
shards = open_shards(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file may grow, also none in /dev/shm
config = DataConfig(input_length=2048, target_length=456, num_workers=2)
batches = training_batches(shards, config, seed=1, global_batch_size=64, micro_batch_size=32, rank=0, world_size=1,
    first_sample=0)
print(sum(len(batch["sample_index"]) for _ in range(10) for batch in next(batches)))
"""


def test_batches_need_no_shared_memory(shards: ShardSet) -> None:
    """Containers have little of it, or none; with too little, batches were lost."""
    command = [sys.executable, "-c", WITHOUT_SHARED_MEMORY, str(shards.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("640\n", "", 0)


def test_readers_are_forked_from_a_process_that_was_started_early(shards: ShardSet) -> None:
    """What the trainer does later, as to begin with CUDA or to start threads, is not in the readers."""
    readers = start_readers(shards, config(num_workers=2))
    assert readers is not None
    rows_of = []
    began_later = threading.Event()
    late = threading.Thread(target=began_later.wait)
    late.start()
    try:
        for first_sample in (0, GLOBAL_BATCH):  # the second time as after a rollback
            others = set(psutil.Process().children(recursive=True))
            batches = training_batches(
                shards,
                config(num_workers=2),
                seed=5,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=4,
                rank=0,
                world_size=1,
                first_sample=first_sample,
                readers=readers,
            )
            new = set(psutil.Process().children(recursive=True)) - others
            assert len(new) == 2 and {reader.ppid() for reader in new}.isdisjoint({os.getpid()})
            rows_of.append([row for batch in next(batches) for row in rows(batch)])
            batches.close()
            assert not any(reader.is_running() for reader in new)
    finally:
        began_later.set()
        late.join()
        readers.close()
    assert [row[0] for part in rows_of for row in part] == list(range(2 * GLOBAL_BATCH))
    readers.close()  # does nothing


def test_a_fault_in_a_reader_shows_its_traceback(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a reader that was killed."""

    def fail(*_: object) -> Batch:
        raise AssertionError("a fault in the reader")

    monkeypatch.setattr(loader, "make_batch", fail)
    with pytest.raises(RuntimeError, match=r"Caught in a reader process:\n(.*\n)*.*a fault in the reader") as error:
        read_run(shards, world_size=1, num_workers=1, micro_batch_size=8, first_sample=0, steps=1)
    assert not isinstance(error.value, DataWorkerError)


def test_the_data_room_is_light_to_import() -> None:
    """Nothing of DeepSpeed is loaded."""
    script = "import sys, colt5dist.data; assert not {'deepspeed', 'triton', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
