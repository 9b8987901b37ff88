"""A chunk as CUDA graphs: it then costs what its kernels cost, not what Python needs to launch them.

A small network spends most of its time between kernels. `stream` hands its work to a `call` once its window
is full; this one captures and replays it. That is possible because a chunk with a RingCache asks the device
nothing: a tensor names the slot to overwrite, prompts are copied into place, noise comes in from outside.

On a CPU, without CUDA graphs, `compiled` takes most of Python's part away.
"""

import os
import shutil
import time
from collections.abc import Callable

import torch
from torch import Tensor

from config import BadInput


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile, for `VideoDiT.run` with a full cache: while it fills, shapes change. On a CPU kernels
    are called from C++: from Python that takes long for a small network. Raises BadInput without g++."""
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise BadInput("--compile is not possible without a C++ compiler; allowed: with g++, or $CXX")
    fast = torch.compile(function, dynamic=False, options={"cpp_wrapper": device == "cpu"})
    return lambda *args: (fast if args[-1].full else function)(*args)


class CudaGraphs:
    """`call(key, function, *inputs)`: the first calls of a key run as they are and are its warm-up, then the
    function is captured, and from then on replayed on the new inputs' values.

    function: of `inputs` and of tensors that stay where they are (weights, cache, text). Calls of one key
    differ in values alone. What it returns is overwritten by the next replay. `seconds`: spent on capturing.
    """

    def __init__(self, warm_up: int = 2):
        self.warm_up, self.seconds, self.pool = warm_up, 0.0, torch.cuda.graph_pool_handle()
        self.seen: dict[tuple, int] = {}
        self.captured: dict[tuple, tuple] = {}

    def __call__(self, key: tuple, function: Callable, *inputs: Tensor):
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= self.warm_up:
            return function(*inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(function, inputs)
        graph, static, outputs = self.captured[key]
        for old, new in zip(static, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs

    def _capture(self, function: Callable, inputs: tuple[Tensor, ...]) -> tuple:
        start = time.perf_counter()
        graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function(*static)
        torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return graph, static, outputs
