"""Which code runs a micro-batch: plain layers, compiled ones, or a CUDA graph of them; none before it is proven."""

import gc
import time
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from colt5dist.data.read.batch import Batch
from colt5dist.errors import first_line
from colt5dist.model.colt5 import CoLT5Output
from colt5dist.ops.failed_capture import clean_up_failed_capture
from colt5dist.train.engine.compile import (
    PassNumbers,
    compile_layers,
    difference,
    restore_layers,
    without_compiled_code,
)
from colt5dist.train.engine.gradient_sums import GradientSums
from colt5dist.train.engine.micro_batch_graph import (
    MicroBatchGraphs,
    Pass,
    form_of,
    is_padded,
    to_device,
    with_other_padding,
    without_needless_mask,
)
from colt5dist.train.ranks import sum_over_ranks

WARM_UP_RUNS = 2
"""Passes before a capture: the first compiles, the second makes the workspaces that compiled code needs."""


class FormError(RuntimeError):
    """A form fails, or computes something else; raised on all ranks."""

    out_of_memory = False
    """Whether some rank had no room for it."""


class CompileError(FormError):
    """Layers cannot be compiled, or compiled ones compute something else."""


class CaptureError(FormError):
    """A CUDA graph cannot be made, or computes something else than what it was made of."""


class MicroBatchForms:
    """The compiled layers and the CUDA graphs of a model: makes them, proves them, and leaves what fails.

    Args:
        module: the model.
        device: where it runs.
        compiled: whether to compile its layers.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, compiled: bool) -> None:
        self.module, self.device = module, device
        self.compiled = compiled
        """Whether the layers run compiled."""
        self.graphs: MicroBatchGraphs | None = None
        """The CUDA graphs; None where layers are launched one by one."""
        self.news: list[str] = []
        """Lines for the log about what has been made; whoever prints them clears the list."""
        self._wrapped = compiled
        self._proven: set[Hashable] = set()
        self._run: Pass | None = None
        self._gradients: GradientSums | None = None
        if compiled:
            compile_layers(module)

    def begin(self, run: Pass, gradients: GradientSums, *, graphs: bool) -> None:
        """Say how a micro-batch runs, once DeepSpeed has taken the model.

        Args:
            run: forward and backward of a micro-batch on the device; adds its gradients to `gradients`.
            gradients: the sums of a step's gradients.
            graphs: whether to make CUDA graphs.
        """
        self._run, self._gradients = run, gradients
        if graphs:
            self.graphs = MicroBatchGraphs(run, self.device)

    def forget(self) -> None:
        """Forget what was proven and captured, before micro-batches get other lengths."""
        if self.graphs is not None:
            assert self._run is not None
            self.graphs = MicroBatchGraphs(self._run, self.device)
        self._proven.clear()

    def leave(self) -> None:
        """From now on nothing is compiled or captured."""
        self.graphs, self.compiled = None, False

    def code(self, *, compiled: bool) -> AbstractContextManager[None]:
        """A context in which layers run compiled, or as they are written."""
        return nullcontext() if compiled or not self._wrapped else without_compiled_code()

    def prove(self, batch: Batch, num_targets: torch.Tensor) -> None:
        """Compile and capture for a shape that is new, and leave what fails or computes something else.

        With padding and without, both at once: so a lack of memory shows at the start, and no rank compiles in the
        middle of a run. All passes of layers that are launched one by one come before the first capture: a graph keeps
        its memory, which they do not get. It is called before the first micro-batch of a step, whose gradients are 0.

        Args:
            batch: a micro-batch, on the host.
            num_targets: valid target tokens of the global batch, on the device.

        Raises:
            torch.OutOfMemoryError: there is no room for the first form, with which the plain layers would not help.
        """
        if not self.compiled or form_of(batch) in self._proven:
            return
        forms = [batch] if batch["input_mask"].numel() == 0 else [batch, with_other_padding(batch)]
        begin = time.monotonic()
        notes = {}
        try:
            for form in forms:
                notes[form_of(form)] = self._compile(form, num_targets)
                self._proven.add(form_of(form))
        except CompileError as error:
            self._fall_back(error)
        if self.graphs is not None:
            try:
                self._capture(forms, num_targets)
            except CaptureError as error:
                self._fall_back(error)
        self._proven.update(map(form_of, forms))
        if self.compiled:
            seconds = (time.monotonic() - begin) / len(forms)
            for form in (form for form in forms if form_of(form) in notes):
                what = f"layers for {_name(form)}"
                if self.graphs is not None:
                    what = f"forward and backward of {_name(form)} in one CUDA graph,"
                self.news.append(f"compile: {what} made in {seconds:.1f} s{notes[form_of(form)]}")

    def _on_device(self, batch: Batch) -> Batch:
        return without_needless_mask(to_device(batch, self.device), batch)

    def _compile(self, batch: Batch, num_targets: torch.Tensor) -> str:
        """Run compiled layers for the first time, and compare them with the layers as they are written.

        Returns:
            What to add to the line about them: that there was no room to compare them, or nothing.

        Raises:
            CompileError: on all ranks, if they cannot be compiled, or compute something else.
        """
        on_device = self._on_device(batch)
        with self._together(CompileError):
            for _ in range(WARM_UP_RUNS):
                compiled = self._dropped_pass(on_device, num_targets)
            try:
                with self.code(compiled=False):
                    plain = self._dropped_pass(on_device, num_targets)
            except torch.OutOfMemoryError:  # they keep more activations
                gc.collect()
                torch.cuda.empty_cache()
                return "; not compared with the plain layers: no room for those"
            problem = difference(compiled, plain)
            if problem:
                raise RuntimeError(f"compiled, {problem}")
        return ""

    def _capture(self, forms: list[Batch], num_targets: torch.Tensor) -> None:
        """Capture a graph of each form, replay it, and compare.

        Raises:
            CaptureError: on all ranks, if one cannot be captured, or computes something else.
        """
        assert self._gradients is not None and self._run is not None and self.graphs is not None
        try:
            with self._together(CaptureError):
                launched = [self._numbers(self._run(self._on_device(form), num_targets)) for form in forms]
                for form in forms:
                    self.graphs.add(form, num_targets)
            with self._together(CaptureError):
                for form, expected in zip(forms, launched, strict=True):
                    problem = difference(self._numbers(self.graphs.run(form, num_targets)[1]), expected)
                    if problem:
                        raise RuntimeError(f"in a CUDA graph, {problem}")
        finally:
            self._gradients.clear()

    def _fall_back(self, error: FormError) -> None:
        """Leave the graphs, or the compiled layers, free their memory, and say so; the same on all ranks.

        Raises:
            torch.OutOfMemoryError: there is no room for the first form, with which the plain layers would not help.
        """
        assert self._gradients is not None
        out_of_memory, in_capture = error.out_of_memory, isinstance(error, CaptureError)
        cause = first_cause(error)
        self._gradients.forget_unfinished()
        if out_of_memory and not in_capture and not self._proven:
            is_own = isinstance(cause, torch.OutOfMemoryError)
            raise cause if is_own else torch.OutOfMemoryError("another rank has no room for a micro-batch")
        in_capture = in_capture or out_of_memory
        reason = first_line(cause)
        self.graphs = None
        if not in_capture:
            self.compiled = self._wrapped = False
            restore_layers(self.module)
        gc.collect()
        if self.device.type == "cuda":
            clean_up_failed_capture(self.device)
            torch.cuda.empty_cache()
        left = "no CUDA graph; layers are launched one by one" if in_capture else "the layers are not compiled"
        self.news.append(f"note: train.compile: {left}, slower ({reason})")

    def _dropped_pass(self, on_device: Batch, num_targets: torch.Tensor) -> PassNumbers:
        """Run a micro-batch whose gradients go nowhere."""
        assert self._gradients is not None and self._run is not None
        with self._gradients.dropped() as norms:
            output = self._run(on_device, num_targets)
        return PassNumbers(output.token_loss.sum(), norms)

    def _numbers(self, output: CoLT5Output) -> PassNumbers:
        """What the first pass of a step computed; the gradients are cleared."""
        assert self._gradients is not None
        numbers = PassNumbers(output.token_loss.sum(), self._gradients.last_norms())
        self._gradients.clear()
        return numbers

    @contextmanager
    def _together(self, kind: type[FormError]) -> Iterator[None]:
        """Have what fails within it on one rank fail on all, for what follows may wait for the other ranks.

        Not at stage 3 on several ranks, if a rank runs out of memory within a pass: the others then wait for it in a
        collective of the pass, until that times out.

        Raises:
            kind: on all ranks; its cause is the error of this rank, if it is this one that failed.
        """
        failure = None
        try:
            yield
        except Exception as error:  # whatever a compiler or a capture may raise
            failure = error
        mine = [failure is not None, isinstance(failure, torch.OutOfMemoryError)]
        num_failed, num_out_of_memory = sum_over_ranks(
            torch.tensor(mine, dtype=torch.float32, device=self.device)
        ).tolist()
        if num_failed:
            problem = kind("it failed on another rank")
            problem.out_of_memory = num_out_of_memory > 0
            raise problem from failure


def _name(batch: Batch) -> str:
    size, n = batch["input_ids"].shape if batch["input_ids"].numel() else batch["target_ids"].shape
    return f"{size} x {n} tokens {'with' if is_padded(batch) else 'without'} padding"


def first_cause(error: BaseException) -> BaseException:
    """The error that came first of those that followed from each other; none keeps the memory of its frames."""
    while True:
        error.__traceback__ = None
        earlier = error.__cause__ or error.__context__
        if earlier is None:
            return error
        error.__cause__ = error.__context__ = None
        error = earlier
