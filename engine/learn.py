"""The loop that trains one network: resumable bit for bit, with a running average, fed by other processes."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import BadInput, Config
from engine import checkpoint
from engine.graphs import compiled
from engine.processes import autocast

# may change between a run and its continuation
FREE = ("device", "threads", "attention", "save_every", "eval_every", "eval_clips", "max_bad")


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    expect: str
    ema: float = 0.998
    clips: str = ""  # what it learns from, if not the world


def learn(stage: Stage, net, opts: list, draw: Callable, loss_of: Callable, cfg: Config, flags, blocks=()):
    """Minimise loss_of(net, step, *draw(step)): warm-up, constant, linear decay over the last 40 %.

    draw: step → (anything, tensors ...), a function of the step alone, so that it does not matter which
    process draws and when. opts: optimizers; their first learning rates are the highest. flags: out,
    resume, workers, compile. blocks: a transformer's, for compile.
    """
    folder = checkpoint.writable_folder(f"{flags.out}/{stage.name}-state")
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(stage.ema), use_buffers=True)
    first = go_on(folder, stage, net, averaged, opts, cfg, flags)
    for block in blocks if flags.compile else []:
        block.forward = compiled(block.forward, cfg.device)
    stop = checkpoint.stop_on_signal()
    batches = ahead(draw, range(first, stage.steps), cfg, flags.workers)
    bar = tqdm(batches, initial=first, total=stage.steps, desc=stage.name, mininterval=2)
    smooth, bad, half, start = None, 0, (first + stage.steps) // 2, time.perf_counter()
    for step, (drawn, *given) in enumerate(bar, first):
        if step == half:
            start = time.perf_counter()
        warm, left = (step + 1) / 100, (stage.steps - step) / (0.4 * stage.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * min(1.0, warm, left)
        given = [x.to(cfg.device, non_blocking=cfg.device == "cuda") for x in given]
        with autocast(cfg):
            loss = loss_of(net, step, drawn, *given)
        loss.backward()
        finite = nn.utils.clip_grad_norm_(net.parameters(), 1.0).isfinite()
        bad = 0 if finite else bad + 1
        if bad >= cfg.max_bad:
            sys.exit(f"{bad} steps in a row were not finite, stopped in step {step}; {folder} is intact")
        if finite:
            for opt in opts:
                opt.step()
            averaged.update_parameters(net)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        net.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == stage.steps or stop:
            nets = {"net": net.state_dict(), "averaged": averaged.state_dict()}
            run = {"opts": [o.state_dict() for o in opts], "config": asdict(cfg), "stage": asdict(stage)}
            checkpoint.save_state(folder, step + 1, nets | run)
        if stop:
            print(f"stopped after step {step + 1}; --resume goes on from there")
            sys.exit(128 + stop[0])
    checkpoint.die_on_signal()
    speed = (stage.steps - half) / (time.perf_counter() - start)
    print(f"{stage.name}: {speed:.1f} steps a second in the later half", flush=True)
    return averaged.module.eval()


def ahead(draw: Callable, steps: range, cfg: Config, workers: int) -> DataLoader:
    """draw(step) of step after step, drawn ahead by that many processes; 0: by this one, when asked for."""
    return DataLoader(
        range(steps.stop), sampler=steps, batch_size=None, collate_fn=draw, num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # what cannot be pickled may draw
        worker_init_fn=lambda worker: os.setpgrp(),  # a signal to the group is for the one who saves
        pin_memory=cfg.device == "cuda", generator=torch.Generator(),  # the global one is for weights
    )  # fmt: skip


def go_on(folder: Path, stage: Stage, net, averaged, opts: list, cfg: Config, flags) -> int:
    """Load the newest state, if --resume asks for it → the step to go on with. Raises BadInput."""
    state = checkpoint.load_state(folder, cfg, FREE, flags.resume)
    if not state:
        return 0
    if (then := state["stage"] | {"expect": stage.expect}) != asdict(stage):
        raise BadInput(f"--resume: {folder} was made with {then}, this run has {asdict(stage)}")
    with checkpoint.readable(folder):
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
    return state["step"]
