"""A loss or gradient that is not finite on one rank: skipped equally at every ZeRO stage, in fp32, bf16, offloaded.

This also tests the semi-private parts of DeepSpeed that colt5dist/train/engine/gradients.py relies on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("bad_numbers.py")
PARAMETER = "encoder.layers.0.feed_forward.light_ff.to_hidden.weight"
VARIANTS = (
    "fp32-none-0",
    "fp32-none-1",
    "fp32-none-2",
    "fp32-none-3",
    "bf16-none-1",
    "bf16-none-2",
    "bf16-none-3",
    "bf16-optimizer-2",
    "bf16-optimizer-3",
)
BAD_STEPS = (2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    micro_settings: tuple[str, ...],
    short_texts: Path,
    run_ranks: Callable[..., str],
) -> dict[str, dict[str, Any]]:
    """Seven steps on two processes for each variant, in one start."""
    folder = tmp_path_factory.mktemp("bad")
    settings = [*micro_settings, f"data.shards={short_texts}", "train.micro_batch_size=2", "train.steps=7"]
    settings.append("model.num_encoder_layers=1")  # how deep a model is does not matter here, and costs time
    own = [str(folder / "out.json"), str(folder), *VARIANTS, "--", *settings, "train.eval_samples=2"]
    run_ranks(SCRIPT, *own, processes=2)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_steps_change_nothing_on_any_rank(results: dict[str, dict[str, Any]], variant: str) -> None:
    """Weights and moments are equal to the bit after a bad step, and changed after a good one."""
    expected = [step in BAD_STEPS for step in range(1, 8)]
    assert results[variant]["unchanged"] == [expected, expected]


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_and_logged_with_the_samples(results: dict[str, dict[str, Any]], variant: str) -> None:
    records, state = results[variant]["records"], results[variant]["state"]
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 3, 4, 5, 5]
    assert (state["skipped_steps"], state["optimizer_step"], state["skipped_in_a_row"]) == (5, 2, 0)
    for record in records:
        bad = record["step"] in BAD_STEPS
        assert (record["loss"] is None) == (record["step"] in (2, 3))
        assert (record["grad_norm"] is None) == bad
        samples = [[8 * (record["step"] - 1), 8 * record["step"]]] if bad else None
        assert record.get("skipped_batch") == samples
    # rank r of 2 has the samples r, r + 2, ...; the bad loss is in the first (second) row of each micro-batch of two
    assert [record.get("not_finite_samples") for record in records] == [None, [9, 13], [18, 22], [], [], [], None]
    lines = "\n".join(results[variant]["lines"])
    assert "step 2 is skipped, samples 8 to 15: not finite is the loss of sample 9 (rank 1, micro-batch 0)" in lines
    for step in (4, 5, 6):
        samples = f"{8 * step - 8} to {8 * step - 1}"
        # no other parameter is named
        assert f"step {step} is skipped, samples {samples}: not finite is the gradient of {PARAMETER}\n" in lines


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_same_numbers_at_every_stage(results: dict[str, dict[str, Any]], variant: str) -> None:
    """fp32 against stage 0 to the noise of float32 sums; bf16, which has 8 bits, against stage 1 to 1e-3."""
    reference, tolerance = ("fp32-none-0", 2e-5) if variant.startswith("fp32") else ("bf16-none-1", 1e-3)
    for record, expected in zip(results[variant]["records"], results[reference]["records"], strict=True):
        for key in ("loss", "grad_norm", "z_loss"):
            assert (record[key] is None) == (expected[key] is None)
            assert expected[key] is None or record[key] == pytest.approx(expected[key], rel=tolerance)


def test_the_diagnosis_names_parameter_rank_and_samples(results: dict[str, dict[str, Any]]) -> None:
    """At stage 3, where the summed gradient does not show which rank caused it: the batch is run again to find out."""
    given_up = results["given up"]
    assert [record["skipped_steps"] for record in given_up["records"]] == [0, 1, 2]
    assert "steps 2 to 3 were skipped" in given_up["fault"] and "data.skip=[[8,24]]" in given_up["fault"]
    found = json.loads(Path(given_up["fault"].split("; ")[1].split(" says")[0]).read_text())
    assert [step["bad_gradients"] for step in found["steps_of_this_start"]] == [[PARAMETER], [PARAMETER]]
    again = [(part["rank"], part["samples"], part["gradients_not_finite"]) for part in found["last_batch_run_again"]]
    assert again == [
        (0, [16, 18], []),
        (0, [20, 22], []),
        (1, [17, 19], [PARAMETER]),
        (1, [21, 23], [PARAMETER]),
    ]
    assert not any(part["losses_not_finite"] for part in found["last_batch_run_again"])
