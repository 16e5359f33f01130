"""The pictures show what was routed: bright where the scores are high, red and blue by preference."""

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import imread

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.model.routing_statistics import LayerRouting, RoutedTokens
from colt5dist.pretrained.routing import KINDS, DocumentRouting, document_routing, draw_kinds, draw_map
from colt5dist.pretrained.routing.pictures import MAX_COLUMNS, pooled

NAMES = ("feed_forward", "query", "key_value")


def pixels(png: bytes) -> np.ndarray:
    """(height, width, 3) float, the colours from 0 to 1."""
    return imread(BytesIO(png), format="png")[:, :, :3]


def places_of(image: np.ndarray, colour: tuple[float, ...]) -> np.ndarray:
    """(height, width) bool: pixels of a colour."""
    return (np.abs(image - np.array(colour[:3])) < 0.005).all(axis=2)


def document(num_layers: int, routed: dict[str, list[int]], kinds: np.ndarray) -> DocumentRouting:
    """A document in which every layer routes the same tokens, with scores 1 and 0."""
    rows = {}
    for name in NAMES:
        rows[name] = np.zeros((num_layers, len(kinds)), dtype=bool)
        rows[name][:, routed[name]] = True
    scores = {name: row.astype(np.float32) for name, row in rows.items()}
    return DocumentRouting(texts=["x"] * len(kinds), kinds=kinds, scores=scores, routed=rows)


@pytest.mark.parametrize("num_tokens", [80, 1000], ids=["shorter than the close-up", "longer"])
def test_the_map_is_bright_where_tokens_are_routed(num_tokens: int) -> None:
    half = num_tokens // 2
    kinds = np.full(num_tokens, KINDS.index("space"), dtype=np.int8)
    kinds[half] = KINDS.index("sentinel")
    parts = {
        "feed_forward": list(range(half)),
        "query": list(range(half, num_tokens)),
        "key_value": [],
    }
    image = pixels(draw_map(document(2, parts, kinds), "step 1"))
    image = image[:, : int(0.93 * image.shape[1])]  # without the scale of colours
    bright, dark = (places_of(image, colormaps["magma"](value)) for value in (1.0, 0.0))
    rows = np.nonzero((bright | dark).sum(axis=1) > 0.8 * image.shape[1])[0]
    maps = np.split(rows, np.nonzero(np.diff(rows) > 3)[0] + 1)[:3]  # of the whole document; below is the close-up
    columns = np.nonzero((bright | dark)[maps[0][0]])[0]
    left, right = columns[0], columns[-1]
    middle = (left + right) / 2
    for rows, (begin, end) in zip(maps, ((left, middle), (middle, right), (left, left)), strict=True):
        shown = np.nonzero(bright[rows[len(rows) // 2]])[0]
        if end == left:
            assert not len(shown)
        else:
            assert abs(shown[0] - begin) <= 2 and abs(shown[-1] - end) <= 2
            assert len(shown) == pytest.approx(end - begin, abs=5)
    marks = np.nonzero(places_of(image[: maps[0][0]], (0xE1 / 255, 0x1D / 255, 0x48 / 255)).any(axis=0))[0]
    assert len(marks) and np.abs(marks - middle).max() <= (right - left) / num_tokens + 2


def test_the_second_picture_is_red_for_preferred_kinds() -> None:
    kinds = np.array([KINDS.index("number")] * 10 + [KINDS.index("space")] * 90, dtype=np.int8)
    chosen = {"feed_forward": list(range(10)), "query": list(range(0, 100, 10)), "key_value": list(range(10, 20))}
    image = pixels(draw_kinds(document(20, chosen, kinds), "step 1"))  # so many layers that cells have no numbers
    third = image.shape[1] // 3
    red, blue, white = (colormaps["RdBu_r"](value) for value in (1.0, 0.0, 0.5))
    body = image[int(0.2 * len(image)) : int(0.6 * len(image))]
    # only numbers; as many of each as there are; only space, 1.1 times as often as there is
    assert places_of(body[:, :third], red).sum() == pytest.approx(places_of(body[:, :third], blue).sum(), rel=0.05)
    even = body[:, int(1.1 * third) : int(1.9 * third)]
    assert places_of(even, white).mean() > 0.5 and not places_of(even, red).any() and not places_of(even, blue).any()
    last = body[:, int(2.1 * third) : int(2.7 * third)]
    assert places_of(last, blue).any() and not places_of(last, red).any()


def test_many_tokens_share_columns() -> None:
    scores = np.arange(5 * MAX_COLUMNS + 1, dtype=np.float32)[None]
    shown = pooled(scores)
    assert shown.shape[1] <= MAX_COLUMNS
    assert shown[0, 0] == scores[0, :6].mean() and shown[0, -1] == scores[0, 6 * (shown.shape[1] - 1) :].mean()


def test_a_row_of_a_batch_without_its_padding() -> None:
    tokenizer = ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=3)
    ids = torch.tensor([[5, 6, 7, 8], [tokenizer.sentinel_id(2), 70, 1, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    soft = torch.arange(8).view(2, 4) / 10
    tokens = RoutedTokens(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[True, True], [True, False]]), soft)
    other = RoutedTokens(torch.tensor([[2], [0]]), torch.tensor([[True], [True]]), soft)
    batch = {"input_ids": ids, "input_mask": mask}
    found = document_routing([LayerRouting(tokens, other, tokens)] * 2, batch, 1, tokenizer)  # type: ignore[arg-type]
    assert found.texts == ["<2>", "C", "<>"]
    assert found.routed["feed_forward"].tolist() == [[False, True, False]] * 2
    assert found.routed["query"].tolist() == [[True, False, False]] * 2
    assert found.scores["key_value"][1].tolist() == pytest.approx([0.4, 0.5, 0.6])
