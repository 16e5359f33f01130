"""Kinds of tokens, and their shares among the routed ones, against a document that is written out."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer, JsonTokenizer
from colt5dist.pretrained.routing import KINDS, DocumentRouting, token_kinds, token_texts
from colt5dist.pretrained.routing.pictures import preference


@pytest.fixture
def by_bytes() -> ModelTokenizer:
    """Every byte is a token; two sentinels, and mode tokens."""
    return ModelTokenizer(ByteTokenizer(), num_modes=3, num_sentinels=2)


def kinds_of(ids, tokenizer):
    return [KINDS[kind] for kind in token_kinds(ids, tokenizer)]


def test_kinds_of_bytes(by_bytes):
    before, after = "  ab1, c\n", "\nd é"
    ids = [
        by_bytes.mode_id("R"),
        *by_bytes.encode(before).tolist(),
        by_bytes.sentinel_id(0),
        *by_bytes.encode(after).tolist(),
        by_bytes.eos_id,
    ]
    assert kinds_of(ids, by_bytes) == [
        "special",
        *["space"] * 2,
        *("line start", "word rest", "number", "punctuation", "space", "word start", "line break"),
        "sentinel",
        *("line break", "line start", "space", "other", "other"),
        "special",
    ]


def test_kinds_of_pieces(tmp_path):
    """Pieces that stand for a space and letters begin a word, others go on with it."""
    pieces = ["<pad>", "</s>", "<unk>", "a", "▁de", "f", "▁42", "▁", "(", ":\n", "▁x"]
    backend = Backend(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ModelTokenizer(JsonTokenizer(tmp_path / "tokenizer.json"), num_modes=0, num_sentinels=1)
    ids = [4, 5, 6, 8, 9, 4, 5, 10, 7, 2, 11, 1]
    assert token_texts(ids[:5], tokenizer) == [" de", "f", " 42", "(", ":\n"]
    assert kinds_of(ids, tokenizer) == [
        *("line start", "word rest", "number", "punctuation", "line break"),
        *("line start", "word rest", "word start", "space", "special", "sentinel", "special"),
    ]


def test_shares_of_kinds_by_counting():
    number, space = KINDS.index("number"), KINDS.index("space")
    kinds = np.array([number] * 2 + [space] * 6, dtype=np.int8)
    routed = np.zeros((2, 8), dtype=bool)
    routed[0, [0, 1]] = True  # only numbers
    routed[1, [0, 2, 3, 4]] = True  # as many of each as there are
    nothing = {name: np.zeros((2, 8)) for name in ("feed_forward", "key_value")}
    document = DocumentRouting(
        texts=["1"] * 2 + [" "] * 6,
        kinds=kinds,
        scores={"query": routed.astype(np.float32), **nothing},
        routed={"query": routed, **{name: zeros.astype(bool) for name, zeros in nothing.items()}},
    )
    present, shares = document.kind_shares("query")
    assert present[[number, space]].tolist() == [0.25, 0.75] and present.sum() == 1
    assert shares[:, [number, space]].tolist() == [[1, 0], [0.25, 0.75]]
    assert preference(document, "query")[:, [number, space]].tolist() == [[4, 0], [1, 1]]
    assert document.kind_shares("key_value")[1].sum() == 0  # nothing routed is no error
