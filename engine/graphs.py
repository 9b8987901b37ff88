"""A chunk as CUDA graphs: it then costs what its kernels cost, not what Python needs to launch them.

A small network spends most of its time between kernels. `stream` hands its work to a `call` once its window
is full; this one captures and replays it. That is possible because a chunk with a RingCache asks the device
nothing: a tensor names the slot to overwrite, prompts are copied into place, noise comes in from outside.
On a CPU, without CUDA graphs, `compiled` takes most of Python's part away.
"""

import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from config import BadInput, Config
from engine.processes import pick_device


def settled(cfg: Config) -> Config:
    """cfg with what a machine decides: the device and, with CUDA, attention's kernel: the fastest one unless
    another is typed. It is printed, and is the whole process' from then on. Raises BadInput."""
    cfg = replace(cfg, device=pick_device(cfg))
    times = kernel_times(cfg) if cfg.device == "cuda" else {}
    if cfg.attention not in (allowed := ("auto", *times)):
        raise BadInput(f"attention={cfg.attention} is not possible here; allowed: {' | '.join(allowed)}")
    if times:
        cfg = replace(cfg, attention=min(times, key=times.get) if cfg.attention == "auto" else cfg.attention)
        allow(cfg.attention, "math", *["mem_efficient"] * (cfg.attention == "flash"))  # flash: no masks
        print(f"attention: {cfg.attention}; milliseconds {times}", file=sys.stderr)
    return cfg


def allow(*kernels: str) -> None:
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        vars(torch.backends.cuda)[f"enable_{name}_sdp"](name in kernels)


def kernel_times(cfg: Config) -> dict[str, float]:
    """Milliseconds of a chunk's attention to a full window by every kernel that can do it."""
    shape, found = (1, cfg.heads, cfg.tokens, cfg.dim // cfg.heads), {}
    q = torch.zeros(shape, device=cfg.device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    k = q.repeat(1, 1, 1 + cfg.cached_chunks, 1)
    given = {"attend": nn.functional.scaled_dot_product_attention, "q": q, "k": k}
    for name in ("cudnn", "flash", "mem_efficient"):
        allow(name)
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore"):  # it says why it cannot
            found[name] = round(1e3 * Timer("attend(q, k, k)", globals=given).timeit(5).mean, 3)
    allow("cudnn", "flash", "mem_efficient", "math")
    return found


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile, for `VideoDiT.run` with a full cache: while it fills, shapes change. On a CPU kernels
    are called from C++: from Python that takes long for a small network. Raises BadInput without g++."""
    if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise BadInput("--compile is not possible without a C++ compiler; allowed: with g++, or $CXX")
    fast = torch.compile(function, dynamic=False, options={"cpp_wrapper": device == "cpu"})
    return lambda *args: (fast if args[-1].full else function)(*args)


class CudaGraphs:
    """`call(key, function, *inputs)`: a key's first two calls run as they are and are its warm-up, then the
    function is captured, and from then on replayed on the new inputs' values.

    function: of `inputs` and of tensors that stay where they are (weights, cache, text). Calls of one key
    differ in values alone. What it returns is overwritten by the next replay.
    """

    def __init__(self):
        self.pool, self.seen, self.captured = torch.cuda.graph_pool_handle(), Counter(), {}

    def __call__(self, key: tuple, function: Callable, *inputs: Tensor):
        self.seen[key] += 1
        if self.seen[key] <= 2:
            return function(*inputs)
        if key not in self.captured:
            graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = function(*static)
            self.captured[key] = graph, static, outputs
        graph, static, outputs = self.captured[key]
        for old, new in zip(static, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs
