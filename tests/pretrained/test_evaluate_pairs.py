"""Texts that a model writes for pairs: what each sample gets, and the means of all."""

import pytest
import torch

from colt5dist.pretrained.evaluate_pairs import PairsReport, evaluate_pairs
from colt5dist.pretrained.metrics import score_text
from colt5dist.pretrained.pairs import PairSample
from colt5dist.pretrained.write_texts import write_texts

INPUTS = ["one", "a much longer input " * 9, "two words", "é", "five, six, seven"]


def samples_of(model, tokenizer):
    """Pairs of which every other has what the model writes among its references."""
    samples = []
    for number, text in enumerate(INPUTS):
        ((own,),) = write_texts(model, tokenizer, [text], max_new_tokens=6)
        references = ("another text", own) if number % 2 else ("another text",)
        samples.append(PairSample(line=number + 1, id=f"q{number}", text=text, references=references))
    return samples


@pytest.fixture
def letters(tiny):
    """A tiny model that writes letters and spaces only."""
    model = tiny().double()
    with torch.no_grad():
        allowed = torch.zeros(384, dtype=torch.bool)
        allowed[[ord(c) + 3 for c in "abcdefghij "]] = True
        model.loss.weight[~allowed] = 0
    return model


def test_every_sample_is_scored_in_the_order_of_the_file(letters, tokenizer):
    samples = samples_of(letters, tokenizer)
    found = evaluate_pairs(letters, tokenizer, samples, batch_size=2, max_new_tokens=6)
    assert [prediction.sample for prediction in found] == samples
    for number, prediction in enumerate(found):
        ((own,),) = write_texts(letters, tokenizer, [INPUTS[number]], max_new_tokens=6)
        assert prediction.text == own
        assert prediction.scores == score_text(own, samples[number].references)
        assert number % 2 == 0 or prediction.scores["exact_match"] == 1
    report = PairsReport(path="p", step=3, ema=False, pairs="f", predictions=found)
    means = report.as_json()
    assert means["num_samples"] == 5 and means["num_references"] == 7
    for name in ("rouge1", "rouge2", "rougeL", "f1", "exact_match"):
        assert means[name] == pytest.approx(sum(p.scores[name] for p in found) / 5)
    assert 0 < means["exact_match"] < 1
    assert f"exact_match           {means['exact_match']:.4f}" in "\n".join(report.lines())
    assert found[1].as_json()["id"] == "q1" and found[1].as_json()["prediction"] == found[1].text
