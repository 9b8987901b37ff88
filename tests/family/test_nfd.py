"""Next-Frame Diffusion: what is kept, and what speculated chunks may see."""

from dataclasses import replace
from itertools import chain, islice
from unittest.mock import Mock

import pytest
import torch
from runs import in_process
from test_model import SINKS
from test_rollout import assert_same_kv, rngs, words

from engine.rng import rng_for
from family import nfd
from family.nfd import play, switching
from model import ListCache
from rollout import stream


def texts(cfg) -> list[torch.Tensor]:
    return [words(cfg, 2, seed) for seed in range(3)]


def video(*args, **how) -> torch.Tensor:
    return torch.cat([x for x, _ in play(*args, **how)], 1)


@pytest.mark.parametrize("sink", SINKS)
def test_one_chunk_ahead_is_the_stream(tiny, build, sink):
    """Catches other noise, another level and a cache that is filled otherwise, beyond eviction."""
    cfg = replace(tiny, **SINKS[sink])
    model, text = build(cfg), texts(cfg)
    with torch.no_grad():
        plain = torch.cat([*islice(stream(model, text[0], cfg, rngs(2)), 6)], 1)
    torch.testing.assert_close(video(model, text, cfg, rngs(2), [0] * 6, 1), plain, atol=1e-4, rtol=1e-4)


def test_what_is_discarded_leaves_no_trace(tiny, build, monkeypatch):
    """Kept chunks are the same whatever was discarded after them, and they alone, clean, are remembered. A
    round has S + 1 passes."""
    cfg = replace(tiny, frames=14, window=0, sink=0, sink_mode="none")
    model, text, actions, caches, passes = build(cfg), texts(cfg), [0, 0, 1, 1, 1, 2], [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(nfd, "ListCache", lambda *a: caches.append(ListCache(*a)) or caches[-1])
    a, told = ([*play(model, text, cfg, rngs(2), actions, n)] for n in (4, 3))
    assert [(x.shape[1] // cfg.chunk, made) for x, made in a] == [(2, 4), (3, 4), (1, 1)]
    assert len(passes) == (len(a) + len(told)) * (4 + 1)
    for (x, _), (y, _) in zip(a, told, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    own, t = ListCache(model, cfg), torch.zeros(2, cfg.chunk)
    with torch.no_grad():
        for x, action in zip(torch.cat([x for x, _ in a], 1).split(cfg.chunk, 1), actions, strict=True):
            own.commit(model(x, t, text[action], own)[1])
    assert_same_kv(*(chain(*cache.chunks) for cache in (caches[0], own)))


def test_hedge_equals_what_is_known(tiny, model):
    """Catches a future that is chosen wrongly, other noise and mixing between futures."""
    actions = [0, 2, 1, 1, 0]
    known, hedged = (video(model, texts(tiny), tiny, rngs(2), actions, 1, hedge=h) for h in (False, True))
    torch.testing.assert_close(hedged, known, atol=1e-5, rtol=1e-5)


def test_kept_as_the_formula_says(tiny, monkeypatch):
    """2,000 rounds; a fake network."""
    monkeypatch.setattr(nfd, "denoise_chunk", lambda given, caches, *a: (a[3], []))
    monkeypatch.setattr(nfd, "Given", lambda *a: lambda *b: (None, []))
    monkeypatch.setattr(nfd, "ListCache", lambda *a: Mock(commit=len))
    monkeypatch.setattr(nfd, "randn", lambda *a: torch.zeros(1, tiny.chunk, 1, 1, 1))
    for name in ("Ahead", "rng_for"):
        monkeypatch.setattr(nfd, name, lambda *a: None)
    for p, chunks in ((0.0, 90), (0.25, 4800), (1.0, 90)):
        actions = switching(rng_for("kept", int(100 * p)), p, chunks)
        rounds = play(None, [torch.zeros(1)] * 4, tiny, rngs(1), actions, 3)
        kept = torch.tensor([x.shape[1] / tiny.chunk for x, made in rounds if made == 3])
        formula, wide = sum((1 - p) ** j for j in range(3)), 3 * kept.std() / len(kept) ** 0.5
        assert len(kept) >= chunks / 3 and (kept.mean() - formula).abs() <= wide + 1e-6


def test_bad_input(monkeypatch, capsys):
    for flag in ("--ahead=0", "--ahead=9", "--change=1.5", "--groups=0", "--chunk=8"):
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, nfd, flag)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
