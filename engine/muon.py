"""Muon for many small matrices: torch.optim.Muon's steps, all matrices of one shape at a time."""

import math

import torch


class Muon(torch.optim.Muon):
    """The same update and the same state. torch's own launches two dozen kernels a matrix and step, for all
    matrices of the preset `small` nearly as many as its forward and backward pass. And it always computes in
    bf16, far slower than fp32 on a CPU without bf16 products; here `dtype` decides."""

    def __init__(self, params, dtype: torch.dtype, **how):
        super().__init__(params, **how)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shapes: dict[tuple, list] = {}
        for p in group["params"]:
            shapes.setdefault(tuple(p.shape), []).append(p)
        for shape, params in shapes.items():
            grads = [p.grad for p in params]
            means = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))  # Nesterov's
            whole = orthogonal(
                ahead.to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            size = 0.2 * math.sqrt(max(shape))  # match_rms_adamw: as large as AdamW's steps
            torch._foreach_add_(params, list(whole.float().unbind()), alpha=-group["lr"] * size)


def adam_and_muon(net: torch.nn.Module, matrices: list, lr: float, dtype: torch.dtype) -> list:
    """AdamW, but Muon for `matrices`, which needs clearly fewer clips here (docs/log.md)."""
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=0.01)
    how = dict(dtype=dtype, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [adam, Muon(matrices, **how)] if matrices else [adam]


def orthogonal(x: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    """Matrices (m rows columns) with singular values moved towards 1, by Newton and Schulz."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
