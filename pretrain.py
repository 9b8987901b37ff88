"""What distillation starts from, made from nothing: codec, teacher, causal start, reward model.

    python pretrain.py                          # the four stages train.py needs, tiny preset
    python pretrain.py tiny --stage=teacher     # one stage
    python pretrain.py tiny --data=clips        # a folder of captioned clips, not the procedural world

Every stage prints what to expect, saves as it goes (--resume), and leaves a contact sheet.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from codec import Codec
from config import BadInput, Config, cli, from_cli
from data import PromptFile, source_of
from engine import checkpoint
from engine.processes import pick_device
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import VideoDiT, add_noise, shift_time, teacher_forcing, to_x0
from networks import load_net
from reward import AXES, RewardModel, bradley_terry
from rollout import rollout, sample_teacher
from world.corrupt import pairs, worse_looks, worse_motion
from world.words import tokenize

# may change between a run and its continuation
FREE = ("device", "threads", "save_every", "eval_every", "eval_clips", "max_bad")


@dataclass(frozen=True)
class Flags:
    stage: str = "all"  # codec | teacher | causal | consistency (optional) | reward | all
    out: str = "out/pretrain"  # the folder for weights and contact sheets
    start: str = ""  # an earlier codec or teacher to go on from, the learning rate rising and falling anew
    rivals: str = ""  # students whose clips the reward model learns to put below real ones, comma-separated
    resume: bool = False  # go on with a stage that was stopped
    steps: int = 0  # updates; 0: the stage's own
    batch: int = 0  # clips an update; 0: the stage's own
    lr: float = 0.0  # Muon's, AdamW's is half of it; 0: the stage's own


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    expect: str
    ema: float = 0.998


STAGES = {
    "codec": Stage("codec", 4000, 32, 4e-3, "PSNR above 30 dB"),
    "teacher": Stage("teacher", 7000, 32, 4e-3, "loss near 0.18"),
    "causal": Stage("causal", 800, 16, 1e-3, "loss near 0.33"),
    "consistency": Stage("consistency", 600, 16, 5e-4, "a loss below 0.1"),
    "reward": Stage("reward", 1600, 16, 2e-3, "held-out pair accuracy VQ > .95, MQ > .9, TA > .9", ema=0.99),
}


def learn(stage: Stage, net: nn.Module, loss_of: Callable, cfg: Config, flags: Flags):
    """Minimise loss_of(net, averaged, step): warm-up, constant, linear decay over the last 40 %."""
    folder = checkpoint.writable_folder(f"{flags.out}/{stage.name}-state")
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(stage.ema), use_buffers=True)
    opts = optimizers(net, stage.lr)
    state = checkpoint.load_state(folder, cfg, FREE, flags.resume)
    if state:
        then, now = (stage_ | {"expect": ""} for stage_ in (state["stage"], asdict(stage)))
        if then != now:
            raise BadInput(f"--resume: {folder} was made with {then}, this run has {now}")
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
    stop = checkpoint.stop_on_signal()
    first = state["step"] if state else 0
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, mininterval=2)
    smooth, bad = None, 0
    for step in bar:
        warm, left = (step + 1) / 100, (stage.steps - step) / (0.4 * stage.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = opt.defaults["lr"] * min(1.0, warm, left)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
            loss = loss_of(net, averaged.module, step)
        loss.backward()
        finite = nn.utils.clip_grad_norm_(net.parameters(), 1.0).isfinite()
        bad = 0 if finite else bad + 1
        if bad >= cfg.max_bad:
            sys.exit(f"{bad} steps in a row were not finite, stopped in step {step}; {folder} is intact")
        for opt in opts:
            if finite:
                opt.step()
            opt.zero_grad()
        if finite:
            averaged.update_parameters(net)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps or stop:
            nets = {"net": net.state_dict(), "averaged": averaged.state_dict()}
            run = {"opts": [o.state_dict() for o in opts], "config": asdict(cfg), "stage": asdict(stage)}
            checkpoint.save_state(folder, step + 1, nets | run)
        if stop:
            print(f"stopped after step {step + 1}; --resume goes on from there")
            sys.exit(0)
    checkpoint.die_on_signal()
    return averaged.module.eval()


def optimizers(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; a transformer's matrices get Muon, which needs clearly fewer clips here (docs/log.md)."""
    matrices = [p for p in net.blocks.parameters() if p.ndim == 2] if isinstance(net, VideoDiT) else []
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=0.01)
    if not matrices:
        return [adam]
    return [adam, torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def made(kind: str, cfg: Config, flags: Flags) -> nn.Module:
    """What an earlier stage has left."""
    return load_net(Path(flags.out) / f"{kind}.safetensors", cfg, kind)


def started(cfg: Config, flags: Flags, kind: str) -> nn.Module | None:
    """What --start names, if it is of this kind; its captions may have been of another length."""
    if not flags.start or (header := checkpoint.read_header(flags.start))["kind"] != kind:
        return None
    words = json.loads(header["config"])
    then = replace(cfg, **{k: words[k] for k in ("objects", "text_length")})
    return load_net(flags.start, then, kind).train()


def keys(cfg: Config, stage: Stage, step: int) -> list[tuple]:
    return [(cfg.seed, stage.name, step, i) for i in range(stage.batch)]


def train_codec(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Triplets of frames, two frames apart."""
    torch.manual_seed(cfg.seed)
    net = started(cfg, flags, "codec") or Codec(cfg)

    def loss_of(net, averaged, step):
        video = source.batch(keys(cfg, stage, step), torch.tensor([0, 2, 4])).video01
        rng = rng_for(cfg.seed, "codec noise", step)
        noise = torch.randn(len(video), 3, *cfg.latent_shape, generator=rng)
        return net.train().loss(video.to(cfg.device), noise.to(cfg.device))

    return learn(stage, net.to(cfg.device), loss_of, cfg, flags)


def noisy_batch(cfg: Config, stage: Stage, step: int, source, codec, times=None):
    """Latents (b f c h w) of fresh clips, their noise, and text (b l e), dropped from one in ten."""
    batch = source.batch(keys(cfg, stage, step), times)
    with torch.no_grad():
        x = codec.encode(batch.video01.to(cfg.device)).float()
    rngs = [rng_for(*key, "noise") for key in keys(cfg, stage, step)]
    noise = randn(rngs, *x.shape[1:], device=cfg.device)
    keep = torch.stack([torch.rand((), generator=g) > 0.1 for g in rngs])
    text = tokenize(batch.words, cfg.text_length, cfg.text_width) * keep[:, None, None]
    return x, noise, text.to(cfg.device), rngs


def train_teacher(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Flow matching: E |v(x_t, t, text) - (ε - x)|², one time per clip, most often a middling one.

    Uniform times spend most of the loss near t = 0 and 1, where a clip is nearly known or hardly visible;
    what words decide lies between (docs/log.md). Logit-normal as in Stable Diffusion 3 (Esser et al. 2024).
    """
    torch.manual_seed(cfg.seed)
    net = started(cfg, flags, "teacher") or VideoDiT(cfg)

    def loss_of(net, averaged, step):
        x, noise, text, rngs = noisy_batch(cfg, stage, step, source, codec)
        u = torch.stack([torch.randn((), generator=g) for g in rngs]).sigmoid().to(cfg.device)
        t = repeat(shift_time(u, cfg.shift), "b -> b f", f=cfg.frames)
        v, _ = net(add_noise(x, noise, t), t, text)
        return F.mse_loss(v, noise - x)

    return learn(stage, net.to(cfg.device), loss_of, cfg, flags)


def train_causal(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Teacher forcing from the teacher's weights: a noisy chunk, at its own time, sees the clean past."""
    net = made("teacher", cfg, flags)

    def loss_of(net, averaged, step):
        x, noise, text, rngs = forced_batch(cfg, stage, step, source, codec)
        u = torch.stack([torch.rand(cfg.chunks, generator=g) for g in rngs]).to(cfg.device)
        t = shift_time(u, cfg.shift).repeat_interleave(cfg.chunk, 1)
        v = forced(net, x, add_noise(x, noise, t), t, text, cfg)
        return F.mse_loss(v, noise - x)

    return learn(stage, net, loss_of, cfg, flags)


def train_consistency(cfg: Config, stage: Stage, source, codec, flags: Flags, levels: int = 48) -> nn.Module:
    """After the causal start (Causal Forcing++): |x̂(x_t) - x̂_averaged(x_s)|², s one level below t.

    x_s is one guided Euler step of the frozen causal start away from x_t; at s = 0 it is the target.
    """
    frozen, net = (made("causal", cfg, flags) for _ in range(2))
    grid = shift_time(torch.linspace(0, 1, levels + 1, device=cfg.device), cfg.shift)

    def loss_of(net, averaged, step):
        x, noise, text, rngs = forced_batch(cfg, stage, step, source, codec)
        at = torch.stack([torch.randint(levels, (cfg.chunks,), generator=g) for g in rngs]).to(cfg.device)
        s, t = (grid[at + i].repeat_interleave(cfg.chunk, 1) for i in (0, 1))
        xt = add_noise(x, noise, t)
        with torch.no_grad():
            c, u = (forced(frozen, x, xt, t, words, cfg) for words in (text, torch.zeros_like(text)))
            xs = xt + rearrange(s - t, "b f -> b f 1 1 1") * (u + cfg.guidance * (c - u))
            target = to_x0(forced(averaged, x, xs, s, text, cfg), xs, s)
        return F.mse_loss(to_x0(forced(net, x, xt, t, text, cfg), xt, t), target)

    return learn(stage, net, loss_of, cfg, flags)


def forced_batch(cfg: Config, stage: Stage, step: int, source, codec):
    """A noisy batch; in half of its clips the first chunk lies further back, as sinks do in a long stream."""
    rng = rng_for(cfg.seed, "gap", step)
    gap = torch.randint(0, 4 * cfg.frames, (stage.batch, 1), generator=rng)
    gap *= torch.rand(stage.batch, 1, generator=rng) < 0.5
    times = torch.arange(cfg.pixel_frames)
    first = 1 + (cfg.chunk - 1) * cfg.time_stride  # pixel frames of the first chunk
    return noisy_batch(cfg, stage, step, source, codec, times + gap * (times >= first))


def forced(net, x: Tensor, xt: Tensor, t: Tensor, text: Tensor, cfg: Config) -> Tensor:
    """Velocity of the noisy chunks x_t (b f c h w) at t (b f), each given the clean chunks of x before it."""
    mask, positions = teacher_forcing(cfg.frames, cfg.chunk)
    both, times = torch.cat([x, xt], dim=1), torch.cat([torch.zeros_like(t), t], dim=1)
    return net(both, times, text, mask=mask, positions=positions)[0][:, cfg.frames :]


@torch.no_grad()
def report_codec(net: Codec, cfg: Config, codec, flags: Flags, count: int = 128) -> dict[str, str]:
    """Reconstruction of the world's clips that were not learnt from, or of a folder's."""
    batch = source_of(cfg, "select").batch([("report", i) for i in range(count)])
    errors = [F.mse_loss(net.decode(net.encode(v)), v) for v in batch.video01.to(cfg.device).split(32)]
    return {"PSNR, dB": f"{-10 * torch.stack(errors).mean().log10():.1f}"}


def train_reward(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Bradley-Terry on pairs: -log σ(r_good - r_bad) on the damaged axis; the other axes are held level.

    The good clip has been through the codec, so that the reward does not ask for what no student can give.
    Clips of the models themselves lose against real ones on every axis: a reward must not prefer what a
    generator makes.
    """
    source = source_of(cfg)  # whole captions: a wrong speed cannot be seen where none is named
    rivals = rival_clips(cfg, codec, source, flags)
    torch.manual_seed(cfg.seed)

    def loss_of(net, averaged, step):
        own = keys(cfg, stage, step)
        rngs = [rng_for(*key, "damage") for key in own]
        batch = source.batch(own, torch.arange(2 * cfg.pixel_frames))
        with torch.no_grad():
            long01 = codec.decode(codec.encode(batch.video01.to(cfg.device))).float().cpu()
        good, bad, captions = pairs(long01, batch.words, rngs, bool(cfg.data))
        text = torch.stack([tokenize(c, cfg.text_length, cfg.text_width) for c in captions]).to(cfg.device)
        pick = torch.randint(len(rivals[0]), (stage.batch // 2,), generator=rngs[0])
        video01 = torch.cat([good, *bad, rivals[0][pick]]).to(cfg.device)
        return bradley_terry(net, video01, text, rivals[1][pick].to(cfg.device))

    return learn(stage, RewardModel(cfg).to(cfg.device), loss_of, cfg, flags)


@torch.no_grad()
def rival_clips(cfg: Config, codec: Codec, source, flags: Flags, count: int = 256) -> tuple[Tensor, Tensor]:
    """`count` clips of each of teacher, causal start and --rivals → video01 (n F 3 H W), text (n l e)."""
    nets = [(Path(flags.out) / f"{kind}.safetensors", kind) for kind in ("teacher", "causal")]
    nets += [(Path(path), "student") for path in flags.rivals.split(",") if path]
    videos, texts = [], []
    for path, kind in nets:
        net = load_net(path, cfg, kind)
        words = source.captions([(cfg.seed, "rival", kind, i) for i in range(count)])
        text = tokenize(words, cfg.text_length, cfg.text_width).to(cfg.device)
        for i in tqdm(range(0, count, 32), desc=f"clips of {path.name}"):
            rngs = [rng_for(cfg.seed, "rival", i + j) for j in range(32)]
            sampler = sample_teacher if kind == "teacher" else rollout
            videos.append(codec.decode(sampler(net, text[i : i + 32], cfg, rngs)).float().cpu())
        texts.append(text)
    return torch.cat(videos), torch.cat(texts)


@torch.no_grad()
def report_reward(net: RewardModel, cfg: Config, codec, flags: Flags, count: int = 256) -> dict[str, str]:
    """Give scores mean 0, unit spread over good and damaged clips → accuracies, against rivals as well."""
    rngs, own = [rng_for("report", i) for i in range(count)], [("report", i) for i in range(count)]
    batch = source_of(cfg, "select").batch(own, torch.arange(2 * cfg.pixel_frames))
    parts = batch.video01.to(cfg.device).split(32)
    long01 = torch.cat([codec.decode(codec.encode(v)).float().cpu() for v in parts])
    good, (looks, motion), captions = pairs(long01, batch.words, rngs, bool(cfg.data))
    text = [tokenize(c, cfg.text_length, cfg.text_width).to(cfg.device) for c in captions]
    net.mean.zero_(), net.std.fill_(1)
    held = [(good, text[0]), (looks, text[0]), (motion, text[0]), (good, text[1])]
    scores = torch.cat([net(v.to(cfg.device), t) for v, t in held])
    net.mean.copy_(scores.mean(0)), net.std.copy_(scores.std(0))
    best, *damaged = scores.split(count)
    pairs_won = torch.stack([(best[:, i] > bad[:, i]).float().mean() for i, bad in enumerate(damaged)])
    rival01, rival_text = rival_clips(cfg, codec, source_of(cfg, "select"), flags, 64)
    rival = net(rival01.to(cfg.device), rival_text)
    rivals_won = (best[:, None] > rival).float().mean((0, 1))
    facts = {"pair accuracy": pairs_won, "real above models' clips": rivals_won}
    return {what: _per_axis(won, ".3f") for what, won in facts.items()}


def _per_axis(values: Tensor, form: str) -> str:
    return " ".join(f"{axis} {v:{form}}" for axis, v in zip(AXES, values.tolist(), strict=True))


@torch.no_grad()
def show(name: str, net: nn.Module, cfg: Config, source, codec, out: Path) -> None:
    """A contact sheet of what the stage has learnt: reconstructions, samples, or scored clips."""
    batch = source.batch([("show", i) for i in range(6)], torch.arange(2 * cfg.pixel_frames))
    good, text = batch.video01[:, : cfg.pixel_frames], tokenize(batch.words, cfg.text_length, cfg.text_width)
    if name == "codec":
        decoded = net.decode(net.encode(good.to(cfg.device))).cpu()
        rows = dict(zip(batch.prompts, torch.cat([good, decoded], dim=3), strict=True))  # one above the other
    elif name == "reward":
        looks = torch.stack([worse_looks(x, rng_for("show", i)) for i, x in enumerate(good)])
        motion = torch.stack([worse_motion(x, rng_for("show", i)) for i, x in enumerate(batch.video01)])
        clips = {"": good, "worse looks: ": looks, "worse motion: ": motion}
        scores = {k: net(v.to(cfg.device), text.to(cfg.device)) for k, v in clips.items()}
        rows = {}
        for i, prompt in enumerate(batch.prompts):
            for kind, video in clips.items():
                rows[f"{kind}{prompt}   {_per_axis(scores[kind][i], '+.2f')}"] = video[i]
    else:
        sampler = sample_teacher if name == "teacher" else rollout
        x = sampler(net, text.to(cfg.device), cfg, [rng_for("show", i) for i in range(6)])
        rows = dict(zip(batch.prompts, codec.decode(x), strict=True))
    contact_sheet(out / f"{name}.png", rows)


TRAINERS = {
    "codec": train_codec, "teacher": train_teacher, "causal": train_causal, "consistency": train_consistency,
    "reward": train_reward,
}  # fmt: skip
REPORTS = {"codec": report_codec, "reward": report_reward}
NEEDED = ("codec", "teacher", "causal", "reward")  # what --stage=all makes


def main() -> None:
    cfg, flags = from_cli(flags=Flags, doc=__doc__)
    openmp.use_threads(cfg.threads)
    cfg = replace(cfg, device=pick_device(cfg))
    if min(flags.steps, flags.batch, flags.lr) < 0:
        typed = f"steps={flags.steps} batch={flags.batch} lr={flags.lr}"
        raise BadInput(f"{typed} is not possible; allowed: from 0")
    if flags.stage != "all" and flags.stage not in STAGES:
        raise BadInput(f"stage={flags.stage} is not possible; allowed: all | {' | '.join(STAGES)}")
    out = checkpoint.writable_folder(flags.out)
    source = source_of(cfg, drop_words=0.1)
    if isinstance(source, PromptFile):
        raise BadInput(f"--data={cfg.data} is a file of prompts; networks are made from a folder of clips")
    stages = NEEDED if flags.stage == "all" else (flags.stage,)
    kind = checkpoint.read_header(flags.start)["kind"] if flags.start else ""
    if kind not in {"", "codec", "teacher"} & {"", *stages}:
        raise BadInput(f"--start={flags.start} is a {kind}; allowed: a codec or teacher, for its own stage")
    for name in stages:
        own = {k: getattr(flags, k) for k in ("steps", "batch", "lr") if getattr(flags, k)}
        stage = replace(STAGES[name], **own)
        print(f"{name}: {stage.steps} steps of {stage.batch} clips; expect {stage.expect}", flush=True)
        start = time.perf_counter()
        codec = None if name == "codec" else made("codec", cfg, flags)
        net = TRAINERS[name](cfg, stage, source, codec, flags)
        minutes = (time.perf_counter() - start) / 60
        facts = {"steps": stage.steps, "command": " ".join(sys.argv)}
        facts["minutes"] = "unknown: resumed" if flags.resume else f"{minutes:.1f}"
        facts["vocabulary"] = " ".join(source.vocabulary)
        if name in REPORTS:
            measured = REPORTS[name](net, cfg, codec, flags)
            print(*(f"{what}: {value}" for what, value in measured.items()), sep="\n", flush=True)
            where = "clips learnt from" if cfg.data else "held-out clips"  # a folder is not split
            facts |= {f"measured on {where}, {what}": value for what, value in measured.items()}
        kind = "causal" if name == "consistency" else name  # either can be where a student starts
        checkpoint.save_weights(out / f"{name}.safetensors", net, cfg, kind, **facts)
        show(name, net, cfg, source, codec, out)
        print(f"{name}: {minutes:.1f} min → {out / name}.safetensors and .png", flush=True)


if __name__ == "__main__":
    cli(main)
