"""Where and when does the reward look? Its pixel gradients become weights over frames and latent cells.

    S_s = |∂r_s / ∂pixel|, summed over colours, on the latent grid   reward_saliency, to_latent_grid
    S   = Σ_s softmax(-r / T)_s S_s / mean(S_s)                      fuse_axes: the weakest axis counts most
    W_time[f]      = norm(max(minmax_f(mean_hw S), floor))           factorise
    W_space[f,h,w] = norm_f(max(minmax_hw(S[f]), floor))             factorise
    W_intra = W_time W_space, mean 1                                 intra_weight

Stream-R1 (2026). Nothing here carries gradient into the student. differs: one reward forward serves the
scores and the three gradients; each axis' map is scaled before fusion (raw logits have unrelated scales);
maps are cut along the codec's own frame boundaries; everything is per sample. The released code reads its
patches in the wrong order, which scrambles the map from left to right.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor

from config import Config


def reward_saliency(reward, video01: Tensor, about, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(b F 3 H W) in [0, 1] and what the reward reads → scores (b s), |∂r_s/∂pixel| (b s F H W), no gradient.

    seen: the frames the reward looks at (None: all); each of the others takes the map of the nearest.
    """
    with torch.enable_grad():
        video01 = video01.detach().requires_grad_()
        scores = reward(video01, about)
        grads = [torch.autograd.grad(r, video01, retain_graph=True)[0] for r in scores.sum(0)]
    saliency = torch.stack([reduce(g.abs(), "b f c h w -> b f h w", "sum") for g in grads], dim=1)
    if seen is not None:
        nearest = seen[(torch.arange(video01.shape[1])[:, None] - seen).abs().argmin(1)]
        saliency = saliency[:, :, nearest.to(saliency.device)]
    return scores.detach(), saliency


def to_latent_grid(saliency: Tensor, h: int, w: int, time_stride: int = 1) -> Tensor:
    """(... F H W) → (... f h w) by area; causal: latent 0 = frame 0, k = frames s(k-1)+1 ... sk."""
    cells = reduce(saliency, "... f (h p) (w q) -> ... f h w", "mean", h=h, w=w)
    if time_stride == 1:
        return cells
    rest = reduce(cells[..., 1:, :, :], "... (f s) h w -> ... f h w", "mean", s=time_stride)
    return torch.cat([cells[..., :1, :, :], rest], dim=-3)


def fuse_axes(saliency: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """(b s f h w), (b s) → (b f h w)."""
    scale = reduce(saliency, "b s f h w -> b s 1 1 1", "mean").clamp(min=1e-12)
    a = rearrange((-scores / temperature).softmax(1), "b s -> b s 1 1 1")
    return (a * saliency / scale).sum(1)


def _floored(x: Tensor, floor: float, percentile: bool) -> Tensor:
    """Rows of (... n) to [0, 1], raised to the floor, to mean 1; a flat row becomes all ones.

    Published: from minimum to maximum, clamped at the floor, so that few peaks decide. percentile: from the
    5th to the 95th, and [0, 1] becomes [floor, 1].
    """
    ends = (0.05, 0.95) if percentile else (0.0, 1.0)
    low, high = (x.quantile(q, dim=-1, keepdim=True) for q in ends)
    spread = high - low
    x = torch.where(spread > 1e-6 * high, (x - low) / spread.clamp(min=1e-30), 1.0).clamp(0, 1)
    x = floor + (1 - floor) * x if percentile else x.clamp(min=floor)
    return x / x.mean(-1, keepdim=True)


def factorise(saliency: Tensor, floor_time: float, floor_space: float, percentile: bool = False):
    """(b f h w) → W_time (b f), W_space (b f h w), each of mean 1 (W_space in every frame)."""
    time = _floored(reduce(saliency, "b f h w -> b f", "mean"), floor_time, percentile)
    space = _floored(rearrange(saliency, "b f h w -> b f (h w)"), floor_space, percentile)
    return time, space.view_as(saliency)


def intra_weight(saliency: Tensor, scores: Tensor, cfg: Config) -> Tensor:
    """Axis maps on the latent grid (b s f h w) and scores (b s) → W_intra (b f 1 h w), mean 1 per sample."""
    fused = fuse_axes(saliency, scores, cfg.fuse_temperature)
    time, space = factorise(fused, cfg.floor_time, cfg.floor_space, cfg.saliency_range == "percentile")
    time = time if cfg.time else torch.ones_like(time)
    space = space if cfg.space else torch.ones_like(space)
    return rearrange(time, "b f -> b f 1 1 1") * rearrange(space, "b f h w -> b f 1 h w")
