"""A training step compiled in one piece, and replayed as one CUDA graph: the processor only says "again"."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ginr.parallel import processes


def compile_loss(function: Callable) -> Callable:
    """``torch.compile`` with the options that make a step of the notebook's model fastest (docs/speed)."""
    # Small kernels, such as casts of weights, side by side in few; and tensors as the scan wants them, where the
    # convolutions' own layout would cost a copy a layer. Left out where PyTorch does not know them.
    from torch._inductor import list_options  # seconds, which only a GPU needs

    options = {"combo_kernels": True, "combo_kernels_pointwise_only": True, "layout_optimization": False}
    return torch.compile(function, options={name: on for name, on in options.items() if name in list_options()})


def start_compiler(device: torch.device) -> None:
    """On a GPU, have ``torch.compile`` load what it consists of and start its worker processes, which takes seconds.

    A head start and no more: what goes wrong here shows where the step is compiled.
    """
    if device.type == "cuda":
        compile_loss(torch.square)(torch.zeros((), device=device, requires_grad=True)).backward()


class GraphedStep:
    """``step(batch)`` as ``function(batch)``, from the fourth call on as one CUDA graph, which waits for nothing.

    Args:
        function: takes a NamedTuple of CUDA tensors, of the same shapes in each call; what it changes, it changes in
            place; what it returns, the next call overwrites.

    ``start_up``: seconds of the first call, which compiles.
    """

    WARM_UP = 3  # calls before the capture, on a stream of their own as CUDA graphs ask for; they do what all others do

    def __init__(self, function: Callable[[NamedTuple], Tensor]):
        self.function, self.calls, self.start_up = function, 0, 0.0
        self.graph, self.stream = None, torch.cuda.Stream()

    def __call__(self, batch: NamedTuple) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            self.batch = type(batch)(*map(torch.empty_like, batch))
        for mine, new in zip(self.batch, batch):
            mine.copy_(new)
        if self.calls <= self.WARM_UP:
            begun = time.perf_counter()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.function(self.batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.start_up = self.start_up or time.perf_counter() - begun
            return self.result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # With several processes a thread of PyTorch's asks NCCL's events whether they came: a capture that forbids
            # such questions to this thread only is not spoilt by it. NCCL itself was set up in the calls before.
            mode = "global" if processes() == 1 else "thread_local"
            with torch.cuda.graph(self.graph, capture_error_mode=mode):  # records, runs nothing
                self.result = self.function(self.batch)
        self.graph.replay()
        return self.result


class MadeAhead:
    """``made(i)`` as ``make(i)``; on a GPU i + 1 is then made on a stream of its own, while the GPU works on i.

    ``make`` returns a tuple of tensors on ``device`` that depend on i only.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], device: torch.device):
        self.make, self.ahead = make, {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, i: int) -> tuple[Tensor, ...]:
        if self.stream is None:
            return self.make(i)
        current = torch.cuda.current_stream()
        made = self.ahead.pop(i, None) or self.make_aside(i)
        current.wait_stream(self.stream)
        for tensor in made:
            tensor.record_stream(current)
        self.ahead = {i + 1: self.make_aside(i + 1)}
        return made

    def make_aside(self, i: int) -> tuple[Tensor, ...]:
        with torch.cuda.stream(self.stream):
            return self.make(i)
