"""Running the scripts on tiny random nets: the settings, the subprocesses, what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from config import cli

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(dim=32, heads=2, ffn=32, layers=1, batch=4, critic_steps=1, critic_warmup=1, eval_clips=2)
KEYS = [f"--{k}={v}" for k, v in SMALL.items()] + ["--device=cpu"]


def command(nets, out, *more, processes=1):
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*head, "train.py", f"--nets={nets}", f"--out={out}", *KEYS, *more]


def call(nets, out, *more, processes=1):
    words = command(nets, out, *more, processes=processes)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)


def state(folder, step):
    return torch.load(folder / f"step_{step:06d}.pt", weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_process(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *argv])
    cli(module.main)
