"""Begin-of-video tokens that follow the video, "ada-BOV" (https://arxiv.org/abs/2511.12099), 2025.

Claim: learned tokens at the head of the window, modulated by the frames just made, hold a stream together.

    k, v = block l's own projections of LN(B_l) (1 + γ) + β, always in view, without a position
    B_l (n d) is learned; (γ, β) = W_l mean of the values of the newest chunk's tokens; W = 0 at first
    static sink: k, v of the first chunk; EMA sink: of old ones, averaged; either takes as many places
simplified: finished chunks instead of a window at rising noise; the tokens learn in 16 steps of distillation
alone; only the paper's abstract was at hand, what modulates what is our reading.
seen here (`python -m family.ada_bov`; three trainings, 95 % intervals; clip 4, minus nothing in the sink's
place): contrast drifts less, -.012 ± .005 with ada-BOV, -.011 ± .007 with fixed tokens, -.000 ± .003 and .002
with a static and an EMA sink; but jitter grows, +.17 ± .09 px, +.16 ± .30, +.04 ± .17, +.02 ± .14, and motion
falls, -.024 ± .022, -.022 ± .031, -.005 ± .012, -.003 ± .013. That the tokens follow changes nothing. A new
prompt's colour is there after .22 ± .22 frames without a rebuild; no arm differs by more than .16 ± .24.
"""

from engine import openmp  # isort: skip  (before torch loads)

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import trange

import train
from config import BadInput, Config, build, cli, read_cli
from engine.checkpoint import load_weights, save_weights, writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import ListCache, VideoDiT
from rollout import Given, context_level, denoise_chunk, remember_chunk, step_grid
from run import Run, prepare
from world.measure import mean, measure, three_axes
from world.scene import World
from world.words import COLOURS, caption

# what stands before the newest chunk and the one in hand: fields of Config, n, whether W learns
_NO_SINK = dict(window=2, sink=0, sink_mode="none")
ARMS = {"nothing": (_NO_SINK, 0, 0), "static sink": (dict(sink_mode="static"), 0, 0),
        "EMA sink": ({}, 0, 0), "fixed tokens": (_NO_SINK, 16, 0), "ada-BOV": (_NO_SINK, 16, 1)}  # fmt: skip
SEEDS, CLIPS, LONG = 3, 64, 4  # LONG: clips in a stream


def with_tokens(net: VideoDiT, cfg: Config, n: int, moves: bool = True) -> VideoDiT:
    """A student gets n tokens for each block and W, which learns to modulate them if it `moves`."""
    net.bov = nn.Parameter(0.01 * torch.randn(cfg.layers, n, cfg.dim))  # small ones learn faster
    net.follow = nn.Parameter(torch.zeros(cfg.layers, cfg.dim, 2 * cfg.dim), requires_grad=moves)
    return net


class BovCache(ListCache):
    """What is remembered, behind the student's tokens; a pass makes those, and its gradient reaches them."""

    def __init__(self, student: VideoDiT, cfg: Config):
        super().__init__(student, cfg)
        self.student = student

    def join(self, layer: int):
        net, join = self.student, super().join(layer)
        x = nn.functional.layer_norm(net.bov[layer], net.bov.shape[-1:])[None]
        if self.filled:
            newest = self.chunks[-1][layer][1].mean(1, keepdim=True).flatten(2)  # of the values, (b 1 a*d)
            scale, shift = (newest @ net.follow[layer]).chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        own = net.blocks[layer].self_attn.read(x)  # keys and values (b n a d)
        return lambda *kv: [torch.cat([bov.expand(len(z), -1, -1, -1), z], dim=1)
                            for bov, z in zip(own, join(*kv), strict=True)]  # fmt: skip


def dream(student, text, cfg, rngs, chunks, exit=None, grad=False, then=None) -> Tensor:
    """`rollout` with the student's own cache; all of it with `then`, the text after clip LONG; no rebuild."""
    given, cache, parts = Given(student, text), BovCache(student, cfg), []
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in rngs]
    for k in range(chunks):
        if then is not None and k == LONG * cfg.chunks:
            given.switch(then)
        grid, own = step_grid(cfg, k)[: None if exit is None else exit + 1], [rng_for(s, k) for s in seeds]
        context, *noise = (randn(own, cfg.chunk, *cfg.latent_shape) for _ in (0, *grid))
        x0, _ = denoise_chunk(given, [cache], grid, grad and k >= chunks - cfg.chunks, None, *noise)
        remember_chunk(given, [cache], context_level(cfg, grid), x0.detach(), context)
        parts.append(x0)
    return torch.cat(parts[-cfg.chunks if then is None else 0 :], dim=1)


def waited(video01: Tensor, colours: Tensor) -> Tensor:
    """Frames (b F 3 H W) until four in a row have 16 pixels of a second colour (2 b 3), fewer of a first."""
    old, new = (((video01 - c[:, None, :, None, None]).norm(dim=2) < 0.35).sum((2, 3)) for c in colours)
    return (~(new > old.clamp(min=15)).unfold(1, 4, 1).all(2)).cumprod(1).sum(1).float()


def student(arm: str, seed: int, flags) -> Run:
    """A run whose `ema` is the student of an arm. What an earlier call has trained is loaded."""
    fields, n, moves = ARMS[arm]
    how = dict(method="windowed", denoise=(1.0, 0.5), batch=8, lr=3e-4, ema=0.9, seed=seed, device="cpu")
    cfg = build("tiny", how | fields)
    run = prepare(cfg, train.Flags(out=f"{flags.out}/ada_bov/{flags.steps}-{n}-{arm}-{seed}"), 0, 1)
    torch.manual_seed(seed)
    net, path = with_tokens(VideoDiT(cfg), cfg, n, bool(moves)), run.out / "student.safetensors"
    net.load_state_dict(run.student.state_dict(), strict=False)  # all but the tokens and W
    run.dream, run.student, run.ema = dream, net, copy.deepcopy(net)
    run.student_opt = torch.optim.AdamW(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
    if not path.exists():
        for step in trange(-5, flags.steps, desc=run.out.name):
            if step >= 0:  # until then the critic learns alone
                train.update_student(run, step)
            for i in range(2):
                train.update_critic(run, "critic", step + 5, i)
        save_weights(path, run.ema, cfg, "student")
    load_weights(path, run.ema, cfg, "student")
    return run


def seen(run: Run) -> tuple[Tensor, Tensor]:
    """→ a line of the table (6,); clip LONG of the first stream."""
    cfg, names, rngs = run.cfg, [*COLOURS], [rng_for("select", i) for i in range(CLIPS)]
    words, n = World(cfg, "select").captions([(i,) for i in range(CLIPS)]), cfg.frames
    other = [[names[names.index(colour) - 4], *more] for colour, *more in words]
    x = dream(run.ema, run.read(words), cfg, rngs, (LONG + 2) * cfg.chunks, then=run.read(other))
    first, _, last, after = map(run.codec.decode, x.split([n, (LONG - 2) * n, n, 2 * n], dim=1))
    found, both = (measure(y, [caption(w) for w in words]) for y in (last, torch.cat([first, last], 1)))
    wait = waited(after, torch.tensor([[COLOURS[w[0]] for w in way] for way in (words, other)]))
    found = [*three_axes(found).values(), found["jitter"], both["contrast"].abs(), wait]
    return torch.stack([x.nanmean() for x in found]), last[0]


@dataclass(frozen=True)
class Flags:
    out: str = "out/family"  # folder of the picture and, in ada_bov/, of students, each trained once
    steps: int = 16  # updates of every student, 1 or more


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if what != "tiny" or typed or not flags.steps:
        raise BadInput(f"{what} {typed or flags} is not possible; allowed: tiny and what --help says")
    rows, table = [], torch.zeros(len(ARMS), SEEDS, 6)
    print(f"of clip {LONG}: looks, motion, text, jitter, drift of contrast, wait (minus the first line's)")
    for row, arm in zip(table, ARMS, strict=True):
        for seed in range(SEEDS):
            row[seed], clip = seen(student(arm, seed, flags))
        rows.append((arm, clip))
        cells = [f"{mean(x, 3)} ({mean(x - y, 3)})" for x, y in zip(row.T, table[0].T, strict=True)]
        print(f"{arm:12}", *cells, sep="  ", flush=True)
    print(contact_sheet(writable_folder(flags.out) / "ada_bov.png", rows, every=2))


if __name__ == "__main__":
    cli(main)
