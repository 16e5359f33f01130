"""300 steps of training with the published soft top-k and with ours: one loss curve."""

import pytest
import torch

from colt5dist.model import CoLT5, CoLT5Config

SIZES = {
    "cpu": {"d_model": 32, "head_dim": 8, "num_heads": 4, "num_heavy_heads": 3, "heavy_ff_dim": 64, "light_ff_dim": 24}
    | {"router_n_iters": 6, "num_encoder_layers": 1},
    "cuda": {"d_model": 192, "head_dim": 64, "num_heads": 3, "num_heavy_heads": 2, "heavy_ff_dim": 2048},
}
STEPS = 300


def loss_curve(device, implementation):
    """Losses of a model that learns how often tokens occur and to repeat the begin of its input; always new samples."""
    sizes = {"vocab_size": 128, "num_encoder_layers": 2, "num_decoder_layers": 1, "num_light_heads": 1} | SIZES[device]
    torch.manual_seed(0)
    model = CoLT5(CoLT5Config(**sizes, light_radius=31, router_implementation=implementation)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        length, samples = (64, 1) if device == "cpu" else (2048, 4)
        ids = (1 + 127 * torch.rand(samples, length, generator=generator) ** 3).long().to(device)
        output = model(ids, ids[:, :16].roll(1, 1), ids[:, :16])
        loss = output.token_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


@pytest.mark.parametrize(
    ("device", "implementation"),
    [("cpu", "scalar"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)],
)
def test_the_published_form_and_ours_train_alike(device, implementation):
    published, ours = loss_curve(device, "reference"), loss_curve(device, implementation)
    assert published[-20:].mean() < published[:20].mean() - 0.05, "it has not learnt anything: the curves say nothing"
    drift = (ours - published).abs() / published
    # rounding differs in the sixth digit of a gradient, and training lets differences grow
    assert drift[:10].max() <= 1e-5, drift[:10].max()
    assert drift.max() <= 5e-3, drift.max()
