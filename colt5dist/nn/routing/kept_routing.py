"""A layer's routing decisions, kept from its first run and given back when activation checkpointing runs it again.

The routers enter `routing_decision()` around the operators that decide. PyTorch's own selective checkpointing does the
same with a Python call for every operator of the layer, which on a GPU takes several times as long as the layer
itself; here only the deciding operators pass through Python. The `reference` implementation of the soft top-k is no
operator of this package: `keep_value` keeps its scores, while their gradient goes through the second run's iterations.

Inside `torch.compile` there is no second run, only a backward graph that computes some of the forward's nodes again;
there `compiled_routing_policy` names the deciding operators to PyTorch's selective checkpointing, whose price is paid
once, at compilation. What the `reference` implementation decides is computed again there.
"""

import threading
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

_thread = threading.local()


def _detached(results: Any) -> Any:
    """The same values, free of the graph that the caller is about to attach."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, results)


class _Decisions(TorchDispatchMode):
    """Sees the operators inside `routing_decision()`; those of this package, below autograd, are the decision."""

    def __init__(self, kept: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.kept = kept
        self.position = 0

    @abstractmethod
    def decide(self, operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The results of an operator of this package."""

    @abstractmethod
    def keep_value(self, result: Tensor) -> Tensor:
        """`result` with the value of the first run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "colt5dist":
            return self.decide(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Record(_Decisions):
    def decide(self, operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        results = operator(*args, **kwargs)
        self.kept.append((operator, _detached(results)))
        return results

    def keep_value(self, result: Tensor) -> Tensor:
        self.kept.append((keep_value, result.detach()))
        return result


class _Replay(_Decisions):
    def decide(self, operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return _detached(self._next(operator))

    def keep_value(self, result: Tensor) -> Tensor:
        # exactly the kept value: what is added is 0
        return self._next(keep_value) + (result - result.detach())

    def _next(self, decider: Any) -> Any:
        recorded, results = self.kept[self.position]
        assert recorded is decider, f"{decider} runs where {recorded} ran first"
        self.position += 1
        return results


class _During:
    """The decisions of this thread pass through `decisions` inside this context, which may be entered again."""

    def __init__(self, decisions: _Decisions) -> None:
        self.decisions = decisions
        self.outer: _Decisions | None = None

    def __enter__(self) -> None:
        self.outer = getattr(_thread, "decisions", None)
        self.decisions.position = 0
        _thread.decisions = self.decisions

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _thread.decisions = self.outer


def keep_routing_decisions() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for the first run of a layer and for every later one, as `torch.utils.checkpoint` takes by
    `context_fn`."""
    kept: list[tuple[Any, Any]] = []
    return _During(_Record(kept)), _During(_Replay(kept))


def compiled_routing_policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For `create_selective_checkpoint_contexts` inside `torch.compile`: the routing operators' results are kept."""
    decides = (
        isinstance(operator, torch._ops.OpOverload)
        and operator.namespace == "colt5dist"
        and not operator.name().startswith("colt5dist::local_attention")
    )
    return CheckpointPolicy.MUST_SAVE if decides else CheckpointPolicy.PREFER_RECOMPUTE


def routing_decision() -> AbstractContextManager:
    """For a router: the context in which its decision is recorded or given back; otherwise one that does nothing."""
    return _current_decisions() or nullcontext()


def keep_value(result: Tensor) -> Tensor:
    """For a router, whose decision was no operator of this package: `result`, in a later run with the first one's
    value."""
    decisions = _current_decisions()
    return result if decisions is None else decisions.keep_value(result)


def _current_decisions() -> _Decisions | None:
    return None if torch.compiler.is_compiling() else getattr(_thread, "decisions", None)
