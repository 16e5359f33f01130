"""The record of a failed run: `failures/rank_N.txt`, one line on stderr, `status.json`."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from colt5dist.errors import ConfigError, SaveError, TrainingFault, first_line
from colt5dist.files import write_whole
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.deepspeed_json import engine_stage
from colt5dist.train.ranks import Ranks
from colt5dist.train.report.monitor import read_metrics
from colt5dist.train.run_directory import FAILURES, STATUS, write_status


@contextmanager
def record_failures(
    config: RunConfig, ranks: Ranks, hosts: list[str], explain: Callable[[BaseException], str]
) -> Iterator[None]:
    """Wrap the training: write an exception's traceback to `failures/`, name the file on stderr, and raise it again.

    Args:
        config: the run.
        ranks: place of this rank.
        hosts: host name of every rank.
        explain: returns which other rank caused an exception, or an empty text; may wait for a few seconds.
    """
    run_dir = Path(str(config.run_dir))
    try:
        yield
    except ConfigError as error:
        if ranks.is_first:
            if not (run_dir / STATUS).exists():  # otherwise this start was refused before it recorded anything
                _try_to_write_status(run_dir, str(error))
        elif not error.known_to_all:  # no other rank would report it
            error.known_to_all = True
            print(f"error: rank {ranks.rank} on {hosts[ranks.rank]}: {error}", file=sys.stderr, flush=True)
        raise
    except (SaveError, TrainingFault) as error:  # reported in one line, without a traceback
        if ranks.is_first:
            _try_to_write_status(run_dir, str(error))
        raise
    except Exception as error:
        trace = traceback.format_exc()
        cause = first_line(error)
        if is_out_of_memory(error):
            cause += f"; {memory_advice(config, ranks.world_size, last_step(run_dir) + 1)}"
        if blamed := explain(error):
            cause = f"{blamed}; seen here as {cause}"
        message = f"rank {ranks.rank} on {hosts[ranks.rank]} failed: {cause}"
        first_rank_failed = blamed.startswith(f"rank 0 on {hosts[0]}")
        write_failure(run_dir, ranks, message, f"{message}\n\n{trace}", first_rank_failed=first_rank_failed)
        raise


def write_failure(run_dir: Path, ranks: Ranks, message: str, details: str, *, first_rank_failed: bool) -> None:
    """Write `failures/rank_N.txt`, print the message, and on rank 0 write `status.json`.

    Args:
        run_dir: folder of the run.
        ranks: place of this rank.
        message: one line.
        details: content of `failures/rank_N.txt`.
        first_rank_failed: whether rank 0 is the one that failed; then this rank writes `status.json` in its place.
    """
    path = run_dir / FAILURES / f"rank_{ranks.rank}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, details.encode())
        more = f"more in {path}"
    except OSError as error:
        more = f"{path} cannot be written ({error.strerror})"
    print(f"{message}; {more}", file=sys.stderr, flush=True)
    # two halves of a cluster may each have lost the other: then what rank 0 writes counts
    if ranks.is_first or first_rank_failed:
        _try_to_write_status(run_dir, message, writer=f"rank_{ranks.rank}", keep_existing=not ranks.is_first)


def last_step(run_dir: Path) -> int:
    """Last step in metrics.jsonl, as far as it can be read; 0 without one."""
    with suppress(OSError, ConfigError):
        return max((record["step"] for record in read_metrics(run_dir)), default=0)
    return 0


def _try_to_write_status(run_dir: Path, reason: str, *, writer: str = "", keep_existing: bool = False) -> None:
    """Write `status.json` if possible: the failure itself must be reported even if the disk is full."""
    with suppress(OSError):
        write_status(run_dir, "failed", last_step(run_dir), reason, writer=writer, keep_existing=keep_existing)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def memory_advice(config: RunConfig, world_size: int, step: int) -> str:
    """Describe the configured sizes that determine the use of memory, and what would lower it.

    Only settings are advised that a resumed run may change, with values that fit the others.

    Args:
        config: the run.
        world_size: number of processes.
        step: step at which memory ran out; it decides the lengths.

    Returns:
        One line.
    """
    stage = config.stage_at(step)
    train, data, zero = stage.train, stage.data, stage.zero
    size = stage.micro_batch_size(world_size)
    number = config.stage_number(step) - 1
    of_entry = number >= 0 and config.data.length_schedule[number].micro_batch_size is not None
    size_key = f"data.length_schedule[{number}].micro_batch_size" if of_entry else "train.micro_batch_size"
    fixes = []
    if size > 1:
        share = train.global_batch_size // world_size
        smaller = max(divisor for divisor in range(1, size) if share % divisor == 0)
        fixes.append(f"lower {size_key} (for instance to {smaller})")
    if train.activation_checkpointing == "none":
        fixes.append("set train.activation_checkpointing=full_keep_routing")
    if stage.optimizer.name != "adafactor":  # which needs stage 0
        zero_stage = engine_stage(config, torch.cuda.is_available())
        if world_size > 1 and zero_stage < 3:
            fixes.append(f"raise zero.stage (to {zero_stage + 1})")
        if zero.offload == "none" and zero.stage:
            fixes.append("set zero.offload=optimizer")
        if zero.offload == "optimizer" and zero.stage == 3:
            fixes.append("set zero.offload=parameters")
    if not fixes:
        fixes.append("use more or larger devices")
    return (
        f"out of memory with {size_key} {size}, data.input_length {data.input_length}, "
        f"data.target_length {data.target_length}, train.activation_checkpointing {train.activation_checkpointing}, "
        f"zero.stage {zero.stage}, zero.offload {zero.offload} on {world_size} processes; {', or '.join(fixes)}; "
        "--dry-run estimates what is needed"
    )
