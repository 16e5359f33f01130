"""Trains with Muon and an average of the weights at ZeRO stages; started by test_muon_and_average.py.

    torchrun --nproc-per-node 2 tests/train/engine/muon_and_average.py OUTPUT FOLDER TRAINED LOADED SETTING...

TRAINED is for instance 1flat,3 (stages, those with `flat` sum gradients themselves); LOADED for instance 2x3:1flat (the
checkpoint that 2 processes wrote at stage 3, loaded at stage 1). A run trains two steps, skips one with NaN, looks at
what the average does, saves, and trains two more steps. OUTPUT gets what came out as JSON, and beside it, as
safetensors, what the plain reference below has after two steps: weights and their average.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from zero_matrix import LEARNING_RATE, TINY, go_back, micro_batches, train_step

from colt5dist.nn.attention.attention import KeyValueProjection
from colt5dist.train.checkpoint import Saver, TrainerState, step_folder
from colt5dist.train.config.load import load_config
from colt5dist.train.config.schema import RunConfig
from colt5dist.train.engine.engine import Engine, build_model
from colt5dist.train.engine.fragments import flat_weights
from colt5dist.train.engine.micro_batch_graph import to_device
from colt5dist.train.losses import LossSums
from colt5dist.train.ranks import finish_process_group, initialise_process_group, ranks_from_environment

PROJECTIONS = ("to_qkv.weight", "to_q.weight", "to_kv.weight", "to_hidden.weight", "to_out.weight")


class PlainMuon:
    """Muon on whole matrices in one process, matrix by matrix, and AdamW for the other parameters."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.optimizer = config.optimizer
        self.rows = {}
        others, routers = [], []
        for name, p in model.named_parameters():
            if name.endswith(PROJECTIONS):
                self.rows[p] = self.rows_of_maps(model.get_submodule(name.removesuffix(".weight")), name, len(p))
            else:
                (routers if "router" in name else others).append(p)
        self.momentum = {p: torch.zeros_like(p) for p in self.rows}
        betas = (self.optimizer.beta1, self.optimizer.beta2)
        groups = [{"params": others}, {"params": routers, "lr": LEARNING_RATE * self.optimizer.router_lr_factor}]
        self.adamw = torch.optim.AdamW(groups, LEARNING_RATE, betas, self.optimizer.eps, weight_decay=0.0)

    def rows_of_maps(self, projection: nn.Module, name: str, num_rows: int) -> list[list[int]]:
        """Which rows of a weight are one map: its queries, its keys, its values, a half of gated GELU, or all."""
        rows = list(range(num_rows))
        if isinstance(projection, KeyValueProjection):  # in the order (head, key | value, dim_head)
            size = projection.dim_head
            return [[row for row in rows if row // size % 2 == kind] for kind in (0, 1)]
        num_maps = 3 if "to_qkv" in name else 2 if "to_kv" in name or "to_hidden" in name else 1
        size = num_rows // num_maps
        return [rows[i * size : (i + 1) * size] for i in range(num_maps)]

    def step(self) -> None:
        """Apply the gradients."""
        mu = self.optimizer.momentum
        for p, maps in self.rows.items():
            assert p.grad is not None
            self.momentum[p] = mu * self.momentum[p] + p.grad
            wanted = p.grad + mu * self.momentum[p]
            p.mul_(1 - LEARNING_RATE * self.optimizer.weight_decay)
            for rows in maps:
                scale = 0.2 * max(len(rows), p.shape[1]) ** 0.5
                p[rows] -= LEARNING_RATE * scale * self.orthogonalised(wanted[rows])
        self.adamw.step()

    def orthogonalised(self, matrix: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz iterations."""
        x = matrix / matrix.norm()
        for _ in range(5):
            product = x @ x.T
            x = 3.4445 * x - 4.7750 * product @ x + 2.0315 * product @ product @ x
        return x


def train_plainly(config: RunConfig, files: Path) -> dict[str, list[tuple[float, float]]]:
    """Four steps of the plain model on the whole batch; weights and average after two go to `files`."""
    torch.manual_seed(config.seed)
    model = build_model(config)
    muon = PlainMuon(model, config)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    averaged_loss = 0.0
    for number, step in enumerate((1, 2, 4, 5)):
        batches = [batch for rank in (0, 1) for batch in micro_batches(config, step, rank, 2)]
        count = sum(int(batch["target_mask"].sum()) for batch in batches)
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = forward(model, batch).token_loss.sum() / count
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        with torch.no_grad():
            muon.step()
            if number < 2:
                assert config.train.ema is not None
                decay = min(config.train.ema, (1 + number) / (10 + number))
                average = {n: decay * average[n] + (1 - decay) * p for n, p in model.named_parameters()}
        losses.append((float(total), float(norm)))
        if number == 1:
            for key, tensors in (("weight", dict(model.named_parameters())), ("ema", average)):
                save_file({n: t.detach().clone() for n, t in tensors.items()}, files / f"{key}.safetensors")
            own = {n: p.detach().clone() for n, p in model.named_parameters()}
            model.load_state_dict(average, strict=False)
            with torch.no_grad():
                held_out = micro_batches(config, 9, 0, 1)
                averaged_loss = sum(float(forward(model, batch).token_loss.sum()) for batch in held_out)
                averaged_loss /= sum(int(batch["target_mask"].sum()) for batch in held_out)
            model.load_state_dict(own, strict=False)
    return {"losses": losses, "averaged": [(averaged_loss, 0.0)]}


def forward(model: nn.Module, batch):  # type: ignore[no-untyped-def]
    """The output of the plain model."""
    return model(
        batch["input_ids"],
        batch["decoder_input_ids"],
        batch["target_ids"],
        input_mask=batch["input_mask"],
        target_mask=batch["target_mask"],
        sample_index=batch["sample_index"],
    )


def held_out_loss(engine: Engine, config: RunConfig) -> float:
    """Mean loss on samples that are not trained on."""
    ranks = ranks_from_environment()
    sums = LossSums(("a", "b", "c", "d"), engine.device)
    with torch.no_grad():
        for batch in micro_batches(config, 9, ranks.rank, ranks.world_size):
            on_device = to_device(batch, engine.device)
            sums.add(on_device, engine.forward(on_device))
    return sums.read().loss


def look_at_average(engine: Engine, config: RunConfig) -> dict[str, float | bool]:
    """The losses with own and averaged weights, and whether the own ones come back to the bit."""
    own = [flat.detach().clone() for flat in flat_weights(engine)]
    assert engine.average is not None
    averages = [average.clone() for average in engine.average.averages]
    before = held_out_loss(engine, config)
    with engine.averaged_weights():
        averaged = held_out_loss(engine, config)
    after = held_out_loss(engine, config)
    same = all(torch.equal(a, b) for a, b in zip(own, flat_weights(engine), strict=True))
    same = same and all(torch.equal(a, b) for a, b in zip(averages, engine.average.averages, strict=True))
    return {"averaged": averaged, "own": before, "comes_back": same and before == after}


def main(output: Path, folder: Path, trained: list[str], loaded: list[str], settings: list[str]) -> None:
    """Train, save and load."""
    ranks = ranks_from_environment()
    device = initialise_process_group(ranks, 5)
    results: dict[str, object] = {}

    def build(stage: str) -> tuple[Engine, RunConfig]:
        config = load_config(TINY, [*settings, f"zero.stage={stage[0]}"])
        return Engine(config, ranks.world_size, device, flat_gradients="flat" in stage), config

    if ranks.is_first:
        results["plain"] = train_plainly(load_config(TINY, settings), output.parent)
    dist.barrier()
    for stage in trained:
        engine, config = build(stage)
        losses = [train_step(engine, config, step)[:2] for step in (1, 2)]
        applied = train_step(engine, config, 3, spoil=True)[2]
        assert not applied and engine.average is not None
        results[f"average {stage}"] = look_at_average(engine, config)
        results[f"updates {stage}"] = engine.average.num_updates
        state = TrainerState(step=3, optimizer_step=2, averaged_steps=2, samples_consumed=24)
        Saver(folder / f"{ranks.world_size}x{stage}", engine, config.checkpoint, run_id="muon").save(state)
        losses += [train_step(engine, config, step)[:2] for step in (4, 5)]
        results[f"losses {stage}"] = losses
        go_back(engine, step_folder(folder / f"{ranks.world_size}x{stage}", 3))
        results[f"back {stage}"] = look_at_average(engine, config)
        engine.close()
    for pair in loaded:
        written, stage = pair.split(":")
        engine, config = build(stage)
        go_back(engine, step_folder(folder / written, 3))
        assert engine.average is not None and engine.average.num_updates == 2
        results[f"average {pair}"] = look_at_average(engine, config)
        results[f"losses {pair}"] = [train_step(engine, config, step)[:2] for step in (4, 5)]
    dist.barrier()
    if ranks.is_first:
        output.write_text(json.dumps(results))
    finish_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4].split(","), sys.argv[5:])
