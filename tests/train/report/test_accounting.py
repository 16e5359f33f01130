"""The FLOPs formula against PyTorch's own count, and the memory of the model states."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from colt5dist.train.config.load import load_config
from colt5dist.train.engine.engine import build_model
from colt5dist.train.report.accounting import (
    forward_multiply_adds,
    gathered_elements,
    peak_flops_of,
    state_memory,
    step_flops,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("encoder", ["conditional", "dense", "light"])
def test_formula_counts_what_pytorch_counts(encoder: str) -> None:
    """The formula counts local attention with 2 * radius + 1 keys; the package computes 3 blocks of `radius` keys."""
    config = load_config(CONFIGS / "tiny.yaml", [f"model.encoder={encoder}", "model.light_radius=64"])
    model = build_model(config)
    n, t = config.data.input_length, config.data.target_length
    ids, targets = torch.randint(3, 250, (1, n)), torch.randint(3, 250, (1, t))
    # the counter knows plain attention, but not the CPU's fused kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, targets, targets, sample_index=torch.zeros(1, dtype=torch.int64))
    counted = counter.get_total_flops() / 2
    if encoder != "dense":
        width = config.model.num_light_heads * config.model.head_dim
        blocks = -(-n // 64) * 64 * 3 * 64
        counted += config.model.num_encoder_layers * 2 * width * (n * (2 * 64 + 1) - blocks)
    assert forward_multiply_adds(config.model, n, t) == pytest.approx(counted, rel=0.01)


def test_a_step_is_three_forwards_of_the_global_batch() -> None:
    config = load_config(CONFIGS / "tiny.yaml", [])
    forward = forward_multiply_adds(config.model, config.data.input_length, config.data.target_length)
    assert step_flops(config) == 2 * 3 * forward * config.train.global_batch_size


def test_memory_falls_with_the_stage_and_the_devices() -> None:
    config = load_config(CONFIGS / "base.yaml", [])
    eight = [row.device_bytes for row in state_memory(config, 1_000_000, 8, on_gpu=True)]
    assert eight == [7_500_000, 7_500_000, 6_000_000, 2_250_000]
    gathered = state_memory(config, 1_000_000, 8, on_gpu=True, num_gathered=300_000)
    assert [row.device_bytes for row in gathered] == [7_500_000, 7_500_000, 6_000_000, 2_850_000]
    assert [row.gradient_bytes for row in gathered] == [4_000_000, 4_000_000, 2_500_000, 500_000]
    one = [row.device_bytes for row in state_memory(config, 1_000_000, 1, on_gpu=True, num_gathered=300_000)]
    assert one == [18_000_000] * 4
    offload = load_config(CONFIGS / "base.yaml", ["zero.offload=optimizer"])
    by_deepspeed = [row.device_bytes for row in state_memory(offload, 1_000_000, 8, on_gpu=True)]
    assert by_deepspeed == [9_500_000, 9_500_000, 4_250_000, 2_500_000]
    cpu = [row.device_bytes for row in state_memory(config, 1_000_000, 2, on_gpu=False)]
    assert cpu == [16_000_000, 14_000_000, 12_000_000, 10_000_000]
    averaged = load_config(CONFIGS / "base.yaml", ["train.ema=0.999"])  # 4 bytes a parameter; Muon: 4 fewer a matrix
    muon = [row.device_bytes for row in state_memory(averaged, 1_000_000, 8, on_gpu=True, num_moments=1_200_000)]
    assert muon == [bytes_of + 500_000 - 400_000 for bytes_of in eight]
    cpu = [row.device_bytes for row in state_memory(averaged, 1_000_000, 2, on_gpu=False)]
    assert cpu == [20_000_000, 16_000_000, 14_000_000, 12_000_000]


def test_stage_3_holds_two_layers_or_more_and_the_rest_whole() -> None:
    shapes = {"embedding.weight": (10, 4), "encoder.layers.0.a": (2, 3), "encoder.layers.1.a": (2, 3)}
    shapes |= {"encoder.layers.1.b": (5,), "decoder.layers.0.a": (7,), "decoder.norm.gamma": (1,)}
    assert gathered_elements(shapes) == gathered_elements(shapes, 50) == 41 + (6 + 5) + 7
    assert gathered_elements(shapes, 61) == 61
    assert gathered_elements(shapes, 10**9) == 65


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Some other GPU", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    """Of the form, not of its family: the NVL and PCIe forms are slower, and of a part of a GPU the peak is unknown."""
    assert peak_flops_of(name) == peak
