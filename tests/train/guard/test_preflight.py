"""The check before the first step: slow ranks and links are named, and a wrong result ends the start on all ranks."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from colt5dist.train.guard.preflight import ring_between_hosts, ring_inside_hosts, slow_devices, slow_links

SCRIPT = Path(__file__).with_name("preflight_ranks.py")
RATES = r"preflight: 2 ranks, products [\d-]+ [GT]FLOP/s(-\d+ TFLOP/s)?, all-reduce [\d.]+ GB/s; took [\d.]+ s\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., str]) -> list[dict[str, dict[str, str]]]:
    """What each of two ranks printed and raised, by case."""
    folder = tmp_path_factory.mktemp("preflight")
    run_ranks(SCRIPT, str(folder), processes=2)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def test_rank_0_prints_the_rates(found: list[dict[str, dict[str, str]]]) -> None:
    for case, printed in found[0].items():
        assert re.fullmatch(RATES, printed["out"]), case
        assert found[1][case]["out"] == found[1][case]["err"] == ""
    assert "error" not in found[0]["whole"]["err"] and found[0]["whole"]["fault"] == ""


def test_a_product_may_be_summed_in_parts(found: list[dict[str, dict[str, str]]]) -> None:
    """A device on which the library does that is sound."""
    assert found[0]["in parts"]["fault"] == found[1]["in parts"]["fault"] == ""


def test_a_slow_rank_is_named(found: list[dict[str, dict[str, str]]]) -> None:
    (line,) = [line for line in found[0]["slow"]["err"].splitlines() if "products" in line]
    assert re.match(r"WARNING: preflight: rank 1 on \S+ \(cpu\): products \d+ GFLOP/s, \d+% of the median \d+", line)
    assert found[0]["slow"]["fault"] == ""


def test_a_rank_that_computes_wrongly_ends_the_start(found: list[dict[str, dict[str, str]]]) -> None:
    fault = found[0]["wrong"]["fault"]
    assert re.match(
        r"train.preflight: rank 1 on \S+ \(cpu\) computes wrongly: 1 wrong element in a matrix product", fault
    )
    assert found[1]["wrong"]["fault"] == fault and f"error: {fault}\n" in found[0]["wrong"]["err"]


def test_a_wrong_sum_ends_the_start(found: list[dict[str, dict[str, str]]]) -> None:
    assert found[0]["wrong sum"]["fault"].startswith("train.preflight: the sum over all ranks is wrong on rank 1; ")


def test_rings() -> None:
    """Every rank meets one of its host and one of another host; hosts may have different numbers of ranks."""
    assert ring_inside_hosts(["a", "a", "a", "b", "b"]) == [1, 2, 0, 4, 3]
    assert ring_between_hosts(["a", "a", "a", "b", "b"]) == [3, 4, 2, 0, 1]


def test_a_slow_link_is_named_and_not_its_neighbours() -> None:
    """A rank takes as long as the slower of the links that it sends to and receives from."""
    hosts, ring = ["a", "b", "c", "d", "e"], [1, 2, 3, 4, 0]
    links = [0.01, 0.01, 0.05, 0.01, 0.01]  # from each rank to the next
    seconds = [max(links[rank], links[rank - 1]) for rank in range(5)]
    (line,) = slow_links(seconds, ring, 10**8, hosts)
    devices = {on_gpu: slow_devices([10e12, 4e12, 10e12], ["a", "b", "c"], on_gpu=on_gpu) for on_gpu in (True, False)}
    assert devices[True][0].endswith("of the median 10 TFLOP/s; training continues, and every step waits for this rank")
    assert devices[False] == [f"{devices[True][0]}; does something else use its cores?"]
    assert line == "link from rank 2 on c to rank 3 on d: 2.00 GB/s, 20% of the median 10 GB/s"
    assert slow_links([0.0, 0.0], [0, 1], 10**8, ["a", "b"]) == []
