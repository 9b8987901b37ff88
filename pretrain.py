"""What distillation starts from, made from nothing: codec, bidirectional teacher, causal start, reward model.

    python pretrain.py                          # all four stages, tiny preset
    python pretrain.py tiny --stage=teacher     # one stage
    python pretrain.py tiny --data=clips        # a folder of clips with metadata.jsonl instead of the procedural world

Every stage prints what to expect, saves as it goes (--resume), and leaves a contact sheet.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from checkpoint import load_state, load_weights, save_state, save_weights, writable_folder
from codec import Codec
from config import BadInput, Config, from_cli, run
from data import World, randn, rng_for, tokenize
from model import VideoDiT, add_noise, shift_time
from plot import contact_sheet


@dataclass(frozen=True)
class Flags:
    stage: str = "all"  # codec | teacher | causal | reward | all
    out: str = "out/pretrain"
    data: str = ""
    resume: bool = False
    steps: int = 0  # 0: the stage's own
    batch: int = 0
    lr: float = 0.0


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    expect: str
    ema: float = 0.998


STAGES = {
    "codec": Stage("codec", 4000, 96, 2e-3, "PSNR above 30 dB"),
    "teacher": Stage("teacher", 14000, 32, 1.5e-3, "loss falls below 0.2"),
    "causal": Stage("causal", 2500, 32, 5e-4, "loss near the teacher's"),
}


def learn(stage: Stage, net: nn.Module, loss_of: Callable[[nn.Module, int], Tensor], cfg: Config, flags: Flags):
    """Minimise loss_of(net, step) with AdamW: warm-up, constant, linear decay over the last 40 % → averaged weights."""
    folder = writable_folder(f"{flags.out}/{stage.name}-state")
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(stage.ema), use_buffers=True)
    opt = torch.optim.AdamW(net.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    state = load_state(folder, cfg) if flags.resume else None
    if state:
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        opt.load_state_dict(state["opt"])
    stop = _stop_on_signal()
    first = state["step"] if state else 0
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, mininterval=2)
    smooth = None
    for step in bar:
        warm, left = (step + 1) / 100, (stage.steps - step) / (0.4 * stage.steps)
        opt.param_groups[0]["lr"] = stage.lr * min(1.0, warm, left)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            loss = loss_of(net, step)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        averaged.update_parameters(net)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps or stop:
            state = {"net": net.state_dict(), "averaged": averaged.state_dict(), "opt": opt.state_dict()}
            save_state(folder, step + 1, state | {"config": asdict(cfg)})
        if stop:
            print(f"stopped after step {step + 1}; --resume goes on from there")
            sys.exit(0)
    return averaged.module.eval()


def _stop_on_signal() -> list:
    """A list that is empty until SIGTERM or SIGINT arrives."""
    stop: list = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    return stop


def keys(cfg: Config, stage: Stage, step: int) -> list[tuple]:
    return [(cfg.seed, stage.name, step, i) for i in range(stage.batch)]


def train_codec(cfg: Config, stage: Stage, source, flags: Flags) -> nn.Module:
    """Single frames, each from a clip of its own moment."""
    torch.manual_seed(cfg.seed)
    net = Codec(cfg)

    def loss_of(net, step):
        video = source.batch(keys(cfg, stage, step), torch.zeros(1, dtype=torch.long)).video01
        noise = torch.randn(len(video), 1, *cfg.latent_shape, generator=rng_for(cfg.seed, "codec noise", step))
        return net.train().loss(video.to(cfg.device), noise.to(cfg.device))

    return learn(stage, net.to(cfg.device), loss_of, cfg, flags)


def noisy_batch(cfg: Config, stage: Stage, step: int, source, codec, times=None):
    """Latents (b f c h w) of fresh clips, noise of that shape, and text (b l e) that is dropped from one clip in ten."""
    batch = source.batch(keys(cfg, stage, step), times)
    with torch.no_grad():
        x = codec.encode(batch.video01.to(cfg.device)).float()
    rngs = [rng_for(*key, "noise") for key in keys(cfg, stage, step)]
    noise = randn(rngs, *x.shape[1:], device=cfg.device)
    keep = torch.stack([torch.rand((), generator=g) > 0.1 for g in rngs])
    text = tokenize(batch.words, cfg.text_length, cfg.text_width) * keep[:, None, None]
    return x, noise, text.to(cfg.device), rngs


def train_teacher(cfg: Config, stage: Stage, source, flags: Flags) -> nn.Module:
    """Flow matching: E |v(x_t, t, text) - (ε - x)|², one time per clip, warped towards noise."""
    codec = load_weights(Path(flags.out) / "codec.safetensors", Codec(cfg), cfg, "codec").to(cfg.device)
    torch.manual_seed(cfg.seed)

    def loss_of(net, step):
        x, noise, text, rngs = noisy_batch(cfg, stage, step, source, codec)
        u = torch.stack([torch.rand((), generator=g) for g in rngs]).to(cfg.device)
        t = repeat(shift_time(u, cfg.shift), "b -> b f", f=cfg.frames)
        v, _ = net(add_noise(x, noise, t), t, text)
        return F.mse_loss(v, noise - x)

    return learn(stage, VideoDiT(cfg).to(cfg.device), loss_of, cfg, flags)


TRAINERS = {"codec": train_codec, "teacher": train_teacher}


def main() -> None:
    cfg, flags = from_cli(flags=Flags, doc=__doc__)
    cfg = replace(cfg, device=cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if flags.stage != "all" and flags.stage not in STAGES:
        raise BadInput(f"stage={flags.stage} is not possible; allowed: all | {' | '.join(STAGES)}")
    out = writable_folder(flags.out)
    source = World(cfg, drop_words=0.1)
    for name in STAGES if flags.stage == "all" else (flags.stage,):
        own = {k: getattr(flags, k) for k in ("steps", "batch", "lr") if getattr(flags, k)}
        stage = replace(STAGES[name], **own)
        print(f"{name}: {stage.steps} steps of {stage.batch} clips; expect {stage.expect}", flush=True)
        start = time.perf_counter()
        net = TRAINERS[name](cfg, stage, source, flags)
        minutes = (time.perf_counter() - start) / 60
        save_weights(out / f"{name}.safetensors", net, cfg, name, steps=stage.steps, minutes=f"{minutes:.1f}",
                     command=" ".join(sys.argv))  # fmt: skip
        print(f"{name}: {minutes:.1f} min → {out / name}.safetensors", flush=True)


if __name__ == "__main__":
    run(main)
