"""What is kept of a run that fails: `failures/rank_N.txt`, one line on stderr, `status.json`."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from colt5dist.errors import ConfigError, SaveError, TrainingFault
from colt5dist.files import write_whole
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.ranks import Ranks
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.run_directory import write_status


@contextmanager
def failures_kept(
    config: RunConfig, ranks: Ranks, hosts: list[str], explain: Callable[[BaseException], str]
) -> Iterator[None]:
    """Around the training: keeps an exception's traceback in `failures/`, says where on stderr, and lets it pass.

    Args:
        config: the run.
        ranks: place of this rank.
        hosts: host name of every rank.
        explain: says which other rank an exception comes from, if any; may wait for a few seconds.
    """
    run_dir = Path(str(config.run_dir))
    try:
        yield
    except ConfigError as error:
        if ranks.is_first:
            if not (run_dir / "status.json").exists():  # else this start is refused: it has not recorded itself
                _try_to_write_status(run_dir, str(error))
        elif not error.known_to_all:  # nobody else would say it
            error.known_to_all = True
            print(f"error: rank {ranks.rank} on {hosts[ranks.rank]}: {error}", file=sys.stderr, flush=True)
        raise
    except (SaveError, TrainingFault) as error:  # one line tells of it
        if ranks.is_first:
            _try_to_write_status(run_dir, str(error))
        raise
    except Exception as error:
        trace = traceback.format_exc()
        cause = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if is_out_of_memory(error):
            cause += f"; {memory_advice(config, ranks.world_size, last_step(run_dir) + 1)}"
        if blamed := explain(error):
            cause = f"{blamed}; seen here as {cause}"
        message = f"rank {ranks.rank} on {hosts[ranks.rank]} failed: {cause}"
        speaks = blamed.startswith(f"rank 0 on {hosts[0]}")  # which then cannot say it itself
        keep_failure(run_dir, ranks, message, f"{message}\n\n{trace}", speaks=speaks)
        raise


def keep_failure(run_dir: Path, ranks: Ranks, message: str, details: str, *, speaks: bool) -> None:
    """Write `failures/rank_N.txt`, print the message, and write `status.json`: rank 0, or who `speaks` for it."""
    path = run_dir / "failures" / f"rank_{ranks.rank}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, details.encode())
        more = f"more in {path}"
    except OSError as error:
        more = f"{path} cannot be written ({error.strerror})"
    print(f"{message}; {more}", file=sys.stderr, flush=True)
    # two halves of a cluster may each miss the other: then rank 0's word counts
    if ranks.is_first or (speaks and not (run_dir / "status.json").exists()):
        _try_to_write_status(run_dir, message, writer=f"rank_{ranks.rank}")


def last_step(run_dir: Path) -> int:
    """Last step in the run's records, as far as they can be read."""
    with suppress(OSError, ConfigError):
        return max((record["step"] for record in read_metrics(run_dir)), default=0)
    return 0


def _try_to_write_status(run_dir: Path, reason: str, *, writer: str = "") -> None:
    """Write `status.json`, unless the disk is full, say: the failure itself is what has to be told."""
    with suppress(OSError):
        write_status(run_dir, "failed", last_step(run_dir), reason, writer=writer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def memory_advice(config: RunConfig, world_size: int, step: int) -> str:
    """The configured sizes that decide on memory, and what would lower it."""
    stage = config.stage_at(step)
    train, data, zero = stage.train, stage.data, stage.zero
    size = stage.micro_batch_size(world_size)
    mends = []
    if size > 1:
        mends.append(f"lower train.micro_batch_size (to {size // 2}, say)")
    if train.activation_checkpointing == "none":
        mends.append("set train.activation_checkpointing=full_keep_routing")
    if world_size > 1 and zero.stage < 3:
        mends.append(f"raise zero.stage (to {zero.stage + 1})")
    if zero.offload == "none" and zero.stage:
        mends.append("set zero.offload=optimizer")
    mends.append("lower data.input_length or data.target_length")
    return (
        f"out of memory with train.micro_batch_size {size}, data.input_length {data.input_length}, "
        f"data.target_length {data.target_length}, train.activation_checkpointing {train.activation_checkpointing}, "
        f"zero.stage {zero.stage}, zero.offload {zero.offload} on {world_size} processes; {', or '.join(mends)}; "
        "--dry-run estimates what is needed"
    )
