"""Opens the shard sets that a configuration names, and makes those of the standard library where they are missing."""

from pathlib import Path

from colt5dist.data.config import DataConfig
from colt5dist.data.read.shards import open_shards
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
    parts = [
        open_shards(
            ensure_standard_library_shards(shards) if shards in STANDARD_LIBRARIES else _path(shards),
            cache_bytes=cache_bytes,
        )
        for shards, _ in named
    ]
    first = parts[0].tokenizer.fingerprint
    for number, part in enumerate(parts):
        if part.tokenizer.fingerprint != first:
            raise ConfigError(
                f"data.sources[{number}].shards: {named[number][0]} was made with another tokenizer than "
                f"{named[0][0]}; prepare both with the same tokenizer"
            )
    return Sources(tuple(parts), tuple(weight for _, weight in named))


def absent_sources(config: DataConfig) -> list[str]:
    """Return the shard sets of a configuration that are not there, or not yet made; addresses are not asked.

    Args:
        config: names the shard sets, in `shards` or `sources`.
    """
    found = []
    for shards in [source.shards for source in config.sources] or [config.shards]:
        if shards in STANDARD_LIBRARIES:
            is_there = find_standard_library_shards(shards) is not None
        else:
            is_there = "://" in shards or Path(shards).exists()
        if not is_there:
            found.append(shards)
    return found


def _path(shards: str) -> str | Path:
    return shards if "://" in shards else Path(shards)
