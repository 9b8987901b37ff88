"""The student from Python, in any folder, without installing anything.

student = torch.hub.load("path/to/this/folder", "student", source="local")
for video01 in student.stream("a red circle moving left slowly", seed=1):
    ...                                                # (F 3 H W) in [0, 1], a chunk at a time, for ever
"""

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from config import BadInput  # all imports stand here: torch.hub finds this folder while it loads, not later
from engine.graphs import CudaGraphs
from engine.rng import rng_for
from model import RingCache
from rollout import directly, stream
from sample import Flags, open_networks

dependencies = ["torch", "numpy", "einops", "imageio", "safetensors", "tqdm"]


def student(preset: str = "tiny", path: str = "", device: str = "auto"):
    """A few-step student: the shipped one, or the student.safetensors at `path`, with a codec beside it.

    Its method `stream` yields what sample.py writes into a file. Raises BadInput, a ValueError.
    """
    return Student(*open_networks(preset, {"device": device}, Flags(student=path)))


class Student:
    def __init__(self, cfg, net, codec, read):
        self.cfg, self.codec, self.read = cfg, codec.to(cfg.device), read
        self.net = net.to(cfg.device, torch.bfloat16 if cfg.bf16 else torch.float32)

    def stream(self, prompt: str, seed: int = 0, frames: int | None = None) -> Iterator[Tensor]:
        """Yield video01 (F 3 H W) in [0, 1] on the CPU, chunk by chunk: `frames` in all, or for ever."""
        if frames is not None and frames < 1:
            raise BadInput(f"frames={frames} is not possible; allowed: 1 or more, or None")
        return self._decoded(self.read(prompt).to(self.cfg.device), seed, frames)

    @torch.no_grad()
    def _decoded(self, text: Tensor, seed: int, frames: int | None) -> Iterator[Tensor]:
        cfg, decode, rngs = self.cfg, self.codec.stream(), [rng_for(seed, "sample", 0)]
        cache = RingCache(self.net, cfg, batch=1, dtype=self.net.patch_embedding.weight.dtype)
        call = CudaGraphs() if cfg.device == "cuda" else directly
        parts = stream(self.net, text, cfg, rngs, cache=cache, call=call)
        for x in islice(parts, frames and math.ceil(frames / cfg.chunk)):
            video01 = decode(x)[0, :frames].float().cpu()
            frames = frames and frames - len(video01)
            yield video01
