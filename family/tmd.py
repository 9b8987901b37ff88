"""Transition Matching Distillation (https://arxiv.org/abs/2601.09881), 2026.

Claim: a student of M steps gains from an inner flow: a head runs N times a step, the backbone once.

    x̂ = head(m), m = backbone(x_t): by itself a network answers E[x | x_t], which is no draw of x
    an inner flow does, from z_1 ~ N(0, I) in N steps: z_s = (1 - s) x + s z_1, z_r = z_s - (s - r) u,
    u = (z_s - x̂) / s, x̂ = head(m + g ⊙ block(m + E(z_s))) + g' ⊙ z_s; g, g' of s and r, at first 0
    matching: u is the velocity at s, |x̂ - x|²; with N = 1 that is E[x | x_t] again
    MeanFlow: u is its mean from s to r, z_1 - x - (s - r) du/ds, so |x̂ - s (s - r) du/ds - x|²

differs: the head's block is one more and sees its own chunk alone (paper: the last 5 of 30); the flow is
that of x, not of ε - x. simplified: stage 1 alone (2: DMD through all inner steps); no adaptive weight.
seen here (`python -m family.tmd`; three trainings, 95 % intervals; their start has looks .72): yes. Looks of
matching .65 ±.08, .76 ±.08, .85 ±.05 for N = 1, 2, 4, of MeanFlow .73 ±.07, .86 ±.03, .90 ±.04. Minus N = 1
of matching: +.113 ±.004, +.202 ±.038; MeanFlow +.084 ±.016, +.215 ±.046, +.252 ±.054. A test has eight modes.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass, replace
from itertools import product

import torch
from einops import repeat
from torch import Tensor, nn
from tqdm import trange

from config import PRESETS, ROOT, BadInput, Config, cli, read_cli
from engine.checkpoint import writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import Head, VideoDiT, add_noise, sinusoid, teacher_forcing, to_x0
from networks import load_net
from rollout import rollout, step_grid
from world.measure import mean, measure, three_axes
from world.scene import World
from world.words import caption, tokenize

SEEDS, CLIPS, WAYS, INNER = 3, 128, ("matching", "MeanFlow"), (1, 2, 4)  # INNER: N
CFG = replace(PRESETS["tiny"], denoise=(1.0, 0.5), device="cpu")  # M = 2


class FlowHead(Head):
    """A flow as a network's head. rngs: one a sample, for z_1; asked: of training, z, v, s, r."""

    def __init__(self, cfg: Config, meanflow: bool):
        super().__init__(cfg.dim, size := cfg.patch_time * cfg.patch**2 * cfg.channels)
        self.inner, self.meanflow, self.freqs, self.tokens = 1, meanflow, cfg.time_freqs, cfg.tokens
        self.see, self.gate = nn.Linear(size, cfg.dim), nn.Linear(2 * cfg.time_freqs, cfg.dim + size)
        self.block = nn.TransformerEncoderLayer(cfg.dim, cfg.heads, cfg.ffn, 0.0, "gelu", batch_first=True)
        self.place, self.rngs, self.asked = nn.Parameter(0.02 * torch.randn(cfg.tokens, cfg.dim)), [], ()
        nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

    def guess(self, m: Tensor, e: Tensor, z: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """m (b n d), e (b f d), z (b n k), s and r (b n) or (1 1) → x̂ (b n k), chunk by chunk."""
        x = (m + self.see(z)).unflatten(1, (-1, self.tokens)) + self.place
        x = self.block(x.flatten(0, 1)).view_as(m)
        waves = [sinusoid(level / 200, self.freqs) for level in (s, s - r)]  # slow: du/ds has to be smooth
        gates = 10 * self.gate(torch.cat(waves, -1))  # ten times: they begin at zero
        return super().forward(m + gates[..., : m.shape[-1]] * x, e) + gates[..., m.shape[-1] :] * z

    def forward(self, m: Tensor, e: Tensor) -> Tensor:
        if self.asked:
            return self.matched(m, e, *self.asked)
        z = randn(self.rngs, m.shape[1], self.see.in_features, device=m.device)
        for j in range(self.inner, 0, -1):
            s, r = (torch.full((1, 1), k / self.inner, device=m.device) for k in (j, j - self.meanflow))
            z = z.lerp(self.guess(m, e, z, s, r), 1 / j)  # z - (z - x̂) / s / N
        return z

    def matched(self, m: Tensor, e: Tensor, z: Tensor, v: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """In training: x̂ - s (s - r) du/ds (b n k) along the path, whose velocity is v (b n k); to be x."""
        slope, late, early = 0, (s + 0.005).clamp(max=1), torch.maximum(s - 0.005, r)
        with torch.no_grad():
            for at, sign in ((late, 1), (early, -1)):
                there = z + (at - s)[..., None] * v
                slope += sign * (there - self.guess(m, e, there, at, r)) / at[..., None].clamp(min=0.05)
        return self.guess(m, e, z, s, r) - (s * (s - r) / (late - early).clamp(min=1e-3))[..., None] * slope


def matching_loss(net: VideoDiT, x: Tensor, text: Tensor, rng, cfg: Config) -> Tensor:
    """Clips x (b f c h w): every chunk, at one of the student's levels, given the clean ones before it."""
    grid, noise = torch.tensor(step_grid(cfg, 0)), torch.randn(x.shape, generator=rng)
    t, s, r = torch.rand(3, len(x), cfg.chunks, generator=rng)
    t = grid[(len(grid) * t).long()].repeat_interleave(cfg.chunk, 1)  # (b f)
    r = torch.where((r < 0.25) & net.head.meanflow, 4 * r * s, s)  # of three in four r = s
    s, r = (y.repeat(1, 2).repeat_interleave(cfg.tokens, 1) for y in (s, r))  # of tokens, clean and noisy
    order = "b (f r) c (h p) (w q) -> b (two f h w) (r p q c)"  # the head's
    y = repeat(x, order, two=2, **dict(zip("rpq", net.size, strict=True)))
    z1 = torch.randn(y.shape, generator=rng)
    net.head.asked = y.lerp(z1, s[..., None]), z1 - y, s, r
    xt, t = torch.cat([x, add_noise(x, noise, t)], 1), torch.cat([0 * t, t], 1)
    v, _ = net(xt, t, text, None, *teacher_forcing(cfg.frames, cfg.chunk))
    net.head.asked = ()
    return nn.functional.mse_loss(to_x0(v, xt, t)[:, cfg.frames :], x)


def trained(way: str, seed: int, codec, steps: int) -> VideoDiT:
    """The start by teacher forcing, with a flow in its head, on clips of the world."""
    torch.manual_seed(seed)
    net, world = load_net(ROOT / "assets/tiny/causal.safetensors", CFG, "causal"), World(CFG, "train")
    head, net.head = net.head, FlowHead(CFG, way == "MeanFlow")
    net.head.load_state_dict(head.state_dict(), strict=False)  # all but the flow
    opt = torch.optim.AdamW(net.train().parameters(), 3e-4, (0.9, 0.99))
    slope = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / 20, 1, 2 - 2 * i / steps))
    for step in trange(steps, desc=f"{way}, seed {seed}", leave=False):
        drawn = world.batch([("tmd", seed, step, i) for i in range(4)])
        text = tokenize(drawn.meanings, CFG.text_length, CFG.text_width)
        matching_loss(net, codec.encode(drawn.video01), text, rng_for("tmd", seed, step), CFG).backward()
        opt.step(), slope.step(), opt.zero_grad()
    return net.eval()


@torch.no_grad()
def dream(net: VideoDiT, text: Tensor, cfg: Config, seeds, inner: int) -> Tensor:
    """`rollout`; the inner noise has generators of its own: with any N the outer noise is the same."""
    net.head.inner, net.head.rngs = inner, [rng_for("inner", i) for i in seeds]
    return rollout(net, text, cfg, [rng_for("tmd", i) for i in seeds])


@dataclass(frozen=True)
class Flags:
    steps: int = 80  # updates of a student, of 4 clips, 1 or more
    out: str = "out/family"  # folder of the picture


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if what != "tiny" or typed or not flags.steps:
        raise BadInput(f"{what} {typed or flags} is not possible; allowed: tiny, steps from 1")
    out, rows, found = writable_folder(flags.out) / "tmd.png", [], torch.zeros(6, 4, SEEDS)
    codec = load_net(ROOT / "assets/tiny/codec.safetensors", CFG, "codec").requires_grad_(False)
    words = World(CFG, "test").captions([("tmd", i) for i in range(CLIPS)])
    text, prompts = tokenize(words, CFG.text_length, CFG.text_width), [caption(w) for w in words]
    print("way, N: looks, motion, text, jitter in px; the same minus those of the first line", flush=True)
    nets = {way: [trained(way, i, codec, flags.steps) for i in range(SEEDS)] for way in WAYS}
    for row, (way, n) in zip(found, product(WAYS, INNER), strict=True):
        for net, column in zip(nets[way], row.T, strict=True):
            video01 = codec.decode(dream(net, text, CFG, range(CLIPS), n))
            seen = measure(video01, prompts)
            column[:] = torch.stack([x.nanmean() for x in (*three_axes(seen).values(), seen["jitter"])])
        print(f"{way}, {n}", *(f"{mean(x, 3):>14}" for x in (*row, *(row - found[0]))), flush=True)
        rows.append((f"{way}, N = {n}: {prompts[0]}", video01[0]))
    print(contact_sheet(out, rows, every=2))


if __name__ == "__main__":
    cli(main)
