"""Beam search against an exhaustive one, and by hand where its rules decide."""

import itertools
import math

import pytest
import torch

from colt5dist.model.generation.beams import BeamSearch
from colt5dist.model.generation.settings import GenerationSettings

PAD, EOS = 0, 1


def search(tables, *, num_beams, length_penalty=1.0, num_return_sequences=1):
    """Search where the probabilities of token t after token s in step i are tables[i, s, t]; also its scores."""
    settings = GenerationSettings(
        max_new_tokens=len(tables),
        num_beams=num_beams,
        length_penalty=length_penalty,
        num_return_sequences=num_return_sequences,
    )
    found = BeamSearch(settings, 1, device=torch.device("cpu"), dtype=torch.float64)
    for table in tables.double():
        found.update(table[found.tokens].log())
    return found.result(), found._finished_scores[0]


def all_texts(tables, length_penalty):
    """Every text that ends or has full length, with its score, the best first."""
    steps, num_ids, _ = tables.shape
    scores = {}
    for text in itertools.product(range(num_ids), repeat=steps):
        text = text[: text.index(EOS) + 1] if EOS in text else text
        sums = sum(math.log(tables[i, s, t]) for i, (s, t) in enumerate(zip((PAD, *text), text, strict=False)))
        scores[text] = sums / len(text) ** length_penalty
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_with_a_beam_for_everything_the_best_text_of_all_is_found(length_penalty):
    for seed in range(5):
        tables = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
        tables /= tables.sum(dim=-1, keepdim=True)
        # one more id than texts can use: it is never likely
        wide = torch.full((3, 130, 130), 1e-30, dtype=torch.float64)
        wide[:, :5, :5] = tables
        texts, scores = search(wide, num_beams=65, length_penalty=length_penalty, num_return_sequences=4)
        if length_penalty <= 0:
            # a text scores no better for being longer, so to stop early loses nothing
            for (text, score), found, its_score in zip(all_texts(tables, length_penalty), texts, scores, strict=False):
                assert found.tolist() == [*text, *[PAD] * (3 - len(text))]
                assert its_score.item() == pytest.approx(score, abs=1e-9)
        else:
            assert scores[0].item() == pytest.approx(all_texts(tables, length_penalty)[0][1], abs=1e-9)


def table(*rows):
    """Probabilities after each of four ids; ids are pad, end, 2, 3."""
    return torch.tensor(rows, dtype=torch.float64).expand(4, 4) if len(rows) == 1 else torch.tensor(rows).double()


def test_only_candidates_among_the_best_k_may_end():
    # the end token is the third likeliest at first: with two beams it is not taken
    first = table((0.02, 0.2, 0.45, 0.33))
    later = table((0.9, 0.05, 0.03, 0.02))
    texts, _ = search(torch.stack((first, later, later)), num_beams=2, num_return_sequences=2, length_penalty=9.0)
    assert EOS not in texts[:, 0].tolist()


def test_it_stops_when_no_beam_scores_better_as_it_stands():
    # the end token and `2, end` are finished after two steps; `3, 2` is no better then, but with a large penalty it is
    first = table((0.001, 0.5, 0.3, 0.199))
    second = table(*[(0.001, 0.9, 0.05, 0.049)] * 3, (0.001, 0.3, 0.4, 0.299))
    tables = torch.stack((first, second, *[table((0.97, 0.01, 0.01, 0.01))] * 8))
    early, _ = search(tables, num_beams=2, num_return_sequences=2)
    assert early[:, :3].tolist() == [[2, EOS, PAD], [EOS, PAD, PAD]]
    late, _ = search(tables, num_beams=2, length_penalty=3.0)
    assert late[0].tolist() == [3, 2, *[PAD] * 8]


def test_every_text_ends_at_the_last_step():
    texts, scores = search(torch.stack([table((0.3, 1e-9, 0.6, 0.1))] * 3), num_beams=2, num_return_sequences=2)
    assert texts[0].tolist() == [2, 2, 2] and EOS not in texts[1].tolist()
    assert scores[0].item() == pytest.approx(math.log(0.6), abs=1e-8)
