"""How much memory a distillation step takes per process, before it is tried.

    python -m wan.memory wan-1.3b                       # for 1, 2, 4 and 8 GPUs
    python -m wan.memory wan-1.3b --teacher_size=14b

The step is run at its real shapes on tensors that have shapes and no numbers (torch's FakeTensorMode), and a
tally of what is alive gives the peak. What FSDP2 spreads over processes is counted by hand. The table is for
one clip at a time (--accumulate = batch / processes). It takes a minute or two.
"""

from engine import openmp  # isort: skip  (before torch loads)

import functools
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from config import BadInput, Config, build, cli, read_cli
from dmd import critic_loss, dmd_gradient, dmd_loss
from engine.processes import autocast, sharing
from model import ListCache, VideoDiT
from rollout import Given, context_level, denoise_chunk, remember_chunk, step_grid
from wan.hub import extra
from wan.lora import adapt
from wan.weights import WanCodec

WAN_SIZES = {"1.3b": {}, "14b": dict(dim=5120, ffn=13824, layers=40, heads=40)}
GB = 1e9
# Qwen2-VL-2B, by its config.json: parameters, layers x width of text and vision; pixels a frame. 34 bytes a
# token, layer and channel in bf16 are what a transformer keeps for a gradient (Korthikanti et al. 2022).
REWARD, REWARD_TEXT, REWARD_VISION, LARGEST = 2.2e9, 28 * 1536, 32 * 1280, 448**2


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


def like_cuda():
    """CUDA's autocast computes these norms in fp32; the CPU's, under which a rehearsal runs, does not."""

    def in_fp32(norm):
        def run(*args, **more):
            if torch.is_autocast_enabled("cpu"):
                args, more = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, (args, more))
            return norm(*args, **more)

        return run

    return patch.multiple(F, layer_norm=in_fp32(F.layer_norm), rms_norm=in_fp32(F.rms_norm))


@dataclass(frozen=True)
class Flags:
    teacher_size: str = "1.3b"  # 1.3b | 14b


def networks(cfg: Config, teacher: Config, sharded: bool) -> tuple[VideoDiT, VideoDiT, VideoDiT]:
    """Student, critic and teacher as a pass sees them: in bf16 if cfg.bf16, but for what one alone trains."""
    own, frozen = [VideoDiT(cfg), VideoDiT(cfg)], VideoDiT(teacher).requires_grad_(False)
    with patch.object(nn.Module, "to", lambda net, *where, **how: net):  # fake tensors do not move
        own = [adapt(net, cfg) for net in own] if cfg.lora else own
    for p in (p for net in (*own, frozen) for p in net.parameters()):
        p.data = p.data.to(torch.bfloat16 if cfg.bf16 and (sharded or not p.requires_grad) else torch.float32)
        if p.requires_grad:  # gradients are counted by hand
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return *own, frozen


@functools.cache
def rehearse(cfg: Config, teacher: Config, sharded: bool, clips=1, fake=True) -> dict[str, int]:
    """Bytes at the peak of one process' student update and critic update, beyond weights and their gradients.

    `fake`: on tensors without numbers; else for real, which is how a test knows that the two agree.
    """
    with FakeTensorMode() if fake else nullcontext(), like_cuda():
        student, critic, frozen = networks(cfg, teacher, sharded)
        rough = autocast(replace(cfg, device="cpu"))
        with Tally() as first, rough:
            text = torch.zeros(clips, cfg.text_length, cfg.text_width)
            x = exit_passes(student, text, cfg)
            t, eps = torch.full((clips, cfg.frames), 0.5), torch.zeros_like(x)
            g, _ = dmd_gradient(x, text, text, frozen, critic, t, eps, cfg.guidance, cfg.motion)
            dmd_loss(x, g).backward()
        clip = x.detach()
        del x, g
        with Tally() as second, rough:
            critic_loss(critic, clip, text, t, eps).sum().backward()
    return {"student update": first.peak, "critic update": second.peak}


def exit_passes(student: VideoDiT, text: Tensor, cfg: Config) -> Tensor:
    """A rollout (b f c h w) of which every pass carries gradient; those before it leave nothing behind."""
    given, parts = Given(student, text), []
    caches = [ListCache(student, cfg) for _ in (cfg.denoise if cfg.context == "aligned" else "1")]
    for k in range(cfg.chunks):
        noise, grid = torch.zeros(len(text), cfg.chunk, *cfg.latent_shape), step_grid(cfg, k)[-len(caches) :]
        x0, kv = denoise_chunk(given, caches, grid, True, None, *[noise] * len(grid))
        remember_chunk(given, caches, context_level(cfg, grid, True), x0.detach(), noise, *chain(*kv))
        parts.append(x0)
    return torch.cat(parts, 1)


@functools.cache
def judging(cfg: Config, clips: int) -> dict[str, float]:
    """Bytes of Wan's codec and VideoAlign's reward: their weights, and while they look at rollouts."""
    diffusers = extra("diffusers")
    with FakeTensorMode(), torch.no_grad():
        codec = WanCodec(diffusers.AutoencoderKLWan())
        with Tally() as tally:
            codec.decode(torch.zeros(clips, cfg.frames, *cfg.latent_shape))
    weights = 4 * sum(p.numel() for p in codec.parameters()) + 2 * REWARD
    seconds, cells = cfg.pixel_frames / cfg.fps, LARGEST / 14**2
    patches = 2 * seconds / 2 * cells  # two frames a second, two frames a patch
    gradients = 34 * clips * (patches * REWARD_VISION + (patches / 4 + 800) * REWARD_TEXT)
    return {"codec and reward": weights, "judging rollouts": max(tally.peak, gradients)}


def estimate(cfg: Config, teacher: Config, processes: int, clips: int = 1) -> dict[str, float]:
    """GB per process by what they are for. In "total": what lasts, the larger of the two updates, and the
    judging, during which the student's graph is alive."""
    with torch.device("meta"):
        own, large = (sum(p.numel() for p in VideoDiT(c).parameters()) for c in (cfg, teacher))
    low, sharded = 2 if cfg.bf16 else 4, cfg.shard and processes > 1
    updates = cfg.lora * cfg.layers * (18 * cfg.dim + 2 * cfg.ffn), 2 * low * own
    trained, frozen = updates if cfg.lora else (own, 0)
    share = processes if sharded else 1
    lasting = {
        "student, average, critic": (4 * own + frozen + 8 * trained) / share,
        "their optimizers": 16 * trained / share,
        "gradients": 4 * trained / share,
        "teacher": low * large / share,
        "blocks in passing": sharded * 2 * low * max(own / cfg.layers, large / teacher.layers),
    }
    judged = judging(cfg, clips) if cfg.time_stride > 1 and cfg.weighted else {}
    peaks = rehearse(cfg, teacher, sharded, clips)
    total = sum(lasting.values()) + max(peaks.values()) + sum(judged.values())
    return {name: size / GB for name, size in (lasting | peaks | judged | {"total": total}).items()}


def check(cfg: Config, teacher: Config, processes: int, available: float) -> None:
    """Raises BadInput if a step will not fit into that many GB: before anything is put there, not after."""
    clips = cfg.batch // (processes * cfg.accumulate)
    needed = estimate(cfg, teacher, min(processes, sharing()), clips)["total"]
    if needed > available:
        what = f"{processes} GPUs with {clips} clips each need about {needed:.0f} GB, have {available:.0f}"
        fix = f"fewer clips: --accumulate={cfg.batch // processes}; python -m wan.memory: the table"
        raise BadInput(f"{what}; {fix}")


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    cfg = build(preset, typed)
    openmp.use_threads(cfg.threads)
    if flags.teacher_size not in WAN_SIZES:
        allowed = " | ".join(WAN_SIZES)
        raise BadInput(f"--teacher_size={flags.teacher_size} is not possible; allowed: {allowed}")
    teacher = replace(cfg, **WAN_SIZES[flags.teacher_size])
    found = {n: estimate(cfg, teacher, n) for n in tqdm((1, 2, 4, 8), desc="rehearsing")}
    print("| GB per GPU, one clip each | " + " | ".join(f"{n} GPU" + "s" * (n > 1) for n in found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name in found[1]:
        print(f"| {name} | " + " | ".join(f"{parts[name]:.1f}" for parts in found.values()) + " |")


if __name__ == "__main__":
    cli(main)
