"""The flow head: what it is before training, how often it runs, what it learns, what a cache sees of it."""

import copy
from dataclasses import replace

import pytest
import torch
from runs import in_process

import family.tmd
from config import PRESETS
from engine.rng import rng_for
from family.tmd import FlowHead, dream, matching_loss
from model import ListCache, RingCache
from rollout import rollout, stream


def with_flow(model, cfg, gate=0.02, meanflow=False):
    """The model with a flow head in place of its own one; its gates are random."""
    torch.manual_seed(1)
    net = copy.deepcopy(model)
    net.head = FlowHead(cfg, meanflow)
    net.head.load_state_dict(model.head.state_dict(), strict=False)
    for p in net.head.gate.parameters():
        p.data += gate * torch.randn_like(p)
    return net.eval()


def words(cfg, n):
    return torch.ones(n, cfg.text_length, cfg.text_width)


def dreamt(net, cfg, inner, *seeds):
    return dream(net, words(cfg, len(seeds)), cfg, seeds, inner)


def test_with_the_gate_shut_it_is_the_student_it_was_made_of(tiny, model):
    """Bit for bit: would catch a gate that is open at first and a last inner step that is not whole."""
    with torch.no_grad():
        plain = rollout(model, words(tiny, 1), tiny, [rng_for("tmd", 0)])
    for inner, meanflow in ((1, False), (2, False), (2, True)):
        assert torch.equal(dreamt(with_flow(model, tiny, 0, meanflow), tiny, inner, 0), plain)


def test_the_head_runs_n_times_and_the_backbone_once(tiny, model):
    # M L blocks and M N heads for a clip of one chunk, which nobody has to remember
    cfg, net, ran = replace(tiny, denoise=(1.0, 0.5), frames=2), with_flow(model, tiny).train(), []
    for block in (*net.blocks, net.head.block):  # trains: in evaluation torch passes hooks by
        block.register_forward_hook(lambda block, *_: ran.append(block is net.head.block))
    dreamt(net, cfg, 3, 0)
    assert (len(ran) - sum(ran), sum(ran)) == (2 * cfg.layers, 2 * 3)


def test_inner_noise_belongs_to_the_sample(tiny, model):
    """A sample is the same in any batch. Would catch noise of the batch, or none."""
    net, told = with_flow(model, tiny), with_flow(model, tiny, meanflow=True)
    two = dreamt(net, tiny, 2, 0, 1)[1:]
    torch.testing.assert_close(two, dreamt(net, tiny, 2, 1), rtol=1e-4, atol=1e-4)
    for other in (dreamt(net, tiny, 1, 1), dreamt(told, tiny, 2, 1)):  # told where each step ends
        assert (other - two).abs().max() > 1e-3


def test_gradient_flows_through_both_inner_steps_and_chunks_are_alone(tiny, model):
    head, calls = with_flow(model, tiny).head, []
    m, e = torch.randn(2, 2 * tiny.tokens, tiny.dim, requires_grad=True), torch.randn(2, 2, tiny.dim)
    guess, head.rngs, head.inner = head.guess, [rng_for(0), rng_for(1)], 2
    head.guess = lambda *args: calls.append(guess(*args)) or calls[-1]
    out = head(m, e)
    (through,) = torch.autograd.grad(out.square().mean(), calls[0], retain_graph=True)
    for p in (m, head.see.weight, head.gate.weight, head.head.weight):
        assert torch.autograd.grad(calls[0], p, through, retain_graph=True)[0].abs().max() > 0
    (seen,) = torch.autograd.grad(out[:, : tiny.tokens].sum(), m)
    assert (seen.abs().amax((0, 2)) > 0).tolist() == tiny.tokens * [True] + tiny.tokens * [False]


def test_mean_flow_of_a_gaussian(tiny):
    """The exact u stays what it is, and one, two and three steps of it land on the data's quantiles. Would
    catch the sign of a step and of du/ds, a factor, and differences off the path."""
    head, mu, sigma = FlowHead(tiny, True).double(), 0.7, 0.3
    wide = lambda t: ((1 - t) ** 2 * sigma**2 + t**2).sqrt()  # noqa: E731
    z, s = torch.randn(50, 20, 1).double(), torch.rand(50, 20).double() * 0.8 + 0.1
    at, r = s[..., None], s * torch.rand(50, 20).double() * 0.9

    def exact(m, e, z, s, r):
        s, r = s[..., None], r[..., None]
        end = mu * (1 - r) + wide(r) / wide(s) * (z - mu * (1 - s))
        return z - s * (z - end) / (s - r)

    head.guess = exact
    x = mu + (1 - at) * sigma**2 / wide(at) ** 2 * (z - (1 - at) * mu)  # E[x | z]
    torch.testing.assert_close(head.matched(None, None, z, (z - x) / at, s, r), x, rtol=0, atol=2e-4)
    for head.inner in (1, 2, 3):
        head.rngs = [rng_for(i) for i in range(4)]
        z1 = torch.stack([torch.randn(6, head.see.in_features, generator=rng_for(i)) for i in range(4)])
        torch.testing.assert_close(head(torch.zeros(4, 6, 1), None), mu + sigma * z1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("meanflow", [False, True])
def test_what_training_asks_for(tiny, build, meanflow):
    """Would catch tokens that lie otherwise than the head's, another path, and times that do not fit."""
    cfg, asked, levels = replace(tiny, patch_time=2, denoise=(1.0, 0.5), shift=1.0), [], []
    net, x = with_flow(build(cfg), cfg, meanflow=meanflow), torch.randn(9, cfg.frames, *cfg.latent_shape)
    net.head.matched = lambda m, e, z, v, s, r: asked.extend((z, v, s, r)) or z - s[..., None] * v  # = x
    read, net.read_time = net.read_time, lambda t: levels.append(t) or read(t)
    assert matching_loss(net, x, words(cfg, 9), rng_for(0), cfg) < 1e-9
    z, v, s, r = asked
    assert levels[0].unique().tolist() == [0, 0.5, 1] and not levels[0][:, : cfg.frames].any()
    torch.testing.assert_close((z + (1 - s[..., None]) * v).std(), torch.tensor(1.0), rtol=0, atol=0.1)
    assert (r <= s).all() and torch.equal(r, s) != meanflow and 0.5 < (r == s).float().mean()
    assert (s.unflatten(1, (-1, cfg.tokens)).std(2) < 1e-6).all() and s.unique().numel() == 9 * cfg.chunks


def ring(rng, n):
    turn = torch.randint(8, (n, 1), generator=rng) * torch.pi / 4
    return torch.stack([turn.cos(), turn.sin()], 2) + 0.05 * torch.randn(n, 1, 2, generator=rng)


@pytest.mark.slow
def test_inner_steps_draw_where_one_step_answers_the_mean():
    """Of a ring of eight places a head alone, by energy distance. Would catch a wrong target or step."""
    size = dict(height=8, width=8, channels=2, frames=1, chunk=1, patch_time=1, dim=64, ffn=256, heads=1)
    cfg, true, off = replace(PRESETS["tiny"], **size), ring(rng_for("test"), 512)[:, 0], {}
    for meanflow in (False, True):
        torch.manual_seed(0)
        head, nothing = FlowHead(cfg, meanflow), torch.zeros(512, 1, 64)
        opt = torch.optim.AdamW(head.parameters(), 2e-3, (0.9, 0.99))
        slope = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, 150)
        for rng in map(rng_for, range(150)):
            x, z1, (s, r) = ring(rng, 256), torch.randn(256, 1, 2, generator=rng), torch.rand(2, 256, 1)
            r = torch.where((r < 0.25) & meanflow, 4 * r * s, s)
            made = head.matched(*2 * [nothing[:256]], x.lerp(z1, s[..., None]), z1 - x, s, r)
            (made - x).square().mean().backward()
            opt.step(), slope.step(), opt.zero_grad()
        for head.inner in (1, 2, 4):
            head.rngs = [*map(rng_for, range(512))]
            a, b = head(nothing, nothing).detach()[:, 0], true
            off[meanflow, head.inner] = sum(w * torch.cdist(*two).mean() for w, two in
                                            ((2, (a, b)), (-1, (a, a)), (-1, (b, b))))  # fmt: skip
    assert off[False, 1] > 0.4 > 0.3 > off[False, 2] > 0.15 > off[False, 4] > off[True, 2], off
    assert off[True, 1] < 0.25 and max(off[True, 2], off[True, 4]) < 0.08, off


@torch.no_grad()
def test_either_cache_gives_the_same_stream(tiny, model):
    net, made = with_flow(model, tiny), []
    for cache in (ListCache(net, tiny), RingCache(net, tiny, 1)):
        net.head.rngs, net.head.inner = [rng_for(3)], 2
        parts = stream(net, words(tiny, 1), tiny, [rng_for(0)], cache=cache)
        made.append([next(parts) for _ in range(6)])
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)


def test_what_is_printed_and_what_is_refused(monkeypatch, tmp_path, capsys):
    clips = torch.randn(2, 4, 12, 4, 4, generator=rng_for("clips"))
    fake = dict(SEEDS=2, CLIPS=2, trained=lambda *args: 0, dream=lambda *args: clips)
    for name, value in fake.items():
        monkeypatch.setattr(family.tmd, name, value)
    in_process(monkeypatch, family.tmd, f"--out={tmp_path}")
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[1].count(" 0.000 ±0.000") == 4 and (tmp_path / "tmd.png").samefile(last)
    for word in ("small", "--beta=1", "--steps=0", "--steps=-1"):
        with pytest.raises(SystemExit, match="2"):
            in_process(monkeypatch, family.tmd, word)
    assert capsys.readouterr().err.count("not possible") == 4
