"""Launching a Triton kernel with little work on the host.

`kernel[grid](...)` looks at every argument of every launch to find the compiled kernel, which takes several times as
long as the launch. Here the caller gives a key that determines all that a kernel is specialised on.
"""

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from colt5dist.ops.triton_rows import INTERPRETED

_MOST_KEYS = 1024


class KernelCall:
    """A kernel with the compiled forms that were called."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, programs: int, arguments: tuple[Tensor | int, ...], constants: dict[str, Any]
    ) -> None:
        """Launch the kernel on the current stream of the current device.

        Args:
            key: equal for two calls only if these are the same in both: the constants, the device, the tensors' types
                and whether their addresses are multiples of 16, and the integers that the kernel does not name in
                do_not_specialize.
            programs: number of programs.
            arguments: of the kernel, in its order.
            constants: constexpr arguments, which come last in the kernel's signature in this order, and launch options.
        """
        found = self.compiled.get(key)
        if found is not None:
            found[0][(programs, 1, 1)](*arguments, *found[1])
            return
        compiled = self.kernel[(programs,)](*arguments, **constants)
        if not INTERPRETED:
            names = self.kernel.arg_names[len(arguments) :]
            if len(self.compiled) >= _MOST_KEYS:
                self.compiled.clear()
            self.compiled[key] = (compiled, tuple(constants[name] for name in names))


def tensor_key(tensor: Tensor | None) -> Hashable:
    """What a kernel is specialised on of a tensor (..., n) that is given with its strides."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0
