"""Weights of the package `colt5-attention` (0.11.2) in the layers of this one.

The mapping follows the layers that a module is made of, whatever its class: three kinds of parts have other names
there, every other parameter has the same name in both.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from colt5dist.nn.attention.rotary import RotaryEmbedding
from colt5dist.nn.feed_forward import FeedForward
from colt5dist.nn.routing.router import CoordinateDescentRouter

ROUTER_PARTS = ("q_router", "kv_router")
"""Names in colt5-attention of the two routers that are one router with two groups of routes here."""
FEED_FORWARD_PARTS = {"norm.": "0.", "to_hidden.": "1.", "to_out.": "3."}
"""Names of the parts of a feed-forward: those here, and those in colt5-attention, where it is a sequence."""


def colt5_attention_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names in colt5-attention of the parameters that make up each parameter of a module.

    Args:
        module: a layer of this package.

    Returns:
        For each parameter's name the names there. Their values, concatenated along the first dimension, are its value;
        there is more than one where a router here serves queries and keys/values.
    """
    names: dict[str, tuple[str, ...]] = {name: (name,) for name, _ in module.named_parameters()}
    for prefix, part in _parts(module):
        if isinstance(part, CoordinateDescentRouter) and part.routing_tokens is not None:
            names[f"{prefix}routing_tokens.weight"] = _routing_token_names(prefix, len(part.route_groups))
        elif isinstance(part, FeedForward):
            for here, there in FEED_FORWARD_PARTS.items():
                for name in names:
                    if name.startswith(prefix + here):
                        names[name] = (prefix + there + name.removeprefix(prefix + here),)
    return names


@torch.no_grad()
def load_colt5_attention(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a module of `colt5-attention` into the module of the same name here.

    Args:
        module: the module here, built with the same arguments as the one there.
        state_dict: `state_dict()` of the module there; values are converted to the types of the parameters here.

    Raises:
        ValueError: a parameter is missing, left over or of another shape, or the rotary frequencies differ; one line
            per problem, and nothing is copied.
    """
    names = colt5_attention_names(module)
    parameters = dict(module.named_parameters())
    left_over = dict(state_dict)
    problems = []
    for prefix, part in _parts(module):
        # a buffer there, computed here
        if isinstance(part, RotaryEmbedding) and (given := left_over.pop(f"{prefix}inv_freq", None)) is not None:
            ours = part.frequencies().to(given)
            # the buffer may have been rounded to 8 bits with the rest of its module
            if ours.shape != given.shape or not torch.allclose(ours, given, rtol=1e-2, atol=0):
                problems.append(
                    f"{prefix}inv_freq: other frequencies than those of theta {part.theta:g}, dim {part.dim}"
                )
    values = {}
    for name, sources in names.items():
        parts = [left_over.pop(source, None) for source in sources]
        missing = [source for source, value in zip(sources, parts, strict=True) if value is None]
        problems += [f"{source}: missing; {name} needs it" for source in missing]
        if missing:
            continue
        found = [value for value in parts if value is not None]
        expected = parameters[name].shape
        if [value.shape[1:] for value in found] != [expected[1:]] * len(found) or (
            sum(value.shape[:1].numel() for value in found) != expected[:1].numel()
        ):
            shapes = ", ".join(str(tuple(value.shape)) for value in found)
            problems.append(f"{' and '.join(sources)}: {shapes}; {name} needs {tuple(expected)}")
            continue
        values[name] = found[0] if len(found) == 1 else torch.cat(found)
    problems += [f"{name}: left over; this {type(module).__name__} has no such parameter" for name in left_over]
    if problems:
        raise ValueError("state_dict: other arguments built it than this module\n" + "\n".join(problems))
    for name, value in values.items():
        parameters[name].copy_(value)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and all below it, each with the prefix of its parameters' names."""
    for name, part in module.named_modules():
        yield f"{name}." if name else "", part


def _routing_token_names(prefix: str, num_groups: int) -> tuple[str, ...]:
    """Names in colt5-attention of the vectors of the router whose names begin with `prefix` here."""
    if num_groups == 1:
        return (f"{prefix}routing_token",)
    assert num_groups == len(ROUTER_PARTS), "a router with groups serves queries and keys/values"
    outer = prefix.removesuffix("router.")
    return tuple(f"{outer}{part}.routing_token" for part in ROUTER_PARTS)
