"""Goodhart's law: pulled at hard enough, a learned reward parts from what pixels show.

    python -m study.goodhart                # a table, and out/goodhart.png

Three ways to pull the shipped student's clips towards a higher mean r of VQ, MQ and TA, harder and harder:

    weights   16 rollouts of a prompt, averaged with weights exp(β r): where weighting alone could lead (β)
    student   updates along ∂r/∂θ, through the step a training rollout stops at, and nothing else (steps)
    clip      Adam on a clip's latents along ∂r/∂x, no student left between (steps)

Pixels: the mean of looks, motion and text (world/measure.py). Both as gains over the student as it is.
"""

from engine import openmp  # isort: skip  (before torch loads)

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, build, cli, read_cli
from engine.checkpoint import writable_folder
from engine.rng import rng_for
from networks import load_net
from rollout import exit_step, rollout
from run import Run
from study.figures import BLUE, GREY, ORANGE, canvas, finish
from study.tables import interval
from study.usefulness import begin
from train import draw, update
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption

NETS = ROOT / "assets/tiny"
HARDER = {
    "weights": (0, 0.5, 2, 8, 32),
    "student": (0, 1, 2, 4, 8, 16, 32),
    "clip": (0, 1, 2, 4, 8, 16, 32, 64),
}


@torch.no_grad()
def clips(run: Run, words: list, k: int = 0) -> Tensor:
    """The student's k-th rollouts of prompts, (b f c h w)."""
    rngs = [rng_for("goodhart", run.cfg.seed, k, i) for i in range(len(words))]
    return rollout(run.student, run.read(words), run.cfg, rngs)


def reward(run: Run, x: Tensor, text: Tensor) -> Tensor:
    """Latents (b f c h w) → mean of VQ, MQ and TA (b,)."""
    return run.reward(run.codec.decode(x).float(), text).mean(1)


@torch.no_grad()
def judged(run: Run, x: Tensor, words: list) -> Tensor:
    """Latents (b f c h w) → the reward and what pixels show, (2 b)."""
    axes = three_axes(measure(run.codec.decode(x).float(), [caption(w) for w in words])).values()
    return torch.stack([reward(run, x, run.read(words)), torch.stack([*axes]).nanmean(0)])


def weights(run: Run, words: list, count: int = 16) -> Iterator[Tensor]:
    found = torch.stack([judged(run, clips(run, words, k), words) for k in range(count)])  # (k 2 b)
    for beta in HARDER["weights"]:
        yield ((beta * found[:, :1]).softmax(0) * found).sum(0)


def clip(run: Run, words: list) -> Iterator[Tensor]:
    x, text = clips(run, words).requires_grad_(), run.read(words)
    opt = torch.optim.Adam([x], lr=0.02)
    for step in range(HARDER["clip"][-1] + 1):
        if step in HARDER["clip"]:
            yield judged(run, x, words)
        opt.zero_grad()
        (-reward(run, x, text).mean()).backward()
        opt.step()


def student(run: Run, words: list) -> Iterator[Tensor]:
    for step in range(HARDER["student"][-1] + 1):
        if step in HARDER["student"]:
            yield judged(run, clips(run, words), words)
        rngs, text, _ = draw(run, "student", step, micro=0)
        x = rollout(run.student, text, run.cfg, rngs, exit=exit_step(run.cfg, "student", step), grad=True)
        (-reward(run, x, text).mean()).backward()
        update(run.student, run.student_opt, run.cfg)


@dataclass(frozen=True)
class Flags:
    seeds: int = 5  # trainings, each with prompts and noise of its own; 2 or more
    clips: int = 32  # prompts of a seed
    out: Path = Path("out/goodhart.png")  # the figure


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if what != "tiny" or typed or flags.seeds < 2 or flags.clips < 1 or flags.out.suffix != ".png":
        raise BadInput(f"{what} {typed or flags} is not possible; allowed: seeds >= 2, clips >= 1, a .png")
    writable_folder(str(flags.out.parent))
    found: dict[str, list[Tensor]] = {way.__name__: [] for way in (weights, clip, student)}
    for seed in tqdm(range(flags.seeds), unit="seed"):
        how = {"method": "windowed", "critic_warmup": 0, "batch": 8, "device": "cpu"}
        cfg = build("tiny", how | {"seed": seed})
        run = begin(NETS, cfg, load_net(NETS / "stream_r1.safetensors", cfg, "student"))
        words = World(cfg, "test").captions([("goodhart", seed, i) for i in range(flags.clips)])
        for way in (weights, clip, student):  # the last one moves the student
            steps = torch.stack([*way(run, words)]).mean(2)  # (k 2)
            found[way.__name__].append(steps - steps[0])
    figure, panel = canvas(1, 1, 4.5)
    print("| way | how hard | reward gained | pixels gained |", "|---|---|---|---|", sep="\n")
    for (way, gains), colour in zip(found.items(), (BLUE, GREY, ORANGE), strict=True):
        ends = [[*map(interval, gain.T)] for gain in torch.stack(gains).unbind(1)]
        for hard, ((r, r_half), (p, p_half)) in zip(HARDER[way], ends, strict=True):
            print(f"| {way} | {hard} | {r:+.3f} ± {r_half:.3f} | {p:+.4f} ± {p_half:.4f} |")
            panel.annotate(f"{hard}" * (hard >= 8), (r, p), (5, 7), textcoords="offset points", fontsize=13)
        (x, xerr), (y, yerr) = (zip(*axis, strict=True) for axis in zip(*ends, strict=True))
        panel.errorbar(x, y, yerr, xerr, "o-", color=colour, label=way)
    panel.set(xlabel="reward gained", ylabel="pixels gained")
    panel.legend(frameon=False, loc="lower left")
    finish(figure, flags.out)
    print(flags.out)


if __name__ == "__main__":
    cli(main)
