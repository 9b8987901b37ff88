"""How good is a clip? Three axes, their balance, and the weight a rollout gets.

VQ visual quality, MQ motion quality, TA text alignment, after VideoAlign (Liu et al. 2025). The network is
trained by Bradley-Terry on pairs (world/corrupt.py), P(a beats b) = σ(r_a - r_b), an axis per kind of damage.

    r = mean_s r_s - λ std_s(Δ_s)        Stream-R1's balance; Δ_s: how axis s improves      Balancer
    w = exp(β r)                         Reward Forcing's and Stream-R1's rollout weight    rollout_weight
"""

from collections import deque

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from config import Config

AXES = ("VQ", "MQ", "TA")


class RewardModel(nn.Module):
    """`reward(video01, text)`: (b F 3 H W) in [0, 1], (b l e) → (b s), differentiable, of unit spread.

    A convolution per frame sees the frame and its change since the last one; a temporal convolution sees how
    that goes on. MQ and TA depend on the text through an inner product, so that one clip can be compared with
    many captions.
    """

    reads = "text"  # as the student does

    def __init__(self, cfg: Config, width: int = 128, match: int = 64):
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(6, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.GELU(),
            nn.Conv2d(64, width, 3, 2, 1), nn.GELU(),
        )  # fmt: skip
        self.time1 = nn.Conv1d(2 * width, width, 3, padding=1)
        self.time2 = nn.Conv1d(width, width, 3, padding=1)
        self.alone = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, 3))
        self.clip = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 3 * match))
        self.words = nn.Linear(cfg.text_width, 3 * match)
        self.register_buffer("uses_text", torch.tensor([0.0, 1.0, 1.0]))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def features(self, video01: Tensor) -> Tensor:
        """(b F 3 H W) in [0, 1] → (b k). Raises ValueError outside that range."""
        low, high = video01.detach().aminmax()
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"video01 must lie in [0, 1]; it spans [{low:.3f}, {high:.3f}]")
        x = video01 * 2 - 1
        change = F.pad(x.diff(dim=1), (0, 0, 0, 0, 0, 0, 1, 0))
        x = rearrange(torch.cat([x, 2 * change], dim=2), "b f c h w -> (b f) c h w")
        x = rearrange(self.frame(x), "(b f) c h w -> b f c h w", b=len(video01))
        x = torch.cat([reduce(x, "b f c h w -> b c f", how) for how in ("mean", "max")], dim=1)
        x = F.gelu(self.time1(x))
        x = torch.cat([x, F.gelu(self.time2(x))], dim=1)
        return torch.cat([x.mean(2), (x.var(2) + 1e-4).sqrt()], dim=1)

    def judge(self, features: Tensor, text: Tensor) -> Tensor:
        """(b k), (b l e) → (b s): what the clip is worth by itself plus how well it matches the text."""
        words = self.words(text).mean(1) * text.shape[1] ** 0.5
        match = rearrange(self.clip(features) * words, "b (s m) -> b s m", s=3).sum(-1)
        return (self.alone(features) + self.uses_text * match - self.mean) / self.std

    def forward(self, video01: Tensor, text: Tensor) -> Tensor:
        return self.judge(self.features(video01), text)

    def sampled(self, frames: int) -> None:
        """Which of a clip's frames are looked at; None: all."""


def bradley_terry(net: RewardModel, video01: Tensor, text: Tensor, rival_text: Tensor) -> Tensor:
    """video01: good, worse looks, worse motion (b each), rivals (b/2); text (4 b l e): right first."""
    b = text.shape[1]
    features = net.features(video01)
    good, looks, motion = (net.judge(features[i * b : (i + 1) * b], text[0]) for i in range(3))
    rival = net.judge(features[3 * b :], rival_text)
    real = good[: len(rival)]
    wrong = [net.judge(features[:b], t)[:, 2] for t in text[1:]]
    loss = -F.logsigmoid(good[:, 0] - looks[:, 0]).mean() - F.logsigmoid(good[:, 1] - motion[:, 1]).mean()
    loss = loss - F.logsigmoid(good[:, 2] - torch.stack(wrong)).mean()
    loss = loss - 0.3 * F.logsigmoid(real - rival).mean()
    level = (good - looks)[:, 1:].square().mean() + (good - motion)[:, 0].square().mean()
    return loss + 0.05 * level + 0.002 * good.square().mean()


class Balancer:
    """Turns axis scores (b s) into one reward (b,), knowing how each axis has been improving.

    Δ_s is the mean score of the later half of the last `balance_window` judged micro-batches, of all
    processes, minus that of the earlier half. The penalty is the same for all rollouts of a step, a global
    scale, which Adam all but cancels. Until the window is full the reward is the plain mean.
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.history: deque[list[float]] = deque(maxlen=cfg.balance_window)

    def improvement(self) -> Tensor | None:
        """Δ (s,), or None during warm-up."""
        if len(self.history) < self.history.maxlen:
            return None
        scores = torch.tensor(list(self.history))
        half = len(scores) // 2
        return scores[half:].mean(0) - scores[:half].mean(0)

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores (b s) of the global batch → reward (b,); remembers their mean."""
        scored = scores.float()[scores.isfinite().all(1)]
        if len(scored):
            self.history.append(scored.mean(0).tolist())
        delta = self.improvement()
        if delta is None or self.cfg.balance == "none" or len(delta) == 1:
            return scores.mean(1)
        return scores.mean(1) - self.cfg.balance_strength * delta.std()

    def state_dict(self) -> list[list[float]]:
        return list(self.history)

    def load_state_dict(self, history: list[list[float]]) -> None:
        self.history = deque(history, maxlen=self.history.maxlen)


def rollout_weight(r: Tensor, cfg: Config) -> Tensor:
    """Rewards (b,) of the global batch → weights (b,) > 0, without gradient.

    group > 1: neighbours in the batch share a prompt, and only what a rollout has over their mean counts:
    good rollouts are weighted, not easy prompts. A reward that is not finite has no finite weight: train.py
    drops and counts its rollout.
    """
    r = r.detach().masked_fill(~r.isfinite(), torch.nan)  # exp(-inf) would be a weight, 0
    if cfg.group > 1:
        r = rearrange(r, "(p k) -> p k", k=cfg.group)
        r = (r - r.nanmean(1, keepdim=True)).flatten()
    if cfg.weight == "softmax":
        r = rearrange(cfg.beta * r, "(p k) -> p k", k=cfg.group)
        w = r.masked_fill(r.isnan(), -torch.inf).softmax(1) * r.isfinite().sum(1, keepdim=True)
        return w.masked_fill(r.isnan(), torch.nan).flatten()
    return (cfg.beta * r).exp()


def effective_share(w: Tensor) -> float:
    """(Σw)² / (n Σw²) in (0, 1]: the effective share of a batch; 1/n = one rollout drives the step."""
    return float(w.sum().square() / (len(w) * w.square().sum()))
