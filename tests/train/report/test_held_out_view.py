"""The held-out sample of an evaluation: which text stands beside which, for all kinds of samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import markdown
import pytest
import torch
from conftest import TINY_MODEL

from colt5dist import CausalCoLT5, CoLT5, CoLT5Config
from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.tokenizer import ByteTokenizer
from colt5dist.train.engine.whole_model import NoRoomError
from colt5dist.train.report.held_out_view import (
    ANSWER_TOKENS,
    CONTINUED_TOKENS,
    Written,
    row_to_show,
    sample_text,
    what_is_written,
    write_passages,
)
from colt5dist.train.report.tensorboard.texts import code_block, literal

TOKENIZER = ModelTokenizer(ByteTokenizer(), num_modes=0, num_sentinels=6)


def untrained(architecture: str) -> CoLT5 | CausalCoLT5:
    """A model that writes something else for each input."""
    torch.manual_seed(0)
    causal = architecture == "causal"
    config = CoLT5Config(**TINY_MODEL, architecture=architecture, num_encoder_layers=0 if causal else 1)
    model = (CausalCoLT5 if causal else CoLT5)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def ids_of(text: str) -> list[int]:
    """Bytes, with the sentinels by their names, and the end token."""
    return [*TOKENIZER.encode(text).tolist(), TOKENIZER.eos_id]


def sample(inputs: list[int], targets: list[int]) -> dict[str, torch.Tensor]:
    """A micro-batch of one row, with two pads each."""

    def padded(ids: list[int], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pads = [0] * number
        return torch.tensor([[*ids, *pads]]), torch.tensor([[True] * len(ids) + [False] * number])

    input_ids, input_mask = padded(inputs, 2 if inputs else 0)
    target_ids, target_mask = padded(targets, 2)
    shifted = torch.cat([torch.zeros(1, 1, dtype=torch.int64), target_ids[:, :-1]], dim=1)
    return {
        "input_ids": input_ids.view(1, -1).long(),
        "input_mask": input_mask.view(1, -1).bool(),
        "decoder_input_ids": shifted,
        "target_ids": target_ids,
        "target_mask": target_mask,
    }


def test_each_blank_stands_beside_its_answer() -> None:
    batch = sample(
        ids_of("The <extra_id_0> fox <extra_id_1> over."), ids_of("<extra_id_0>quick brown red<extra_id_1>jumps")
    )
    first, second = write_passages(untrained("encoder_decoder"), batch, TOKENIZER)
    assert (first.before, first.after, first.truth) == ("The ", " fox [1] over.", "quick brown …")
    assert (second.before, second.after, second.truth) == ("The [0] fox ", " over.", "jumps")
    assert first.model and second.model and all(len(p.model or "") <= ANSWER_TOKENS for p in (first, second))
    (same, _) = write_passages(untrained("encoder_decoder"), batch, TOKENIZER)
    assert same == first  # nothing is drawn


def test_a_prefix_is_continued() -> None:
    (found,) = write_passages(untrained("encoder_decoder"), sample(ids_of("Once upon"), ids_of(" a time")), TOKENIZER)
    assert (found.before, found.after, found.truth) == ("Once upon", "", " a time")
    assert found.model is not None and len(found.model) <= CONTINUED_TOKENS


def test_a_decoder_only_model_continues_half_of_the_text() -> None:
    targets = TOKENIZER.encode("abcdefgh").tolist()
    (found,) = write_passages(untrained("causal"), sample([], targets), TOKENIZER)
    assert (found.before, found.truth) == ("abc", "defgh")
    assert found.model is not None


@pytest.mark.parametrize("architecture", ["encoder_decoder", "causal"])
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (NoRoomError(3 * 2**30), "take 3 GiB more, and a GPU has no room for them; lower train.micro_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU has no room for it; lower train.micro_batch_size"),
    ],
    ids=["for the copy", "to write"],
)
def test_without_room_the_truth_is_shown_and_why_there_is_no_more(
    architecture: str, failure: Exception, words: str
) -> None:
    """An evaluation does not end a run because a GPU has no memory left to write a sample."""

    class Engine:
        @contextmanager
        def writer(self, *, wanted: bool) -> Iterator[CoLT5 | CausalCoLT5 | None]:
            if isinstance(failure, NoRoomError):
                raise failure
            model = untrained(architecture)
            model.generate = Mock(side_effect=failure)  # type: ignore[method-assign]
            yield model if wanted else None

    inputs = ids_of("a <extra_id_0> b") if architecture == "encoder_decoder" else []
    batch = sample(inputs, ids_of("<extra_id_0>x" if inputs else "xyz"))
    passages, note = what_is_written(Engine(), batch, TOKENIZER, wanted=True)  # type: ignore[arg-type]
    assert note.startswith("The model did not write: ") and words in note
    assert [passage.model for passage in passages] == [None]
    text = sample_text(passages, "", note)
    assert "model |" not in text and text.endswith(literal(note))
    passages, _ = what_is_written(Engine(), batch, TOKENIZER, wanted=False)  # type: ignore[arg-type]
    assert passages == []


def test_rows_with_sentinels_come_first() -> None:
    rows = [
        sample(ids_of("a"), ids_of("b")),
        sample(ids_of("a"), ids_of("c")),
        sample([5], [TOKENIZER.sentinel_id(0), 1]),
    ]
    targets = torch.cat([row["target_ids"] for row in rows])
    assert row_to_show({"target_ids": targets}, TOKENIZER) == 2  # type: ignore[typeddict-item]
    assert row_to_show({"target_ids": targets[:2]}, TOKENIZER) == 0  # type: ignore[typeddict-item]


def test_no_text_is_taken_as_markdown() -> None:
    """As TensorBoard renders it: a table of two rows, whatever is in the texts."""
    wild = "a | b\n`c` <b>*d*</b> &amp;"
    page = markdown.markdown(
        sample_text([Written(wild, "", wild, wild)], "x_y_", "*note*"), extensions=["tables", "fenced_code"]
    )
    assert page.count("<tr>") == 2 and page.count("<td>") == 3
    assert "<b>" not in page and "<em>" not in page and "<code>" not in page
    assert literal("a b\n", space="␣") == "a&#9251;b&#9166;"
    page = markdown.markdown(code_block("```\n- a\n\n# b"), extensions=["tables", "fenced_code"])
    assert page == "<pre><code>```\n- a\n\n# b\n</code></pre>"
