"""Distribution matching distillation, and the family's one change to it: weights.

    x_t = (1 - t) x + t ε                           the student's clip x, noised           model.add_noise
    x̂_T = u + guidance (c - u)                      what the teacher sees in it            guided_x0
    g   = (x̂_critic - x̂_T) / mean|x - x̂_T|          direction of ∇ KL(student || teacher)  dmd_gradient
    g  += λ Dᵀ(g of the temporal differences D x)   Diagonal Distillation's motion term    motion_gradient
    L   = ½ mean( w ⊙ (x - sg[x - g])² )            so that ∂L/∂x = w ⊙ g / numel          dmd_loss
    L_c = mean |v_critic(x_t, t) - (ε - x)|²        the critic follows the student         critic_loss

DMD: Yin et al. 2024. w = 1 is Self Forcing; w = exp(β r) is Reward Forcing's Re-DMD; w = exp(β r) W_time
W_space is Stream-R1. The guidance here is the usual weight: 1 is no guidance, the papers' "3.0" is 4.0.
differs: scores and normaliser in fp32, an epsilon in the normaliser, a sample with a non-finite score is
dropped and reported (released code turns infinities into 3e38), and time is drawn inside [t_min, t_max]
rather than clamped to it.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from config import Config
from model import add_noise, guided_x0, shift_time, to_x0


def sample_t(rngs: list[torch.Generator], cfg: Config, device=None) -> Tensor:
    """One time per sample, warped towards noise, in [t_min, t_max] → (b f)."""
    u = torch.stack([torch.rand((), generator=g) for g in rngs]).to(device)
    t = cfg.t_min + (cfg.t_max - cfg.t_min) * shift_time(u, cfg.shift)
    return repeat(t, "b -> b f", f=cfg.frames)


@torch.no_grad()
def dmd_gradient(x, text, null, teacher, critic, t, noise, guidance, motion=0.0) -> tuple[Tensor, Tensor]:
    """x, noise (b f c h w), t (b f) → g (b f c h w) without gradient, and which samples are finite (b,) bool.

    Dropped samples have g = 0. The normaliser is one number per sample, so that every noise level pulls
    alike.
    """
    x = x.detach().float()
    xt = add_noise(x, noise, t)
    fake = to_x0(critic(xt, t, text)[0].float(), xt, t)
    real = guided_x0(teacher, xt, t, text, null, guidance)
    g = (fake - real) / _mean_abs(x - real)
    if motion:
        g = g + motion * motion_gradient(x, fake, real)
    finite = g.isfinite().flatten(1).all(1)
    return torch.where(rearrange(finite, "b -> b 1 1 1 1"), g, 0.0), finite


def motion_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Dᵀ of the DMD gradient of temporal differences, all (b f c h w) → (b f c h w).

    With D x = x[f+1] - x[f] this is the gradient of ½|D x - sg(D x - g_m)|², g_m = D(x̂_critic - x̂_T) /
    mean|D(x - x̂_T)|. It vanishes for errors that do not change over time. differs: in the released code this
    term is built without gradient and moves nothing.
    """
    g = (fake - real).diff(dim=1) / _mean_abs((x - real).diff(dim=1))
    pad = torch.zeros_like(g[:, :1])
    return torch.cat([pad, g], dim=1) - torch.cat([g, pad], dim=1)


def _mean_abs(x: Tensor) -> Tensor:
    return x.abs().mean(dim=(1, 2, 3, 4), keepdim=True) + 1e-6


def dmd_loss(x: Tensor, g: Tensor, w: Tensor | float = 1.0) -> Tensor:
    """½ mean(w ⊙ (x - sg[x - g])²) over (b f c h w): a scalar with ∂/∂x = w ⊙ g / numel. w broadcasts."""
    return 0.5 * (w * (x - (x - g).detach()).square()).mean()


def critic_loss(critic, x: Tensor, text: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Flow matching on the student's own clip x (b f c h w), no gradient to it → per sample (b,)."""
    x = x.detach()
    v, _ = critic(add_noise(x, noise, t), t, text)
    return (v - (noise - x)).square().mean(dim=(1, 2, 3, 4))
