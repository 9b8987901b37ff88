"""study/goodhart.py: what each way of pulling moves, and which way."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import study.goodhart as module
from config import build, cli


class Line(nn.Module):
    """A student whose clips are one number, θ + noise."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(()))


@pytest.fixture
def run(monkeypatch):
    """The reward is x, pixels say -|x - 1|: they agree up to 1."""
    net, cfg = Line(), build("tiny", {"method": "windowed"})
    monkeypatch.setattr(module, "rollout", lambda net, text, cfg, rngs, **how: net.at + torch.cat(
        [torch.randn(1, 1, 1, 1, 1, generator=g) for g in rngs]))  # fmt: skip
    monkeypatch.setattr(module, "measure", lambda video01, prompts: video01.flatten())
    monkeypatch.setattr(module, "three_axes", lambda x: {"looks": -(x - 1).abs()})
    monkeypatch.setattr(module, "draw", lambda run, *key, micro: ([torch.Generator()] * 4, None, None))
    monkeypatch.setattr(module, "update", lambda net, opt, cfg: (opt.step(), opt.zero_grad()))
    return SimpleNamespace(
        cfg=cfg, student=net, student_opt=torch.optim.SGD(net.parameters(), 0.25), read=lambda words: None,
        reward=lambda x, text: x.flatten(1)[:, :1].expand(-1, 3), codec=SimpleNamespace(decode=lambda x: x),
    )  # fmt: skip


WORDS = [["red", "circle", "left", "slowly", "black"]] * 3


def test_weights_go_from_the_mean_to_the_best(run):
    """β = 0 is the plain mean of the rollouts, a large β their best by the reward, whatever pixels say."""
    found = torch.stack([*module.weights(run, WORDS)])
    every = torch.stack([module.judged(run, module.clips(run, WORDS, k), WORDS) for k in range(16)])
    assert torch.allclose(found[0], every.mean(0)) and (found[1:, 0] > found[:-1, 0]).all()
    best = every[:, 0].argmax(0)
    assert torch.allclose(found[-1], every[best, :, range(3)].T, atol=0.1)


@pytest.mark.parametrize("way", [module.clip, module.student])
def test_gradients_climb_the_reward_and_nothing_else(run, way):
    """Catches a sign, a step too many before a measurement, and clips of other noise."""
    found = torch.stack([*way(run, WORDS)]).mean(2)
    steps = torch.tensor(module.HARDER[way.__name__], dtype=torch.float)
    size = 0.02 if way is module.clip else 0.25
    assert torch.allclose(found[:, 0] - found[0, 0], size * steps, atol=1e-3)


@pytest.mark.parametrize("argv", [["--seeds=1"], ["--clips=0"], ["--out=x.foo"], ["small"], ["--beta=3"]])
def test_bad_input(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goodhart", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli(module.main)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
