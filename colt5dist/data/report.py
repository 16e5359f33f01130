"""What a folder of shards holds, as lines for the terminal."""

from colt5dist.data.documents import Problems
from colt5dist.data.lengths import length_lines
from colt5dist.data.manifest import Manifest
from colt5dist.data.shards import ShardSet
from colt5dist.wording import count


def summary_lines(training: Manifest, validation: Manifest, problems: Problems) -> list[str]:
    """What was made: counts, what was left out, and how long the documents are."""
    lines = [
        f"{name}: {count(part.documents, 'document')}, {count(part.tokens, 'token')}, "
        f"{count(len(part.shards), 'shard')}"
        for name, part in (("training", training), ("held out", validation))
    ]
    lines += problems.lines()
    counts = training.source.get("document_lengths")
    return lines + (length_lines(counts) if counts else [])


def info_lines(shards: ShardSet) -> list[str]:
    """The same of a folder that was opened, with its tokenizer, its bytes, and what it was made from."""
    manifest, entry = shards.manifest, shards.manifest.tokenizer
    source = manifest.source
    problems = Problems(counts=source.get("left_out", {}), unwanted=source.get("unwanted", {}))
    size = sum(part.bytes for held in (manifest, shards.validation.manifest) for part in held.shards)
    lines = [
        f"fingerprint: {manifest.checksum}",
        f"tokenizer: {entry.kind}, {entry.vocab_size:,} ids ({manifest.dtype}), pad {entry.pad_id}, end {entry.eos_id}",
        f"bytes: {size:,}",
    ]
    for key, value in source.get("job", {}).items():
        lines.append(f"made with {key.replace('_', ' ')}: {value}")
    return lines + summary_lines(manifest, shards.validation.manifest, problems)
