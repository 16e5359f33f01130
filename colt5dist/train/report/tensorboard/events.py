"""Writes TensorBoard's event files: numbers with their descriptions, histograms, texts and pictures."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.plugins.histogram.metadata import PLUGIN_NAME as HISTOGRAMS
from tensorboard.plugins.image.metadata import PLUGIN_NAME as IMAGES
from tensorboard.plugins.scalar.metadata import PLUGIN_NAME as SCALARS
from tensorboard.plugins.text.summary_v2 import text_pb
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram_raw

from colt5dist.train.report.tensorboard.tags import layout, place

EVENTS = "events.out.tfevents."
EVENT_TIME = re.compile(r"events\.out\.tfevents\.(\d{10})")


class Events:
    """The event files of a run in one folder. A full disk leaves a gap, and is reported once.

    Args:
        folder: where they are.
        last_step: steps that are already done; events of later steps become obsolete.
        keys: keys of metrics.jsonl that the run has written before.
        warn: called with the error if something cannot be written.
    """

    def __init__(self, folder: Path, last_step: int, *, keys: Iterable[str], warn: Callable[[OSError], None]) -> None:
        self._folder = folder
        self._warn = warn
        self._start_step = last_step + 1
        self._start: list[Summary] = []
        self._tags = {place(key).tag for key in keys}
        self._layout: object = None
        self._described: set[str] = set()
        self._writer: SummaryWriter | None = self._open(last_step)

    def begin(self, texts: Mapping[str, str], summaries: Sequence[Summary]) -> None:
        """Write what is known at the start; it belongs to the first step of this start.

        Args:
            texts: Markdown by tag.
            summaries: further ones.
        """
        self._start = [*(text_pb(tag, text) for tag, text in texts.items()), *summaries]
        self._add_all(self._start_step, self._start)

    def scalars(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write numbers, by their keys in metrics.jsonl; after an error, with a new writer."""
        if self._writer is None:
            self._writer = self._reopen()
        known = {key: value for key, value in values.items() if value is not None}
        for key, value in known.items():
            tag, metadata = self._place(key, SCALARS, DATA_CLASS_SCALAR)
            self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)]))
        self._tags |= {place(key).tag for key in known}
        charts = layout(self._tags)
        if charts != self._layout:
            self._layout = charts
            self._add(step, custom_scalars(charts))

    def histograms(self, step: int, counts: Mapping[str, torch.Tensor]) -> None:
        """Write histograms: (bins,) counts over equal bins of [0, 1], by key."""
        for key, count in counts.items():
            values = count.double().cpu()
            edges = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)
            centers = (edges[:-1] + edges[1:]) / 2
            total = float(values.sum())
            tag, metadata = self._place(key, HISTOGRAMS, DATA_CLASS_TENSOR)
            summary = histogram_raw(
                name=tag,
                min=0.0,
                max=1.0,
                num=int(total),
                sum=float((values * centers).sum()),
                sum_squares=float((values * centers**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=values.tolist(),
            )
            summary.value[0].metadata.CopyFrom(metadata)
            self._add(step, summary)

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a text in Markdown."""
        self._add(step, text_pb(tag, text))

    def image(self, step: int, tag: str, png: bytes, description: str) -> None:
        """Write a picture, the bytes of a PNG file."""
        width, height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))  # of its first chunk, IHDR
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        metadata = _metadata(IMAGES, DATA_CLASS_BLOB_SEQUENCE, description)
        self._add(step, Summary(value=[Summary.Value(tag=tag, image=image, metadata=metadata)]))

    def roll_back(self, step: int) -> None:
        """Make the events after a step obsolete, and write what belongs to this start again."""
        self.close()
        self._described.clear()
        self._layout = None
        self._writer = None
        try:
            self._writer = self._open(step)
        except OSError as error:
            self._warn(error)
        if step < self._start_step:
            self._start_step = step + 1
            self._add_all(self._start_step, self._start)

    def flush(self) -> None:
        """Have everything on the disk."""
        self._write(SummaryWriter.flush)

    def close(self) -> None:
        """End the file."""
        self._write(SummaryWriter.close)

    def _place(self, key: str, plugin: str, data_class: int) -> tuple[str, SummaryMetadata]:
        """Tag of a key, with its description the first time that a file gets it."""
        tag, description = place(key)
        is_new = tag not in self._described
        self._described.add(tag)
        return tag, _metadata(plugin, data_class, description if is_new else "")

    def _add_all(self, step: int, summaries: Iterable[Summary]) -> None:
        for summary in summaries:
            self._add(step, summary)

    def _add(self, step: int, summary: Summary) -> None:
        def add(writer: SummaryWriter) -> None:
            assert writer.file_writer is not None
            writer.file_writer.add_summary(summary, step)

        self._write(add)

    def _open(self, last_step: int) -> SummaryWriter:
        """Open a writer that marks the events after a step as obsolete."""
        _date_back(self._folder)
        return SummaryWriter(str(self._folder), purge_step=last_step + 1, flush_secs=15)

    def _reopen(self) -> SummaryWriter | None:
        try:
            return SummaryWriter(str(self._folder), flush_secs=15)
        except OSError as error:
            self._warn(error)
            return None

    def _write(self, call: Callable[[SummaryWriter], object]) -> None:
        """Do something with the writer; after an error it can no longer be used."""
        try:
            if self._writer is not None:
                call(self._writer)
        except OSError as error:
            self._writer = None
            self._warn(error)


def _metadata(plugin: str, data_class: int, description: str) -> SummaryMetadata:
    """Which page of TensorBoard shows a value, and what is written beside it."""
    return SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin),
        summary_description=description,
        data_class=data_class,
    )


def _date_back(folder: Path) -> None:
    """Make sure that the event file of this start is the last by name, because TensorBoard reads them in that order.

    The names begin with the time. If the clock was set back, the new file, which makes overlapping events obsolete,
    would come first, and TensorBoard would show nothing new. Then the older files get a time just before now.
    """
    dated = [(match, path) for path in sorted(folder.glob(f"{EVENTS}*")) if (match := EVENT_TIME.match(path.name))]
    now = int(time.time())
    if not dated or int(dated[-1][0][1]) < now:
        return
    for age, (match, path) in zip(range(len(dated), 0, -1), dated, strict=True):
        path.rename(folder / f"{EVENTS}{now - age:010d}{path.name[match.end() :]}")
