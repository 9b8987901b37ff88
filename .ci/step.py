"""One plain distillation step at a preset's shapes, on random weights and latents alone: seconds and memory.

python .ci/step.py wan-1.3b [--key=value ...]
"""

import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from config import build, cli, read_cli
from engine import processes
from model import VideoDiT
from run import Run
from wan import memory
from wan.lora import adapt, merged
from wan.networks import lowered


def random_net(cfg) -> VideoDiT:
    """With a head that is not zero."""
    with torch.device(cfg.device):
        net = VideoDiT(cfg)
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    return net


def main() -> None:
    preset, typed, _ = read_cli(None, train.Flags, __doc__)
    one = {"method": "windowed", "batch": 1, "accumulate": 1, "shard": False}
    cfg = build(preset, one | typed)
    cfg = build(preset, one | typed | {"device": processes.pick_device(cfg)})
    torch.manual_seed(cfg.seed)
    teacher, student, critic = (random_net(cfg) for _ in range(3))
    ema = copy.deepcopy(student)
    if cfg.lora:
        student, critic = (adapt(lowered(net, cfg), cfg) for net in (student, critic))
    texts = torch.randn(1, cfg.text_length, cfg.text_width)
    source = SimpleNamespace(captions=lambda keys: [["random"] for _ in keys])
    adam = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=0.01)
    run = Run(
        origin={}, codec=None, teacher=lowered(teacher, cfg).requires_grad_(False), student=student,
        critic=critic, ema=ema, reward=None, balancer=None, track=None, weights=merged,
        read=lambda words: texts.expand(len(words), -1, -1),
        null=torch.zeros_like(texts).to(cfg.device), cfg=cfg, out=Path("."), rank=0, world=1, source=source,
        student_opt=torch.optim.AdamW(student.parameters(), lr=cfg.lr, **adam),
        critic_opt=torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, **adam),
    )  # fmt: skip
    for step in range(2):  # the first one makes the optimizers' state
        seconds = []
        for update, key in ((train.update_student, (step,)), (train.update_critic, ("critic", step))):
            start = time.perf_counter()
            stats = update(run, *key)  # ends with a number: waits for the device
            seconds.append(time.perf_counter() - start)
            assert stats["grad_norm"] > 0
        took = "student {:.2f} s, critic {:.2f} s".format(*seconds)
        print(f"step {step}: {took}", flush=True)
    peak = torch.cuda.max_memory_allocated() / memory.GB if cfg.device == "cuda" else float("nan")
    print(f"{took}, peak {peak:.1f} GB", flush=True)  # the estimate takes a minute or two
    print(f"{took}, peak {peak:.1f} GB, estimate {memory.estimate(cfg, cfg, 1)['total']:.1f} GB")


cli(main)
