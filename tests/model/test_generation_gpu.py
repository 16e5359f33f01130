"""Generation on a GPU: the CUDA graph of a step is the step, and writes what the CPU writes."""

import pytest
import torch

from colt5dist.model.generation import DecoderState, GenerationSettings, encode_inputs, for_inference, search_for
from colt5dist.model.generation.graph import RepeatedStep
from colt5dist.model.generation.write import decode_step

pytestmark = pytest.mark.gpu

WAYS = {
    "greedy": {},
    "draws": {"temperature": 1.0, "seed": 4, "num_return_sequences": 3},
    "top": {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 4},
    "top_p": {"temperature": 1.0, "top_p": 0.9, "seed": 4},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
}
each_way = pytest.mark.parametrize("way", WAYS)
STEPS = 40
WIDER = {"head_dim": 64, "num_heads": 4, "d_model": 128, "vocab_size": 512, "light_radius": 127}


@pytest.fixture
def model(build):
    """A model that does not write one token again and again, and ends at different places."""
    model = build(**WIDER)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
        model.loss.weight[model.eos_id] *= 1.5
    return model.eval()


def inputs():
    ids = torch.randint(2, 512, (3, 700), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(700) < torch.tensor([[700], [1], [333]])


def started(model, way):
    """State and search at the start token, on the model's device."""
    ids, mask = (tensor.to(model.loss.weight.device) for tensor in inputs())
    settings = GenerationSettings(max_new_tokens=STEPS, **WAYS[way])
    numbers = torch.arange(3, device=ids.device)
    state = DecoderState(
        model.embedding,
        model.decoder,
        model.loss,
        encode_inputs(model, ids, mask, numbers),
        rows_per_sample=settings.rows_per_sample,
        num_slots=STEPS,
    )
    logits_type = torch.float64 if ids.is_cpu else torch.float32
    return state, search_for(settings, numbers, logits_type)


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_graph_writes_what_the_step_writes(model, way, dtype):
    model = model.to("cuda", dtype)
    written = []
    with for_inference(model, torch.device("cuda")):
        for graph in (False, True):
            state, search = started(model, way)
            step = RepeatedStep(lambda st=state, se=search: decode_step(st, se), torch.device("cuda"), graph=graph)
            for _ in range(STEPS):
                step()
            assert step.is_captured == graph
            written.append(search.result())
    assert torch.equal(*written)
    assert len(written[0].unique()) > 20
    ids, mask = (tensor.cuda() for tensor in inputs())
    through = model.generate(ids, input_mask=mask, max_new_tokens=STEPS, **WAYS[way])
    assert torch.equal(through, written[0][:, : through.shape[1]])


@each_way
def test_it_writes_what_the_cpu_writes(model, way):
    ids, mask = inputs()
    expected = model.double().generate(ids, input_mask=mask, max_new_tokens=STEPS, **WAYS[way])
    written = model.float().cuda().generate(ids.cuda(), input_mask=mask.cuda(), max_new_tokens=STEPS, **WAYS[way])
    width = min(expected.shape[1], written.shape[1])
    # a near-tie in one row may fall the other way; in most rows there is none
    same = (expected[:, :width] == written[:, :width].cpu()).all(dim=1)
    assert same.float().mean() >= 0.6


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_cached_logits_are_those_of_the_whole_pass(model, dtype, tolerance):
    model = model.to("cuda", dtype)
    targets = torch.randint(2, 512, (3, 130), generator=torch.Generator().manual_seed(2)).cuda()
    ids = inputs()[0].cuda()
    with for_inference(model, torch.device("cuda")):
        encoded = encode_inputs(model, ids, None, None)
        state = DecoderState(model.embedding, model.decoder, model.loss, encoded, rows_per_sample=1, num_slots=130)
        stepped = torch.stack([state.step(token) for token in targets.unbind(1)], dim=1)
        mask = torch.arange(encoded.states.shape[1], device="cuda") < encoded.lengths.unsqueeze(1)
        expected = model.loss.logits(model.decode(targets, encoded.states, input_mask=mask))
    scale = expected.std()
    errors = (stepped - expected).abs().amax(dim=-1) / scale
    assert errors.median() < tolerance and errors.isfinite().all()


@each_way
def test_a_step_never_waits_for_the_gpu(model, way):
    model = model.to("cuda", torch.bfloat16)
    with for_inference(model, torch.device("cuda")):
        state, search = started(model, way)
        decode_step(state, search)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                decode_step(state, search)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(capsys):
    total = torch.zeros((), device="cuda")

    def step():
        total.add_(1)
        total.item()

    repeated = RepeatedStep(step, torch.device("cuda"))
    for _ in range(6):
        repeated()
    assert total.item() == 6 and not repeated.is_captured
    assert torch.randn(3, device="cuda").isfinite().all()  # the capture has left nothing behind
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and "generate: decoding runs without a CUDA graph" in errors
