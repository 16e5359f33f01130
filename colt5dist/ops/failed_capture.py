"""What is left to do after a CUDA graph whose capture failed."""

import warnings
from contextlib import suppress

import torch


def clean_up_failed_capture(device: torch.device) -> None:
    """Make PyTorch's random generator of the GPU usable again; call it outside of a capture.

    A capture that fails leaves the generator as if it were still being captured: from then on `torch.randn` and its
    like raise "Offset increment outside graph capture" (torch 2.11). A capture that holds nothing, and ends as it
    should, puts that right.
    """
    graph = torch.cuda.CUDAGraph()
    with suppress(RuntimeError), warnings.catch_warnings(), torch.cuda.stream(torch.cuda.Stream(device)):
        warnings.simplefilter("ignore")  # that the graph is empty
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()
