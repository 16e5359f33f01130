"""TensorBoard's event files: descriptions, texts, pictures, settings, and each step once after an interruption."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, TensorEvent
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from colt5dist.pretrained.routing.pictures import _png
from colt5dist.train.report.monitor import Monitor

SETTINGS = {"optimizer.lr": 0.01, "data.mixture": ["prefix_lm"], "model.encoder": None, "parameters": 7}


def start(run_dir: Path, first_step: int) -> Monitor:
    """A start of a run."""
    monitor = Monitor(run_dir, is_first=True, first_step=first_step, num_steps=9)
    monitor.begin(SETTINGS, f"seed: {first_step}\nname: '*'\n", ["a line", "| another |"], "id")
    return monitor


def read(run_dir: Path) -> EventAccumulator:
    """What TensorBoard reads, all of it."""
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def tensors(run_dir: Path, tag: str) -> list[TensorEvent]:
    """Values of a tag as TensorBoard's own pages read them, which have everything as tensors."""
    guidance = {"scalars": 0, "images": 0, "text": 0}
    events = plugin_event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), tensor_size_guidance=guidance)
    return events.Reload().Tensors(tag)


def steps(run_dir: Path, tag: str) -> list[int]:
    """Steps of a tag."""
    return [event.step for event in tensors(run_dir, tag)]


def texts(run_dir: Path, tag: str) -> list[tuple[int, str]]:
    """The texts of a tag by step."""
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in tensors(run_dir, tag)]


@pytest.fixture
def png() -> bytes:
    """A small picture."""
    from matplotlib.figure import Figure

    return _png(Figure(figsize=(2, 1), dpi=50))


def test_what_a_run_shows(tmp_path: Path, png: bytes) -> None:
    with start(tmp_path, 0) as monitor:
        monitor.record(1, {"loss": 2.0, "eval/loss": 3.0, "mfu": None})
        monitor.histograms(1, {"router/layer_00/query/positions": torch.tensor([3, 0, 1, 0])})
        monitor.text(1, "held_out/sample", "**bold**")
        monitor.picture(1, "map", png, "What it *is*.")
    events = read(tmp_path)
    assert events.Scalars("1_loss/all/train")[0].value == 2.0
    assert sorted(events.Tags()["scalars"]) == ["1_loss/all/held_out", "1_loss/all/train"]
    for tag, words in {
        "1_loss/all/train": "nats per target token",
        "3_routing/positions/query/layer_00": "0 is the first token",
        "3_routing/all_layers/map": "What it *is*.",
    }.items():
        assert words in events.SummaryMetadata(tag).summary_description
    histogram = events.Histograms("3_routing/positions/query/layer_00")[0].histogram_value
    assert list(histogram.bucket) == [3, 0, 1, 0] and list(histogram.bucket_limit) == [0.25, 0.5, 0.75, 1.0]
    (image,) = events.Images("3_routing/all_layers/map")
    assert (image.width, image.height, image.encoded_image_string) == (100, 50, png)
    assert (tmp_path / "routing" / "step_00000001_map.png").read_bytes() == png
    assert texts(tmp_path, "run/configuration") == [(1, "    seed: 0\n    name: '*'")]
    assert texts(tmp_path, "run/start") == [(1, "    a line\n    | another |")]
    assert texts(tmp_path, "held_out/sample") == [(1, "**bold**")]
    assert list(tmp_path.glob("tensorboard/*/")) == []  # no run within the run


def test_settings_and_charts(tmp_path: Path) -> None:
    with start(tmp_path, 0) as monitor:
        monitor.record(1, {"loss": 2.0})
        monitor.record(2, {"loss": 1.0, "eval/loss": 3.0, "eval/books/loss": 3.0})
    events = read(tmp_path)
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info
    values = {key: value.number_value or value.string_value for key, value in found.hparams.items()}
    assert values == {"optimizer.lr": 0.01, "data.mixture": "['prefix_lm']", "parameters": 7.0}
    layouts = [
        Layout.FromString(event.tensor_proto.string_val[0]) for event in events.Tensors("custom_scalars__config__")
    ]
    titles = [[chart.title for category in found.category for chart in category.chart] for found in layouts]
    assert titles == [
        ["training and held-out loss"],
        ["training and held-out loss", "loss by validation set"],
    ]


def test_a_resumed_run_holds_each_text_and_picture_once(tmp_path: Path, png: bytes) -> None:
    for first_step, last_step in ((0, 4), (2, 6), (2, 5)):
        with start(tmp_path, first_step) as monitor:
            for step in range(first_step + 1, last_step + 1):
                monitor.record(step, {"loss": float(step), "eval/loss": 1.0})
                monitor.text(step, "held_out/sample", f"from {first_step}")
                monitor.picture(step, "map", png, "")
    assert texts(tmp_path, "held_out/sample") == [(1, "from 0"), (2, "from 0"), *((n, "from 2") for n in (3, 4, 5))]
    assert steps(tmp_path, "3_routing/all_layers/map") == [1, 2, 3, 4, 5]
    assert steps(tmp_path, "1_loss/all/train") == [1, 2, 3, 4, 5]
    assert texts(tmp_path, "run/configuration") == [(n, f"    seed: {n - 1}\n    name: '*'") for n in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "routing").iterdir()) == [
        f"step_{step:08d}_map.png" for step in (1, 2, 3, 4, 5)
    ]


def test_a_rollback_before_the_start_keeps_the_configuration(tmp_path: Path, png: bytes) -> None:
    with start(tmp_path, 0) as monitor:
        monitor.record(1, {"loss": 1.0})
    with start(tmp_path, 4) as monitor:
        for step in (5, 6):
            monitor.record(step, {"loss": 1.0, "eval/loss": 2.0})
            monitor.picture(step, "map", png, "")
        monitor.roll_back(2)
        monitor.record(3, {"loss": 7.0})
    assert texts(tmp_path, "run/configuration") == [
        (step, f"    seed: {seed}\n    name: '*'") for step, seed in ((1, 0), (3, 4))
    ]
    assert steps(tmp_path, "1_loss/all/train") == [1, 3]
    assert list((tmp_path / "routing").iterdir()) == []
