"""Where DeepSpeed keeps the float32 weights and the optimizer's moments, as flat fragments of named parameters.

The moving average of the weights, where there is one, has the layout of the weights.

Every ZeRO stage holds the same numbers in other places. This file is the only one that knows them; it touches
semi-private parts of DeepSpeed 0.19.8 (tests/train/engine/test_zero_stages.py probes them, run it again at each new
version):

- stage 0: the parameters themselves and the state of torch's optimizer, whole on every rank;
- stages 1 and 2: flat partitions (`single_partition_of_fp32_groups`; `fp32_groups_flat_partition` in bf16 at stage 1),
  in which `param._hp_mapping` names this rank's part of each parameter;
- stage 3: flat sub-groups (`fp32_partitioned_groups_flat`), in which `grad_position` names it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from colt5dist.storage.checkpoints import AVERAGE, WEIGHT
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.optimizer.groups import moment_keys, muon_matrices
from colt5dist.train.optimizer.muon import Muon, Part
from colt5dist.train.optimizer.weight_average import WeightAverage
from colt5dist.train.ranks import gather_objects


class Engine(Protocol):
    """What is asked of the engine (`colt5dist.train.engine.engine.Engine`) here."""

    deepspeed: Any
    stage: int
    average: WeightAverage | None
    gradients: Any

    @property
    def module(self) -> nn.Module:
        """The model."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter, or of one of its optimizer states, that this rank holds.

    `tensor` is a flat float32 view of the live memory: reading it saves, writing it loads.
    """

    name: str
    key: str
    offset: int
    shape: tuple[int, ...]
    tensor: torch.Tensor


def owned_fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank has to save: the ranks' fragments together cover every element once."""
    if engine.stage:
        yield from _sharded_fragments(engine)
        return
    fragments = list(_whole_fragments(engine))
    total = sum(f.tensor.numel() for f in fragments)
    world_size, rank = engine.deepspeed.world_size, engine.deepspeed.global_rank
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    start = 0
    for f in fragments:
        low, high = max(first - start, 0), min(last - start, f.tensor.numel())
        if low < high:
            yield Fragment(f.name, f.key, f.offset + low, f.shape, f.tensor[low:high])
        start += f.tensor.numel()


def needed_fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank has to load: at stage 0 all of it, else the part that it holds."""
    return _sharded_fragments(engine) if engine.stage else _whole_fragments(engine)


def create_optimizer_state(engine: Engine, optimizer_step: int, shapes: dict[tuple[str, str], tuple[int, ...]]) -> None:
    """Set the optimizer's step, and make zero moments where there are none, as before the first step.

    Moments that are there stay where they are, to be written over: DeepSpeed's `_hp_mapping` refers to them, and would
    keep them alive beside new ones.

    Args:
        engine: the engine.
        optimizer_step: steps that the optimizer has applied.
        shapes: shape of the state by (parameter name, key), as the checkpoint's index has it.
    """
    if engine.stage:
        for number, flat in enumerate(flat_weights(engine)):
            state = _state_at(engine, flat, optimizer_step)
            for key in moment_keys(_parameter_group(engine, number)):
                if key not in state:
                    state[key] = torch.zeros_like(flat)
        return
    for name, p in engine.module.named_parameters():
        state = _state_at(engine, p, optimizer_step)
        for key in sorted({key for _, key in shapes} - {WEIGHT, AVERAGE}):
            if (name, key) in shapes and key not in state:
                state[key] = torch.zeros(shapes[name, key], dtype=torch.float32, device=p.device)


def forget_optimizer_state(engine: Engine) -> None:
    """Drop the moments and the optimizer's step, as before the first step, with DeepSpeed's references to them."""
    engine.torch_optimizer.state.clear()
    if engine.stage not in (1, 2):
        return
    p: Any
    for p in engine.module.parameters():
        if p._hp_mapping is not None:
            p._hp_mapping.optim_fragment = None
    engine.deepspeed.optimizer._hp_optimizer_states_linked = False  # so that it refers to those of the next step


def optimizer_step(engine: Engine) -> int:
    """Steps that the optimizer has applied (skipped ones not counted)."""
    for tensor in flat_weights(engine):
        state = engine.torch_optimizer.state.get(tensor)
        if state:
            return int(state["step"])
    return 0


def refresh_parameters(engine: Engine) -> None:
    """After loading: bring the weights that forward uses in line with the float32 masters, on all ranks."""
    if engine.stage in (1, 2):
        engine.deepspeed.optimizer.update_lp_params()
    elif engine.stage == 3:
        optimizer = engine.deepspeed.optimizer
        if not isinstance(engine.gradients, GradientSums):
            optimizer._partition_all_parameters()  # what it keeps gathered would stay as it is
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def flat_weights(engine: Engine) -> list[torch.Tensor]:
    """The float32 tensors that the optimizer steps on: at stage 0 the parameters, else one a group (or sub-group)."""
    if engine.stage == 0:
        return list(engine.module.parameters())
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_groups_flat_partition)


def place_matrices(engine: Engine) -> None:
    """Tell Muon, if it is the optimizer, which part of which matrix each tensor holds; collective."""
    optimizer = engine.torch_optimizer
    if not isinstance(optimizer, Muon):
        return
    matrices = muon_matrices(engine.module)
    parameters = {name: p for name, p in engine.module.named_parameters() if name in matrices}
    if engine.stage == 0:
        for name, p in parameters.items():
            optimizer.place(p, [matrices[name]], [[Part(0, 0, 0, p.numel())]], rank=0)
        return
    places = {name: place for name, p in parameters.items() if (place := _place(engine, p))}
    of_ranks = gather_objects(places)
    for number, flat in enumerate(flat_weights(engine)):
        names = [name for name in matrices if any(name in of and of[name][0] == number for of in of_ranks)]
        parts = [[Part(names.index(name), *of[name][1:]) for name in names if name in of] for of in of_ranks]
        if names:
            optimizer.place(flat, [matrices[name] for name in names], parts, engine.deepspeed.global_rank)


def _parameter_group(engine: Engine, number: int) -> dict[str, Any]:
    """Stages 1-3: the optimizer's parameter group that a flat tensor belongs to."""
    if engine.stage == 3:
        number = engine.deepspeed.optimizer.sub_group_to_group_id[number]
    return engine.torch_optimizer.param_groups[number]


def _state_at(engine: Engine, tensor: torch.Tensor, optimizer_step: int) -> dict[str, Any]:
    """The optimizer's state of a tensor, at a step."""
    state = engine.torch_optimizer.state[tensor]
    state["step"] = torch.tensor(float(optimizer_step), device=tensor.device)
    return state


def _states(engine: Engine, owner: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    state = engine.torch_optimizer.state.get(owner, {})
    for key in sorted(state):
        if key != "step" and torch.is_tensor(state[key]):
            yield key, state[key]


def _whole_fragments(engine: Engine) -> Iterator[Fragment]:
    averages = engine.average.averages if engine.average else []
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        yield Fragment(name, WEIGHT, 0, tuple(p.shape), p.detach().view(-1))
        for key, state in _states(engine, p):
            yield Fragment(name, key, 0, tuple(state.shape), state.view(-1))
        if averages:
            yield Fragment(name, AVERAGE, 0, tuple(p.shape), averages[number].view(-1))


def _sharded_fragments(engine: Engine) -> Iterator[Fragment]:
    flats = flat_weights(engine)
    averages = engine.average.averages if engine.average else []
    for name, p in engine.module.named_parameters():
        place = _place(engine, p)
        if place is None:
            continue
        group, start, offset, count = place
        shape = tuple(getattr(p, "ds_shape", p.shape))
        yield Fragment(name, WEIGHT, offset, shape, flats[group].detach()[start : start + count])
        for key, state in _states(engine, flats[group]):
            yield Fragment(name, key, offset, shape, state[start : start + count])
        if averages:
            yield Fragment(name, AVERAGE, offset, shape, averages[group][start : start + count])


def _place(engine: Engine, p: Any) -> tuple[int, int, int, int] | None:
    """This rank's part of a parameter: flat partition, start in it, offset in the parameter, number of elements."""
    if engine.stage == 3:
        optimizer = engine.deepspeed.optimizer
        group, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        offset = p.partition_numel() * engine.deepspeed.global_rank
        count = min(p.partition_numel(), p.ds_numel - offset)  # the last partitions may be padding
        return (group, start, offset, count) if count > 0 else None
    mapping = p._hp_mapping
    if mapping is None:
        return None
    return (
        mapping.param_group_index,
        mapping.hp_fragment_address.start,
        mapping.lp_fragment_address.start,
        mapping.hp_fragment_address.numel,
    )
