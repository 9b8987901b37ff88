"""Saliency: the weight must land on the very cells and frames at which the reward looks."""

from dataclasses import replace

import pytest
import torch

from config import Config
from reward import RewardModel, effective_share
from saliency import factorise, fuse_axes, intra_weight, reward_saliency, to_latent_grid

# of the latent; nothing is square, so that swapped axes do not pass, and blocks of 2 x 2 cells fit
FRAMES, H, W, CELL = 4, 6, 10, 8
PIXELS = (FRAMES, 3, H * CELL, W * CELL)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def weights(reward, video01) -> torch.Tensor:
    """The way a training step goes: clip → W_intra (b f 1 h w)."""
    scores, saliency = reward_saliency(reward, video01, torch.zeros(len(video01), 1, 1))
    return intra_weight(to_latent_grid(saliency, H, W), scores, Config())


# -- where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame, row, column", [(0, 0, 0), (0, 2, 1), (1, 0, 4), (2, 1, 3), (3, 2, 4), (3, 2, 0)]
)
def test_argmax_is_where_the_reward_looks(frame, row, column):
    """Catches patches that are read in the wrong order, as in the released code, swapped rows and columns,
    and frames that are off by one."""

    def reward(video01, text):
        cell = video01[:, frame, :, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        return torch.stack([cell.square().sum((1, 2, 3))] * 3, dim=1)

    w = weights(reward, uniform(0, 2, *PIXELS))
    for sample in w[:, :, 0]:
        assert divmod(int(sample.argmax()), H * W) == (frame, row * W + column)
        assert (sample.flatten().topk(2).values.diff() < 0).all()


@pytest.mark.parametrize("frame", range(9))
def test_time_map_of_a_causal_codec(frame):
    """Catches latents cut as four frames each: latent 0 is frame 0 alone, latent k ends with frame 4k."""
    saliency = torch.zeros(1, 3, 9, H * CELL, W * CELL)
    saliency[:, :, frame] = 1
    seen = to_latent_grid(saliency, H, W, time_stride=4)
    assert seen.shape == (1, 3, 3, H, W)
    latent = -(-frame // 4)
    expected = torch.zeros(3)
    expected[latent] = 1 if frame == 0 else 0.25
    assert torch.equal(seen[0, 1, :, 1, 2], expected)


def test_cells_are_averages():
    """Catches a resize that samples pixels or blurs over the borders of cells."""
    pixels = uniform(1, 2, 3, FRAMES, H * CELL, W * CELL)
    cells = to_latent_grid(pixels, H, W)
    assert cells.shape == (2, 3, FRAMES, H, W)
    by_hand = pixels[1, 2, 3, 2 * CELL : 3 * CELL, 4 * CELL : 5 * CELL].mean()
    torch.testing.assert_close(cells[1, 2, 3, 2, 4], by_hand)
    torch.testing.assert_close(cells.mean(), pixels.mean())


# -- gradients -------------------------------------------------------------------------------------


@pytest.fixture
def judge(tiny) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(replace(tiny, text_width=4), width=16, match=8)


def test_saliency_is_each_axis_own_gradient(judge):
    """Catches gradients of the sum over axes or of a neighbour, and colours that cancel each other."""
    video01, text = uniform(0, 2, *PIXELS), uniform(1, 2, 3, 4)
    scores, saliency = reward_saliency(judge, video01, text)
    torch.testing.assert_close(scores, judge(video01, text))
    for i in range(2):
        for axis in range(3):
            clip = video01[i : i + 1].clone().requires_grad_()
            judge(clip, text[i : i + 1])[0, axis].backward()
            expected = clip.grad[0].abs().sum(1)
            torch.testing.assert_close(saliency[i, axis], expected, rtol=1e-3, atol=1e-6)


def test_nothing_carries_gradient(judge):
    """Catches a weight that the student could learn to bend, and a reward network that collects gradients."""
    codec = torch.nn.Parameter(torch.tensor(1.0))
    judge.zero_grad()
    with torch.no_grad():  # a training step calls it under no_grad as well
        saliency = reward_saliency(judge, uniform(0, 1, *PIXELS), uniform(1, 1, 3, 4))[1]
    assert saliency.max() > 0
    video01 = uniform(0, 1, *PIXELS) * codec
    scores, saliency = reward_saliency(judge, video01, uniform(1, 1, 3, 4))
    w = intra_weight(to_latent_grid(saliency, H, W), scores, Config())
    assert not any(x.requires_grad for x in (scores, saliency, w))
    assert codec.grad is None and all(p.grad is None for p in judge.parameters())


# -- fusion ----------------------------------------------------------------------------------------


def test_scale_of_an_axis_does_not_matter():
    """Catches axes that are fused in raw units, where the one with the largest logits takes everything."""
    maps, scores = uniform(0, 2, 3, FRAMES, H, W), uniform(1, 2, 3)
    louder = maps * torch.tensor([1.0, 1000.0, 1e-3])[:, None, None, None]
    torch.testing.assert_close(fuse_axes(louder, scores, 1.0), fuse_axes(maps, scores, 1.0))


@pytest.mark.parametrize("worst", range(3))
def test_worst_axis_dominates(worst):
    """Catches softmax(+r), which looks where the clip is good already."""
    maps = torch.full((1, 3, FRAMES, H, W), 0.1)
    for axis in range(3):
        maps[0, axis, axis, axis, axis] = 1.0
    scores = torch.tensor([[2.0, 2.5, 3.0]])
    scores[0, worst] = -2.0
    fused = fuse_axes(maps, scores, 1.0)[0]
    assert fused[worst, worst, worst] == fused.max()
    assert int(intra_weight(maps, scores, Config())[0, :, 0].argmax()) == worst * (H * W + W + 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_fusion_by_hand(temperature):
    """Catches a temperature that multiplies, and a softmax over the batch."""
    maps, scores = uniform(0, 2, 3, FRAMES, H, W), uniform(1, 2, 3)
    expected = torch.zeros(2, FRAMES, H, W)
    for i in range(2):
        a = [2.718281828 ** (-float(r) / temperature) for r in scores[i]]
        for axis in range(3):
            expected[i] += a[axis] / sum(a) * maps[i, axis] / maps[i, axis].mean()
    torch.testing.assert_close(fuse_axes(maps, scores, temperature), expected)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor_time, floor_space", [(0.2, 0.15), (0.0, 0.0), (0.9, 0.05), (0.05, 0.9)])
def test_means_and_floors(floor_time, floor_space):
    """Catches weights that change the size of the loss, and floors that are swapped or applied after the
    mean: the smallest weight is exactly floor times the largest, over time and within every frame."""
    saliency = uniform(0, 3, FRAMES, H, W) ** 4 * torch.tensor([1e-3, 1.0, 50.0])[:, None, None, None]
    saliency = saliency * torch.tensor([1.0, 2.0, 5.0, 3.0])[:, None, None]
    time, space = factorise(saliency, floor_time, floor_space)
    torch.testing.assert_close(time.mean(1), torch.ones(3))
    torch.testing.assert_close(space.mean((2, 3)), torch.ones(3, FRAMES))
    torch.testing.assert_close(time.amin(1) / time.amax(1), torch.full((3,), floor_time))
    torch.testing.assert_close(space.amin((2, 3)) / space.amax((2, 3)), torch.full((3, FRAMES), floor_space))
    assert torch.equal(time.argmax(1), saliency.mean((2, 3)).argmax(1))


def test_factors_by_hand():
    """Catches a minimum that is not subtracted, and a spatial map that is scaled over the whole clip."""
    saliency = torch.tensor(
        [[[[1.0, 3.0], [5.0, 2.0]], [[10.0, 10.0], [10.0, 50.0]]]]
    )  # frame means 2.75, 20
    time, space = factorise(saliency, 0.2, 0.15)
    torch.testing.assert_close(time, torch.tensor([[0.2, 1.0]]) / 0.6)
    first, second = torch.tensor([0.15, 0.5, 1.0, 0.25]), torch.tensor([0.15, 0.15, 0.15, 1.0])
    torch.testing.assert_close(
        space[0].flatten(1), torch.stack([first / first.mean(), second / second.mean()])
    )


def test_percentiles_by_hand():
    """Catches one bright cell that pushes others to the floor, and a floor that clamps."""
    cells = torch.cat([torch.linspace(0, 1, 21), torch.tensor([-9.0, 9.0])])  # 23 cells, two outliers
    low, high = cells.quantile(0.05), cells.quantile(0.95)
    expected = 0.15 + 0.85 * ((cells - low) / (high - low)).clamp(0, 1)
    _, space = factorise(cells.view(1, 1, 1, 23), 0.2, 0.15, percentile=True)
    torch.testing.assert_close(space.flatten(), expected / expected.mean())
    maps, scores = uniform(0, 2, 3, FRAMES, H, W) ** 4, uniform(1, 2, 3)
    flat, peaked = (intra_weight(maps, scores, Config(saliency_range=k)) for k in ("percentile", "minmax"))
    assert effective_share(flat.flatten()) > effective_share(peaked.flatten()) + 0.05


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("time", [True, False])
def test_intra_weight(space, time):
    """Catches crossed switches, a product whose mean is not 1, and a sample that sees its neighbours."""
    maps, scores = uniform(0, 3, 3, FRAMES, H, W), uniform(1, 3, 3)
    cfg = Config(space=space, time=time)
    w = intra_weight(maps, scores, cfg)
    assert w.shape == (3, FRAMES, 1, H, W)
    torch.testing.assert_close(w.mean((1, 2, 3, 4)), torch.ones(3))
    assert (w.std((3, 4)).min() > 0) == space
    assert (w.mean((3, 4)).std(1).min() > 1e-3) == time
    alone = [intra_weight(maps[i : i + 1], scores[i : i + 1], cfg) for i in range(3)]
    torch.testing.assert_close(w, torch.cat(alone))


@pytest.mark.parametrize("value", [0.0, 1e-20, 3.0])
def test_flat_map_is_plain_dmd(value):
    """Catches 0/0 where the reward has no preference."""
    maps = torch.full((2, 3, FRAMES, H, W), value)
    assert torch.equal(intra_weight(maps, torch.zeros(2, 3), Config()), torch.ones(2, FRAMES, 1, H, W))


def test_a_blind_reward_gives_ones():
    """Catches a crash or a NaN on a reward that has no gradient anywhere."""
    w = weights(lambda video01, text: 0 * video01.mean((2, 3, 4))[:, :3], uniform(0, 2, *PIXELS))
    assert torch.equal(w, torch.ones_like(w))
