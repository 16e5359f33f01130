"""A step that is run again and again, on a GPU as one CUDA graph: one launch, however slow the host is."""

import gc
import sys
from collections.abc import Callable

import torch

from colt5dist.errors import first_line
from colt5dist.ops.failed_capture import clean_up_failed_capture

PLAIN_STEPS = 2
"""Steps that run before one is captured: kernels are compiled and libraries set up by then."""


class RepeatedStep:
    """Runs a step; on a GPU from the third call on as the replay of a CUDA graph.

    Every call counts: the calls before the capture are steps too, and the capture itself runs nothing. Where it fails,
    one line on stderr says so, and the step goes on without a graph.

    Args:
        step: without arguments; reads and writes tensors that stay where they are, and never waits for the GPU.
        device: where it runs.
        graph: whether to capture; False runs the step as it is.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, graph: bool = True) -> None:
        self._step, self._device = step, device
        self._graph = graph and device.type == "cuda"
        self._num_plain = 0
        self._stream = torch.cuda.Stream(device) if self._graph else None
        self._captured: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._captured is not None

    def __call__(self) -> None:
        """Run the step once."""
        if self._num_plain == PLAIN_STEPS and self._captured is None and self._stream is not None:
            self._capture()
        if self._captured is not None:
            self._captured.replay()
            return
        if self._stream is None:
            self._step()
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)
        self._num_plain += 1

    def _capture(self) -> None:
        """Record the step; where that fails, it goes on without a graph."""
        assert self._stream is not None
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        torch.cuda.synchronize(self._device)
        # a graph that is collected while another one is recorded would end the recording
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # thread_local: other threads may page-lock memory meanwhile
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            print(f"generate: decoding runs without a CUDA graph ({first_line(error)})", file=sys.stderr)
            self._stream = None
            clean_up_failed_capture(self._device)
            return
        finally:
            if collects:
                gc.enable()
        self._captured = graph
