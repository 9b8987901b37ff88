"""StreamDiffusionV2: chunks that share a pass are those that do not; levels and sinks by closed forms."""

from dataclasses import replace

import pytest
import torch
from runs import in_process
from test_model import SINKS
from test_rollout import given, made_over, rngs, words

from family import streamv2v
from family.streamv2v import batched, noise_level, stale_sink


def in_flight(model, cfg, source, strength, **how):
    return [x for x, _ in batched(model, words(cfg, 2), cfg, rngs(2), source, strength, **how)]


@pytest.mark.parametrize("sink", SINKS)
def test_chunks_in_flight_equal_the_sequential_stream(tiny, build, sink):
    """Beyond eviction; catches a row that reads or fills another's cache, other noise, another step's level,
    windows of different length in one pass, and a chunk that is lost at an end."""
    cfg = replace(tiny, context="aligned", **SINKS[sink])
    model, source = build(cfg), given(cfg, 7)
    both = (torch.cat(how(model, cfg, source, 0.95), 1) for how in (made_over, in_flight))
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_passes_and_when_a_chunk_leaves(tiny, model, monkeypatch):
    """Chunks + steps - 1 ticks, one pass each where windows are equally full, and what arrives is asked for
    when it is due."""
    cfg, asked, sizes = replace(tiny, context="aligned", window=3), [], []
    run = model.run
    monkeypatch.setattr(model, "run", lambda xt, *rest: sizes.append(len(xt) // 2) or run(xt, *rest))
    source, left = map(lambda z: asked.append(1) or z, given(cfg, 8)), []
    for _ in batched(model, words(cfg, 2), cfg, rngs(2), source, 0.95):
        left.append(len(asked))
    assert left == [min(k + 4, 8) for k in range(8)]
    filling, ticks = [1, 1, 1, 1, 1, 1, 2, 1, 1], 8 + 4 - 1
    assert sizes == [*filling, 3, 1, 4, 4, 4, 3, 2, 1] and len(sizes) == ticks + 6


def test_a_row_does_not_know_the_others(tiny, model):
    """Catches attention across rows: the newest chunk does not change older ones that share its passes."""
    cfg, source = replace(tiny, context="aligned"), given(tiny, 5)
    other = [*source[:4], source[4] + 9]
    a, b = (in_flight(model, cfg, z, 0.8) for z in (source, other))
    torch.testing.assert_close(torch.cat(a[:4], 1), torch.cat(b[:4], 1), atol=1e-6, rtol=1e-6)
    assert (a[4] - b[4]).abs().max() > 1e-2


def test_levels_of_a_chunk(tiny, model):
    """Catches a level that every sample or chunk shares."""
    cfg, source = replace(tiny, context="aligned"), given(tiny, 3)
    levels = [torch.tensor([[0.7], [0.8]])] * 3
    mixed, low = in_flight(model, cfg, source, 0.8, levels=levels), in_flight(model, cfg, source, 0.8)
    torch.testing.assert_close(mixed[0][1], low[0][1], atol=1e-5, rtol=1e-5)
    assert (mixed[0][0] - low[0][0]).abs().max() > 1e-3


def test_noise_level():
    """Falls with motion, between s0 - .1 and s0, and rests at s0 - .1 D."""
    frames = torch.zeros(3, 5, 3, 8, 8)
    frames[1, 2:], frames[2, 2:] = 0.05, 0.5
    level = torch.full((3, 1), 0.75)
    for _ in range(30):
        level = noise_level(frames, level, 0.75)
        assert ((level >= 0.65 - 1e-6) & (level <= 0.75 + 1e-6)).all()
    torch.testing.assert_close(level, torch.tensor([[0.75], [0.70], [0.65]]))


def test_stale_sink(tiny, build):
    """Catches the wrong sink, a sink that is replaced without cause, and one that stays."""
    cfg = replace(tiny, context="aligned", **SINKS["static2"])
    kv = [tuple(torch.randn(2, cfg.tokens, 2, 24) + 1 for _ in "kv") for _ in range(2)]
    away = [tuple(-z for z in pair) for pair in kv]
    assert stale_sink([kv, kv], kv, 0.99) is None and stale_sink([], kv, 0.9) is None
    assert stale_sink([kv, away], kv, 0.2) == 1 and stale_sink([away, kv], kv, 0.2) == 0
    model, source = build(cfg), given(cfg, 6)
    for tau, replaced in ((-1.1, 0), (1.1, 4 * 5)):  # in every step every chunk but the first
        *_, (_, count) = batched(model, words(cfg, 2), cfg, rngs(2), source, 0.95, tau=tau)
        assert count == replaced


def test_bad_input(monkeypatch, capsys):
    for flag in ("--clips=1", "--chunk=8", "--student=no.safetensors"):
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, streamv2v, flag)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
