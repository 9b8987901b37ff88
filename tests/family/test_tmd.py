"""The flow head: what it is before training, how often it runs, what it learns, what a cache sees of it."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import in_process

import family.tmd
from engine.rng import rng_for
from family.tmd import FlowHead, dream, matching_loss
from model import ListCache, RingCache
from rollout import rollout, stream


def with_flow(model, cfg, inner, gate=0.02):
    """The model with a flow head in place of its own one; its gates are random."""
    torch.manual_seed(1)
    net = copy.deepcopy(model)
    net.head = FlowHead(cfg, inner)
    net.head.load_state_dict(model.head.state_dict(), strict=False)
    for p in net.head.gate.parameters():
        p.data += gate * torch.randn_like(p)
    return net.eval()


@torch.no_grad()
def dreamt(net, cfg, *seeds, way=dream):
    return way(net, torch.ones(len(seeds), cfg.text_length, cfg.text_width), cfg, [rng_for(s) for s in seeds])


@pytest.mark.parametrize("inner", [1, 2])
def test_with_the_gate_shut_it_is_the_student_it_was_made_of(tiny, model, inner):
    """Bit for bit: would catch a gate that is open at first and a last inner step that is not whole."""
    assert torch.equal(dreamt(with_flow(model, tiny, inner, 0), tiny, 0), dreamt(model, tiny, 0, way=rollout))


def test_the_head_runs_n_times_and_the_backbone_once(tiny, model):
    # M L blocks and M N heads for a clip of one chunk, which nobody has to remember
    cfg, net, ran = replace(tiny, denoise=(1.0, 0.5), frames=2), with_flow(model, tiny, 3).train(), []
    for block in (*net.blocks, net.head.block):  # trains: in evaluation torch passes hooks by
        block.register_forward_hook(lambda block, *_: ran.append(block is net.head.block))
    dreamt(net, cfg, 0)
    assert (len(ran) - sum(ran), sum(ran)) == (2 * cfg.layers, 2 * 3)


def test_inner_noise_belongs_to_the_sample(tiny, model):
    """Would catch noise of the batch, or none: a sample is the same in any batch."""
    one, two = (with_flow(model, tiny, inner) for inner in (1, 2))
    torch.testing.assert_close(dreamt(two, tiny, 0, 1)[1:], dreamt(two, tiny, 1), rtol=1e-4, atol=1e-4)
    assert (dreamt(one, tiny, 1) - dreamt(two, tiny, 1)).abs().max() > 1e-3
    assert (dreamt(two, tiny, 1) - dreamt(two, tiny, 1, way=rollout)).abs().max() > 1e-3  # rngs have gone on


def test_gradient_flows_through_both_inner_steps(tiny, model):
    net, calls = with_flow(model, tiny, 2), []
    m, e = torch.randn(2, tiny.tokens, tiny.dim, requires_grad=True), torch.randn(2, 1, tiny.dim)
    guess, net.head.rngs = net.head.guess, [rng_for(0), rng_for(1)]
    net.head.guess = lambda *args: calls.append(guess(*args)) or calls[-1]
    (through,) = torch.autograd.grad(net.head(m, e).square().mean(), calls[0], retain_graph=True)
    for p in (m, net.head.see.weight, net.head.gate.weight, net.head.head.weight):
        assert torch.autograd.grad(calls[0], p, through, retain_graph=True)[0].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("inner, low, high", [(1, 0.0, 0.2), (4, 0.6, 1.2)])
def test_inner_steps_draw_where_one_step_answers_the_mean(tiny, model, inner, low, high):
    """A world of two clips, all 1 and all -1: would catch a target, a time or a step that does not fit."""
    cfg, text = replace(tiny, frames=2, denoise=(1.0,)), torch.ones(8, tiny.text_length, tiny.text_width)
    net, x = with_flow(model, cfg, inner, 0), (-1.0) ** torch.arange(8).view(-1, 1, 1, 1, 1)
    x, opt = x.expand(-1, 2, *cfg.latent_shape), torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(150):
        matching_loss(net, x, text, torch.ones(1), rng_for(step), cfg).backward()
        opt.step(), opt.zero_grad()
    drawn = dreamt(net, cfg, *range(64))
    assert low < drawn.abs().mean() < high and (inner == 1 or drawn.min() < -low < low < drawn.max())


@torch.no_grad()
def test_either_cache_gives_the_same_stream(tiny, model):
    net, text, made = with_flow(model, tiny, 2), torch.ones(1, tiny.text_length, tiny.text_width), []
    for cache in (ListCache(net, tiny), RingCache(net, tiny, 1)):
        net.head.rngs, parts = [rng_for(3)], stream(net, text, tiny, [rng_for(0)], cache=cache)
        made.append([next(parts) for _ in range(6)])
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)


def test_what_is_printed_and_what_is_refused(monkeypatch, tmp_path, capsys, tiny):
    clips = torch.rand(2, 4, 3, 32, 32), ["a red circle moving left slowly on a black background"] * 2
    monkeypatch.setattr(family.tmd, "student", lambda *arm: SimpleNamespace(ema=None, cfg=tiny))
    monkeypatch.setattr(family.tmd, "imagine", lambda *args: clips)
    in_process(monkeypatch, family.tmd, f"--out={tmp_path}")
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].count("(0.000 ±0.000)") == 4 and (tmp_path / "tmd.png").samefile(last)
    for word in ("small", "--beta=1", "--steps=0", "--warm=-1"):
        with pytest.raises(SystemExit, match="2"):
            in_process(monkeypatch, family.tmd, word)
    assert capsys.readouterr().err.count("not possible") == 4
