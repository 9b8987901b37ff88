"""Begin-of-video tokens: what they see, what sees them, what they cost, and where gradient goes."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import in_process

import config
import family.ada_bov
from codec import Codec
from engine.checkpoint import save_weights
from engine.rng import rng_for
from family.ada_bov import BovCache, dream, waited, with_tokens
from networks import load_net
from rollout import rollout
from world.words import tokenize


@pytest.fixture
def cfg(tiny):
    return replace(tiny, window=3, sink=0, sink_mode="none")


def student(build, cfg, n=3, follow=0.05):
    """A random student with random tokens."""
    torch.manual_seed(1)
    net = with_tokens(build(cfg), cfg, n)
    net.follow.data = follow * torch.randn_like(net.follow)
    return net.eval()


def read(net, cfg, *seeds):
    """Keys and values of the last layer's window after these chunks, and those of the tokens in it."""
    cache, own = BovCache(net, cfg), torch.zeros(2, cfg.tokens, cfg.heads, cfg.dim // cfg.heads)
    for seed in seeds:
        chunk = torch.randn(cfg.layers, 2, *own.shape, generator=rng_for(seed))
        cache.commit([tuple(pair) for pair in chunk])
    with torch.no_grad():
        keys, values = cache.join(cfg.layers - 1)(own, own)
    return keys, values, keys[:, : net.bov.shape[1]], values[:, : net.bov.shape[1]]


def same(one, two) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, two, strict=True))


def dreamt(net, cfg, chunks=6, way=dream, **how):
    given = torch.ones(2, cfg.text_length, cfg.text_width), cfg, [rng_for(0), rng_for(1)]
    return way(net, *given, chunks, **how)


def test_tokens_follow_the_newest_chunk_alone(build, cfg):
    """With W = 0 nothing. Would catch features of an old chunk, and some where there is no chunk yet."""
    still = student(build, cfg, follow=0.0)
    assert same(read(still, cfg, 1, 2)[2:], read(still, cfg, 1, 3)[2:])
    for part in (slice(cfg.dim), slice(cfg.dim, None)):  # γ alone, β alone
        moving = student(build, cfg)
        moving.follow.data[..., part] = 0
        assert not same(read(moving, cfg, 1, 2)[2:], read(moving, cfg, 1, 3)[2:])
        assert same(read(moving, cfg, 1, 2)[2:], read(moving, cfg, 4, 2)[2:])
        assert same(read(moving, cfg)[2:], read(still, cfg)[2:])


def test_keys_pass_the_blocks_own_norm(build, cfg):
    net = student(build, cfg)
    net.blocks[-1].self_attn.norm_k.weight.data.fill_(1.0)
    keys = read(net, cfg, 1)[2].flatten(2)
    torch.testing.assert_close(keys.square().mean(-1), torch.ones(2, 3), rtol=1e-3, atol=1e-3)


def test_no_tokens_are_a_cache_without_a_sink(build, cfg):
    net, other = student(build, cfg, n=0), student(build, cfg, n=3)
    plain = dreamt(net, cfg, way=rollout)
    torch.testing.assert_close(dreamt(net, cfg), plain, rtol=1e-4, atol=1e-4)
    assert (dreamt(other, cfg) - plain).abs().max() > 1e-2


def test_a_long_stream_is_like_a_fresh_one_and_needs_no_more(build, cfg):
    net = student(build, cfg)
    long, fresh = read(net, cfg, *range(50)), read(net, cfg, 48, 49)
    assert long[0].shape[1] == 3 + cfg.cached_chunks * cfg.tokens + cfg.tokens and same(long, fresh)


def test_gradient_reaches_tokens_and_what_moves_them(build, cfg):
    # though remembered keys carry none
    net = student(build, cfg, follow=0.0)
    dreamt(net, cfg, exit=1, grad=True).square().mean().backward()
    for p in (net.bov, net.follow):
        assert p.grad.flatten(1).abs().amax(1).min() > 0
    assert (net.bov.numel(), net.follow.numel()) == (3 * 48 * 2, 2 * 48 * 2 * 48)


def test_a_prompt_changes_and_nothing_is_rebuilt(build, cfg, monkeypatch):
    """Would catch a switch at another chunk, none, and a cache that is filled anew."""
    monkeypatch.setattr(family.ada_bov, "LONG", 1)
    net, own = student(build, cfg), torch.ones(2, cfg.text_length, cfg.text_width)
    alike, changed = (dreamt(net, cfg, chunks=6, then=text) for text in (own, -own))
    torch.testing.assert_close(alike[:, -cfg.frames :], dreamt(net, cfg), rtol=0, atol=0)
    where = (alike != changed).flatten(2).any(2).all(0)  # (f)
    assert where.tolist() == cfg.frames * [False] + (6 * cfg.chunk - cfg.frames) * [True]


def test_how_long_an_old_colour_lasts():
    """By hand: the new one is there from frame 0, 3, 5 (2 was too short), never (15 pixels), not before 2."""
    red, blue = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    video01 = torch.zeros(5, 9, 3, 8, 8)
    for clip, reds, blues in zip(video01, (0, 0, 0, 0, 20), (16, 16, 16, 15, 16), strict=True):
        clip.flatten(2)[:, :, :blues] = blue[:, None]
        clip.flatten(2)[:, :, 20 : 20 + reds] = red[:, None]
    for clip, off in ((1, (0, 1, 2)), (2, (0, 1, 4))):
        video01[clip, list(off)] = 0
    video01[4, 2:, :, 2:] = video01[0, 6:] = 0  # the red one goes; what was there for four frames has come
    assert waited(video01, torch.stack([red, blue])[:, None]).tolist() == [0, 3, 5, 6, 2]


def test_a_ring_is_refused(build, cfg, tmp_path):
    """sample.py, which streams with a RingCache, does not take such a student and leave its tokens out."""
    save_weights(tmp_path / "student.safetensors", student(build, cfg), cfg, "student")
    with pytest.raises(config.BadInput, match="student.safetensors"):
        load_net(tmp_path / "student.safetensors", cfg, "student")


def test_what_is_printed_and_what_is_refused(monkeypatch, tmp_path, capsys, build):
    cfg = config.build("tiny", dict(dim=48, heads=2, layers=1, ffn=48, frames=8, device="cpu"))
    read = partial(tokenize, length=cfg.text_length, width=cfg.text_width)
    run = SimpleNamespace(ema=student(build, cfg), cfg=cfg, read=read, codec=Codec(cfg).requires_grad_(False))
    monkeypatch.setattr(family.ada_bov, "student", lambda *arm: run)
    monkeypatch.setattr(family.ada_bov, "LONG", 2)
    monkeypatch.setattr(family.ada_bov, "CLIPS", 2)
    made = family.ada_bov.seen(run)
    monkeypatch.setattr(family.ada_bov, "seen", lambda run: made)
    in_process(monkeypatch, family.ada_bov, f"--out={tmp_path}")
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1].count("(0.000 ±0.000)") == 6
    assert (tmp_path / "ada_bov.png").samefile(last)
    for word in ("small", "--beta=1", "--steps=0"):
        with pytest.raises(SystemExit, match="2"):
            in_process(monkeypatch, family.ada_bov, word)
    assert capsys.readouterr().err.count("not possible") == 3
