"""Opens the shard sets that a configuration names, and makes those of the standard library where they are missing."""

from pathlib import Path

from colt5dist.data.config import DataConfig
from colt5dist.data.read.shards import ShardSet, open_shards
from colt5dist.data.read.sources import Sources
from colt5dist.data.standard_library import (
    STANDARD_LIBRARIES,
    ensure_standard_library_shards,
    find_standard_library_shards,
)
from colt5dist.errors import ConfigError


def open_sources(config: DataConfig) -> Sources:
    """Open the shard sets of a configuration; those of the standard library are made where they are missing.

    Args:
        config: names the shard sets, in `shards` or `sources`.

    Raises:
        ConfigError: one is missing or damaged, or they were made with different tokenizers.
    """
    named = [(source.shards, source.weight) for source in config.sources] or [(config.shards, 1.0)]
    cache_bytes = int(config.cache_gb * 1e9)
    parts = [_open(shards, cache_bytes) for shards, _ in named]
    first = parts[0].tokenizer.fingerprint
    for number, part in enumerate(parts):
        if part.tokenizer.fingerprint != first:
            raise ConfigError(
                f"data.sources[{number}].shards: {named[number][0]} was made with another tokenizer than "
                f"{named[0][0]}; prepare both with the same tokenizer"
            )
    return Sources(tuple(parts), tuple(weight for _, weight in named))


def open_validation_sets(config: DataConfig, sources: Sources) -> dict[str, Sources]:
    """Open the shard sets whose held-out documents are measured by themselves, besides those of the whole run.

    Args:
        config: names them: the sources that have a name, and `validation`.
        sources: what `open_sources` returned.

    Returns:
        The sets by their names, in this order.

    Raises:
        ConfigError: one is missing or damaged, or was made with another tokenizer than the training text.
    """
    named = zip(config.sources, sources.parts, strict=False)  # without `sources` there is one part, which has no name
    sets = {source.name: Sources((part,), (1.0,)) for source, part in named if source.name}
    for number, entry in enumerate(config.validation):
        key = f"data.validation[{number}].shards"
        try:
            part = _open(entry.shards, int(config.cache_gb * 1e9))
        except ConfigError as error:
            raise ConfigError(f"{key}: {str(error).removeprefix('data.shards: ')}") from None
        if part.tokenizer.fingerprint != sources.tokenizer.fingerprint:
            raise ConfigError(
                f"{key}: {entry.shards} was made with another tokenizer than the training text; prepare it with the "
                "same tokenizer"
            )
        sets[entry.name] = Sources((part,), (1.0,))
    return sets


def absent_sources(config: DataConfig) -> list[str]:
    """Return the shard sets of a configuration that are not there, or not yet made; addresses are not asked.

    Args:
        config: names the shard sets, in `shards` or `sources`; in `validation` only the standard library counts, since
            a missing folder there is wrong.
    """
    found = []
    places = [source.shards for source in config.sources] or [config.shards]
    measured = [entry.shards for entry in config.validation]
    places += [name for name in STANDARD_LIBRARIES if name in measured and name not in places]
    for shards in places:
        if shards in STANDARD_LIBRARIES:
            is_there = find_standard_library_shards(shards) is not None
        else:
            is_there = "://" in shards or Path(shards).exists()
        if not is_there:
            found.append(shards)
    return found


def _open(shards: str, cache_bytes: int) -> ShardSet:
    if shards in STANDARD_LIBRARIES:
        return open_shards(ensure_standard_library_shards(shards), cache_bytes=cache_bytes)
    return open_shards(shards if "://" in shards else Path(shards), cache_bytes=cache_bytes)
