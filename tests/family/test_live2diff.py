"""Live2Diff: the warm-up sees both ways, the ways to look back differ, and what is measured is right."""

from dataclasses import replace

import pytest
import torch
from runs import in_process
from test_rollout import given, rngs, words

from family import live2diff
from family.live2diff import centre, judged, made, scenes, warm_up
from world.scene import World


@pytest.mark.parametrize("warm", [1, 2])
def test_warm_up_looks_both_ways(tiny, model, warm):
    """Chunk 1 changes chunk 0 when both are made together, and only then."""
    cfg = replace(tiny, sink=2, sink_mode="static", window=4, context="aligned")
    source = given(cfg, 4)
    other = [source[0], source[1] + 9, *source[2:]]
    a, b = (made(model, words(cfg, 2), z, rngs(2), cfg, "aligned", 0.6, warm) for z in (source, other))
    assert a.shape[1] == 4 * cfg.chunk
    assert ((a - b)[:, : cfg.chunk].abs().max() > 1e-3) == (warm == 2)
    assert (a - b)[:, 3 * cfg.chunk :].abs().max() > 1e-4  # it is remembered


def test_a_warm_up_of_one_is_a_chunk_alone(tiny, model):
    """Catches another level, other steps and a mask where there should be none."""
    source, text = given(tiny, 1), words(tiny, 2)
    (x,) = warm_up(model, text, rngs(2), source, (0.8,))
    noise = torch.stack([torch.randn(tiny.chunk, *tiny.latent_shape, generator=g) for g in rngs(2)])
    xt = 0.2 * source[0] + 0.8 * noise
    with torch.no_grad():
        v, _ = model(xt, torch.full((2, tiny.chunk), 0.8), text)
    torch.testing.assert_close(x, xt - 0.8 * v, atol=1e-4, rtol=1e-4)


def test_ways_to_look_back(tiny, model):
    """Without a past a chunk does not depend on the one before; with one it does, in each way otherwise."""
    source, text, found = given(tiny, 2), words(tiny, 2), {}
    other = [source[0] + 1, *source[1:]]
    for way in live2diff.WAYS:
        x, y = (made(model, text, z, rngs(2), tiny, way, 0.8)[:, tiny.chunk :] for z in (source, other))
        assert torch.equal(x, y) == (way == "no past")
        found[way] = x
    assert all((found["clean"] - found[way]).abs().max() > 1e-4 for way in ("last", "aligned", "no past"))


def test_centre_and_distance(tiny):
    """True positions, over the edge of the torus too."""
    cfg = live2diff.Config()
    drawn = World(cfg, "test").batch([("centre", i) for i in range(6)])
    off = (centre(drawn.video01) - drawn.position[:, 0] + 16) % 32 - 16
    assert off.norm(dim=-1).max() < 0.6
    moved = judged(drawn.video01.roll(10, -1), drawn.prompts, drawn.position[:, 0])
    torch.testing.assert_close(moved[:, 1], torch.full((6,), 10.0), atol=0.6, rtol=0)
    assert moved[:, 2].all() and moved[:, 3].all()


def test_scenes(tiny):
    """Another colour, all else as it was; the ground that was asked for; a clip whatever the batch."""
    cfg = live2diff.Config()
    video01, asked, paths = scenes(cfg, "white", 0, 6, 3)
    assert video01.shape[1] == 12 and all(m[-1] == "white" for m in asked)
    later, more, _ = scenes(cfg, "white", 4, 2, 3)
    assert torch.equal(later, video01[4:]) and more == asked[4:]
    wrong = judged(video01, [live2diff.caption(m) for m in asked], paths)
    assert not wrong[:, 3].any() and wrong[:, 1].max() < 1


def test_bad_input(monkeypatch, capsys):
    for flag in ("--strengths=0", "--strengths=1.5", "--clips=1", "--chunks=1", "--ground=pink", "--chunk=8"):
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, live2diff, flag)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
