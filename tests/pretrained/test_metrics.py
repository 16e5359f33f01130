"""Scores of written texts: worked examples, SCROLLS's published one, and random texts against the definitions."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from colt5dist.pretrained.metrics import METRICS, check_metrics, mean_scores, normalised, score_text, token_f1

WORDS = ["The", "a", "an", "theatre", "cat,", "cat", "CATS", "sat.", "on-mat", "é", "1,000", "--", "_x_", "\n", "the"]


def random_texts(number, seed):
    """Texts of up to a dozen words, some of them empty."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(13))) for _ in range(number)]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("The  Cat,\tsat.", "cat sat"),
        ("a an the", ""),
        ("theatre of an ant", "theatre of ant"),
        ("it's a-b", "its ab"),
        ("the-cat", "thecat"),
        ("“é” 1,000", "“é” 1000"),
    ],
    ids=["case", "articles", "inside-words", "joined", "punctuation-first", "other-marks-stay"],
)
def test_normalised(text, result):
    assert normalised(text) == result


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("The cat sat", "a cat SAT.", 1.0),
        ("cat cat dog", "cat dog dog bird", 4 / 7),  # two shared: 2/3 and 2/4
        ("dog", "cat", 0.0),
        ("the", "the", 0.0),  # no word is left, so none is shared
        ("", "cat", 0.0),
    ],
    ids=["same", "repeated-words", "nothing-shared", "articles-only", "empty"],
)
def test_token_f1(text, reference, f1):
    assert token_f1(text, reference) == pytest.approx(f1)


def test_the_example_that_scrolls_publishes():
    texts = ["exact match example", "hello there", "general kenobi"]
    references = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]
    means = mean_scores([score_text(text, right) for text, right in zip(texts, references, strict=True)])
    percent = {name: round(100 * mean, 4) for name, mean in means.items()}
    assert percent == {
        "rouge1": 72.2222,
        "rouge2": 33.3333,
        "rougeL": 72.2222,
        "rouge_geometric_mean": 55.8136,
        "f1": 72.2222,
        "exact_match": 33.3333,
    }
    assert list(means) == list(percent)


def test_each_score_takes_its_own_best_reference():
    # the first reference has more words in common, the second the longer sequence
    scores = score_text("one two three four", ["four three two one", "one two five six seven eight"])
    assert scores["rouge1"] == 1 and scores["rouge2"] == pytest.approx(1 / 4)
    assert scores["rougeL"] == pytest.approx(2 / 5)
    assert scores["f1"] == 1 and scores["exact_match"] == 0


def test_random_texts_against_the_package_and_the_definitions():
    texts, others = random_texts(200, 1), random_texts(200, 2)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    seen = set()
    for text, reference in zip(texts, others, strict=True):
        scores = score_text(text, [reference])
        expected = scorer.score(reference, text)
        assert all(scores[name] == expected[name].fmeasure for name in expected)
        words = [words_of(text), words_of(reference)]
        left, num_shared = list(words[1]), 0
        for word in words[0]:
            if word in left:
                left.remove(word)
                num_shared += 1
        total = len(words[0]) + len(words[1])
        assert scores["f1"] == pytest.approx(2 * num_shared / total if total else 0)
        assert scores["exact_match"] == (words[0] == words[1])
        seen.add((scores["f1"] > 0, scores["exact_match"]))
    assert len(seen) >= 2
    assert all(score_text(text, [text])["exact_match"] == 1 for text in texts)


def words_of(text):
    """Words of a text by SQuAD's definition, spelled out: a character at a time, then a word at a time."""
    kept = "".join(c for c in text.lower() if c not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def test_only_what_is_asked_for():
    assert set(score_text("a", ["b"], ["f1"])) == {"f1"}
    assert set(mean_scores([score_text("a", ["b"], ["exact_match", "f1"])])) == {"f1", "exact_match"}
    assert set(score_text("a", ["b"], ["rouge"])) == set(METRICS["rouge"])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="metrics: 'bleu' is unknown; use some of rouge, f1, exact_match"):
        check_metrics(["f1", "bleu"])
    with pytest.raises(ValueError, match="references: there is none"):
        score_text("a", [])
    with pytest.raises(ValueError, match="scores: there is none"):
        mean_scores([])
