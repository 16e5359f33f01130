"""Progress of prepare: a bar on a terminal, or a line every half minute in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from colt5dist.data.prepare.held_out_split import CorpusWriter
from colt5dist.data.prepare.resume import Report

LINE_SECONDS = 30.0


class Speed:
    """Documents, tokens and input bytes per second since the first report of this process."""

    def __init__(self) -> None:
        self._begin: tuple[float, int, int, int] | None = None

    def describe(self, done: int, total: int, documents: int, tokens: int) -> str:
        """Return one line: what is done, how fast, and the time left.

        Args:
            done: bytes of the inputs that are done.
            total: bytes of all inputs.
            documents: documents that are done.
            tokens: tokens that are done.
        """
        now = time.monotonic()
        if self._begin is None:
            self._begin = now, done, documents, tokens
        begin, done_before, documents_before, tokens_before = self._begin
        seconds = max(now - begin, 1e-9)
        text = f"{documents:,} documents, {tokens:,} tokens"
        if now == begin or done == done_before:
            return text
        left = (total - done) * seconds / (done - done_before)
        return (
            f"{text}, {(documents - documents_before) / seconds:,.0f} documents/s, "
            f"{(tokens - tokens_before) / seconds:,.0f} tokens/s, {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def progress() -> Iterator[Report]:
    """Provide the `report` function of `prepare`: a bar if stderr is a terminal, else a line every LINE_SECONDS."""
    speed = Speed()
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(20), TextColumn("{task.percentage:>3.0f}% {task.description}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def show(done: int, total: int, writer: CorpusWriter) -> None:
                line = speed.describe(done, total, writer.num_documents, writer.num_tokens)
                bar.update(task, completed=done, total=total, description=line)

            yield show
        return
    said = time.monotonic()

    def say(done: int, total: int, writer: CorpusWriter) -> None:
        nonlocal said
        line = speed.describe(done, total, writer.num_documents, writer.num_tokens)
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            print(f"{done / max(total, 1):.0%}: {line}", file=sys.stderr, flush=True)

    yield say
