"""Many small matrices at a time."""

from functools import partial

import pytest
import torch

from pretrain import Muon


@pytest.mark.parametrize("bf16, off", [(True, 0.02), (False, 0.05)])
@pytest.mark.parametrize("shape", [(24, 24), (24, 8), (8, 24)])
def test_all_matrices_of_a_shape_at_once_are_what_torch_makes_of_each(shape, bf16, off):
    """Three steps with momentum and weight decay, another shape beside. torch's rounds to bf16."""
    torch.manual_seed(0)
    start = [torch.randn(shape), torch.randn(shape), torch.randn(8, 8)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]
    moved = []
    for kind in (torch.optim.Muon, partial(Muon, bf16=bf16)):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        opt = kind(params, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            opt.step()
        moved.append([(p.detach() - q).flatten() for p, q in zip(params, start, strict=True)])
        buffers = [opt.state_dict()["state"][i]["momentum_buffer"].shape for i in range(3)]
        assert buffers == [p.shape for p in start]
    for one, many in zip(*moved, strict=True):
        assert (one - many).norm() < off * one.norm()
