"""Weighted DMD in one dimension: what exp(β r) gains where it leaves a student, exact and by steps."""

from itertools import product

import torch
from torch import Tensor

from config import Config, build
from engine.rng import rng_for
from model import shift_time
from reward import rollout_weight
from study.tables import interval


def law(s: float, beta: float, t: Tensor) -> float:
    """Gain in E r over the teacher N(0, 1), r = x, where weighted DMD at times t (n,) in (0, 1) leaves a
    student N(θ, s²) that can move its mean alone.

    Its clips under weights exp(β x) are N(θ + β s², s²). With a = 1 - t and k = a v / (a² v + t²), the slope
    of the posterior mean for variance v, the force is zero where θ Σ(1 - a k_1) = β s² Σ a (k_1 - k_s²). As
    t → 0, that is β (1 - s²).
    """
    t = t.double()
    a = 1 - t
    own, teacher = (a * v / (a**2 * v + t**2) for v in (s**2, 1.0))
    return float(beta * s**2 * (a * (teacher - own)).sum() / (1 - a * teacher).sum())


def law_measured(s: float, beta: float, t: Tensor, seed: int, steps: int = 300, batch: int = 2048) -> float:
    """The same by steps along the weighted gradient of samples: mean θ of the later half."""
    rng, theta, path = rng_for("law", seed), torch.zeros(()), []
    cfg = build("tiny", {"beta": beta, "group": batch, "batch": batch})
    pull = (t**2 / ((1 - t) ** 2 + t**2)).mean()  # how hard the teacher pulls sets the step size
    for _ in range(steps):
        x, noise = theta + s * torch.randn(batch, generator=rng), torch.randn(batch, generator=rng)
        at = t[torch.randint(len(t), (batch,), generator=rng)]
        a = 1 - at
        xt = a * x + at * noise
        fake = theta + a * s**2 / (a**2 * s**2 + at**2) * (xt - a * theta)
        theta = theta - 0.1 / pull * (rollout_weight(x, cfg) * (fake - a / (a**2 + at**2) * xt)).mean()
        path.append(theta)
    return float(torch.stack(path[steps // 2 :]).mean())


def law_rows(cfg: Config, beta: float = 0.5) -> list[tuple]:
    """(which times, s, exact, measured, half a 95 % interval of five seeds), gains in units of β."""
    warped = cfg.t_min + (cfg.t_max - cfg.t_min) * shift_time((torch.arange(256) + 0.5) / 256, cfg.shift)
    rows, times = [], {"t = .02": torch.tensor([0.02]), "t as in training": warped}
    for (when, t), s in product(times.items(), (0.25, 0.5, 0.75, 1.0, 1.25)):
        tried = [law_measured(s, beta, t, seed) / beta for seed in range(5)]
        rows.append((when, s, law(s, beta, t) / beta, *interval(tried)))
    return rows
