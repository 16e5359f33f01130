"""The arguments that a conditional layer hands to its routers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


def check_mapping(**values: Any) -> None:
    """Raise TypeError where an argument, given by its name, is no mapping."""
    for name, value in values.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: {value!r}; use a dict of further arguments")


def router_arguments(router_kwargs: Mapping[str, Any], *, straight_through: bool, use_triton: bool) -> dict[str, Any]:
    """Keyword arguments of `CoordinateDescentRouter` from those of a conditional layer.

    Args:
        router_kwargs: the layer's `router_kwargs`.
        straight_through: the layer's `router_straight_through`.
        use_triton: the layer's; False leaves the choice to router_kwargs.

    Raises:
        TypeError: router_kwargs is no mapping, or names straight_through, which has an argument of its own.
    """
    check_mapping(router_kwargs=router_kwargs)
    if "straight_through" in router_kwargs:
        raise TypeError("router_kwargs: straight_through has an argument of its own; use router_straight_through")
    chosen = {"use_triton": True} if use_triton else {}
    return {"straight_through": straight_through, **router_kwargs, **chosen}
