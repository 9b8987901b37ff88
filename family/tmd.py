"""Transition Matching Distillation (https://arxiv.org/abs/2601.09881), 2026.

Claim: a student of M steps gains from an inner flow: a head runs N times a step, the backbone once.

    x̂ = head(m), m = backbone(x_t): by itself a network answers E[x | x_t], which is no draw of x
    z_s = (1 - s) x + s z_1, z_1 ~ N(0, I):  an inner flow draws one, in N steps from s = 1 to s = 0:
    x̂ = head(m + g(s) ⊙ block(m + E(z_s))) + g'(s) ⊙ z_s,  z_r = z_s - (s - r) (z_s - x̂) / s; at first g = 0
    stage 1, transition matching: |x̂ - x|² at the s of the N steps; with N = 1 that is E[x | x_t] again
    stage 2: distribution matching (DMD) through all inner steps

differs: the head's block is one more and sees its own chunk alone (paper: the last 5 of 30 are the head);
the flow is that of x, not of ε - x: given x_t, one is the other on another scale.
simplified: stage 1 is plain, not MeanFlow, and knows the students' own levels alone; no GAN.
seen here: no gain (`python -m family.tmd`; three trainings, 95 % intervals). N = 2 minus N = 1: -.004 ± .014
looks, -.002 ± .014 motion, +.001 ± .007 text, -.02 ± .19 px jitter; a third step: +.005 ± .018, -.005 ± .009,
+.013 ± .018, -.04 ± .19. That N steps draw what one step averages, a test shows on a world of two clips.
"""

from engine import openmp  # isort: skip  (before torch loads)

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import trange

import train
from config import BadInput, Config, build, cli, read_cli
from engine.checkpoint import load_weights, save_weights
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import Head, VideoDiT, add_noise, sinusoid, teacher_forcing, to_x0
from rollout import rollout
from run import Run, imagine, prepare
from world.measure import mean, measure, three_axes

ARMS = {(2, 1): (1.0, 0.5), (2, 2): (1.0, 0.5), (3, 1): (1.0, 0.75, 0.5)}  # (M, N): levels, unshifted
SEEDS, CLIPS = 3, 128  # trainings of an arm, clips that are measured


class FlowHead(Head):
    """A flow as a student's head. rngs: one a sample, for z_1; asked: of stage 1, z (b n k) and s (b n)."""

    def __init__(self, cfg: Config, inner: int):
        super().__init__(cfg.dim, size := cfg.patch_time * cfg.patch**2 * cfg.channels)
        self.inner, self.freqs, self.tokens, self.rngs, self.asked = inner, cfg.time_freqs, cfg.tokens, [], ()
        self.see, self.gate = nn.Linear(size, cfg.dim), nn.Linear(cfg.time_freqs, cfg.dim + size)
        self.block = nn.TransformerEncoderLayer(cfg.dim, cfg.heads, cfg.ffn, 0.0, F.gelu, batch_first=True)
        self.place = nn.Parameter(0.02 * torch.randn(cfg.tokens, cfg.dim))
        nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

    def guess(self, m: Tensor, e: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """m (b n d), e (b f d), z (b n k), s (b n) or (1 1) → x̂ (b n k), chunk by chunk."""
        x = (m + self.see(z)).unflatten(1, (-1, self.tokens)) + self.place
        x = self.block(x.flatten(0, 1)).view_as(m)
        gates = 10 * self.gate(sinusoid(s / 20, self.freqs))  # ten times: they begin at zero
        return super().forward(m + gates[..., : m.shape[-1]] * x, e) + gates[..., m.shape[-1] :] * z

    def forward(self, m: Tensor, e: Tensor) -> Tensor:
        if self.asked:
            return self.guess(m, e, *self.asked)
        z = randn(self.rngs, m.shape[1], self.see.in_features, device=m.device)
        for j in range(self.inner, 0, -1):
            z = z.lerp(self.guess(m, e, z, torch.full((1, 1), j / self.inner, device=m.device)), 1 / j)
        return z


def dream(student, text, cfg, rngs, *how, **more) -> Tensor:
    """`rollout`; the inner noise has generators of its own: with any N the outer noise is the same."""
    student.head.rngs = [rng_for(g.initial_seed(), "inner") for g in rngs]
    return rollout(student, text, cfg, rngs, *how, **more)


def matching_loss(net: VideoDiT, x: Tensor, text: Tensor, levels: Tensor, rng, cfg: Config) -> Tensor:
    """Stage 1 on clips x (b f c h w): every chunk, at one of the levels, given the clean ones before it."""
    noise, z1 = torch.randn(2, *x.shape, generator=rng)
    s, t = torch.rand(2, len(x), cfg.chunks, generator=rng).repeat_interleave(cfg.chunk, 2)  # (b f)
    s, t = (1 + (net.head.inner * s).long()) / net.head.inner, levels[(len(levels) * t).long()]
    xt, t = torch.cat([x, add_noise(x, noise, t)], 1), torch.cat([0 * t, t], 1)
    z, s = torch.cat([x, add_noise(x, z1, s)], 1), torch.cat([s, s], 1)[:, :: cfg.patch_time]
    (r, p, q), (h, w) = net.size, cfg.grid
    z = rearrange(z, "b (f r) c (h p) (w q) -> b (f h w) (r p q c)", r=r, p=p, q=q)  # as the head orders x
    net.head.asked = z, s.repeat_interleave(h * w, 1)
    v, _ = net(xt, t, text, None, *teacher_forcing(cfg.frames, cfg.chunk))
    net.head.asked = ()
    return F.mse_loss(to_x0(v, xt, t)[:, cfg.frames :], x)


def student(m: int, n: int, seed: int, flags) -> Run:
    """A run whose `ema` is the student of an arm. What an earlier call has trained is loaded."""
    how = dict(method="windowed", denoise=ARMS[m, n], horizon=1, batch=8, lr=3e-4, ema=0.9, seed=seed)
    cfg, levels = build("tiny", how | {"device": "cpu"}), torch.tensor([1.0, 0.9, 0.75])
    run = prepare(cfg, train.Flags(out=f"{flags.out}/tmd/{flags.warm}-{flags.steps}-{m}-{n}-{seed}"), 0, 1)
    net, path, head = run.student, run.out / "student.safetensors", run.student.head
    torch.manual_seed(seed)
    net.head = FlowHead(cfg, n)
    net.head.load_state_dict(head.state_dict(), strict=False)  # all but the flow
    run.dream, run.ema = dream, copy.deepcopy(net)
    run.student_opt = torch.optim.AdamW(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2))
    for step in range(0) if path.exists() else trange(-flags.warm, flags.steps, desc=run.out.name):
        if step < 0:
            drawn = run.source.batch([(seed, "stage 1", step + flags.warm, i) for i in range(4)])
            x, rng = run.codec.encode(drawn.video01), rng_for(seed, "stage 1", step + flags.warm)
            matching_loss(net, x, run.read(drawn.words), levels, rng, cfg).backward()
            train.update(net, run.student_opt, cfg)
        else:
            train.update_student(run, step)
        for i in range(2 * (step >= -5)):  # the critic begins a little earlier
            train.update_critic(run, "critic", step + 5, i)
    if not path.exists():
        save_weights(path, run.ema, cfg, "student")
    load_weights(path, run.ema, cfg, "student")
    return run


@dataclass(frozen=True)
class Flags:
    out: Path = Path("out/family")  # folder of the picture and, in tmd/, of the students, each trained once
    warm: int = 120  # updates of stage 1
    steps: int = 24  # updates of stage 2, 1 or more


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if what != "tiny" or typed or flags.steps < 1:
        raise BadInput(f"{what} {typed or flags} is not possible; allowed: tiny, --steps=1 or more")
    rows, table = [], torch.zeros(len(ARMS), SEEDS, 4)
    print("M  N  looks, motion, text, jitter (minus those of the first line)", flush=True)
    for row, (m, n) in zip(table, ARMS, strict=True):
        for seed in range(SEEDS):
            run = student(m, n, seed, flags)
            video01, prompts = imagine(run, run.ema, CLIPS, run.cfg.chunks)
            found = [*three_axes(each := measure(video01, prompts)).values(), each["jitter"]]
            row[seed] = torch.stack([x.nanmean() for x in found])
        rows += [(f"M = {m}, N = {n}: {prompts[i]}", video01[i]) for i in range(2)]
        cells = [f"{mean(x, 3)} ({mean(x - y, 3)})" for x, y in zip(row.T, table[0].T, strict=True)]
        print(m, n, *cells, sep="  ", flush=True)
    print(contact_sheet(flags.out / "tmd.png", rows, every=2))


if __name__ == "__main__":
    cli(main)
