"""A training run: what it holds, how it starts, is looked at, saved and ended. Its steps are in train.py."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import ROOT, BadInput, Config
from data import ClipFolder, source_of
from engine import checkpoint, processes
from engine.rng import rng_for
from engine.sheet import contact_sheet
from networks import Networks, load_net, own_networks
from reward import AXES, Balancer
from rollout import rollout
from world.measure import ACCURACIES, measure
from world.scene import World
from world.words import caption

# may change between a run and its continuation
FREE = ("steps", "save_every", "eval_every", "eval_clips", "max_bad", "device", "threads", "attention")


# -- what it shows of itself ----------------------------------------
def read_metrics(folder: Path) -> list[dict]:
    """What a run has logged, a dict a step; of a last line that a kill has cut short nothing."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def as_json(row: dict[str, float]) -> str:
    """A line of metrics.jsonl. JSON knows no NaN and no Infinity: they become null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"


class Track:
    """Numbers and contact sheets of a run, from the first process. step: where it begins; what an interrupted
    run noted after that is left out. Raises BadInput without the package."""

    def __init__(self, tool: str, folder: Path, settings: dict, step: int):
        self.path, self.tool = folder / "metrics.jsonl", tool
        if tool not in ("none", "tensorboard", "wandb"):
            raise BadInput(f"track={tool} is not possible; allowed: none | tensorboard | wandb")
        try:
            if tool == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter  # optional, as wandb is: the extra `track`

                self.to = SummaryWriter(str(folder / tool), purge_step=step + 1 if step else None)
            elif tool == "wandb":
                import wandb

                how = {"name": folder.name, "dir": str(folder), "config": settings}
                self.to, self.picture = wandb.init(project="stream-r1", **how), wandb.Image
        except ImportError as error:
            raise BadInput(f"--track={tool} needs what is not installed: pip install {tool}") from error
        kept = "".join(as_json(row) for row in read_metrics(folder) if row["step"] <= step)
        checkpoint.write_atomically(self.path, lambda name: name.write_text(kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(as_json({"step": step} | values))
        if self.tool == "tensorboard":
            for name, value in values.items():
                self.to.add_scalar(name, value, step)
            self.to.flush()
        elif self.tool == "wandb":
            self.to.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        if self.tool == "tensorboard":
            self.to.add_image(name, np.array(Image.open(path)), step, dataformats="HWC")
        elif self.tool == "wandb":
            self.to.log({name: self.picture(str(path))}, step=step)

    def close(self) -> None:
        if self.tool != "none":
            self.to.close() if self.tool == "tensorboard" else self.to.finish()


@dataclass(kw_only=True)
class Run(Networks):
    """What a training run holds. Only student, critic, their optimizers, the average, balancer, step and best
    score change."""

    cfg: Config
    out: Path
    rank: int
    world: int
    source: World | ClipFolder  # or wan.networks.PromptFile
    dream: Callable = rollout  # what makes the student's videos, called as rollout is
    student_opt: torch.optim.Optimizer
    critic_opt: torch.optim.Optimizer
    balancer: Balancer
    track: Track | None  # of the first process
    step: int = 0
    best: float = -math.inf  # held-out score of the student that is kept
    start: float = math.nan  # of the first student
    bad: int = 0


# -- starting, saving, ending ----------------------------------------
def prepare(cfg: Config, flags, rank: int, world: int) -> Run:
    """Load the networks, or the run that is to be resumed. flags: train.py's. Raises BadInput."""
    out = checkpoint.writable_folder(flags.out)
    state = checkpoint.load_state(out, cfg, FREE, flags.resume)
    if bool(flags.wan) != (cfg.time_stride > 1) or flags.wan and not cfg.data:
        raise BadInput("the preset wan-1.3b, --wan=FOLDER and --data=FILE (prompts, one a line) go together")
    if flags.wan and flags.nets or not flags.wan and (flags.teacher or flags.videoalign or cfg.lora):
        raise BadInput("--teacher, --videoalign and --lora go with --wan, --nets with the other presets")
    if state and state["step"] > cfg.steps:
        raise BadInput(f"--resume: {out} is at step {state['step']}, beyond --steps={cfg.steps}")
    if flags.wan:
        from wan.networks import PromptFile, wan_networks  # diffusers and transformers take seconds

        source = PromptFile(cfg.data)
        nets = wan_networks(cfg, source.prompts, flags)
    else:
        source = source_of(cfg)
        nets = own_networks(cfg, Path(flags.nets or ROOT / "assets" / cfg.preset), flags.start)
    if isinstance(source, ClipFolder):
        nets.origin["clips"] = source.fingerprint
    if state and state.get("origin") != nets.origin:
        what = f"--resume: {out} began from others of what --nets, --start, --wan or --data name"
        raise BadInput(f"{what}: {state.get('origin')}, not {nets.origin}")
    spread = cfg.shard and world > 1
    if spread:
        from wan.shards import shard  # takes a second to load
    for net in (nets.teacher, nets.student, nets.ema, nets.critic):
        shard(net, cfg) if spread else net.to(cfg.device)
    adam = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=0.01)
    student_opt = torch.optim.AdamW(nets.student.parameters(), lr=cfg.lr, **adam)
    critic_opt = torch.optim.AdamW(nets.critic.parameters(), lr=cfg.critic_lr, **adam)
    # not earlier: what is refused leaves metrics.jsonl as it is
    track = None if rank else Track(flags.track, out, asdict(cfg), state["step"] if state else 0)
    run = Run(**vars(nets), cfg=cfg, out=out, rank=rank, world=world, source=source, track=track,
              student_opt=student_opt, critic_opt=critic_opt, balancer=Balancer(cfg))  # fmt: skip
    if state:
        restore(run, state)
    if rank == 0:
        facts = {"torch": torch.__version__, "world": world, "origin": run.origin}
        facts["flags"] = {k: v for k, v in vars(flags).items() if k not in ("out", "resume")}
        text = json.dumps(asdict(cfg) | facts, indent=1)
        checkpoint.write_atomically(out / "config.json", lambda name: name.write_text(text))
    return run


NETS, STATE = ("student", "critic", "ema"), ("student_opt", "critic_opt", "balancer")


def save(run: Run) -> None:
    facts = {"config": asdict(run.cfg), "best": run.best, "start": run.start, "origin": run.origin}
    if run.cfg.shard:
        from wan.shards import save_shards

        save_shards(run, NETS, facts)
    elif run.rank == 0:
        state = {name: getattr(run, name).state_dict() for name in (*NETS, *STATE)}
        checkpoint.save_state(run.out, run.step, state | facts)


def restore(run: Run, state: dict) -> None:
    if "shards" in state:
        from wan.shards import load_shards

        load_shards(run, NETS, state)
    else:
        with checkpoint.readable(run.out):
            for name in (*NETS, *STATE):
                getattr(run, name).load_state_dict(state[name])
    run.step, run.best, run.start = state["step"], state["best"], state.get("start", math.nan)


def finish(run: Run, signals: list[int]) -> None:
    """signals: that have stopped this process; a stopped run ends with 128 + the first one."""
    stopped, student = run.step < run.cfg.steps, run.out / "student.safetensors"
    if not stopped and processes.any_of(not student.exists(), run.cfg.device):
        run.best = -math.inf  # the best one is lost; the state holds the last one's average
        select(run)
    if run.rank == 0 and stopped:
        after = "; the traceback below is torchrun's" * torch.distributed.is_torchelastic_launched()
        there = "--resume goes on from there" if run.step else "nothing is saved before the first"
        print(f"stopped after step {run.step}; {there}{after}", flush=True)
    elif run.rank == 0:
        sheet(run, "after", load_net(student, run.cfg, "student"))
        gain, score = run.best - run.start, f" (held-out score {run.best:.3f}" * (not run.cfg.data)
        if score:
            than = f", {abs(gain):.3f} {'worse' if gain < 0 else 'better'} than its start"
            score += than * math.isfinite(gain) + ")"
        print(f"student {student}{score}; {run.out}/before.png and after.png show the change")
        if run.folder:
            print(f'next: python sample.py {run.cfg.preset} --student={student} --prompt "{run.cfg.example}"')
    if run.track:
        run.track.close()
    processes.stop()
    if stopped:
        sys.exit(128 + next(iter(signals), signal.SIGTERM))


def stop_if_broken(run: Run, stats: dict[str, float]) -> None:
    """Single non-finite samples are dropped and counted; max_bad steps in a row with some end the run. At
    once do weights that are not finite: they are neither shown nor saved."""
    finite = math.isfinite(stats["grad_norm"] + stats["critic_grad_norm"])
    run.bad = run.bad + 1 if stats["dropped"] or not finite else 0
    nets = {name: list(getattr(run, name).parameters()) for name in NETS}
    nets = {name: [p.to_local() if processes.is_share(p) else p for p in own] for name, own in nets.items()}
    broken = [k for k, own in nets.items() if not torch.stack(torch._foreach_norm(own)).isfinite().all()]
    what = f"{run.bad} steps in a row had non-finite samples" * (run.bad >= run.cfg.max_bad)
    if processes.any_of(bool(broken), run.cfg.device):
        what = f"weights ({' '.join(broken) or 'of another process'}) are not finite"
    if what:
        sys.exit(f"{what}, stopped in step {run.step}; the last checkpoint in {run.out} is intact")


# -- looking at it ----------------------------------------
def imagine(run: Run, net: nn.Module, clips: int, chunks: int) -> tuple[Tensor, list[str]]:
    """Rollouts for prompts of the `select` split, always the same prompts and noise → video01, prompts."""
    cfg = run.cfg
    source = run.source if cfg.data else World(cfg, "select")
    words = source.captions([(i,) for i in range(clips)])
    text = run.read(words).to(cfg.device)
    with torch.no_grad(), processes.autocast(cfg):
        x = run.dream(net, text, cfg, [rng_for("select", i) for i in range(clips)], chunks)
        video01 = torch.cat([run.codec.decode(part) for part in x.split(16)])
    return video01.float().cpu(), [" ".join(w) if cfg.data else caption(w) for w in words]


def held_out(run: Run) -> tuple[dict[str, float], float]:
    """Measures of the averaged student on held-out prompts after a rollout of full horizon, and a score of
    them. Of real clips nobody knows the truth: no measures and, as for what cannot be measured, -inf."""
    if run.cfg.data:
        return {}, -math.inf
    found = measure(*imagine(run, run.ema, run.cfg.eval_clips, run.cfg.chunks * run.cfg.horizon))
    stats = {f"held_out_{k}": float(found[k].nanmean()) for k in (*ACCURACIES, "jitter", "sharpness")}
    score = sum(stats[f"held_out_{k}"] for k in ACCURACIES) / len(ACCURACIES)
    score -= stats["held_out_jitter"] / 20  # students that are trained for too long begin to tremble
    if run.cfg.shard:  # all processes come to one decision
        score = processes.mean({"score": score}, run.cfg.device)["score"]
    return stats, -math.inf if math.isnan(score) else score


def select(run: Run) -> dict[str, float]:
    """Measure the averaged student; keep the best, of real clips the newest. Few-step students are easily
    over-trained."""
    if run.rank and not run.cfg.shard:
        return {}
    stats, score = held_out(run)
    if score >= run.best or run.cfg.data:
        run.best = score
        facts = {"step": run.step, "command": " ".join(sys.argv), **{k: f"{v:.3f}" for k, v in stats.items()},
                 "vocabulary": " ".join(run.source.vocabulary)}  # fmt: skip
        if run.folder:  # where sample.py finds the codec
            facts["nets"] = relative(Path(run.folder), run.out)
        checkpoint.save_weights(run.out / "student.safetensors", run.ema, run.cfg, "student", **facts)
    return stats


def relative(path: Path, start: Path) -> str:
    """The way from one folder to another, links followed; between two drives of Windows there is none."""
    path, start = path.resolve(), start.resolve()
    return os.path.relpath(path, start) if path.anchor == start.anchor else str(path)


def sheet(run: Run, name: str, net: nn.Module) -> None:
    if run.rank and not run.cfg.shard:
        return
    clips = min(6, run.cfg.batch // (run.world * run.cfg.accumulate))
    video01, prompts = imagine(run, net, clips, run.cfg.chunks)
    if run.rank == 0:
        how = dict(scale=1, every=video01.shape[1] // 8) if video01.shape[1] > 32 else {}
        path = contact_sheet(run.out / f"{name}.png", zip(prompts, video01, strict=True), **how)
        run.track.image(run.step, name, path)


def log(run: Run, stats: dict, bar) -> None:
    if run.rank:
        return
    stats = {k: round(float(v), 6) for k, v in stats.items()}
    run.track.scalars(run.step, stats)
    shown = ("dmd", "critic", *AXES, "ess", "held_out_direction")
    bar.set_postfix({k: f"{stats[k]:.2f}" for k in shown if k in stats}, refresh=False)
