"""Attention's kernel is chosen by measurement, on a GPU that is played here by given times."""

from dataclasses import replace

import pytest
import torch

from config import BadInput
from engine import graphs

TIMES = {"cudnn": 2.0, "flash": 1.0, "mem_efficient": 3.0}


@pytest.fixture
def gpu(monkeypatch, tiny):
    """Times of a machine → what it settles for, with what is typed; afterwards all kernels are allowed."""

    def settled(times, attention="auto"):
        monkeypatch.setattr(graphs, "pick_device", lambda cfg: "cuda")
        monkeypatch.setattr(graphs, "kernel_times", lambda cfg: times)
        cfg = graphs.settled(replace(tiny, attention=attention))
        assert cfg.device == "cuda"
        return cfg.attention

    yield settled
    graphs.allow(*TIMES, "math")


def allowed() -> list[str]:
    cuda = torch.backends.cuda
    asked = {"mem_efficient": cuda.mem_efficient_sdp_enabled, "math": cuda.math_sdp_enabled}
    asked |= {"cudnn": cuda.cudnn_sdp_enabled, "flash": cuda.flash_sdp_enabled}
    return sorted(name for name, is_allowed in asked.items() if is_allowed())


def test_the_fastest_is_chosen_and_said(gpu, capsys):
    assert gpu(TIMES) == "flash" and allowed() == ["flash", "math", "mem_efficient"], "flash takes no masks"
    said = capsys.readouterr()
    assert not said.out and "flash" in said.err and "'cudnn': 2.0" in said.err and "3.0" in said.err
    assert gpu({"mem_efficient": 1.0}) == "mem_efficient" and allowed() == ["math", "mem_efficient"]


def test_what_is_typed_wins(gpu):
    assert gpu(TIMES, "cudnn") == "cudnn" and allowed() == ["cudnn", "math"]


def test_what_a_gpu_lacks_is_refused(gpu):
    with pytest.raises(BadInput, match=r"attention=flash .* allowed: auto \| mem_efficient"):
        gpu({"mem_efficient": 0.003}, "flash")


def test_only_kernels_that_can_do_it_have_a_time(tiny):
    """A CPU has one of the three."""
    assert graphs.kernel_times(replace(tiny, device="cpu")).keys() == {"flash"} and len(allowed()) == 4


def test_no_kernel_that_can_do_it_leaves_all_of_them_on(tiny, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(graphs, "Timer", broken)
    monkeypatch.setattr(graphs, "pick_device", lambda cfg: "cuda")
    monkeypatch.setattr(graphs.nn.functional, "scaled_dot_product_attention", broken)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **how: zeros(*args, **how))
    assert graphs.settled(tiny).attention == "auto" and len(allowed()) == 4


def test_elsewhere_nothing_is_measured(tiny, capsys):
    assert graphs.settled(replace(tiny, device="cpu")).attention == "auto" and len(allowed()) == 4
    assert not capsys.readouterr().err
