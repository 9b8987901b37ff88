"""Randomness without state: every draw is a function of what it is for.

Resuming needs no generator states, and a sample's numbers do not depend on the batch or process it is in.
"""

import numpy as np
import torch
from torch import Tensor


def rng_for(*key: int | str) -> torch.Generator:
    """A generator that depends on (seed, purpose, step, sample, ...) alone: resume needs no RNG state."""
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def randn(rngs: list[torch.Generator], *shape: int, device=None) -> Tensor:
    """Standard normal noise (b *shape), sample i from generator i, whatever batch it is in."""
    x = torch.stack([torch.randn(shape, generator=g) for g in rngs])
    pinned = torch.device(device or "cpu").type == "cuda"  # so that nobody waits for the copy
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)


def pick(rng: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (), generator=rng))
