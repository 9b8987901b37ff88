"""Begin-of-video tokens: what they see, what sees them, what they cost, and where gradient goes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import in_process

import family.ada_bov
from engine.rng import rng_for
from family.ada_bov import BovCache, BovStudent, dream
from rollout import rollout


@pytest.fixture
def cfg(tiny):
    return replace(tiny, window=3, sink=0, sink_mode="none")


def student(build, cfg, n=3, follow=0.05):
    """A random student with random tokens."""
    torch.manual_seed(1)
    net = BovStudent(cfg, n)
    net.load_state_dict(build(cfg).state_dict(), strict=False)
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
    assert torch.equal(dreamt(net, cfg), plain) and not torch.allclose(dreamt(other, cfg), plain)


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


def test_what_is_printed_and_what_is_refused(monkeypatch, tmp_path, capsys, tiny):
    clips = torch.rand(2, 4, 3, 32, 32), ["a red circle moving left slowly on a black background"] * 2
    monkeypatch.setattr(family.ada_bov, "student", lambda *arm: SimpleNamespace(ema=None, cfg=tiny))
    monkeypatch.setattr(family.ada_bov, "imagine", lambda *args: clips)
    in_process(monkeypatch, family.ada_bov, f"--out={tmp_path}")
    *lines, last = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 6
        and lines[1].count("(0.000 ±0.000)") == 5
        and (tmp_path / "ada_bov.png").samefile(last)
    )
    for word in ("small", "--beta=1", "--steps=0", "--tokens=-1"):
        with pytest.raises(SystemExit, match="2"):
            in_process(monkeypatch, family.ada_bov, word)
    assert capsys.readouterr().err.count("not possible") == 4
