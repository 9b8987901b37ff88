"""Running the scripts on tiny random nets: the settings, the processes, what they leave."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

import train
from codec import Codec
from config import build, cli
from engine.checkpoint import save_weights
from model import VideoDiT
from reward import RewardModel

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(dim=32, heads=2, ffn=32, layers=1, batch=4, critic_steps=1, critic_warmup=1, eval_clips=2)
KEYS = [f"--{k}={v}" for k, v in SMALL.items()] + ["--device=cpu"]


def random_nets(folder) -> Path:
    """Random nets of one tiny config, saved as pretrain.py would."""
    cfg = build("tiny", SMALL)
    torch.manual_seed(0)
    for kind, net in (("codec", Codec(cfg)), ("reward", RewardModel(cfg)), ("teacher", VideoDiT(cfg))):
        for p in net.parameters():
            p.data += 0.02 * torch.randn_like(p)
        save_weights(folder / f"{kind}.safetensors", net, cfg, kind)
    save_weights(folder / "causal.safetensors", net, cfg, "causal")
    save_weights(folder / "stream_r1.safetensors", net, cfg, "student")
    return folder


def command(nets, out, *more) -> list[str]:
    """train.py's command line."""
    return ["train.py", f"--nets={nets}", f"--out={out}", *KEYS, *more]


def launch(words, processes=1, machines=1) -> list:
    """train.py in processes with the environment that torchrun gives them, on so many machines, but forked:
    to import torch takes a new one six seconds of CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{processes}"}
    meet["LOCAL_WORLD_SIZE"] = f"{processes // machines}"

    def main(rank):
        os.environ |= meet | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork
        sys.argv = words
        cli(train.main)

    fork = multiprocessing.get_context("fork").Process
    started = [fork(target=main, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def call(words, processes=1, machines=1) -> None:
    """The same, to its end."""
    started = launch(words, processes, machines)
    for process in started:
        process.join(170)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * processes


def state(folder, step):
    return torch.load(folder / f"step_{step:06d}.pt", weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_process(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *argv])
    cli(module.main)
