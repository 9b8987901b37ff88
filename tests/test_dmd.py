"""Distribution matching: exact gradients, per-sample bookkeeping, and Gaussians, for which everything is
known."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from config import Config
from dmd import critic_loss, dmd_gradient, dmd_loss, motion_gradient, sample_t
from engine.rng import rng_for
from model import add_noise, guided_x0, to_x0
from reward import rollout_weight

SHAPE = (4, 3, 2, 5)  # f c h w


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(x: torch.Tensor) -> torch.Tensor:
    """(b f) → (b f 1 1 1)."""
    return x[:, :, None, None, None]


def gaussian(mean, std):
    """The exact net for data of this normal distribution: its x-prediction is the posterior mean."""

    def net(xt, t, text):
        u = spread(t)
        gain = (1 - u) * std**2 / ((1 - u) ** 2 * std**2 + u**2)
        return (xt - mean - gain * (xt - (1 - u) * mean)) / u, None

    return net


def listener(xt, t, text):
    """A net that predicts what the text says: the mean of each sample's words, and a bit of x_t."""
    return text.mean((1, 2))[:, None, None, None, None] + 0.1 * xt, None


@pytest.fixture
def clips():
    """x, noise (3 f c h w) on three scales, t (3 f), text (3 l e), null (1 l e)."""
    x = draw(0, 3, *SHAPE) * torch.tensor([0.1, 1.0, 8.0])[:, None, None, None, None]
    t = torch.tensor([0.1, 0.5, 0.9])[:, None].expand(3, SHAPE[0])
    return x, draw(1, 3, *SHAPE), t, draw(2, 3, 2, 4), torch.zeros(1, 2, 4)


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 1, 1, 1, 1), (3, 4, 1, 2, 5), (3, *SHAPE)])
def test_gradient_of_the_loss(shape):
    """Catches a missing half, a mean over the wrong axes, weights inside the square, and weights that are
    normalised once more."""
    x = draw(0, 3, *SHAPE).double().requires_grad_()
    g, w = draw(1, 3, *SHAPE).double(), draw(2, *shape).double().exp()
    dmd_loss(x, g, w).backward()
    torch.testing.assert_close(x.grad, w * g / x.numel(), rtol=1e-10, atol=1e-14)


def test_loss_does_not_move_the_target():
    """Catches a target that is not detached, whose gradient would cancel the loss'."""
    x, g = draw(0, 2, *SHAPE).requires_grad_(), draw(1, 2, *SHAPE).requires_grad_()
    dmd_loss(x, g).backward()
    assert g.grad is None and x.grad.abs().max() > 0


# -- the score difference --------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance(clips, guidance):
    """Catches the papers' convention c + g (c - u), swapped halves, and a null text that is not broadcast."""
    x, _, t, text, null = clips
    c, u = (listener(x, t, words)[0] for words in (text, null.expand_as(text)))
    expected = to_x0(u + guidance * (c - u), x, t)
    torch.testing.assert_close(guided_x0(listener, x, t, text, null, guidance), expected)


def test_nothing_to_learn_from_oneself(clips):
    """Catches a critic that is asked at another time, about another clip or with other words."""
    x, noise, t, text, null = clips
    g, finite = dmd_gradient(x, text, null, listener, listener, t, noise, 1.0, motion=0.5)
    assert finite.all() and torch.equal(g, torch.zeros_like(g))
    g, _ = dmd_gradient(x, text, null, listener, listener, t, noise, 3.0)
    assert g.abs().flatten(1).amax(1).min() > 0


def test_formula(clips):
    """Catches a flipped sign, a normaliser of another quantity, and gradient that reaches the student."""
    x, noise, t, text, null = clips
    x = x.requires_grad_()
    teacher, critic = gaussian(1.0, 0.5), gaussian(-1.0, 2.0)
    g, _ = dmd_gradient(x, text, null, teacher, critic, t, noise, 1.0)
    assert not g.requires_grad
    with torch.no_grad():
        xt = add_noise(x, noise, t)
        fake, real = (to_x0(net(xt, t, text)[0], xt, t) for net in (critic, teacher))
        for i in range(3):
            expected = (fake[i] - real[i]) / (x[i] - real[i]).abs().mean()
            torch.testing.assert_close(g[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("motion", [0.0, 0.3])
def test_samples_are_normalised_one_by_one(clips, motion):
    """Catches a normaliser over the whole batch, in which one loud sample silences the others."""
    x, noise, t, text, null = clips
    args = (gaussian(1.0, 0.5), gaussian(-1.0, 2.0))
    together, _ = dmd_gradient(x, text, null, *args, t, noise, 1.0, motion)
    for i in range(3):
        one = slice(i, i + 1)
        alone, _ = dmd_gradient(x[one], text[one], null, *args, t[one], noise[one], 1.0, motion)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["clip", "teacher", "critic"])
def test_a_broken_sample_is_dropped(clips, poison, place):
    """Catches a NaN that spreads over the batch, and one that is replaced and then learned from unnoticed."""
    x, noise, t, text, null = clips
    teacher, critic = gaussian(1.0, 0.5), gaussian(-1.0, 2.0)
    whole, _ = dmd_gradient(x, text, null, teacher, critic, t, noise, 1.0, 0.3)

    def broken(net):
        def poisoned(xt, t, text):
            v = net(xt, t, text)[0].clone()
            v[1, 2, 0, 1, 3] = poison
            return v, None

        return poisoned

    x = x.clone()
    if place == "clip":
        x[1, 0, 0, 0, 0] = poison
    teacher, critic = (broken(n) if place == k else n for n, k in ((teacher, "teacher"), (critic, "critic")))
    g, finite = dmd_gradient(x, text, null, teacher, critic, t, noise, 1.0, 0.3)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(g[1], torch.zeros_like(g[1]))
    assert torch.equal(g[[0, 2]], whole[[0, 2]])


# -- the motion term -------------------------------------------------------------------------------


def test_motion_gradient_is_the_transpose():
    """Catches a transposed difference with a wrong sign or a wrong end, against the matrix written out."""
    x, fake, real = (draw(i, 2, *SHAPE).double() for i in range(3))
    f = SHAPE[0]
    d = torch.eye(f, dtype=torch.float64)[1:] - torch.eye(f, dtype=torch.float64)[:-1]

    def apply(matrix, y):
        return torch.einsum("gf,bfchw->bgchw", matrix, y)

    norm = apply(d, x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = apply(d.T, apply(d, fake - real) / norm)
    torch.testing.assert_close(motion_gradient(x, fake, real), expected, rtol=1e-5, atol=1e-7)

    x = x.requires_grad_()
    target = (apply(d, x) - apply(d, fake - real) / norm).detach()
    (by_autograd,) = torch.autograd.grad(0.5 * (apply(d, x) - target).square().sum(), x)
    torch.testing.assert_close(motion_gradient(x.detach(), fake, real), by_autograd, rtol=1e-5, atol=1e-7)


def test_motion_gradient_ignores_what_does_not_move():
    """Catches a term that punishes a wrong colour as if it were a wrong motion."""
    x, real = draw(0, 2, *SHAPE), draw(1, 2, *SHAPE)
    still = draw(2, 2, 1, *SHAPE[1:])
    assert motion_gradient(x, real + still, real).abs().max() < 1e-5
    assert motion_gradient(x, real + draw(3, 2, *SHAPE), real).abs().mean() > 0.1


def test_motion_is_added(clips):
    """Catches a motion weight that goes nowhere."""
    x, noise, t, text, null = clips
    args = (x, text, null, gaussian(1.0, 0.5), gaussian(-1.0, 2.0), t, noise, 1.0)
    plain, half, full = (dmd_gradient(*args, motion)[0] for motion in (0.0, 0.5, 1.0))
    assert (full - plain).abs().max() > 0.01
    torch.testing.assert_close(full - plain, 2 * (half - plain), rtol=1e-4, atol=1e-5)


# -- Gaussians -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("mu, sigma, mean, std", [(-1.0, 0.5, 2.0, 1.0), (0.5, 1.5, 0.0, 0.7)])
def test_direction_is_the_gradient_of_the_divergence(level, mu, sigma, mean, std):
    """Catches a wrong sign or scale of the score difference: undone the normaliser, its average must be the
    exact gradient of KL(student || teacher) at this noise level, up to the known factor t²/(1 - t)², for mean
    and spread."""
    eps, noise = draw(0, 1, 2, 1, 400, 400), draw(1, 1, 2, 1, 400, 400)
    x, t = mu + sigma * eps, torch.full((1, 2), level)
    text = torch.zeros(1, 1, 1)
    teacher, critic = gaussian(mean, std), gaussian(mu, sigma)
    g, _ = dmd_gradient(x, text, text, teacher, critic, t, noise, 1.0)
    real = guided_x0(teacher, add_noise(x, noise, t), t, text, text, 1.0)
    direction = g * (x - real).abs().mean()

    m, s = (torch.tensor(v, requires_grad=True) for v in (mu, sigma))
    a = 1 - level
    theirs = Normal(a * torch.tensor(mean), (a**2 * torch.tensor(std) ** 2 + level**2).sqrt())
    kl_divergence(Normal(a * m, (a**2 * s**2 + level**2).sqrt()), theirs).backward()
    factor = level**2 / a**2  # from scores to clean estimates, and from x_t to x
    for ours, exact in ((direction, m.grad), (direction * eps, s.grad)):
        error = 5 * float(ours.std()) / ours.numel() ** 0.5 + 1e-5
        assert float(ours.mean()) == pytest.approx(factor * float(exact), abs=error)


def learn_mean(beta: float, sigma: float, start: float = -1.0) -> float:
    """Distil N(2, 1) into N(mu, sigma²) with the true critic; the reward is the clip's mean → final mu."""
    generator = torch.Generator().manual_seed(0)
    mu, text = torch.tensor(start, requires_grad=True), torch.zeros(64, 1, 1)
    for _ in range(300):
        eps, noise = torch.randn(2, 64, 1, 1, 2, 2, generator=generator)
        x, t = mu + sigma * eps, 0.02 + 0.96 * torch.rand(64, 1, generator=generator)
        g, _ = dmd_gradient(
            x, text, text[:1], gaussian(2.0, 1.0), gaussian(mu.detach(), sigma), t, noise, 1.0
        )
        w = rollout_weight(x.detach().mean((1, 2, 3, 4)), Config(beta=beta))
        w = w / w.mean()  # so that the step is as long with every beta
        (grad,) = torch.autograd.grad(dmd_loss(x, g, w[:, None, None, None, None]), mu)
        mu = (mu - 0.1 * grad).detach().requires_grad_()
    return float(mu.detach())


@pytest.mark.parametrize("sigma", [1.0, 0.5])
@pytest.mark.parametrize("start", [-1.0, 4.0])
def test_mean_reaches_the_teacher(sigma, start):
    """Catches any sign error on the way from the two nets to the student's parameters."""
    assert learn_mean(0.0, sigma, start) == pytest.approx(2.0, abs=0.03)


def test_reward_moves_the_mean():
    """Catches weights that prefer bad rollouts. The student is narrower than the teacher, as a few-step one
    is: with the teacher's own spread both scores differ by a constant, and no weight could change where that
    is zero."""
    plain, some, more = (learn_mean(beta, 0.5) for beta in (0.0, 2.0, 6.0))
    assert plain + 0.03 < some < more - 0.03


# -- the critic and time ---------------------------------------------------------------------------


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, xt, t, text):
        return self.gain * xt, None


def test_critic_learns_the_velocity(clips):
    """Catches the target x - ε, and a mean over the batch where a number per sample is promised."""
    x, noise, t, text, _ = clips
    oracle = critic_loss(lambda xt, t, text: (noise - x, None), x, text, t, noise)
    assert torch.equal(oracle, torch.zeros(3))
    seen = []
    loss = critic_loss(
        lambda xt, t, text: (seen.append(xt) or noise - x + spread(t), None), x, text, t, noise
    )
    torch.testing.assert_close(loss, t[:, 0].square(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0], (1 - spread(t)) * x + spread(t) * noise)


def test_critic_loss_leaves_the_student_alone(clips):
    """Catches the critic's loss pulling the student along."""
    x, noise, t, text, _ = clips
    x, critic = x.requires_grad_(), Critic()
    critic_loss(critic, x, text, t, noise).sum().backward()
    assert x.grad is None
    assert critic.gain.grad.abs() > 0


def test_times(tiny):
    """Catches times outside the bounds, a shift that is missing or that comes after the bounds, different
    times within a clip, and a draw that depends on the batch."""
    cfg = replace(tiny, t_min=0.1, t_max=0.9, shift=3.0)
    t = sample_t([rng_for("t", i) for i in range(2000)], cfg)
    assert t.shape == (2000, cfg.frames) and (t == t[:, :1]).all()
    assert 0.1 <= t.min() < 0.12 and 0.88 < t.max() <= 0.9
    assert float(t.median()) == pytest.approx(0.1 + 0.8 * 0.75, abs=0.02)  # u = .5 becomes .75
    assert torch.equal(sample_t([rng_for("t", 7)], cfg), t[7:8])
