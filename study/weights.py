"""Do weights go where errors are? What train.py weighs by, against what is wrong with a student's clips.

`study.figures weights` prints and draws it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from config import Config
from engine.rng import randn, rng_for
from model import add_noise, guided_x0
from reward import AXES, rollout_weight
from rollout import rollout
from saliency import intra_weight, reward_saliency, to_latent_grid
from study.tables import extra
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption, tokenize

GROUPS = 8  # of points, by weight


@torch.no_grad()
def weights_and_errors(nets: dict, cfg: Config, clips: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A student's clips for prompts of the test split → {what: (weight, error)}, each (rows points): a weight
    counts in comparison with the others of its row.

    w_inter of the rollouts of a batch (unbalanced), against what pixels say is wrong with them ·
    W_time, the mean of four frames in a row, against the jitter in them · W_intra of the latent cells of a
    clip, against |x - x̂_T|, what the teacher would change at t = 1/2, mean over channels.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    used = [AXES.index(a) for a in cfg.axes]
    for first in range(0, clips, cfg.batch):
        keys = [("weights", seed, i) for i in range(first, first + cfg.batch)]
        words, rngs = World(cfg, "test").captions(keys), [rng_for(*key) for key in keys]
        text, prompts = tokenize(words, cfg.text_length, cfg.text_width), [caption(w) for w in words]
        x = rollout(nets["student"], text, cfg, rngs)
        video01, t = nets["codec"].decode(x).float(), torch.full(x.shape[:2], 0.5)
        noisy = add_noise(x, randn(rngs, *x.shape[1:]), t)
        change = x - guided_x0(nets["teacher"], noisy, t, text, torch.zeros_like(text[:1]), cfg.guidance)
        scores, pixels = (part[:, used] for part in reward_saliency(nets["reward"], video01, text))
        cells = to_latent_grid(pixels, *cfg.latent_shape[1:])
        time = intra_weight(cells, scores, replace(cfg, space=False))[:, :, 0, 0, 0]
        fours = [slice(f, f + 4) for f in range(x.shape[1] - 3)]
        heavy = torch.stack([time[:, four].mean(1) for four in fours], 1)
        jitter = torch.stack([measure(video01[:, four], prompts)["jitter"] for four in fours], 1)
        alone = replace(cfg, group=1, weight="exp")  # no two of these share a prompt
        inter = rollout_weight(scores.mean(1), alone)
        wrong = {axis: 1 - v for axis, v in three_axes(measure(video01, prompts)).items()}
        rows = {f"w_inter of rollouts: 1 - {axis}": (inter[None], v[None]) for axis, v in wrong.items()}
        rows["W_time of four frames: jitter"] = heavy, jitter
        intra = intra_weight(cells, scores, cfg).flatten(1)
        rows["W_intra of cells: |x - x_T|"] = intra, change.abs().mean(2).flatten(1)
        for what, pair in rows.items():
            found.setdefault(what, []).append(pair)
    return {what: tuple(map(torch.cat, zip(*pairs, strict=True))) for what, pairs in found.items()}


def by_weight(weight: Tensor, error: Tensor) -> tuple[float, Tensor]:
    """(points,) each → Spearman's ρ; (GROUPS,) the mean error of each eighth of the points, lightest first,
    over that of all. nan without errors, if all are alike, or if something is not finite."""
    fine = (weight.isfinite() & error.isfinite()).all()
    if not fine or weight.min() == weight.max() or error.min() == error.max():
        return float("nan"), torch.full((GROUPS,), torch.nan)
    rho = extra("scipy.stats").spearmanr(weight.numpy(), error.numpy()).statistic
    alike = (weight == weight[:, None]).float()  # at the floor many weights are
    shared = alike @ error / alike.sum(1) / error.mean()
    return float(rho), torch.stack([part.mean() for part in shared[weight.argsort()].tensor_split(GROUPS)])
