"""Rows split over programs that exchange sums: the launch shapes, and on a GPU the results of every shape."""

import pytest
import torch

from colt5dist.ops import row_split
from colt5dist.ops.row_split import LARGEST_COUNT, LONGEST_WHOLE_ROW, split_rows, spread_rows
from colt5dist.ops.select_topk import select_topk
from colt5dist.ops.soft_topk import soft_topk

SETTINGS = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "n_iters": 20}
# rows x n: parts of 2 to 128 programs, rows in turn, rows that do not fill their last part
SHAPES = [(1, 16_385), (1, 1_000_003), (3, 70_001), (16, 65_536), (33, 40_000), (150, 20_000), (300, 17_000)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"R{shape[0]}-N{shape[1]}")


@pytest.fixture
def multiprocessors(monkeypatch):
    """multiprocessors(count): the rules see a device with so many."""

    def see(count):
        properties = type("Properties", (), {"multi_processor_count": count})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(row_split, "INTERPRETED", False)
        for rule in (split_rows, spread_rows):
            rule.cache_clear()

    yield see
    for rule in (split_rows, spread_rows):
        rule.cache_clear()


@pytest.mark.parametrize("rule", [split_rows, spread_rows])
@pytest.mark.parametrize("count", [1, 7, 108, 132])
def test_every_column_has_a_place_and_all_that_wait_have_room(multiprocessors, rule, count):
    multiprocessors(count)
    for n in (1, 2, 1000, 16_384, 16_385, 65_536, 1_000_003, 4_194_304, 50_000_000):
        for num_rows in (1, 2, 16, 66, 133, 100_000):
            layout = rule(num_rows, n, torch.device("cuda", 0))
            assert (layout.parts - 1) * layout.block * layout.blocks < n <= layout.parts * layout.block * layout.blocks
            assert layout.block & (layout.block - 1) == 0 and 1 <= layout.num_warps <= 16
            assert 1 <= layout.groups <= num_rows
            if layout.parts > 1:
                assert layout.parts * layout.groups <= count
                assert layout.block * layout.blocks <= LARGEST_COUNT or rule is spread_rows
            else:
                assert layout.groups == num_rows


def test_nothing_waits_without_a_device():
    for rule in (split_rows, spread_rows):
        assert rule(2, 10 * LONGEST_WHOLE_ROW, None).parts == 1


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
@each_shape
def test_split_rows_are_those_of_float64(result_and_gradients, poisoned_memory, shape, solver):
    generator = torch.Generator("cuda").manual_seed(shape[0])
    scores, grad = (torch.randn(shape, device="cuda", generator=generator) for _ in range(2))
    mask = torch.rand(shape, device="cuda", generator=generator) > 0.1
    mask[0] = False  # a row without a valid entry
    k = shape[1] * (0.05 + 0.2 * torch.rand(shape[0], device="cuda", generator=generator))
    settings = {**SETTINGS, "solver": solver, "mask": mask}
    expected = result_and_gradients(scores.double(), k, grad, implementation="scalar", **settings)
    actual = result_and_gradients(scores, k, grad, implementation="triton", **settings)
    again = result_and_gradients(scores, k, grad, implementation="triton", **settings)
    for one, other, repeated in zip(actual, expected, again, strict=True):
        assert torch.equal(one, repeated)
        difference = (one.double() - other).abs().flatten().sort().values
        # a ten-thousandth may lie within an ulp of a threshold
        assert difference[: -(len(difference) // 10_000) or None].norm() <= 2e-5 * max(other.norm(), 1e-3 * grad.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0.4, 99_999.5, 100_000.0, 3e6])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_hard_rows_in_parts(result_and_gradients, budget, scale):
    """Budgets about n, scores so far apart that the unclipped mass vanishes beside its largest term."""
    scores, grad = torch.randn(2, 100_000, device="cuda") * scale, torch.randn(2, 100_000, device="cuda")
    settings = {"eps": 0.02, "solver": "newton"}
    expected = result_and_gradients(scores.double(), budget, grad, implementation="scalar", **settings)
    actual = result_and_gradients(scores, budget, grad, implementation="triton", **settings)
    assert (actual[0].double() - expected[0]).norm() <= 2e-6 * expected[0].norm()
    assert (actual[0].sum(-1, dtype=torch.float64) / min(budget, 1e5) - 1).abs().max() <= 1e-5


@pytest.mark.gpu
@each_shape
def test_segments_change_no_bit(result_and_gradients, shape):
    scores, grad = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")
    expected = result_and_gradients(scores, shape[1] / 7, grad, **SETTINGS)
    for segments in (1, 3, 20):
        actual = result_and_gradients(scores, shape[1] / 7, grad, checkpoint_segments=segments, **SETTINGS)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1]), segments


@pytest.mark.gpu
@each_shape
def test_selection_is_the_references(shape):
    scores = torch.randn(shape, device="cuda").round(decimals=2)  # many ties
    mask = torch.rand(shape, device="cuda") > 0.1
    for num_tokens in (1, shape[1] // 8, shape[1]):
        for given in (None, mask):
            expected = select_topk(scores, num_tokens, given, implementation="reference")
            assert torch.equal(select_topk(scores, num_tokens, given, implementation="triton"), expected)


@pytest.mark.gpu
def test_a_graph_and_other_streams_do_not_disturb_each_other():
    rows = [torch.randn(4, 60_000, device="cuda") for _ in range(3)]
    expected = [soft_topk(x, 7000.0, **SETTINGS) for x in rows]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = soft_topk(rows[0], 7000.0, **SETTINGS)
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
            beside = soft_topk(rows[1], 7000.0, **SETTINGS)
        here = soft_topk(rows[2], 7000.0, **SETTINGS)
        torch.cuda.synchronize()
        for one, other in zip((captured, beside, here), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_graph_that_is_captured_before_anything_ran():
    row_split._of_stream.clear()
    row_split._reserves.clear()
    scores = torch.randn(2, 50_000, device="cuda")
    expected = soft_topk(scores, 6000.0, implementation="scalar", **SETTINGS)
    soft_topk(scores[:, :40_000].contiguous(), 6000.0, **SETTINGS)  # compiles
    row_split._reserves.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = soft_topk(scores, 6000.0, **SETTINGS)
    for _ in range(3):
        graph.replay()
        assert torch.allclose(captured, expected, atol=1e-5)


@pytest.mark.gpu
def test_graphs_of_the_compiler():
    """`mode="reduce-overhead"` records what it compiled into CUDA graphs, warmed up on memory that it lends."""
    row_split._of_stream.clear()
    row_split._reserves.clear()
    torch._dynamo.reset()

    def weigh(scores):
        return soft_topk(2 * scores, 6000.0, **SETTINGS) + select_topk(scores, 6000).sum(-1, keepdim=True)

    compiled = torch.compile(weigh, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        scores = torch.randn(2, 50_000, device="cuda", requires_grad=True)
        upstream = torch.randn(2, 50_000, device="cuda")
        out = compiled(scores)
        (grad,) = torch.autograd.grad(out, scores, upstream)
        out, grad = out.detach().clone(), grad.clone()
        expected = weigh(scores)
        assert torch.equal(out, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, scores, upstream)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["coordinate_descent", "newton"])
def test_nan_and_infinite_scores_in_split_rows_end(solver):
    scores = torch.randn(3, 100_000, device="cuda", requires_grad=True)
    with torch.no_grad():
        scores[1, 77_777] = float("nan")
    result = soft_topk(scores, 900.0, solver=solver, **SETTINGS)
    result.sum().backward()
    assert result[1].isnan().all() and scores.grad[1].isnan().all()
    assert result[[0, 2]].isfinite().all() and scores.grad[[0, 2]].isfinite().all()
