"""Python's garbage collector, run by all ranks after the same steps: by itself it runs when a rank happens to be due.

A collection stops a rank for some milliseconds while the others wait for it; of many ranks one would nearly always be
collecting.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 200
"""Steps between two collections."""


@contextmanager
def collected_by_step() -> Iterator[None]:
    """Within it Python does not collect by itself, and never looks again at what the start has made."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_after(step: int) -> None:
    """Collect if a collection follows this step."""
    if step % EVERY_STEPS == 0:
        gc.collect()
