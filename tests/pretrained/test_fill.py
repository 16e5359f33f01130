"""Filling blanks: what the model is given and may write, and that the rest of the text stays as it was."""

import re

import pytest
import torch

import colt5dist
from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.model.generation import Constraint
from colt5dist.pretrained.fill import fill_texts

TEXTS = ["def add(a, b):\n    return ___  # the sum", "<0> is a ____, é <2>!", "x <0>"]
WAYS = {
    "greedy": {},
    "draws": {"temperature": 1.0, "seed": 1, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_blank_is_filled_and_the_rest_stays(tiny, tokenizer, way):
    results = fill_texts(tiny(), tokenizer, TEXTS, max_answer_tokens=5, **WAYS[way])
    for text, filled in zip(TEXTS, results, strict=True):
        pieces = re.split(r"<\d>|_{3,}", text)
        assert len(filled) == WAYS[way].get("num_return_sequences", 1)
        for result in filled:
            assert len(result.answers) == len(pieces) - 1
            assert result.text == pieces[0] + "".join(a + p for a, p in zip(result.answers, pieces[1:], strict=True))
            # a byte that is no whole character becomes one replacement character
            assert all(1 <= len(answer) <= 5 for answer in result.answers)
    alone = colt5dist.fill(tiny(), tokenizer, TEXTS[1], max_answer_tokens=5)
    if way == "greedy":
        assert alone == results[1][0].text


def test_what_the_model_is_given(tiny):
    tokenizer = ModelTokenizer(ByteTokenizer(), num_modes=3, num_sentinels=10)
    model, given = tiny(), []
    original = model.encode
    model.encode = lambda ids, **others: given.append(ids[0].tolist()) or original(ids, **others)
    # a sentinel's name in a text is text
    fill_texts(model, tokenizer, ["a ___<extra_id_0>___"], max_answer_tokens=2)
    middle = tokenizer.tokenizer.encode("<extra_id_0>").tolist()
    first = tokenizer.first_sentinel
    expected = [tokenizer.mode_id("R"), *tokenizer.tokenizer.encode("a "), first, *middle, first + 1, tokenizer.eos_id]
    assert given[0][: len(expected)] == expected and not any(given[0][len(expected) :])
    fill_texts(model, tokenizer, ["a ___"], max_answer_tokens=2, mode="X")
    assert given[1][0] == tokenizer.mode_id("X")


def test_the_constraint_allows_answers_in_order_and_nothing_else():
    is_text = torch.tensor([False, False, True, True, False, False, False])
    constraint = Constraint(torch.tensor([2]), answer_tokens=2, is_text=is_text, first_sentinel=4, eos_id=1)
    written = [4, 2, 3, 5, 3, 1]
    allowed = [{4}, {2, 3}, {2, 3, 5}, {5}, {2, 3}, {1, 2, 3}]
    for step, (token, expected) in enumerate(zip(written, allowed, strict=True)):
        logits = constraint.apply(torch.zeros(1, 7), torch.tensor([step]))
        assert set(logits[0].isfinite().nonzero().flatten().tolist()) == expected
        constraint.read(torch.tensor([token]))


def test_a_batch_is_its_texts_one_by_one(tiny, tokenizer):
    settings = {"max_answer_tokens": 4, "temperature": 1.0, "seed": 3}
    together = fill_texts(tiny().double(), tokenizer, TEXTS, **settings)
    for number, text in enumerate(TEXTS):
        assert fill_texts(tiny().double(), tokenizer, [text], first_index=number, **settings)[0] == together[number]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no gap", "text 0: has no blank; write <0>, <1>, ... or ___"),
        ("a <1> b", "text 0: blank <1> is out of order, <0> comes there"),
        ("a <0> b <0>", "text 0: blank <0> is out of order, <1> comes there"),
        ("a " + "___ " * 11, "text 0: has 11 blanks, but the model has 10 sentinels; leave fewer blanks"),
        (" ___ <1>", "text 0: has no text beside its blanks"),
    ],
    ids=["none", "skipped", "twice", "too-many", "nothing-else"],
)
def test_wrong_texts(tiny, tokenizer, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        colt5dist.fill(tiny(), tokenizer, text)
    assert "\n" not in str(error.value)


def test_a_decoder_only_model_is_refused(tiny, tokenizer):
    with pytest.raises(ValueError, match="fill: the model is decoder-only"):
        colt5dist.fill(tiny(architecture="causal", window_size=16), tokenizer, "a ___")
