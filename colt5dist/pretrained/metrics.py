"""Scores of a written text against its references: ROUGE, token F1 and exact match, as the SCROLLS benchmark has them.

SCROLLS: https://arxiv.org/abs/2201.03533, section 5. ROUGE is that of the package rouge-score, without stemming; F1
and exact match are those of SQuAD (https://arxiv.org/abs/1606.05250, section 6). All lie between 0 and 1.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from colt5dist.errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL")
ROUGE_MEAN = "rouge_geometric_mean"
METRICS = {"rouge": ROUGE, "f1": ("f1",), "exact_match": ("exact_match",)}
"""What can be asked for, and the scores of a text that each gives."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def check_metrics(names: Iterable[str]) -> None:
    """Raise where a metric is asked for that is not there.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"metrics: {name!r} is unknown; use some of {', '.join(METRICS)}")


def score_text(text: str, references: Sequence[str], metrics: Iterable[str] = tuple(METRICS)) -> dict[str, float]:
    """Score one text against its references; each score is that of the reference for which it is highest.

    Args:
        text: what was written.
        references: the right texts, one or more.
        metrics: names of METRICS.

    Returns:
        Scores by name, from 0 to 1, in the order of METRICS.

    Raises:
        ConfigError: a metric is unknown.
        ValueError: there is no reference.
    """
    metrics = set(metrics)
    check_metrics(metrics)
    if not references:
        raise ValueError("references: there is none; give one or more")
    scores: dict[str, float] = {}
    if "rouge" in metrics:
        of_best = _rouge_scorer().score_multi(references, text)
        scores |= {name: float(of_best[name].fmeasure) for name in ROUGE}
    if "f1" in metrics:
        scores["f1"] = max(token_f1(text, reference) for reference in references)
    if "exact_match" in metrics:
        scores["exact_match"] = float(any(normalised(text) == normalised(reference) for reference in references))
    return scores


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each score over all texts; with ROUGE also the geometric mean of its three means.

    Args:
        scores: of each text, from `score_text`, all with the same names; one or more.

    Raises:
        ValueError: there is no text.
    """
    if not scores:
        raise ValueError("scores: there is none; give those of one text or more")
    means = {name: sum(of_text[name] for of_text in scores) / len(scores) for name in scores[0]}
    if ROUGE[-1] not in means:
        return means
    product = 1.0
    for name in ROUGE:
        product *= means[name]
    rouge = {name: means.pop(name) for name in ROUGE}
    return {**rouge, ROUGE_MEAN: product ** (1 / len(ROUGE)), **means}


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that two texts share after `normalised`, counted as often as both have them; none shared: 0."""
    words, reference_words = normalised(text).split(), normalised(reference).split()
    num_shared = (Counter(words) & Counter(reference_words)).total()
    if not num_shared:
        return 0.0
    precision, recall = num_shared / len(words), num_shared / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def normalised(text: str) -> str:
    """A text in lower case, without ASCII punctuation and English articles, its words a single space apart."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imported here: it loads nltk, which takes most of a second

    return RougeScorer(list(ROUGE), use_stemmer=False)
