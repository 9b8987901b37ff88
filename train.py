"""Stream-R1: distil a bidirectional video teacher into a few-step streaming student, on its own rollouts.

    torchrun train.py                                          # tiny preset: minutes on two CPU cores
    torchrun --nproc_per_node=8 train.py small                 # the same code on GPUs
    python train.py tiny --method=self_forcing --steps=100     # another member of the family, no launcher
    torchrun train.py --resume                                 # go on, bit for bit, after a stop or a crash

A step is one student update followed by `critic_steps` critic updates. Every random draw is a function of
(seed, purpose, step, sample), so a resumed run equals an uninterrupted one and two processes equal one.

simplified: gradients are averaged by one all-reduce, without overlap; with --accumulate, the balance sees
one micro-batch after another.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from config import BadInput, Config, build, cli, read_cli
from dmd import critic_loss, dmd_gradient, dmd_loss, sample_t
from engine import checkpoint, processes
from engine.rng import randn, rng_for
from reward import AXES, effective_share, rollout_weight
from rollout import exit_step, rollout_chunks
from run import Run, finish, held_out, log, prepare, save, select, sheet, stop_if_broken
from saliency import intra_weight, reward_saliency, to_latent_grid


@dataclass(frozen=True)
class Flags:
    out: str = "out/train"  # the folder of the run
    nets: str = ""  # folder with codec, teacher, causal and reward weights; default assets/<preset>
    start: str = ""  # the student's first weights; default <nets>/causal.safetensors
    wan: str = ""  # Wan2.1 in diffusers' format, in place of nets; then --data names a file of prompts
    teacher: str = ""  # with --wan: another, larger teacher; published: 14B, without it 1.3B
    videoalign: str = ""  # with --wan: a folder with the reward, see wan/videoalign.py
    resume: bool = False  # go on with the run in --out
    track: str = "none"  # none | tensorboard | wandb: shows metrics.jsonl and the contact sheets as well


def main() -> None:
    cfg, flags = settings()
    openmp.use_threads(cfg.threads)
    restarts, kept = (os.environ.get(f"TORCHELASTIC_{k}", "0") for k in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if restarts != "0" and kept == "True":  # a restarted process would wait for the addresses of the dead
        what = "first TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, then --standalone or --rdzv-backend=c10d"
        raise BadInput(f"torchrun --max-restarts would wait for ever after a failure; allowed: {what}")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun --max-restarts, after a failure
        flags = replace(flags, resume=bool(checkpoint.states(Path(flags.out))))
    elif flags.resume:
        checkpoint.can_resume(flags.out)
    if cfg.attention != "auto":
        raise BadInput(f"attention={cfg.attention} is sample.py's; allowed here: auto")
    rank, world, device = processes.start(cfg)
    with checkpoint.locked(flags.out, mine=rank == 0):
        learn(prepare(replace(cfg, device=device), flags, rank, world))


def settings() -> tuple[Config, Flags]:
    """What is typed. With --resume what is not typed is as in the run's config.json. Raises BadInput."""
    preset, typed, flags = read_cli(None, Flags, __doc__)
    path, plain = Path(flags.out) / "config.json", vars(Flags())
    if flags.resume and path.exists():
        preset, typed, _ = read_cli([f"--config={path}", *sys.argv[1:]], Flags, __doc__)
        then = json.loads(path.read_text())
        typed = {"threads": then.get("threads", 0)} | typed
        same = {k: x for k, x in then.get("flags", {}).items() if k in plain and vars(flags)[k] == plain[k]}
        flags = replace(flags, **same)
    return build(preset, typed), flags


def learn(run: Run) -> None:
    """All steps that are left."""
    stop, cfg = checkpoint.stop_on_signal(), run.cfg
    if run.step == 0:
        sheet(run, "before", run.student)
        if run.rank == 0 or cfg.shard:
            _, run.start = held_out(run)
        for i in range(cfg.critic_warmup):
            update_critic(run, "warm-up", i)
            if processes.any_of(bool(stop), cfg.device):
                return finish(run, stop)
    ahead = range(run.step, cfg.steps)
    bar = tqdm(ahead, initial=run.step, total=cfg.steps, desc=cfg.method, disable=run.rank > 0)
    for step in bar:
        start = time.perf_counter()
        stats = update_student(run, step)
        for i in range(cfg.critic_steps):
            behind = update_critic(run, "critic", step, i)
            stats |= {"critic": behind["critic"], "critic_grad_norm": behind["grad_norm"]}
            stats["dropped"] += behind["dropped"]
        run.step = step + 1
        stop_if_broken(run, stats)
        stats["seconds"] = time.perf_counter() - start
        stopping = processes.any_of(bool(stop), cfg.device)
        if run.step % cfg.eval_every == 0 or run.step == cfg.steps:
            stats |= select(run)
        log(run, stats, bar)
        if run.step % cfg.save_every == 0 or run.step == cfg.steps or stopping:
            save(run)
        if stopping:
            break
    finish(run, stop)


def update_student(run: Run, step: int) -> dict[str, float]:
    """Move the student along the weighted DMD gradient on one batch of its own rollouts."""
    cfg, logged, weights = run.cfg, [], []
    for micro in range(cfg.accumulate):
        rngs, text, about = draw(run, "student", step, micro=micro)
        # 1. the student dreams a video the way it will at inference
        chunks, exit = rollout_chunks(cfg, "student", step), exit_step(cfg, "student", step)
        with processes.autocast(cfg):
            x = run.dream(run.student, text, cfg, rngs, chunks, exit, grad=True)
        if not processes.may(x.isfinite().all(), cfg):
            x, rngs = without_broken(run, x, text, chunks, exit, ("student", step), micro)
        # 2. how far to trust the teacher on this rollout, and where
        w, inter, stats = weigh(run, x.detach(), about)
        # 3. what would make it more like the teacher's videos
        t, noise = sample_t(rngs, cfg, cfg.device), randn(rngs, *x.shape[1:], device=cfg.device)
        with processes.autocast(cfg):
            g, finite = dmd_gradient(x, text, run.null, run.teacher, run.critic, t, noise, cfg.guidance,
                                     cfg.motion)  # fmt: skip
            stats["dmd"] = g.abs().mean()
        w = w.expand(len(x), -1, -1, -1, -1)
        finite = finite & w.isfinite().flatten(1).all(1)  # a reward may fail where the clip is fine
        if processes.may(finite.any(), cfg):
            loss = dmd_loss(x[finite], g[finite], w[finite]) * finite.float().mean()
            (loss / cfg.accumulate).backward()
        stats |= {"exit": exit, "frames": chunks * cfg.chunk}
        stats["dropped"] = (~finite).sum() * run.world * cfg.accumulate
        logged.append({k: float(v) for k, v in stats.items()})
        weights.append(inter)
    stats = processes.mean({k: sum(s[k] for s in logged) / len(logged) for k in logged[0]}, cfg.device)
    if run.reward is not None:
        w = torch.cat(weights)
        stats["ess"] = effective_share(w[w.isfinite()])
        stats["w_intra_max"] = max(s["w_intra_max"] for s in logged)
    stats["grad_norm"] = update(run.student, run.student_opt, cfg)
    average(run, step)
    return stats


@torch.no_grad()
def average(run: Run, step: int) -> None:
    """Move the running average towards the student; after its first step it is the student."""
    for mean, new in zip(run.ema.parameters(), run.weights(run.student), strict=True):
        mean.lerp_(new, 1 - run.cfg.ema if step else 1.0)


def without_broken(run: Run, x: Tensor, text: Tensor, chunks: int, exit: int, key: tuple, micro: int):
    """Roll the finite samples of x (b f c h w) out again by themselves → x, generators.

    A NaN inside the graph would reach every weight, even multiplied by zero.
    """
    sane = x.isfinite().flatten(1).all(1)
    rngs, _, _ = draw(run, *key, micro=micro)
    x = torch.full_like(x, torch.nan)
    if processes.may(sane.any(), run.cfg):
        kept = [g for g, ok in zip(rngs, sane.tolist(), strict=True) if ok]
        with processes.autocast(run.cfg):
            x[sane] = run.dream(run.student, text[sane], run.cfg, kept, chunks, exit, grad=True)
    return x, rngs


def weigh(run: Run, x: Tensor, about) -> tuple[Tensor, Tensor, dict]:
    """w_inter · w_intra for rollouts x (b f c h w) → weights (b 1|f 1 1|h 1|w), w_inter of all processes'
    rollouts, and what to log. Where the reward is not finite, neither is the weight."""
    cfg = run.cfg
    if run.reward is None:
        return torch.ones(1, 1, 1, 1, 1, device=x.device), torch.ones(0), {}
    axes = [AXES.index(a) for a in cfg.axes]
    with torch.no_grad(), processes.autocast(cfg):
        video01 = run.codec.decode(x.nan_to_num()).float()  # a broken rollout is judged, then dropped
    if cfg.space or cfg.time:
        seen = run.reward.sampled(video01.shape[1])
        scores, saliency = reward_saliency(run.reward, video01, about, seen)
        saliency = to_latent_grid(saliency[:, axes], *cfg.latent_shape[1:], cfg.time_stride)
        intra = intra_weight(saliency, scores[:, axes], cfg)
    else:
        with torch.no_grad():
            scores, intra = run.reward(video01, about), torch.ones(1, 1, 1, 1, 1, device=x.device)
    everyone = processes.gather(scores)
    r = run.balancer(everyone[:, axes])
    inter = rollout_weight(r, cfg)
    mine = inter[run.rank * len(x) : (run.rank + 1) * len(x)]
    judged = everyone[everyone.isfinite().all(1)]
    stats = {name: judged[:, i].mean() for i, name in enumerate(AXES)}
    stats |= {"penalty": (everyone[:, axes].mean(1) - r).nanmean(), "w_inter": inter[inter.isfinite()].mean()}
    stats["w_intra_max"] = processes.gather(intra.amax((1, 2, 3, 4)).nan_to_num()).max()
    return rearrange(mine, "b -> b 1 1 1 1") * intra, inter, stats


def update_critic(run: Run, *key: int | str) -> dict[str, float]:
    """Let the critic catch up: flow matching on fresh rollouts of the student as it now is."""
    cfg, total, dropped = run.cfg, 0.0, 0.0
    for micro in range(cfg.accumulate):
        rngs, text, _ = draw(run, *key, micro=micro)
        with processes.autocast(cfg):
            with torch.no_grad():
                x = run.dream(run.student, text, cfg, rngs, rollout_chunks(cfg, *key), exit_step(cfg, *key))
            t, noise = sample_t(rngs, cfg, cfg.device), randn(rngs, *x.shape[1:], device=cfg.device)
        finite = x.isfinite().flatten(1).all(1)
        dropped += (~finite).sum() * run.world
        if processes.may(finite.any(), cfg):
            with processes.autocast(cfg):
                losses = critic_loss(run.critic, x[finite], text[finite], t[finite], noise[finite])
            loss = losses.sum() / len(x) / cfg.accumulate
            loss.backward()
            total += loss.detach()
    stats = processes.mean({"critic": total, "dropped": dropped}, cfg.device)
    return stats | {"grad_norm": update(run.critic, run.critic_opt, cfg)}


def update(net: nn.Module, opt: torch.optim.Optimizer, cfg: Config) -> float:
    """Average gradients over processes, clip, step → gradient norm; no step along one that is zero, as it is
    when no sample was finite, or not finite."""
    for p in (params := [p for p in net.parameters() if p.requires_grad]):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    processes.average_gradients(params)
    norm = processes.clip_gradients(net, cfg.clip)
    if norm.isfinite() and norm > 0:
        opt.step()
    opt.zero_grad()
    return float(norm)


def draw(run: Run, *key: int | str, micro: int) -> tuple[list[torch.Generator], Tensor, Tensor | list[str]]:
    """This process' generators and captions (b l e) of a micro-batch, and what the reward reads of them; a
    group of rollouts shares a caption."""
    cfg = run.cfg
    per = cfg.batch // (run.world * cfg.accumulate)  # this process' share of the global batch
    ids = range((micro * run.world + run.rank) * per, (micro * run.world + run.rank + 1) * per)
    words = run.source.captions([(cfg.seed, *key, i // cfg.group) for i in ids])
    text = run.read(words).to(cfg.device)
    prompts = run.reward is not None and run.reward.reads == "prompts"
    return [rng_for(cfg.seed, *key, i) for i in ids], text, [" ".join(w) for w in words] if prompts else text


if __name__ == "__main__":
    cli(main)
