"""How useful are the gradients of single rollouts, and beside which teacher?

A wrong teacher: on the worse half of each prompt's rollouts, odd chunks of its clean estimate lie one cell
too far to the right; worse by the learned reward (low), by what pixels show (pixels), or by lot (random).
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from config import Config
from dmd import dmd_gradient, dmd_loss, sample_t
from engine.rng import randn, rng_for
from model import VideoDiT, add_noise, guided_x0, to_x0
from networks import load_net, own_networks
from reward import Balancer, rollout_weight
from rollout import rollout
from run import Run
from saliency import intra_weight, reward_saliency, to_latent_grid
from train import update_critic
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption

# where the teacher errs; what weighs places; which of them with which β
FAULTS = dict(exact="nowhere", low="where the reward is low", pixels="where pixels are bad", random="by lot")
MAPS = ("no map", "min-max", "percentiles", "another clip's", "residual")
PAIRS = [(MAPS[0], b) for b in (0.0, 0.5, 2.0, 8.0, -2.0)] + [(m, 0.0) for m in MAPS[1:]] + [(MAPS[1], 2.0)]


def shifted(teacher: Callable, wrong: Tensor, chunk: int) -> Callable:
    """The teacher; for samples `wrong` (b,) bool odd chunks of its clean estimate lie one cell further."""

    def call(xt: Tensor, t: Tensor, text: Tensor):
        v, kv = teacher(xt, t, text)
        clean = to_x0(v.float(), xt, t)
        odd = (torch.arange(xt.shape[1]) // chunk) % 2 == 1
        bad = wrong.repeat(len(xt) // len(wrong))[:, None]  # guidance asks for two estimates at once
        error = (clean.roll(1, -1) - clean) * rearrange(bad & odd, "b f -> b f 1 1 1").to(xt.device)
        return v - error / rearrange(t, "b f -> b f 1 1 1"), kv

    return call


@torch.no_grad()
def worse(run: Run, fault: str, x: Tensor, text: Tensor, words: list, *key, group: int) -> Tensor:
    """The rollouts x (b f c h w) that the teacher is wrong on (b,) bool: half of every `group` neighbours."""
    video01 = run.codec.decode(x).float()
    if fault == "low":
        score = run.reward(video01, text).mean(1).cpu()
    elif fault == "pixels":
        score = torch.stack([*three_axes(measure(video01, [caption(w) for w in words])).values()]).mean(0)
    else:
        score = torch.rand(len(x), generator=rng_for(run.cfg.seed, "fault", *key))
    rank = score.view(-1, group).argsort(1).argsort(1).flatten()
    return (rank < group // 2) & (fault != "exact")


def begin(nets: Path, cfg: Config, student: VideoDiT) -> Run:
    """Networks and optimizers, the reward also for students without weights; the critic has caught up."""
    held = own_networks(replace(cfg, beta=1.0), nets, "")
    held.student, held.ema = student, copy.deepcopy(student)
    adam, alone = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=0.01), dict(out=Path(), rank=0, world=1)
    student_opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, **adam)
    critic_opt = torch.optim.AdamW(held.critic.parameters(), lr=cfg.critic_lr, **adam)
    run = Run(**vars(held), **alone, cfg=cfg, student_opt=student_opt, critic_opt=critic_opt,
              source=World(cfg), track=None, balancer=Balancer(cfg))  # fmt: skip
    for i in range(cfg.critic_warmup):
        update_critic(run, "warm-up", i)
    return run


def step_gradients(run: Run, p: int, rollouts: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of rollouts of one prompt: parameter gradients (2 maps rollouts n), teacher exact and wrong; rewards
    (rollouts,); {fault: where the teacher is wrong (rollouts,)}."""
    cfg, key = replace(run.cfg, space=True, time=True), (run.cfg.seed, "usefulness", p)
    words, exit = run.source.captions([key] * rollouts), p % len(cfg.denoise)
    text, rngs = run.read(words).to(cfg.device), [rng_for(*key, i) for i in range(rollouts)]
    with torch.no_grad():
        x = rollout(run.student, text, cfg, rngs, exit=exit)
        t, noise = sample_t(rngs, cfg, cfg.device), randn(rngs, *x.shape[1:], device=cfg.device)
        change = x - guided_x0(run.teacher, add_noise(x, noise, t), t, text, run.null, cfg.guidance)
    scores, pixels = reward_saliency(run.reward, run.codec.decode(x).float(), text)
    cells = to_latent_grid(pixels, *cfg.latent_shape[1:], cfg.time_stride)
    published, residual = intra_weight(cells, scores, cfg), change.abs().mean(2)[:, None]
    gentle = replace(cfg, saliency_range="percentile", floor_time=0.5, floor_space=0.5)
    maps = torch.ones_like(published), published, intra_weight(cells, scores, gentle), published.roll(1, 0)
    maps = torch.stack([*maps, intra_weight(residual, scores[:, :1], cfg)])  # as in MAPS
    teachers = run.teacher, shifted(run.teacher, torch.ones(rollouts, dtype=torch.bool), cfg.chunk)
    g = [dmd_gradient(x, text, run.null, net, run.critic, t, noise, cfg.guidance)[0] for net in teachers]
    params = list(run.student.parameters())
    found = torch.empty(2, len(MAPS), rollouts, sum(q.numel() for q in params), device=cfg.device)
    how = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    for i in range(rollouts):  # alone: a batch's backward pass would run over all of it each time
        own = rollout(run.student, text[:1], cfg, [rng_for(*key, i)], exit=exit, grad=True)
        for k, m in product(range(2), range(len(MAPS))):
            grads = torch.autograd.grad(dmd_loss(own, g[k][i : i + 1], maps[m, i : i + 1]), params, **how)
            found[k, m, i] = torch.cat([q.flatten() for q in grads])
    wrong = {f: worse(run, f, x, text, words, p, group=rollouts) for f in FAULTS}
    return found, scores.mean(1), wrong


def usefulness(nets: Path, cfg: Config, start: str, prompts: int = 8, rollouts: int = 8) -> list[dict]:
    """Signal to noise of a rollout's weighted gradient; cosine of its mean over all rollouts with that of the
    exact teacher without weights on the same rollouts.

    Signal is |E gradient|², without bias from pairs of prompts; noise is the rest of E |gradient|².
    """
    kind = "causal" if start == "causal" else "student"
    run = begin(nets, cfg, load_net(nets / f"{start}.safetensors", cfg, kind))
    settings, total, between, size = list(product(FAULTS, PAIRS)), 0.0, 0.0, 0.0
    for p in range(prompts):
        found, r, wrong = step_gradients(run, p, rollouts)
        means, sizes = [], []
        for fault, (name, beta) in settings:
            given = replace(cfg, beta=abs(beta), group=rollouts, batch=rollouts)
            w = rollout_weight(-r if beta < 0 else r, given)[:, None]
            own = w * found[wrong[fault].long(), MAPS.index(name), range(rollouts)]
            means.append(own.mean(0))
            sizes.append(own.square().sum(1).mean())
        means = torch.stack(means)
        total, size = total + means, size + torch.stack(sizes) / prompts
        between = between + means.square().sum(1)
    signal = (total.square().sum(1) - between) / (prompts * (prompts - 1))
    cosine = torch.cosine_similarity(total.double(), total[:1].double(), dim=1)
    found = {"cosine": cosine, "signal to noise": signal / (size - signal)}
    names = [{"setting": f"{start}, {f}", "weight": f"{name}, β = {b:g}"} for f, (name, b) in settings]
    return [a | {"measure": k, "value": float(x[i])} for i, a in enumerate(names) for k, x in found.items()]
