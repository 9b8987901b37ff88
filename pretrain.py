"""What distillation starts from, made from nothing: codec, teacher, causal start, reward model.

    python pretrain.py                          # the four stages train.py needs, tiny preset
    python pretrain.py tiny --stage=teacher     # one stage
    python pretrain.py tiny --data=clips        # a folder of captioned clips (--cache: encoded once)

Every stage prints what to expect, saves as it goes (--resume), and leaves a contact sheet.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from tqdm import tqdm

from codec import Codec
from config import BadInput, Config, build, cli, read_cli
from data import source_of
from engine import checkpoint
from engine.learn import Stage, learn
from engine.processes import pick_device
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import VideoDiT, add_noise, shift_time, teacher_forcing
from networks import load_net
from reward import AXES, RewardModel, bradley_terry
from rollout import rollout, sample_teacher
from world.corrupt import pairs
from world.words import embed


@dataclass(frozen=True)
class Flags:
    stage: str = "all"  # codec | teacher | causal | reward | all
    out: str = "out/pretrain"  # the folder for weights and contact sheets
    start: str = ""  # an earlier codec or teacher to go on from, the learning rate rising and falling anew
    rivals: str = ""  # students whose clips the reward model learns to put below real ones, comma-separated
    resume: bool = False  # go on with a stage that was stopped
    steps: int = 0  # updates; 0: the stage's own
    batch: int = 0  # clips an update; 0: the stage's own
    lr: float = 0.0  # Muon's, AdamW's is half of it; 0: the stage's own
    workers: int = 0  # processes that draw clips ahead of time, the same ones; a GPU waits for one core
    compile: bool = False  # a transformer's blocks, for training
    cache: bool = False  # with --data: keep the clips' latents in --out/latents, for teacher and causal


STAGES = {
    "codec": Stage("codec", 4000, 32, 4e-3, "PSNR above 30 dB"),
    "teacher": Stage("teacher", 7000, 32, 4e-3, "loss near 0.18"),
    "causal": Stage("causal", 800, 16, 1e-3, "loss near 0.33"),
    "reward": Stage("reward", 1600, 16, 2e-3, "held-out pair accuracy VQ > .95, MQ > .9, TA > .9", ema=0.99),
}


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
    net = (started(cfg, flags, "codec") or Codec(cfg)).to(cfg.device)

    def draw(step):
        drawn = source.draw(keys(cfg, stage, step), torch.tensor([0, 2, 4]))
        rng = rng_for(cfg.seed, "codec noise", step)
        return drawn, torch.randn(stage.batch, 3, *cfg.latent_shape, generator=rng)

    def loss_of(net, step, drawn, noise):
        return net.train().loss(source.pixels(drawn, cfg.device), noise)

    return learn(stage, net, adam_and_muon(net, stage.lr, cfg.bf16), draw, loss_of, cfg, flags)


def learn_flow(stage: Stage, net, draw_t: Callable, loss_of: Callable, source, codec, cfg, flags, gaps=False):
    """`learn` of VideoDiTs, loss_of(net, x, noise, text, u): latents x of fresh clips and noise
    (b f c h w), text (b l e), dropped from one in ten, and what draw_t draws for each clip's times.
    gaps: in half of the clips the first chunk lies further back, as sinks do in a long stream.
    """
    if flags.cache:
        source.encode(codec, Path(flags.out))

    def draw(step):
        own, times = keys(cfg, stage, step), torch.arange(cfg.pixel_frames)
        if gaps:
            rng = rng_for(cfg.seed, "gap", step)
            gap = torch.randint(0, 4 * cfg.frames, (stage.batch, 1), generator=rng)
            gap *= torch.rand(stage.batch, 1, generator=rng) < 0.5
            times = times + gap * (times >= 1 + (cfg.chunk - 1) * cfg.time_stride)  # after the first chunk
        drawn = (source.latents if flags.cache else source.draw)(own, times)
        rngs = [rng_for(*key, "noise") for key in own]
        noise = randn(rngs, cfg.frames, *cfg.latent_shape)
        keep = torch.stack([torch.rand((), generator=g) > 0.1 for g in rngs])
        text = embed(drawn.words, cfg) * keep[:, None, None]
        return drawn, noise, text, torch.stack([draw_t(generator=g) for g in rngs])

    def loss(net, step, drawn, *given):
        with torch.no_grad():
            x = drawn.latents if flags.cache else codec.encode(source.pixels(drawn, cfg.device))
        return loss_of(net, x.to(cfg.device).float(), *given)

    opts = adam_and_muon(net, stage.lr, cfg.bf16, net.blocks)
    return learn(stage, net, opts, draw, loss, cfg, flags, net.blocks)


def train_teacher(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Flow matching: E |v(x_t, t, text) - (ε - x)|², one time per clip, most often a middling one.

    Uniform times spend most of the loss near t = 0 and 1, where a clip is nearly known or hardly visible;
    what words decide lies between (docs/log.md). Logit-normal as in Stable Diffusion 3 (Esser et al. 2024).
    """
    torch.manual_seed(cfg.seed)
    net = started(cfg, flags, "teacher") or VideoDiT(cfg)

    def loss_of(net, x, noise, text, z):
        t = repeat(shift_time(z.sigmoid(), cfg.shift), "b -> b f", f=cfg.frames)
        v, _ = net(add_noise(x, noise, t), t, text)
        return F.mse_loss(v, noise - x)

    return learn_flow(stage, net.to(cfg.device), partial(torch.randn, ()), loss_of, source, codec, cfg, flags)


def train_causal(cfg: Config, stage: Stage, source, codec, flags: Flags) -> nn.Module:
    """Teacher forcing from the teacher's weights: a noisy chunk, at its own time, sees the clean past."""
    net = load_net(Path(flags.out) / "teacher.safetensors", cfg, "teacher")
    mask, positions = teacher_forcing(cfg.frames, cfg.chunk)

    def loss_of(net, x, noise, text, u):
        t = shift_time(u, cfg.shift).repeat_interleave(cfg.chunk, 1)
        both, times = torch.cat([x, add_noise(x, noise, t)], 1), torch.cat([torch.zeros_like(t), t], 1)
        v, _ = net(both, times, text, mask=mask, positions=positions)
        return F.mse_loss(v[:, cfg.frames :], noise - x)

    draw_t = partial(torch.rand, cfg.chunks)
    return learn_flow(stage, net, draw_t, loss_of, source, codec, cfg, flags, gaps=True)


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

    def draw(step):
        return (source.draw(keys(cfg, stage, step), torch.arange(2 * cfg.pixel_frames)),)

    def loss_of(net, step, drawn):
        rngs = [rng_for(*key, "damage") for key in keys(cfg, stage, step)]
        with torch.no_grad():
            long01 = codec.decode(codec.encode(source.pixels(drawn, cfg.device))).float()
        good, bad, captions = pairs(long01, drawn.words, rngs, bool(cfg.data))
        text = torch.stack([embed(c, cfg) for c in captions]).to(cfg.device)
        pick = torch.randint(len(rivals[0]), (stage.batch // 2,), generator=rngs[0])
        video01 = torch.cat([good, *bad, rivals[0][pick].to(cfg.device)])
        return bradley_terry(net, video01, text, rivals[1][pick].to(cfg.device))

    net = RewardModel(cfg).to(cfg.device)
    return learn(stage, net, adam_and_muon(net, stage.lr, cfg.bf16), draw, loss_of, cfg, flags)


@torch.no_grad()
def rival_clips(cfg: Config, codec: Codec, source, flags: Flags, count: int = 256) -> tuple[Tensor, Tensor]:
    """`count` clips of each of teacher, causal start and --rivals → video01 (n F 3 H W), text (n l e)."""
    nets = [(Path(flags.out) / f"{kind}.safetensors", kind) for kind in ("teacher", "causal")]
    nets += [(Path(path), "student") for path in flags.rivals.split(",") if path]
    videos, texts = [], []
    for path, kind in nets:
        net = load_net(path, cfg, kind)
        words = source.captions([(cfg.seed, "rival", kind, i) for i in range(count)])
        text = embed(words, cfg).to(cfg.device)
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
    text = [embed(c, cfg).to(cfg.device) for c in captions]
    net.mean.zero_(), net.std.fill_(1)
    clips = zip((good, looks, motion, good), (text[0], text[0], text[0], text[1]), strict=True)
    scores = torch.cat([net(v.to(cfg.device), t) for v, t in clips])
    net.mean.copy_(scores.mean(0)), net.std.copy_(scores.std(0))
    best, *damaged = scores.split(count)
    pairs_won = torch.stack([(best[:, i] > bad[:, i]).float().mean() for i, bad in enumerate(damaged)])
    rival01, rival_text = rival_clips(cfg, codec, source_of(cfg, "select"), flags, 64)
    rivals_won = (best[:, None] > net(rival01.to(cfg.device), rival_text)).float().mean((0, 1))
    facts = {"pair accuracy": pairs_won, "real above models' clips": rivals_won}
    return {what: _per_axis(won, ".3f") for what, won in facts.items()}


def _per_axis(values: Tensor, form: str) -> str:
    return " ".join(f"{axis} {v:{form}}" for axis, v in zip(AXES, values.tolist(), strict=True))


@torch.no_grad()
def show(name: str, net: nn.Module, cfg: Config, source, codec, out: Path) -> None:
    """A contact sheet of what the stage has learnt: reconstructions, samples, or scored clips."""
    batch = source.batch([("show", i) for i in range(6)], torch.arange(2 * cfg.pixel_frames))
    good, text = batch.video01[:, : cfg.pixel_frames], embed(batch.words, cfg)
    if name == "codec":
        decoded = net.decode(net.encode(good.to(cfg.device))).cpu()
        rows = zip(batch.prompts, torch.cat([good, decoded], dim=3), strict=True)  # one above the other
    elif name == "reward":
        worse = pairs(batch.video01, batch.words, [rng_for("show", i) for i in range(6)], True)[1]
        clips = {"": good, "worse looks: ": worse[0], "worse motion: ": worse[1]}
        scores = {k: net(v.to(cfg.device), text.to(cfg.device)) for k, v in clips.items()}
        rows = [(f"{kind}{prompt}   {_per_axis(scores[kind][i], '+.2f')}", video[i])
                for i, prompt in enumerate(batch.prompts) for kind, video in clips.items()]  # fmt: skip
    else:
        sampler = sample_teacher if name == "teacher" else rollout
        x = sampler(net, text.to(cfg.device), cfg, [rng_for("show", i) for i in range(6)])
        rows = zip(batch.prompts, codec.decode(x), strict=True)
    contact_sheet(out / f"{name}.png", rows)


# -- optimizers ----------------------------------------
class Muon(torch.optim.Muon):
    """The same update and the same state, for all matrices of one shape at once and, unless `bf16`, in fp32:
    torch's own launches two dozen kernels a matrix, and in bf16 a CPU takes fourteen times as long."""

    def __init__(self, params, bf16: bool, **how):
        super().__init__(params, **how)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for shape in dict.fromkeys(p.shape for p in group["params"]):
            params = [p for p in group["params"] if p.shape == shape]
            grads = [p.grad for p in params]
            means = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))  # Nesterov's
            (a, b, c), tall = group["ns_coefficients"], shape[0] > shape[1]
            x = (ahead.mT if tall else ahead).to(self.dtype)
            x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
            for _ in range(group["ns_steps"]):  # singular values move towards 1 (Newton and Schulz)
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = (x.mT if tall else x).float()
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(x.unbind()), alpha=-group["lr"] * (0.2 * max(shape) ** 0.5))


def adam_and_muon(net: nn.Module, lr: float, bf16: bool, blocks=()) -> list:
    """AdamW, but Muon for the matrices of `blocks`, which needs clearly fewer clips here (docs/log.md)."""
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=0.01)
    how = dict(lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")  # steps as large as AdamW's
    return [adam, Muon(matrices, bf16, **how)] if matrices else [adam]


# -- the stages, one after another ----------------------------------------
TRAINERS = dict(zip(STAGES, (train_codec, train_teacher, train_causal, train_reward), strict=True))
REPORTS = {"codec": report_codec, "reward": report_reward}


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    cfg = build(preset, typed)
    openmp.use_threads(cfg.threads)
    cfg = replace(cfg, device=pick_device(cfg))
    if flags.workers and sys.platform == "win32":
        raise BadInput(f"workers={flags.workers} is not possible on Windows; allowed: 0")
    if flags.stage != "all" and flags.stage not in STAGES:
        raise BadInput(f"stage={flags.stage} is not possible; allowed: all | {' | '.join(STAGES)}")
    if flags.cache and not cfg.data:
        raise BadInput("--cache is of a folder of clips: --data=FOLDER; the world is drawn anew each time")
    if flags.resume:
        checkpoint.can_resume(flags.out)
    out = checkpoint.writable_folder(flags.out)
    source = source_of(cfg, drop_words=0.1)
    stages = STAGES if flags.stage == "all" else (flags.stage,)
    kind = checkpoint.read_header(flags.start)["kind"] if flags.start else ""
    if kind not in {"", "codec", "teacher"} & {"", *stages}:
        raise BadInput(f"--start={flags.start} is a {kind}; allowed: a codec or teacher, for its own stage")
    for name in stages:
        stage = replace(STAGES[name], **{k: v for k in ("steps", "batch", "lr") if (v := vars(flags)[k])})
        stage = replace(stage, clips=source.fingerprint if cfg.data else "")
        expect = f"; expect {stage.expect}" * (not cfg.data)  # of the world; clips of one's own may be harder
        print(f"{name}: {stage.steps} steps of {stage.batch} clips{expect}", flush=True)
        start = time.perf_counter()
        codec = None if name == "codec" else load_net(out / "codec.safetensors", cfg, "codec")
        with checkpoint.locked(f"{out}/{name}-state"):
            net = TRAINERS[name](cfg, stage, source, codec, flags)
        minutes = (time.perf_counter() - start) / 60
        facts = {"steps": stage.steps, "command": " ".join(sys.argv),
                 "minutes": "unknown: resumed" if flags.resume else f"{minutes:.1f}",
                 "vocabulary": " ".join(source.vocabulary)}  # fmt: skip
        if name in REPORTS:
            measured = REPORTS[name](net, cfg, codec, flags)
            print(*(f"{what}: {value}" for what, value in measured.items()), sep="\n", flush=True)
            where = "clips learnt from" if cfg.data else "held-out clips"  # a folder is not split
            facts |= {f"measured on {where}, {what}": value for what, value in measured.items()}
        checkpoint.save_weights(out / f"{name}.safetensors", net, cfg, name, **facts)
        show(name, net, cfg, source, codec, out)
        print(f"{name}: {minutes:.1f} min → {out / name}.safetensors and .png", flush=True)


if __name__ == "__main__":
    cli(main)
