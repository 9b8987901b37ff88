"""Pictures of a run and of the reward's saliency.

    python -m study.figures curves --run=out/train --against=assets/curves/healthy   # of metrics.jsonl
    python -m study.figures saliency --prompt "a red circle moving left slowly"      # to out/saliency.png

Curves need matplotlib (the extra `study`); contact sheets do not.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder, write_atomically
from engine.rng import rng_for
from engine.sheet import contact_sheet
from networks import load_net
from reward import AXES, RewardModel
from rollout import rollout
from run import read_metrics
from saliency import factorise, fuse_axes, reward_saliency, to_latent_grid
from study.tables import extra
from world.words import embed, understand

BLUE, ORANGE, GREY = "#1f4e9c", "#c8501e", "#8a8a8a"


def canvas(rows: int, columns: int, height: float, **how):
    """A white page 780 pixels wide, its `rows` x `columns` panels `height` inches high → figure, panels.
    Letters are large enough to be read on a phone, at half of that width. Raises BadInput."""
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    pyplot.rcParams.update({"font.size": 14, "axes.titlesize": 15, "axes.spines.top": False,
                            "axes.spines.right": False, "savefig.dpi": 100})  # fmt: skip
    return pyplot.subplots(rows, columns, figsize=(7.8, rows * height), layout="constrained", **how)


def finish(figure, path: Path) -> None:
    write_atomically(path, lambda name: figure.savefig(name))
    extra("matplotlib.pyplot").close(figure)


# -- curves ----------------------------------------
CURVES = {
    "held_out_shape": ("held out: right shape", "share of objects"),
    "held_out_speed": ("held out: right speed", "share of objects"),
    "held_out_jitter": ("held out: jitter", "pixels"),
    "held_out_sharpness": ("held out: sharpness", "1 = sharp"),
    "VQ": ("reward: visual quality", "VQ"),
    "MQ": ("reward: motion quality", "MQ"),
    "TA": ("reward: text alignment", "TA"),
    "dmd": ("DMD gradient", "mean size"),
    "critic": ("critic's loss", "mean square"),
    "ess": ("effective sample size", "share of batch"),
    "penalty": ("balance: penalty", "reward"),
}


def smoothed(y: np.ndarray) -> np.ndarray:
    """(n,) → means over windows of a fifth of the run, shorter at both ends."""
    reach = len(y) // 10
    return np.array([y[max(0, i - reach) : i + reach + 1].mean() for i in range(len(y))])


def curves(run: Path, against: str) -> Path:
    """A panel per quantity of metrics.jsonl over steps: what is measured on held-out prompts comes first; of
    noisy quantities the points are faint and a smoothed line is drawn. In grey another run, `against`."""
    if not (rows := read_metrics(run)):
        raise BadInput(f"no {run}/metrics.jsonl with a step in it; a run of train.py writes it")
    if not (other := read_metrics(Path(against))) and against:
        raise BadInput(f"no {against}/metrics.jsonl with a step in it; assets/curves/healthy holds one")
    names = [k for k in CURVES if sum(k in row for row in rows) > 1]
    if not names:
        raise BadInput(f"{run}/metrics.jsonl holds a single step; a curve needs two or more")
    figure, panels = canvas(-(-len(names) // 2), 2, 2.4, squeeze=False, sharex=True)
    for name, panel in zip(names, panels.flat, strict=False):
        title, unit = CURVES[name]
        for found, colour in ((other, GREY), (rows, BLUE)):
            seen = [(row["step"], row[name]) for row in found if name in row]
            step, y = np.array(seen, dtype=float).reshape(-1, 2).T
            if not name.startswith("held_out_"):
                panel.plot(step, y, ".", color=colour, alpha=0.25)
                y = smoothed(y)
            panel.plot(step, y, color=colour, linewidth=2.5)
        panel.set(title=title, ylabel=unit)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(names) - 2) : len(names)]:
        panel.set_xlabel("step (student updates)")
        panel.tick_params(labelbottom=True)
    finish(figure, path := run / "curves.png")
    return path


# -- saliency ----------------------------------------
def heat(x: Tensor) -> Tensor:
    """(f h w), scaled by its maximum → black-red-yellow-white pictures (f 3 h w) in [0, 1]."""
    x = x / x.max().clamp(min=1e-12)
    return torch.stack([(3 * x).clamp(0, 1), (3 * x - 1).clamp(0, 1), (3 * x - 2).clamp(0, 1)], dim=1)


def saliency_sheet(path: Path, video01: Tensor, text: Tensor, reward: RewardModel, cfg: Config) -> None:
    """One clip (1 F 3 H W), every second frame: frames, |∂r/∂pixel| per axis, the fused latent map, its two
    factors."""
    scores, pixels = reward_saliency(reward, video01, text)
    cells = to_latent_grid(pixels, *cfg.latent_shape[1:], cfg.time_stride)
    fused = fuse_axes(cells, scores, cfg.fuse_temperature)
    time, space = factorise(fused, cfg.floor_time, cfg.floor_space)

    def enlarge(x):
        return x.repeat_interleave(cfg.stride, -2).repeat_interleave(cfg.stride, -1)

    height = (torch.arange(cfg.height, 0, -1) / cfg.height)[None, :, None]
    bars = (height <= (time[0] / time.max())[:, None, None]).expand(-1, -1, cfg.width)
    bars = torch.where(bars[:, None], torch.tensor([0.12, 0.3, 0.6])[:, None, None], 0.9)
    rows = {"frames": video01[0]}
    for axis, r, gradient in zip(AXES, scores[0], pixels[0], strict=True):
        rows[f"|dr/dpixel| of {axis} (score {r:+.2f})"] = heat(gradient)
    rows |= {
        "the three together, on the latent grid": heat(enlarge(fused[0])),
        "weights over space, per frame": heat(enlarge(space[0])),
        f"weights over time: bars, {time.min():.2f} to {time.max():.2f}": bars,
    }
    contact_sheet(path, rows.items(), every=2)


@dataclass(frozen=True)
class Flags:
    run: str = "out/train"  # of curves: what train.py has left
    against: str = ""  # of curves: another run, in grey
    prompt: str = "a red circle moving left slowly on a black background"  # of saliency
    nets: str = str(ROOT / "assets/tiny")  # folder with codec, teacher and reward
    seed: int = 0  # of the noise
    out: str = "out"  # folder of the picture
    student: str = ""  # of saliency; default <nets>/stream_r1.safetensors


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if what not in ("curves", "saliency"):
        raise BadInput(f"study.figures {what} is not possible; allowed: curves | saliency")
    if what == "curves":
        if typed:
            raise BadInput(f"study.figures curves does not depend on --{min(typed)}; leave it out")
        return print(curves(Path(flags.run), flags.against))
    out, nets = writable_folder(flags.out) / "saliency.png", Path(flags.nets)
    student = Path(flags.student or nets / "stream_r1.safetensors")
    header = read_header(student)
    cfg = from_words(header["config"], typed | {"device": "cpu"})
    net, codec = load_net(student, cfg, "student"), load_net(nets / "codec.safetensors", cfg, "codec")
    words = understand(flags.prompt, cfg, header.get("vocabulary", "").split())
    text = embed([words], cfg)
    with torch.no_grad():
        video01 = codec.decode(rollout(net, text, cfg, [rng_for(flags.seed, "saliency")]))
    saliency_sheet(out, video01, text, load_net(nets / "reward.safetensors", cfg, "reward"), cfg)
    print(out)


if __name__ == "__main__":
    cli(main)
