"""CausVid's start (Yin et al., 2025), https://arxiv.org/abs/2412.07772: regress onto the teacher's paths

Claim: regression onto a bidirectional teacher's own ODE paths makes a causal few-step student to distil from.

    path     dx/dt = v_T(x_t, t) from ε to x_0, kept at the student's levels t = 1, .9, .75, .5 and at 0
    stage 1  |x̂(x_t)_k - x_0,k|² under a block-causal mask; every chunk k draws its own t_k, t_k = 0 is out
    It blurs where x_0,1 depends on later chunks' noise. Two chunks of variance 1, correlation ρ: x_0 = Σ^½ ε,
    the best causal x̂_1 is a ε_1, a = (√(1+ρ) + √(1-ρ)) / 2, its variance a² = (1 + √(1-ρ²)) / 2.
    stage 2  DMD on x̂((1 - t_k) x + t_k ε) of real clips x: the student never meets its own videos
simplified: 256 paths, 300 steps; of stage 2 its clip alone (`on_data`): train.py has rollouts in its place.
seen here: (python -m family.causvid) the other chunks' noise decides .84 ±.04 of a first chunk's variance (64
prompts, 8 draws). One step from noise, 256 test clips: shape right in .40 ±.06 (teacher forcing .00, teacher
.98), yet farther from the teacher's clip of the same noise (.75 ±.05) than a blur is (.67 ±.03): 256 paths
are learnt by heart. Rollouts of four steps score .94 before any distillation, teacher forcing's .78; after 16
steps the difference is +.003 ±.008 (3 seeds; README.md has the command).
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, Config, build, cli, read_cli
from engine.checkpoint import save_weights, writable_folder
from engine.learn import Stage, learn
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import add_noise, guided_x0, shift_time, to_x0
from networks import load_net
from rollout import step_grid
from world.measure import mean, measure
from world.scene import World
from world.words import caption, tokenize


@torch.no_grad()
def teacher_path(net, noise: Tensor, text: Tensor, cfg: Config, levels, steps: int = 15) -> Tensor:
    """Noise (b f c h w) → the guided Euler path's states at `levels`, 1 to 0 (b m f c h w)."""
    own = shift_time(torch.linspace(1, 0, steps + 1), cfg.shift).tolist()
    x, kept = noise, {1.0: noise}
    for now, then in pairwise(sorted({*own, *levels}, reverse=True)):
        x0 = guided_x0(net, x, torch.full(x.shape[:2], now), text, torch.zeros_like(text[:1]), cfg.guidance)
        x = kept[then] = x + (then - now) * (x - x0) / now
    return torch.stack([kept[level] for level in levels], dim=1)


def causal(net, xt: Tensor, t: Tensor, text: Tensor, cfg: Config) -> Tensor:
    """x_t (b f c h w) at t (b f), each chunk seeing itself and those before it → x̂ (b f c h w)."""
    chunk = torch.arange(xt.shape[1]) // cfg.chunk
    return to_x0(net(xt, t, text, mask=chunk[:, None] >= chunk)[0], xt, t)


def on_data(net, x: Tensor, noise: Tensor, level: Tensor, text: Tensor, levels, cfg: Config) -> Tensor:
    """Real clips and noise (b f c h w), which of `levels` every chunk is at (b k) → x̂ (b f c h w)."""
    t = torch.tensor(levels)[level].repeat_interleave(cfg.chunk, 1)  # (b f)
    return causal(net, add_noise(x, noise, t), t, text, cfg)


def ode_loss(net, path: Tensor, level: Tensor, text: Tensor, levels, cfg: Config) -> Tensor:
    """Paths (b m f c h w) and which of their states every chunk shows (b k) → the error of x̂ where t > 0."""
    level = level.repeat_interleave(cfg.chunk, 1)  # (b f)
    xt = path[torch.arange(len(path))[:, None], level, torch.arange(path.shape[2])]
    t = torch.tensor(levels)[level]
    error = (causal(net, xt, t, text, cfg) - path[:, -1]).square().mean((2, 3, 4))
    return error[t > 0].sum() / (t > 0).sum().clamp(min=1)


def drawn(cfg: Config, split: str, count: int) -> tuple[list[str], Tensor, Tensor]:
    """→ prompts, text (n l e), noise (n f c h w)."""
    words = World(cfg, split).captions([("causvid", i) for i in range(count)])
    noise = randn([rng_for("causvid", i, "noise") for i in range(count)], cfg.frames, *cfg.latent_shape)
    return [caption(w) for w in words], tokenize(words, cfg.text_length, cfg.text_width), noise


def ode_start(net, cfg: Config, flags) -> None:
    """Stage 1 from the teacher `net`, as flags say → out/ode.safetensors, which `train.py --start` takes."""
    levels, (_, text, noise) = (*step_grid(cfg, 0), 0.0), drawn(cfg, "train", flags.paths)
    parts = tqdm([*zip(noise.split(32), text.split(32), strict=True)], desc="paths")
    path = torch.cat([teacher_path(net, *part, cfg, levels) for part in parts])

    def draw(step):
        rng, sizes = rng_for(cfg.seed, "ode", step), ((len(path), (16,)), (len(levels), (16, cfg.chunks)))
        return None, *(torch.randint(*size, generator=rng) for size in sizes)

    def loss_of(net, step, _, rows, level):
        return ode_loss(net, path[rows], level, text[rows], levels, cfg)

    how = SimpleNamespace(out=str(flags.out), resume=True, workers=0, compile=False)
    opt, stage = torch.optim.AdamW(net.parameters(), 5e-4), Stage("ode", flags.steps, 16, 5e-4, "", 0.98)
    net = learn(stage, net.train(), [opt], draw, loss_of, cfg, how)
    save_weights(flags.out / "ode.safetensors", net, cfg, "causal", steps=flags.steps)


def open_share(net, cfg: Config, prompts: int, draws: int = 8) -> Tensor:
    """The share of the first chunk's variance that the other chunks' noise decides, of each prompt (p,)."""
    shares, shape, (_, text, _) = [], (cfg.frames, *cfg.latent_shape), drawn(cfg, "test", prompts)
    for i in tqdm(range(prompts), desc="other noise"):
        noise = randn([rng_for("open", i, j) for j in range(2 * draws)], *shape)
        noise[:draws, : cfg.chunk] = noise[0, : cfg.chunk]  # of half of them the first chunk's is the same
        x = teacher_path(net, noise, text[i : i + 1].expand(2 * draws, -1, -1), cfg, (1.0, 0.0))
        same, free = (half.var(0).mean() for half in x[:, 1, : cfg.chunk].split(draws))
        shares.append(same / free)
    return torch.stack(shares)


@dataclass(frozen=True)
class Flags:
    nets: Path = ROOT / "assets/tiny"  # folder with codec, teacher and causal start
    out: Path = Path("out/family/causvid")  # the folder of the start; a picture lies beside it
    paths: int = 256  # of the teacher, that the start learns from
    steps: int = 300  # of the start; it goes on where it was stopped
    clips: int = 256  # of the test split, of which every fourth tells how much the others' noise decides


@torch.no_grad()
def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if typed or min(flags.paths // 8, flags.clips // 4, flags.steps + 1) < 2:
        raise BadInput(f"{typed or flags} is not possible; allowed: from 16 paths, 8 clips and 1 step on")
    writable_folder(str(flags.out))
    cfg = build("tiny", {"device": "cpu"})
    codec, teacher = (load_net(flags.nets / f"{k}.safetensors", cfg, k) for k in ("codec", "teacher"))
    share = open_share(teacher, cfg, flags.clips // 4)
    print(f"the other chunks' noise decides {mean(share)} of a first chunk's variance (n = {len(share)})")
    if not (flags.out / "ode.safetensors").exists():
        with torch.enable_grad():
            ode_start(load_net(flags.nets / "teacher.safetensors", cfg, "teacher"), cfg, flags)
    prompts, text, noise = drawn(cfg, "test", flags.clips)
    first, t = noise[:, : cfg.chunk], torch.ones(flags.clips, cfg.chunk)
    starts = {"teacher forcing": flags.nets / "causal.safetensors", "ODE": flags.out / "ode.safetensors"}
    made = {"teacher, 15 steps": teacher_path(teacher, noise, text, cfg, (0.0,))[:, 0, : cfg.chunk]}
    made |= {k: causal(load_net(path, cfg, "causal"), first, t, text, cfg) for k, path in starts.items()}
    print(f"{'first chunk':>18}" + "".join(f"{k:>15}" for k in ("variance", "error", "sharpness", "shape")))
    for name, x in made.items():
        seen = measure(codec.decode(x), prompts)
        wide, off = ((x - y).square().mean((1, 2, 3, 4)) for y in (x.mean(0), made["teacher, 15 steps"]))
        print(f"{name:>18}", *(f"{mean(c):>14}" for c in (wide, off, seen["sharpness"], seen["shape"])))
    rows = [(name, codec.decode(x[:6, :1])[:, 0]) for name, x in made.items()]
    print(contact_sheet(flags.out.with_suffix(".png"), rows, scale=3))


if __name__ == "__main__":
    cli(main)
