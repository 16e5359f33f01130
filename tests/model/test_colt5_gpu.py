"""The model on a GPU: what the CPU computes, and the bit-equalities in the types that runs use."""

import pytest
import torch

pytestmark = pytest.mark.gpu

ENCODERS = [{}, {"routing": "static"}, {"routing": "random"}, {"encoder": "dense"}, {"encoder": "light"}]
ENCODERS += [{"router_noise": 0.5}]
each_encoder = pytest.mark.parametrize(
    "fields", ENCODERS, ids=["learned", "static", "random", "dense", "light", "noise"]
)
# flash kernels want heads of a multiple of 8, Triton's soft top-k rows of any length
SMALL_WEIGHTS = {"initializer_range": 0.02, "embedding_init_std": 0.02}
LONGER = {"head_dim": 64, "num_heads": 4, "d_model": 64, "light_radius": 127}


@pytest.fixture
def long_batch():
    """Three samples of 1024 and 96 tokens: a full one, one with padding, one wholly padded."""
    generator = torch.Generator().manual_seed(1)
    input_mask = torch.arange(1024)[None] < torch.tensor([[1024], [515], [0]])
    target_mask = torch.arange(96)[None] < torch.tensor([[96], [41], [0]])
    ids = [torch.randint(1, 128, shape, generator=generator) for shape in ((3, 1024), (3, 96), (3, 96))]
    return {
        "input_ids": ids[0] * input_mask,
        "decoder_input_ids": ids[1] * target_mask,
        "target_ids": ids[2] * target_mask,
        "input_mask": input_mask,
        "target_mask": target_mask,
        "sample_index": torch.tensor([5, 6, -1]),
    }


def on_gpu(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


def run(model, batch):
    output = model(**batch)
    (output.token_loss.sum() + 1e-4 * output.z_loss.sum()).backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    return output.token_loss.detach().cpu(), gradients


@each_encoder
@pytest.mark.parametrize("masked", [True, False])
def test_float32_is_what_the_cpu_computes(build, long_batch, fields, masked):
    if not masked:
        del long_batch["input_mask"]
    # small weights: with larger ones the layers amplify what two devices round differently
    fields = LONGER | fields | SMALL_WEIGHTS | {"router_implementation": "scalar"}
    loss, gradients = run(build(**fields), long_batch)
    gpu_loss, gpu_gradients = run(build(**fields).cuda(), on_gpu(long_batch))
    torch.testing.assert_close(gpu_loss, loss, rtol=0, atol=2e-4)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            gpu_gradients[name], gradient, rtol=0, atol=2e-3 * scale, msg=lambda m, n=name: f"{n} {m}"
        )


@each_encoder
def test_padding_and_later_tokens_do_not_move_a_bfloat16_loss_by_one_bit(build, long_batch, fields):
    model, batch = build(**(LONGER | fields)).cuda().bfloat16(), on_gpu(long_batch)
    other = dict(batch)
    for ids, mask in (("input_ids", "input_mask"), ("decoder_input_ids", "target_mask"), ("target_ids", "target_mask")):
        other[ids] = torch.where(batch[mask], batch[ids], torch.randint_like(batch[ids], 1, 128))
    with torch.no_grad():
        first = model(**batch).token_loss
        assert first.isfinite().all()
        assert torch.equal(first, model(**other).token_loss)
        for position in (1, 40, 95):
            later = batch["decoder_input_ids"].clone()
            later[:, position:] = (later[:, position:] + 17) % 128
            moved = model(**(batch | {"decoder_input_ids": later})).token_loss
            assert torch.equal(first[:, :position], moved[:, :position])
            assert not torch.equal(first[:, position], moved[:, position])


@each_encoder
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_modes_agree_in_bfloat16(build, long_batch, fields, autocast):
    batch, results = on_gpu(long_batch), {}
    for mode in ("none", "full", "full_keep_routing"):
        model = build(mode, **(LONGER | fields)).cuda()
        model = model if autocast else model.bfloat16()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            results[mode] = run(model, batch)
    loss, gradients = results.pop("none")
    for other_loss, other_gradients in results.values():
        assert torch.equal(other_loss, loss)
        for name, gradient in gradients.items():
            assert gradient.isfinite().all()
            # attention's backward adds with atomics on a GPU
            scale = gradient.float().abs().max().item()
            torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=1e-2 * scale)
