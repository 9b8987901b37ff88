"""family/kl_tracing.py: the response is the posterior covariance, the flow is where the mark went."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from runs import in_process

from config import PRESETS, ROOT, BadInput
from engine.rng import randn, rng_for
from family import kl_tracing as kl

BAD = "levels=1 levels= frames=16 frames=0 clips=1 noises=0 seed=1 nets=no nets=assets/small".split()
TWO = replace(PRESETS["tiny"], objects=2, text_length=9)


def denoiser(clean):
    """x_t → clean estimate, as a net that returns velocity and no keys."""
    return lambda xt, t, text: ((xt - clean(xt)) / t[:, :, None, None, None], None)


def test_the_response_of_a_gaussian_denoiser_is_its_posterior_covariance():
    """Catches a wrong factor, a mark that is not scaled by 1 - t, and other noise in the second pass."""
    f, h, w, t = 3, 2, 2, 0.4
    root, x, delta = (torch.randn(*size, dtype=torch.float64) for size in ((12, 12), (2, f, 1, h, w), (12,)))
    sigma = root @ root.T + 0.1 * torch.eye(12, dtype=torch.float64)
    gain = (1 - t) * sigma @ ((1 - t) ** 2 * sigma + t**2 * torch.eye(12, dtype=torch.float64)).inverse()
    cov = sigma - (1 - t) * gain @ sigma
    assert torch.allclose(gain, (1 - t) / t**2 * cov, atol=1e-12, rtol=0)
    net = denoiser(lambda xt: (xt.flatten(1) @ gain.T).view_as(xt))
    noises, marked = torch.randn(2, 3, *x.shape[1:], dtype=torch.float64), x + delta.view(f, 1, h, w)
    maps = kl.trace(net, lambda z: z, x, [marked, x], None, t, noises, [0, 1, 2])
    wanted = (((1 - t) / t) ** 2 * cov @ delta).abs().view(1, f, h, w)
    assert (maps[0] - wanted).abs().max() < 1e-12
    assert (maps[1] == 0).all(), "no mark, no map"


def test_flow_follows_a_net_that_moves_what_it_sees_across_the_border():
    video01, points = torch.full((1, 2, 3, 32, 32), 0.2), torch.tensor([[5.5, 27.0]])
    marked = kl.tracer(video01, points)
    assert (marked[:, 1] == video01[:, 1]).all() and marked[0, 0, :, 26, 5].min() > 0.7, (
        "in frame 0, at (x, y)"
    )
    with pytest.raises(BadInput, match="outside"):
        kl.tracer(video01, points + 5)
    for d in product((0, 3, 15, 16, 31), (0, 7, 16, 30)):
        net = denoiser(lambda xt, d=d: torch.stack([xt[:, 0], xt[:, 0].roll(d[::-1], (-2, -1))], 1))
        maps = kl.trace(net, lambda z: z, video01, [marked], None, 0.5, torch.zeros(1, 1, 2, 3, 32, 32), [1])
        assert kl.apart(kl.flow(maps[0, :, 0]), points + torch.tensor(d)).max() < 0.01, d


def test_a_sample_does_not_know_its_batch(model, tiny):
    x, marked = (randn([rng_for(i) for i in k], 8, *tiny.latent_shape) for k in ((1, 2), (3, 4)))
    text, noises = torch.randn(2, 7, 16), randn([rng_for(5), rng_for(6)], 2, 8, *tiny.latent_shape)
    both = kl.trace(model, torch.abs, x, [marked], text, 0.5, noises, [1, 5])
    alone = kl.trace(model, torch.abs, x[1:], [marked[1:]], text[1:], 0.5, noises[1:], [1, 5])
    assert both.shape == (1, 2, 2, 4, 6) and torch.allclose(both[:, 1:], alone, atol=1e-5)
    few, more = (kl.scene(TWO, n, 3.0) for n in (2, 4))
    assert all(torch.equal(a, b[:2]) for a, b in zip(few, more, strict=True))


def test_a_scene_marks_one_object_and_a_spot_of_background():
    _, paths, _, ground, told = kl.scene(TWO, 16, 0.0)
    assert 2 < kl.apart(kl.scene(TWO, 16, 4.0)[2], paths[:, 0, 0]).max() <= 4 * 2**0.5
    assert kl.apart(ground[:, None], paths[:, :, 0]).min() > 9, "no object is there"
    step = (paths[:, 0, 1] - paths[:, 0, 0] + 16) % 32 - 16
    assert torch.allclose((told * step).sum(1), told.square().sum(1), atol=1e-4), "its pace, no weaving"


def test_a_row_of_the_table_by_hand():
    paths = torch.tensor(
        [[[[4.5, 4.5], [30.5, 4.5]], [[20.5, 20.5]] * 2]] * 3
    )  # the first moves 6 to the left
    paths[2, 1, 1] = torch.tensor([30.5, 8.5])  # in the third clip the other object comes too near
    maps = torch.zeros(2, 3, 32, 32)
    maps[0, :, 4, 28], maps[1, :, 0, 0] = 3.0, 4.0  # found 2 too far; the background's energy is 16 of 25
    row = kl.row(maps, 1, paths, paths[:, 0, 0], torch.tensor([[-6.0, 1.0]] * 3)).replace("±0.00", "").split()
    assert row == ["2", "1.00", "1.00", "2.00", "2.00", "-4.00", "1.00", "0.64"]


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_said_before_the_work(words, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(monkeypatch, kl, f"--{words}", f"--out={tmp_path}/x.png")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_prints_a_table_and_its_picture(nets, monkeypatch, tmp_path, capsys):
    out = tmp_path / "a/x.png"
    in_process(monkeypatch, kl, f"--nets={nets}", "--clips=2", "--levels=.5", "--noises=1", f"--out={out}")
    assert capsys.readouterr().out.splitlines()[4:] == [str(out)] and out.is_file()


@pytest.mark.slow
def test_the_shipped_teacher_knows_which_object_was_marked(monkeypatch, tmp_path, capsys):
    run = ["--clips=32", "--noises=1", "--levels=.5", "--frames=4", f"--out={tmp_path}/x.png"]
    in_process(monkeypatch, kl, f"--nets={ROOT}/assets/two", *run)
    _, _, n, own, *_ = capsys.readouterr().out.splitlines()[1].split()
    assert int(n) >= 8 and float(own) >= 0.8
