"""How much memory a distillation step takes per process, before it is tried.

    python memory.py wan-1.3b                       # for 1, 2, 4 and 8 GPUs
    python memory.py wan-1.3b --teacher_size=14b

The step is run at its real shapes on tensors that have shapes and no numbers (torch's FakeTensorMode), and a
tally of what is alive gives the peak. What FSDP2 spreads over processes is counted by hand. Each process
works on one clip at a time (--accumulate = batch / processes).
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config
from dmd import critic_loss, dmd_gradient, dmd_loss
from model import ListCache, VideoDiT
from rollout import Given, denoise_chunk, remember_chunk, step_grid

WAN_SIZES = {"1.3b": {}, "14b": dict(dim=5120, ffn=13824, layers=40, heads=40)}
GB = 1e9
# Qwen2-VL-2B, from its config.json: parameters, and for text and vision layers x width
REWARD, REWARD_TEXT, REWARD_VISION = 2.2e9, 28 * 1536, 32 * 1280


class Tally(TorchDispatchMode):
    """Bytes of storage that operations inside `with Tally() as tally` make: tally.now, tally.peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self.add(x.untyped_storage())
        return out

    def add(self, storage) -> None:
        if storage not in self.alive:
            self.alive[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Flags:
    teacher_size: str = "1.3b"  # 1.3b | 14b
    memory: float = 0.0  # of a GPU, in GB; 0: only print


def networks(cfg: Config, teacher: Config, sharded: bool) -> tuple[VideoDiT, VideoDiT, VideoDiT]:
    """Student, critic and teacher as a pass sees them: what is sharded arrives in bf16 if cfg.bf16."""

    def made(config: Config, low: bool) -> VideoDiT:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if low and cfg.bf16 else before)
        net = VideoDiT(config)
        torch.set_default_dtype(before)
        return net

    student, critic, frozen = made(cfg, sharded), made(cfg, sharded), made(teacher, True)
    for p in (*student.parameters(), *critic.parameters()):  # gradients are counted by hand
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return student, critic, frozen.requires_grad_(False)


def rehearse(cfg: Config, teacher: Config, sharded: bool, fake: bool = True) -> dict[str, int]:
    """Bytes at the peak of one process' student update and critic update, beyond weights and their gradients.

    `fake`: on tensors without numbers; else for real, which is how a test knows that the two agree.
    """
    with FakeTensorMode() if fake else torch.no_grad(), torch.enable_grad():
        student, critic, frozen = networks(cfg, teacher, sharded)
        with Tally() as first, torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            text = torch.zeros(1, cfg.text_length, cfg.text_width)
            given, cache, parts = Given(student, text), ListCache(student, cfg), []
            for k in range(cfg.chunks):
                grid = step_grid(cfg, k)
                noise = [torch.zeros(1, cfg.chunk, *cfg.latent_shape) for _ in range(1 + len(grid))]
                x0, kv = denoise_chunk(given, cache, grid, None, True, *noise[1:])
                remember_chunk(given, cache, cfg, grid, None, kv, x0, noise[0])
                parts.append(x0)
            x = torch.cat(parts, 1)
            t, eps = torch.full((1, cfg.frames), 0.5), torch.zeros_like(x)
            g, _ = dmd_gradient(x, text, text, frozen, critic, t, eps, cfg.guidance, cfg.motion)
            loss = dmd_loss(x, g)
            loss.backward()
        clip, noise = x.detach(), torch.zeros_like(x)
        del given, cache, parts, x0, kv, x, g, loss, eps
        with Tally() as second, torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            critic_loss(critic, clip, text, t, noise).sum().backward()
    return {"student update": first.peak, "critic update": second.peak}


def estimate(cfg: Config, teacher: Config, processes: int) -> dict[str, float]:
    """GB per process, by what they are for, and "total": what lasts and the larger of the two updates."""
    with torch.device("meta"):
        own, large = (sum(p.numel() for p in VideoDiT(c).parameters()) for c in (cfg, teacher))
    low, sharded = 2 if cfg.bf16 else 4, processes > 1
    lasting = {
        "student, average, critic": 12 * own / processes,
        "their optimizers": 16 * own / processes,
        "gradients": 4 * own / processes,
        "teacher": low * large / processes,
    }
    if sharded:  # this block and the next, whole
        lasting["blocks in passing"] = 2 * low * max(own / cfg.layers, large / teacher.layers)
    peaks = rehearse(cfg, teacher, sharded)
    found = lasting | peaks | {"total": sum(lasting.values()) + max(peaks.values())}
    return {name: size / GB for name, size in found.items()}
