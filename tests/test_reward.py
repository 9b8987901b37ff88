"""Rewards: the network, the weight of a rollout, the balance of the axes, and the damage the network learns
from."""

import json

import pytest
import torch

from config import Config
from engine.rng import rng_for
from reward import Balancer, RewardModel, effective_share, rollout_weight
from world.corrupt import LOOKS, MOTION, worse_looks, worse_motion, wrong_words
from world.scene import World
from world.words import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPEEDS, caption, parse, tokenize

R = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.fixture
def judge(tiny) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(tiny, width=16, match=8)


def clip_and_text(cfg, b: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    video01 = torch.rand(b, 6, 3, cfg.height, cfg.width, generator=torch.Generator().manual_seed(0))
    captions = [[w, "circle", "left", "quickly", "black"] for w in ("red", "blue", "green")]
    return video01, tokenize(captions[:b], cfg.text_length, cfg.text_width)


# -- the network -----------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_the_batch(tiny, judge):
    """Catches a batch norm, and any other way of one clip into another's score."""
    video01, text = clip_and_text(tiny)
    alone = torch.cat([judge(video01[i : i + 1], text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(judge(video01, text), alone, rtol=1e-4, atol=1e-5)
    assert alone.shape == (3, 3) and alone.std(0).min() > 1e-4


@pytest.mark.parametrize("shift, scale", [(-1.0, 2.0), (0.0, 255.0), (0.0, 1.1)])
def test_pixels_out_of_range_are_refused(tiny, judge, shift, scale):
    """Catches clips in [-1, 1] or 0..255, which would be scored without a word."""
    video01, text = clip_and_text(tiny)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        judge(video01 * scale + shift, text)


def test_every_pixel_frame_has_a_say(tiny, judge):
    """Catches a reward that cannot be differentiated, which leaves saliency empty."""
    video01, text = clip_and_text(tiny)
    video01.requires_grad_()
    for axis in range(3):
        (grad,) = torch.autograd.grad(judge(video01, text)[:, axis].sum(), video01)
        assert grad.isfinite().all()
        assert grad.abs().amax((2, 3, 4)).min() > 0


def test_looks_do_not_depend_on_the_words(tiny, judge):
    """Catches axes in another order than AXES, and a text that is never read."""
    video01, text = clip_and_text(tiny)
    change = (judge(video01, text) - judge(video01, text.flip(0))).abs()[[0, 2]]
    assert change[:, 0].max() == 0 and change[:, 1:].min() > 1e-4


def test_scores_are_on_the_scale_of_the_buffers(tiny, judge):
    """Catches a mean and a spread that are saved and not used, or used the wrong way round."""
    raw = judge(*clip_and_text(tiny))
    judge.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    judge.std.copy_(torch.tensor([2.0, 4.0, 8.0]))
    torch.testing.assert_close(judge(*clip_and_text(tiny)), (raw - judge.mean) / judge.std)


# -- the weight of a rollout -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_exponential_weight(beta):
    """Catches a wrong sign or a lost beta."""
    torch.testing.assert_close(rollout_weight(R, Config(beta=beta)), (beta * R).exp())


def test_easy_prompts_get_no_weight():
    """Catches groups that are cut across prompts: a constant per prompt must change nothing."""
    cfg, per_prompt = Config(beta=1.0, group=2), torch.tensor([3.0, 3.0, -1.0, -1.0])
    w = rollout_weight(R, cfg)
    torch.testing.assert_close(w, rollout_weight(R + per_prompt, cfg))
    torch.testing.assert_close(w, torch.tensor([0.75, -0.75, 1.0, -1.0]).exp())
    alone = Config(beta=1.0)
    assert not torch.allclose(rollout_weight(R, alone), rollout_weight(R + per_prompt, alone))


def test_softmax_shares_out_a_prompt():
    """Catches a softmax over the whole batch, one that loses its scale, a NaN that spreads."""
    cfg, r = Config(beta=2.0, group=2, weight="softmax"), torch.tensor([1.0, 0.0, 7.0, 7.0])
    share = torch.tensor([2.0]).sigmoid().item()
    torch.testing.assert_close(rollout_weight(r, cfg), torch.tensor([2 * share, 2 - 2 * share, 1.0, 1.0]))
    broken = rollout_weight(torch.tensor([float("nan"), 0.0, 7.0, float("inf")]), cfg)
    assert broken.isnan().tolist() == [True, False, False, True] and broken[1] == broken[2] == 1
    with pytest.raises(ValueError, match="weight=softmax"):
        Config(weight="softmax")


def test_weights_are_constants():
    """Catches a weight through which the student could raise its reward directly."""
    assert not rollout_weight(R.clone().requires_grad_(), Config()).requires_grad


@pytest.mark.parametrize(
    "w, share", [([2, 2, 2, 2], 1.0), ([1, 0, 0, 0], 0.25), ([3, 1], 0.8), ([1, 1, 0, 0], 0.5)]
)
def test_effective_share(w, share):
    """Catches a share that depends on the size of the batch or of the weights."""
    assert effective_share(torch.tensor(w, dtype=torch.float32)) == pytest.approx(share)


# -- balance ---------------------------------------------------------------------------------------

# four steps of two rollouts; improvements of the later two over the earlier two, worked out by hand: 1, 0, 4
HISTORY = torch.tensor(
    [[[1.0, 5, -1], [-1, 5, 1]], [[0, 5, 0], [0, 5, 0]], [[2, 5, 3], [0, 5, 5]], [[2, 3, 6], [0, 7, 2]]]
)


def fed(cfg: Config, steps: int = 4) -> tuple[Balancer, torch.Tensor]:
    """A balancer that has seen some of the history, and what it made of the last step."""
    balancer = Balancer(cfg)
    rewards = [balancer(scores) for scores in HISTORY[:steps]]
    return balancer, rewards[-1]


@pytest.mark.parametrize("balance", ["penalty", "none"])
def test_warm_up_is_the_plain_mean(balance):
    """Catches improvements that are measured on half a window."""
    _, r = fed(Config(balance=balance, balance_window=4), steps=3)
    torch.testing.assert_close(r, HISTORY[2].mean(1))


def test_penalty_by_hand():
    """Catches a penalty on the spread of the scores where that of the improvements is meant."""
    cfg = Config(balance="penalty", balance_window=4, balance_strength=0.5, accumulate=2)
    balancer, r = fed(cfg)  # a window of micro-batches, as many as it says whatever is accumulated
    assert balancer.improvement().tolist() == [1, 0, 4]
    torch.testing.assert_close(
        r, HISTORY[3].mean(1) - 0.5 * (13 / 3) ** 0.5
    )  # the variance of 1, 0, 4 is 13/3


def test_axes_that_improve_alike_leave_the_mean():
    """Catches a balance that has a taste of its own."""
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    balancer = Balancer(Config(balance="penalty", balance_window=4))
    r = [balancer(scores + i) for i in range(6)][-1]
    torch.testing.assert_close(r, torch.tensor([7.0]))


def test_balancer_state():
    """Catches a resumed run that starts with an empty memory, and one that never forgets."""
    cfg = Config(balance="penalty", balance_window=4)
    old, _ = fed(cfg)
    new = Balancer(cfg)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    for i in range(20):
        scores = HISTORY[i % 4].roll(i, dims=1)
        assert torch.equal(old(scores), new(scores))
        assert len(new.state_dict()) == len(old.state_dict()) == 4


def test_one_axis_is_its_own_mean():
    """Catches the spread of a single number, which is not a number."""
    balancer = Balancer(Config(balance="penalty", balance_window=2, axes=("MQ",)))
    r = [balancer(torch.tensor([[1.0], [float(i)]])) for i in range(4)][-1]
    torch.testing.assert_close(r, torch.tensor([1.0, 3.0]))


def test_a_broken_rollout_does_not_break_the_others():
    """Catches one rollout's NaN that enters the history and makes all rewards NaN for a window."""
    balancer, _ = fed(Config(balance="penalty", balance_window=4))
    broken = HISTORY[0].clone()
    broken[1] = float("nan")
    assert balancer(broken)[0].isfinite()
    assert balancer(HISTORY[0]).isfinite().all()


def test_a_broken_reward_does_not_break_the_others():
    """Catches a mean that hands one rollout's NaN to its group."""
    r = torch.tensor([0.5, float("nan"), 2.0, 0.0])
    assert rollout_weight(r, Config(beta=1.0, group=2)).isfinite().tolist() == [True, False, True, True], (
        "its own stays broken"
    )


def test_shortest_window():
    """Catches the mean of an empty half: the shortest window that is allowed must give a number."""
    balancer = Balancer(Config(balance_window=2))
    assert all(balancer(scores).isfinite().all() for scores in HISTORY)
    with pytest.raises(ValueError, match="balance_window"):
        Config(balance_window=1)


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    """One clip of twice 16 frames per kind of motion."""
    world, clips = World(Config()), {}
    for i in range(200):
        motion = world.captions([("damage", i)])[0][2]
        if motion not in clips:
            clips[motion] = world.batch([("damage", i)], torch.arange(32)).video01[0]
    return clips


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("kind", LOOKS)
def test_worse_looks(clips, kind, motion):
    """Catches damage that does nothing to some clips, changes their size or leaves the range of pixels."""
    good = clips[motion][:16]
    for seed in range(4):
        bad = worse_looks(good, rng_for("looks", seed), kind)
        assert bad.shape == good.shape and 0 <= bad.min() and bad.max() <= 1
        assert (bad - good).abs().max() > 0.02


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("kind", MOTION)
def test_worse_motion(clips, kind, motion):
    """Catches stalls and reversals of what stands still, which change nothing, and damage to the pictures:
    every frame must have the pixels of a frame of the long clip, wherever they now lie."""
    long01 = clips[motion]
    for seed in range(6):
        bad = worse_motion(long01, rng_for("motion", seed), kind)
        assert bad.shape == long01[:16].shape
        assert (bad - long01[:16]).abs().max() > 0.1
        ours, theirs = (x.flatten(2).sort(-1).values for x in (bad, long01))
        assert (ours[:, None] == theirs[None]).all(-1).all(-1).any(1).all()


def test_damage_is_drawn_from_all_kinds(clips):
    """Catches a kind that is never drawn, and draws that are not reproducible."""
    for worsen, kinds, clip in (
        (worse_looks, LOOKS, clips["left"][:16]),
        (worse_motion, MOTION, clips["left"]),
    ):
        drawn = [worsen(clip, rng_for("kind", i)) for i in range(60)]
        assert all(torch.equal(a, worsen(clip, rng_for("kind", i))) for i, a in enumerate(drawn[:10]))
        first = torch.stack([torch.randint(len(kinds), (), generator=rng_for("kind", i)) for i in range(60)])
        assert len(first.unique()) == len(kinds)


@pytest.mark.parametrize("objects", [1, 2])
def test_wrong_words(objects):
    """Catches a wrong caption that is right, that is wrong in two places, or that is no caption at all."""
    world, places = World(Config(objects=objects, text_length=9), drop_words=0.3), set()
    kinds = [tuple(COLOURS), SHAPES, tuple(MOTIONS), tuple(SPEEDS)] * objects + [tuple(BACKGROUNDS)]
    for i, right in enumerate(world.batch([("words", i) for i in range(200)], torch.zeros(1).long()).words):
        wrong = wrong_words(right, rng_for("wrong", i))
        (place,) = [k for k, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
        assert right[place] and right[place] in kinds[place] and wrong[place] in kinds[place]
        assert parse(caption(wrong), objects) == wrong
        places.add(place)
    assert len(places) == 4 * objects + 1
