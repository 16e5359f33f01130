"""Trains with compiled layers and CUDA graphs and without, and writes what differs; started by test_fast_path_gpu.py.

    torchrun --nproc-per-node N tests/train/engine/fast_path.py OUTPUT [--variants=3-none,1-none-float32,...] SETTING...

For each variant STAGE-CHECKPOINTING: the losses of all steps, the relative error of each gradient at the first step,
and whether a step whose gradient was made NaN left weights and moments as they were, to the bit. For a variant
STAGE-CHECKPOINTING-KIND with static routing or in float32 (also with noise in the scores) the first step only;
`released` is a model too large to stay gathered.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from colt5dist.data.read.batch import Batch
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine import fragments
from colt5dist.train.engine.engine import Engine
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.losses import LossSums, count_target_tokens
from colt5dist.train.ranks import Ranks, finish_process_group, initialise_process_group, ranks_from_environment

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
VARIANTS = ("1-none", "1-full", "1-full_keep_routing", "2-none", "3-none", "3-none-released", "3-full_keep_routing")
KINDS = {
    "static": "model.routing=static",
    "float32": "train.precision=fp32",
    "noise": "model.router_noise=0.5",
    "released": "deepspeed.zero_optimization.stage3_max_live_parameters=0",
}
EXACT_VARIANTS = ("1-none-static", "3-none-static", "1-none-float32", "3-none-float32", "1-none-float32-noise")
STEPS = 50
NAN_STEP = 6


def micro_batches(config: RunConfig, step: int, ranks: Ranks) -> list[Batch]:
    """This rank's random samples; every third input is padded, targets have very different lengths."""
    generator = torch.Generator().manual_seed(step)
    size, n, t = config.train.global_batch_size, config.data.input_length, config.data.target_length
    inputs = torch.randint(3, 250, (size, n), generator=generator)
    targets = inputs[:, :t]  # so that there is something to be learnt
    lengths = torch.randint(2, t, (size, 1), generator=generator)
    input_lengths = torch.where(torch.arange(size) % 3 == 0, n - 40, n).unsqueeze(1)
    whole = Batch(
        input_ids=inputs,
        input_mask=torch.arange(n) < input_lengths,
        decoder_input_ids=targets.roll(1, dims=1),
        target_ids=targets.contiguous(),
        target_mask=torch.arange(t) < lengths,
        objective=torch.arange(size) % 4,
        sample_index=torch.arange(size) + step * size,
        target_bytes=lengths.squeeze(1),
    )
    mine = {name: tensor[ranks.rank :: ranks.world_size] for name, tensor in whole.items()}
    if torch.cuda.is_available():
        mine = {name: tensor.pin_memory() for name, tensor in mine.items()}
    width = config.train.micro_batch_size
    starts = range(0, size // ranks.world_size, width)
    return [Batch(**{name: tensor[i : i + width] for name, tensor in mine.items()}) for i in starts]


def train(
    config: RunConfig, ranks: Ranks, device: torch.device, steps: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train a variant; returns losses and what was noted, and the first step's gradients where they can be read."""
    engine = Engine(config, ranks.world_size, device)
    losses, gradients, unchanged, news = [], {}, None, []
    for step in range(1, steps + 1):
        batches = engine.arrange(micro_batches(config, step, ranks))
        count = count_target_tokens(batches, device)
        sums = LossSums(("a", "b", "c", "d"), device)
        for batch in batches:
            sums.add(*engine.forward_backward(batch, count))
        if step == 1 and isinstance(engine.gradients, GradientSums):
            gradients = {name: part.clone() for name, part in engine.gradients.own_parts()}
        spoil = step == NAN_STEP and isinstance(engine.gradients, GradientSums)
        if spoil and ranks.rank == ranks.world_size - 1:
            engine.gradients.own_sums()[0][3] = float("nan")
        means = sums.read(on_device=[engine.gradients.summary()])
        before = [f.tensor.clone() for f in fragments.owned_fragments(engine)] if spoil else []
        if not engine.gradients.are_finite(means.extra):
            engine.gradients.refuse()
        applied, _ = engine.step(0.003)
        if spoil:
            after = [f.tensor for f in fragments.owned_fragments(engine)]
            unchanged = not applied and all(map(torch.equal, before, after)) and len(before) == len(after)
        losses.append(means.loss)
        news += engine.forms.news
        engine.forms.news.clear()
    engine.close()
    return {"losses": losses, "unchanged": unchanged, "news": news}, gradients


def main(output: Path, settings: list[str]) -> None:
    """Train every variant both ways."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    results = {}
    chosen = [setting.partition("=")[2].split(",") for setting in settings if setting.startswith("--variants=")]
    settings = [setting for setting in settings if not setting.startswith("--variants=")]
    for variant in chosen[0] if chosen else (*VARIANTS, *EXACT_VARIANTS):
        stage, checkpointing, *kinds = variant.split("-")
        own = [
            f"zero.stage={stage}",
            f"train.activation_checkpointing={checkpointing}",
            *(KINDS[kind] for kind in kinds),
        ]
        slow, fast = (load_config(TINY, [*settings, *own, f"train.compile={way}"]) for way in ("off", "auto"))
        steps = 1 if variant in EXACT_VARIANTS else STEPS
        slow, slow_gradients = train(slow, ranks, device, steps)
        fast, fast_gradients = train(fast, ranks, device, steps)
        errors = {
            name: float((fast_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
            for name, gradient in slow_gradients.items()
        }
        results[variant] = {"slow": slow, "fast": fast, "errors": errors}
        if ranks.is_first:
            output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
