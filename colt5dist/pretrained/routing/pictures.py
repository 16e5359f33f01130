"""Two pictures of what is routed: where in a document, and which kinds of tokens.

They are drawn without pyplot, so neither a display nor any state that others share is needed.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from colt5dist.pretrained.routing.document import DocumentRouting
from colt5dist.pretrained.routing.token_kinds import KINDS, LINE_BREAK, SENTINEL, SPECIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"feed_forward": "feed-forward", "query": "queries", "key_value": "keys/values"}
"""Names of the routers in the pictures."""
MARKS = {LINE_BREAK: "#3b82f6", SENTINEL: "#e11d48", SPECIAL: "#16a34a"}
"""Colour by which the strip above the map marks a kind."""
CLOSE_UP = 100
"""Tokens of the close-up, which is drawn with their text."""
MAX_COLUMNS = 1200
"""Columns of a map; of more tokens, neighbours share a column, which shows the mean of their scores."""
MOST_LABELLED_LAYERS = 14
"""Layers up to which every cell of the second picture has its number."""
LARGEST_FACTOR = 4.0
"""Factor at which the colours of the second picture end."""


def draw_map(document: DocumentRouting, title: str) -> bytes:
    """Draw where in a document tokens are routed: tokens along x, layers down y, one map for each router.

    The soft scores are the brightness. Line breaks, sentinels and other special tokens are marked above the map. Below,
    the part of the document from which the most queries are routed is drawn close up, with its text; there a dot marks
    every routed token.

    Args:
        document: what was routed.
        title: what the picture is headed by.

    Returns:
        A PNG file.
    """
    num_layers, num_tokens = document.routed["query"].shape
    height = 0.16 * num_layers + 0.25
    heights = [0.14, *[height] * 3, 0.3, 0.14, *[height] * 3]
    figure, rows = _axes(14, heights, margins=(0.7, 1.1, 0.35, 0.5), gap=0.12)
    whole, space, part = rows[:4], rows[4], rows[5:]
    space.set_axis_off()
    heading = (
        f"{title}: all {num_tokens:,} tokens; brightness: soft score (marked above the map: line breaks blue, "
        "sentinels red, other special tokens green)"
    )
    picture = _draw_maps(whole, document, slice(0, num_tokens), heading)
    shown = _close_up(document)
    heading = f"close-up of tokens {shown.start:,} to {shown.stop - 1:,}; a dot: routed to the heavy branch"
    _draw_maps(part, document, shown, heading)
    for name, axis in zip(TITLES, part[1:], strict=True):
        layers, tokens = np.nonzero(document.routed[name][:, shown])
        axis.plot(tokens + shown.start, layers, ".", color="#22d3ee", markersize=3)
    texts = [_visible(text) for text in document.texts[shown]]
    part[3].set_xticks(range(shown.start, shown.stop), texts, family="monospace", fontsize=7)
    for label, text in zip(part[3].get_xticklabels(), texts, strict=True):
        label.set_rotation(90 if len(text) > 2 else 0)
    figure.colorbar(picture, cax=_beside(rows)).ax.tick_params(labelsize=7)
    return _png(figure)


def draw_kinds(document: DocumentRouting, title: str) -> bytes:
    """Draw which kinds of tokens are routed: layers down y, kinds along x, one table for each router.

    A cell is the share of the kind among the routed tokens, divided by its share among all tokens: above 1, the layer
    prefers the kind.

    Args:
        document: what was routed.
        title: what the picture is headed by.

    Returns:
        A PNG file.
    """
    from matplotlib.colors import LogNorm

    num_layers = next(iter(document.routed.values())).shape[0]
    present, _ = document.kind_shares("query")
    kinds = np.nonzero(present)[0]
    figure, columns = _axes(
        15, [0.24 * num_layers + 0.2], num_columns=3, margins=(0.7, 1.0, 0.6, 1.0), gap=0.4, sharey=True
    )
    figure.suptitle(f"{title}: share among the routed tokens / share among all tokens", fontsize=10, y=0.97, va="top")
    norm = LogNorm(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    picture: Any = None
    for (name, heading), axis in zip(TITLES.items(), columns, strict=True):
        factors = preference(document, name)[:, kinds]
        shown = np.clip(factors, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        picture = axis.imshow(shown, aspect="auto", cmap="RdBu_r", norm=norm)
        share = document.routed[name].mean()
        axis.set_title(f"{heading} ({share:.1%} of the tokens routed)", fontsize=9)
        labels = [f"{KINDS[kind]} {present[kind]:.1%}" for kind in kinds]
        axis.set_xticks(range(len(kinds)), labels, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        if num_layers <= MOST_LABELLED_LAYERS:
            axis.set_yticks(range(num_layers))
            for layer, column in np.ndindex(factors.shape):
                dark = not 0.5 < factors[layer, column] < 2
                text = f"{factors[layer, column]:.1f}"
                axis.text(column, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    columns[0].set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(picture, cax=_beside(columns))
    bar.ax.minorticks_off()
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"], fontsize=8)
    return _png(figure)


def preference(document: DocumentRouting, router: str) -> NDArray[np.float64]:
    """(L, kinds): share of a kind among the routed tokens, divided by its share among all; 1 where it is absent."""
    present, routed = document.kind_shares(router)
    return np.divide(routed, present, out=np.ones_like(routed), where=present > 0)


def _axes(
    width: float,
    heights: Sequence[float],
    *,
    num_columns: int = 1,
    margins: tuple[float, float, float, float],
    gap: float,
    **settings: Any,
) -> tuple["Figure", Sequence["Axes"]]:
    """A figure with rows, or one row of columns; everything in inches.

    The places are computed here: matplotlib's own layouts draw a figure twice.

    Args:
        width: of the figure.
        heights: of the rows.
        num_columns: of the row, if there is one.
        margins: left, right, above and below.
        gap: between two rows or columns.
        settings: for `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    left, right, above, below = margins
    height = sum(heights) + gap * (len(heights) - 1) + above + below
    figure = Figure(figsize=(width, height), dpi=90)
    column = (width - left - right - gap * (num_columns - 1)) / num_columns
    places = {
        "left": left / width,
        "right": 1 - right / width,
        "top": 1 - above / height,
        "bottom": below / height,
        "hspace": gap * len(heights) / sum(heights),
        "wspace": gap / column,
    }
    rows = figure.subplots(len(heights), num_columns, height_ratios=heights, gridspec_kw=places, **settings)
    return figure, list(np.ravel(rows))


def _beside(axes: Sequence["Axes"]) -> "Axes":
    """A narrow axis for the colours, to the right of the others and as high as they are together."""
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    boxes = [axis.get_position() for axis in axes]
    right, bottom = max(box.x1 for box in boxes), min(box.y0 for box in boxes)
    return figure.add_axes((right + 0.01, bottom, 0.012, max(box.y1 for box in boxes) - bottom))


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_maps(axes: Sequence["Axes"], document: DocumentRouting, shown: slice, heading: str) -> Any:
    """Marks and the three maps of some tokens, one axis each; returns one of the drawn images."""
    marks, *maps = axes
    kinds = document.kinds[shown]
    marks.set(xlim=(shown.start - 0.5, shown.stop - 0.5), ylim=(0, 1))
    marks.set_axis_off()
    marks.set_title(heading, fontsize=9, loc="left")
    for kind, colour in MARKS.items():
        marks.vlines(shown.start + np.nonzero(kinds == kind)[0], 0, 1, colors=colour, linewidth=1)
    picture: Any = None
    for (name, router), axis in zip(TITLES.items(), maps, strict=True):
        scores = document.scores[name][:, shown]
        num_layers = len(scores)
        extent = (shown.start - 0.5, shown.stop - 0.5, num_layers - 0.5, -0.5)
        picture = axis.imshow(
            pooled(scores), aspect="auto", cmap="magma", vmin=0, vmax=1, extent=extent, interpolation="nearest"
        )
        axis.set_ylabel(f"{router}\nlayer", fontsize=8)
        axis.set_yticks(range(0, num_layers, 1 if num_layers <= 6 else 4))
        axis.tick_params(labelsize=7, labelbottom=axis is maps[-1])
    return picture


def pooled(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """(L, n) scores in at most MAX_COLUMNS columns, each the mean of as many neighbours; the last of fewer."""
    width = -(-scores.shape[1] // MAX_COLUMNS)
    starts = np.arange(0, scores.shape[1], width)
    counts = np.diff(np.append(starts, scores.shape[1]))
    return (np.add.reduceat(scores, starts, axis=1) / counts).astype(np.float32)


def _close_up(document: DocumentRouting) -> slice:
    """The CLOSE_UP neighbours that hold the most routed queries, or all tokens of a short document."""
    num_routed = document.routed["query"].sum(axis=0)
    if len(num_routed) <= CLOSE_UP:
        return slice(0, len(num_routed))
    sums = np.convolve(num_routed, np.ones(CLOSE_UP, dtype=np.int64), mode="valid")
    first = int(sums.argmax())
    return slice(first, first + CLOSE_UP)


def _visible(text: str) -> str:
    """A token's text such that space shows; letters that the font may lack are left out."""
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return "".join(c if c.isprintable() and ord(c) < 0x2E80 else "?" for c in shown)[:12]
