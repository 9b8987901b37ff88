"""CausVid: the regression onto the teacher's paths."""

import shutil

import pytest
import torch
from runs import KEYS, ROOT, SMALL, in_process

import train
from config import Config, build, cli
from engine.rng import randn, rng_for
from family import causvid
from rollout import sample_teacher, step_grid


def gaussian(rho):
    """The exact velocity of two chunks (b 2 1 1 1) of variance 1 and correlation rho."""
    sigma, one = torch.tensor([[1, rho], [rho, 1]]).double(), torch.eye(2).double()

    def net(xt, t, text):
        now = float(t[0, 0])
        x0 = (1 - now) * sigma @ torch.linalg.inv((1 - now) ** 2 * sigma + now**2 * one)
        return ((xt.flatten(1) - xt.flatten(1) @ x0.T.to(xt)) / now).view_as(xt), []

    return net


@pytest.mark.parametrize("rho, slope", [(0.5, 0.9659), (0.9, 0.8473), (0.99, 0.7553)])
def test_a_causal_answer_is_a_mean(rho, slope):
    """The closed form: of what the whole noise decides, the first chunk's noise gives a ε_1; both give all.
    Catches a path that is no solution of the ODE."""
    cfg = Config(frames=2, chunk=1, patch_time=1, channels=1, height=8, width=8, guidance=1.0, shift=1.0)
    noise = torch.randn(20000, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    end = causvid.teacher_path(gaussian(rho), noise, torch.zeros(1, 1, 1), cfg, (0.0,), steps=100)[:, 0, 0]
    end, own, both = end.flatten(), noise[:, 0].flatten(), noise.flatten(1)
    assert float((end * own).mean() / own.square().mean()) == pytest.approx(slope, rel=0.02)
    left = end - both @ torch.linalg.lstsq(both, end[:, None]).solution[:, 0]
    assert float(left.var() / end.var()) < 0.01


def test_a_path_is_the_teachers_way(tiny, model):
    """Catches states of other levels and another solver than the one that samples the teacher."""
    text, rngs = torch.randn(2, tiny.text_length, tiny.text_width), lambda: [rng_for(0), rng_for(1)]
    noise = randn(rngs(), tiny.frames, *tiny.latent_shape)
    plain = causvid.teacher_path(model, noise, text, tiny, (1.0, 0.0), steps=5)
    assert torch.equal(plain[:, 0], noise)
    assert torch.equal(plain[:, 1], sample_teacher(model, text, tiny, rngs(), steps=5))
    grid = (*step_grid(tiny, 0), 0.0)
    line = causvid.teacher_path(lambda x, t, text: (torch.ones_like(x), []), noise, text, tiny, grid)
    for i, level in enumerate(grid):  # of a constant velocity a state tells its level
        torch.testing.assert_close(line[:, i], noise - (1 - level), rtol=1e-4, atol=1e-4)


def test_only_noisy_chunks_count(tiny, model):
    """Catches targets of chunks that are given, a mask with a future, one level for all chunks."""
    levels, text = (1.0, 0.5, 0.0), torch.randn(2, tiny.text_length, tiny.text_width)
    path = torch.randn(2, 3, tiny.frames, *tiny.latent_shape)
    level = torch.tensor([[0, 2, 1, 1], [1, 1, 2, 0]])

    def loss(path):
        return causvid.ode_loss(model, path, level, text, levels, tiny)

    given = path.clone()
    given[0, 1, 2:4] += 1  # chunk 1 of the first clip shows its clean state, not this one
    assert torch.equal(loss(path), loss(given))
    given[0, 1, 4:6] += 1
    assert not torch.equal(loss(path), loss(given))
    t, later = torch.full((2, tiny.frames), 0.5), path[:, 0].clone()
    plain = causvid.causal(model, later, t, text, tiny)
    later[:, 4:] += 1
    moved = causvid.causal(model, later, t, text, tiny) - plain
    assert moved[:, :4].abs().max() < 1e-5 and (moved[:, 4:].abs().amax((2, 3, 4)) > 1e-3).all()
    each = level.repeat_interleave(tiny.chunk, 1)
    shown = path[torch.arange(2)[:, None], each, torch.arange(tiny.frames)]
    wrong = causvid.causal(model, shown, torch.tensor(levels)[each], text, tiny) - path[:, -1]
    torch.testing.assert_close(loss(path), wrong[each < 2].square().mean())
    clean = torch.full_like(level, 2)
    assert causvid.ode_loss(model, path, clean, text, levels, tiny) == 0


def test_noised_clips(tiny, model):
    """Catches levels that are not the chunks' own, and chunks without gradient."""
    x, noise = torch.randn(2, 2, tiny.frames, *tiny.latent_shape)
    text = torch.randn(2, tiny.text_length, tiny.text_width)
    level = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    made = causvid.on_data(model, x, noise, level, text, (1.0, 0.0), tiny)
    kept = level.repeat_interleave(tiny.chunk, 1) == 1
    assert torch.equal(made[kept], x[kept]) and ((made - x)[~kept].abs().amax((1, 2, 3)) > 0.1).all()
    for part in causvid.on_data(model, x, noise, 0 * level, text, (1.0,), tiny).split(tiny.chunk, 1):
        (grad,) = torch.autograd.grad(part.square().sum(), model.patch_embedding.weight, retain_graph=True)
        assert grad.abs().max() > 0


def test_a_start_that_can_be_distilled(nets, tmp_path, monkeypatch, capsys):
    """Two steps of stage 1, one level a chunk, and a step of distillation from there."""
    cfg = build("tiny", SMALL | {"device": "cpu"})
    seen = []
    monkeypatch.setattr(causvid, "learn", lambda *a, learn=causvid.learn: seen.append(a[3]) or learn(*a))
    net = causvid.load_net(nets / "teacher.safetensors", cfg, "teacher")
    causvid.ode_start(net, cfg, causvid.Flags(out=tmp_path, paths=32, steps=2))
    levels = torch.cat([seen[0](step)[2] for step in range(20)])  # (n chunks)
    assert levels.unique().tolist() == [0, 1, 2, 3, 4] and (levels[:, 0] != levels[:, 1]).any()
    start = f"--start={tmp_path}/ode.safetensors"
    how = f"--nets={nets}", f"--out={tmp_path}/run", start, *KEYS, "--steps=1", "--batch=2"
    in_process(monkeypatch, train, *how)


@pytest.mark.parametrize("words, said", [
    (["--paths=8"], "16 paths"), (["--steps=0"], "1 step"), (["--beta=1"], "allowed"),
    (["--nets=."], "teacher.safetensors"),
])  # fmt: skip
def test_bad_input(monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)  # where there is a codec, but no teacher
    shutil.copy(ROOT / "assets/tiny/codec.safetensors", tmp_path)
    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit) as stopped:
        cli(causvid.main)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
