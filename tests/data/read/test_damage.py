"""Forty kinds of damage to a folder of shards: each is reported or harmless, and none changes a sample silently."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from colt5dist.data.config import DataConfig
from colt5dist.data.manifest import read_manifest
from colt5dist.data.read.batch import Batch, make_batch
from colt5dist.data.read.samples import Samples
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.token_reader import DamagedShardError, UnreadableShardError
from colt5dist.data.verify import verify
from colt5dist.errors import ConfigError

NUM_SAMPLES = 1000  # more than two epochs
CONFIG = DataConfig(input_length=1500, target_length=700, num_workers=0, max_bad_records=1000)
Samplings = dict[int, tuple[bytes, bytes]]

HEADER, BLOCK = 512, 512


def flip(path: Path, place: int, bit: int = 4) -> None:
    """Change one bit of a file; a negative place counts from its end."""
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def overwrite(path: Path, place: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


def truncate(path: Path, size: int) -> None:
    """Keep the first bytes; a negative size removes that number of bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:size])


def swap(first: Path, second: Path) -> None:
    """Exchange the contents of two files."""
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def swap_members(folder: Path) -> None:
    """Exchange the first two members of a shard, byte by byte up to the length of the shorter."""
    rows = open_shards(folder).index.members[:2]
    path = folder / "000000.tar"
    content = path.read_bytes()
    size = int(rows["size"].min())
    parts = [content[int(offset) : int(offset) + size] for offset in rows["offset"]]
    for part, offset in zip(reversed(parts), rows["offset"].tolist(), strict=True):
        overwrite(path, offset, part)


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def second_member(folder: Path) -> int:
    """Offset of the second member of the first shard."""
    return int(open_shards(folder).index.members[1]["offset"])


# what is wrong after each: "start": found when the folder is opened; "read": named when a sample needs it;
# "none": nothing that training reads
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in the first header's name": (lambda d: flip(d / "000000.tar", 3), "read"),
    "bit in a header's size": (lambda d: flip(d / "000000.tar", 130, 1), "read"),
    "bit in a header's checksum": (lambda d: flip(d / "000000.tar", 150, 1), "read"),
    "bit in a header's type": (lambda d: flip(d / "000000.tar", 156, 1), "read"),
    "bit in a header's magic word": (lambda d: flip(d / "000000.tar", 258, 1), "read"),
    "bit in the second member's header": (lambda d: flip(d / "000000.tar", second_member(d) + 5), "read"),
    "bit in the number of records": (lambda d: flip(d / "000000.tar", HEADER, 1), "read"),
    "bit in a record's length": (lambda d: flip(d / "000000.tar", HEADER + 5, 1), "read"),
    "bit in the first token": (lambda d: flip(d / "000000.tar", HEADER + 2000, 1), "read"),
    "bit in a later token": (lambda d: flip(d / "000000.tar", 200_001, 128), "read"),
    "bit in the padding of a member": (lambda d: flip(d / "000000.tar", second_member(d) - 1), "none"),
    "bit in the end of the tar file": (lambda d: flip(d / "000000.tar", -1), "none"),
    "block of zeros over a header": (lambda d: overwrite(d / "000000.tar", 0, bytes(2 * BLOCK)), "read"),
    "block of zeros over tokens": (lambda d: overwrite(d / "000000.tar", 20 * BLOCK, bytes(BLOCK)), "read"),
    "zeros from the second member on": (
        lambda d: overwrite(d / "000000.tar", second_member(d), bytes(10 * BLOCK)),
        "read",
    ),
    "block of ones": (lambda d: overwrite(d / "000000.tar", 30 * BLOCK, b"\xff" * BLOCK), "read"),
    "members swapped": (swap_members, "read"),
    "cut in a header": (lambda d: truncate(d / "000000.tar", 100), "start"),
    "cut after a header": (lambda d: truncate(d / "000000.tar", HEADER), "start"),
    "cut in a member": (lambda d: truncate(d / "000000.tar", 5001), "start"),
    "cut between members": (lambda d: truncate(d / "000000.tar", second_member(d)), "start"),
    "cut in the end of the tar file": (lambda d: truncate(d / "000000.tar", -BLOCK), "start"),
    "cut to nothing": (lambda d: truncate(d / "000000.tar", 0), "start"),
    "bytes added": (lambda d: (d / "000000.tar").write_bytes((d / "000000.tar").read_bytes() + b"\0"), "start"),
    "shard missing": (lambda d: (d / "000001.tar").unlink(), "start"),
    "shard renamed": (lambda d: (d / "000001.tar").rename(d / "000009.tar"), "start"),
    "shards swapped": (lambda d: swap(d / "000000.tar", d / "000001.tar"), "start"),
    "shard doubled": (lambda d: shutil.copy(d / "000000.tar", d / "000001.tar"), "start"),
    "shard of the held-out set": (lambda d: shutil.copy(d / "validation/000000.tar", d / "000000.tar"), "start"),
    "shard is a folder": (lambda d: ((d / "000001.tar").unlink(), (d / "000001.tar").mkdir()), "start"),
    "foreign shard added": (lambda d: shutil.copy(d / "000000.tar", d / "000077.tar"), "none"),
    "bit in members.bin": (lambda d: flip(d / "index/members.bin", 20), "start"),
    "bit in documents.bin": (lambda d: flip(d / "index/documents.bin", 17), "start"),
    "bit in checksums.bin": (lambda d: flip(d / "index/checksums.bin", 8), "start"),
    "documents.bin cut by an entry": (lambda d: truncate(d / "index/documents.bin", -8), "start"),
    "index of another set": (
        lambda d: shutil.copytree(d / "validation/index", d / "index", dirs_exist_ok=True),
        "start",
    ),
    "index missing": (lambda d: shutil.rmtree(d / "index"), "start"),
    "manifest cut": (lambda d: truncate(d / "manifest.json", 300), "start"),
    "bit in the manifest": (lambda d: flip(d / "manifest.json", 400, 1), "start"),
    "manifest of more tokens": (lambda d: edit(d / "manifest.json", tokens=read_manifest(d).tokens + 1), "start"),
    "held-out set of other shards": (
        lambda d: edit(d / "validation/manifest.json", validation=None, documents=1),
        "start",
    ),
    "held-out set missing": (lambda d: shutil.rmtree(d / "validation"), "start"),
}


def samplings(batch: Batch) -> Samplings:
    """Inputs and targets of every sample of a batch."""
    rows = zip(batch["sample_index"].tolist(), batch["input_ids"], batch["target_ids"], strict=True)
    return {number: (inputs.numpy().tobytes(), targets.numpy().tobytes()) for number, inputs, targets in rows}


@pytest.fixture(scope="module")
def sound(shards: ShardSet) -> Samplings:
    """The samples without damage."""
    return samplings(make_batch(Samples(shards, CONFIG, seed=2), range(NUM_SAMPLES)))


@pytest.fixture
def copy(shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the shard set that may be damaged."""
    return Path(shutil.copytree(shards.folder, tmp_path / "copy"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_is_silent(copy: Path, sound: Samplings, damage: str) -> None:
    """Refused at start, or reported and replaced, or without any effect; `verify` reports it in every case."""
    inflict, kind = DAMAGE[damage]
    inflict(copy)
    if kind == "start":
        with pytest.raises(ConfigError) as error:
            open_shards(copy)
        assert "\n" not in str(error.value) and str(copy) in str(error.value)
    else:
        samples = Samples(open_shards(copy), CONFIG, seed=2)
        found = samplings(make_batch(samples, range(NUM_SAMPLES)))
        named = samples.new_bad_records()
        changed = [number for number in range(NUM_SAMPLES) if found[number] != sound[number]]
        assert (len(changed) > 0) == (len(named) > 0) == (kind == "read")
        assert all(str(copy / "000000.tar") in line and "\n" not in line for line in named)
    if damage == "held-out set missing" or not (copy / "manifest.json").exists():
        return
    verified = verify(copy, workers=1)
    assert verified.damage or verified.notes
    assert bool(verified.damage) == (damage != "foreign shard added")


def test_a_damaged_sample_is_replaced_by_the_next(copy: Path, shards: ShardSet, sound: Samplings) -> None:
    """By the text of the next sample, with its own number and mask, whatever the order in which samples are made."""
    flip(copy / "000000.tar", 100_001)
    opened = open_shards(copy)
    forward = Samples(opened, CONFIG, seed=2)
    found = samplings(make_batch(forward, range(NUM_SAMPLES)))
    changed = [number for number in range(NUM_SAMPLES) if found[number] != sound[number]]
    assert changed and len(forward.new_bad_records()) == 1
    assert forward.new_bad_records() == []
    for number in changed:
        alone = samplings(make_batch(Samples(opened, CONFIG, seed=2), [number]))
        assert alone[number] == found[number]
        replacement = next(n for n in range(number + 1, NUM_SAMPLES + 1) if n not in changed)
        text, planned = forward._undamaged_text(number)[1], forward.planned(replacement)
        assert np.array_equal(text, forward._readers[0].read_chunk(planned.chunk))


def test_the_run_stops_after_so_many_bad_records(copy: Path) -> None:
    """Each record counts once; the first above the limit is the error."""
    opened = open_shards(copy)
    members = opened.index.members
    for number in range(3):
        place = int(members[number]["offset"]) + HEADER + 4 + 4 * len(opened.index.record_lengths(number))
        flip(copy / opened.manifest.shards[int(members[number]["shard"])].file, place + 10)
    for allowed in (0, 2):
        config = DataConfig(input_length=1500, target_length=700, max_bad_records=allowed)
        samples = Samples(opened, config, seed=2)
        with pytest.raises(DamagedShardError, match="is damaged") as error:
            make_batch(samples, range(NUM_SAMPLES))
        assert ("data.max_bad_records=2" in str(error.value)) == (allowed == 2)
        assert len(samples.new_bad_records()) == allowed + 1
    three = Samples(opened, DataConfig(input_length=1500, target_length=700, max_bad_records=3), seed=2)
    make_batch(three, range(NUM_SAMPLES))
    assert len(three.new_bad_records()) == 3


def test_what_cannot_be_read_is_not_replaced(copy: Path) -> None:
    """A shard that disappears later, or a failing disk, is not a damaged record: the run stops."""
    samples = Samples(open_shards(copy), CONFIG, seed=2)
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UnreadableShardError, match=r"\.tar: at byte \d+: cannot be read"):
        make_batch(samples, range(8))


def test_verify_is_content_with_what_is_whole(shards: ShardSet) -> None:
    """And reports how much it read."""
    verified = verify(shards.folder, workers=2)
    assert verified.damage == [] and verified.notes == []
    sizes = [entry.bytes for part in (shards, shards.validation) for entry in part.manifest.shards]
    assert verified.num_bytes == sum(sizes)


def test_verify_names_the_record(copy: Path) -> None:
    """A damaged token is reported with shard, place and record, and so is a second one elsewhere."""
    flip(copy / "000000.tar", 100_001)
    flip(copy / "validation/000000.tar", 5_001)
    verified = verify(copy, workers=2)
    assert len(verified.damage) == 2
    assert f"{copy / '000000.tar'}: at byte" in verified.damage[0] and "record" in verified.damage[0]
    assert str(copy / "validation/000000.tar") in verified.damage[1]


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/secret.tar", "a/../../secret.tar", ""])
@pytest.mark.parametrize("kind", ["shards", "index"])
def test_a_manifest_cannot_name_files_outside_its_folder(copy: Path, kind: str, name: str) -> None:
    """Its checksum is right, so the one who made the shards wrote it."""
    manifest = read_manifest(copy)
    first, *rest = getattr(manifest, kind)
    replace(manifest, **{kind: (replace(first, file=name), *rest)}).write(copy)
    with pytest.raises(ConfigError, match="names a file outside the folder"):
        open_shards(copy)
