"""The world: its language, its splits, its motion, and the objective measures that are calibrated on it."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from config import BadInput, Config
from engine.rng import rng_for
from world.corrupt import LOOKS, MOTION, worse_looks, worse_motion
from world.measure import ACCURACIES, mean, measure, three_axes
from world.scene import WEAVE, World, split_of
from world.words import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPEEDS, caption, parse, tokenize

SPLITS = ("train", "select", "test")
ALL = [
    [colour, shape, motion, speed, background]
    for colour, shape, motion, background in product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    for speed in ([""] if motion == "still" else SPEEDS)
]
RED = "a red circle moving left slowly on a black background"


def keys(n: int, name: str = "test") -> list[tuple]:
    return [(name, i) for i in range(n)]


# -- randomness ------------------------------------------------------------------------------------


def test_a_clip_is_a_function_of_its_key():
    """Catches a draw from the global generator, one that depends on the batch, and keys that are mixed up."""
    world = World(Config())
    torch.manual_seed(0)
    a = world.batch(keys(4))
    torch.manual_seed(1)
    b = world.batch([("other",), *keys(4)[2:]])
    assert torch.equal(a.video01[2:], b.video01[1:]) and a.prompts[2:] == b.prompts[1:]
    assert world.captions(keys(4)) == a.words
    assert len({float(v.mean()) for v in (*a.video01, b.video01[0])}) == 5


@pytest.mark.parametrize("times", [[0, 1, 2], [5], [3, 40]])
def test_a_clip_does_not_depend_on_how_long_one_looks(times):
    """Catches a start or a size that is drawn after as many numbers as frames were asked for: a sample with
    times of its own would then depend on the others in its batch."""
    world, at = World(Config()), torch.tensor(times)
    whole = world.batch(keys(3), torch.arange(64))
    torch.testing.assert_close(world.batch(keys(3), at).video01, whole.video01[:, at])


def test_generators_differ_by_every_part_of_the_key():
    """Catches parts of a key that are dropped or that run together."""
    some = [
        (0, "a", 1),
        (0, "a", 2),
        (0, "b", 1),
        (1, "a", 1),
        (0, "a", 1, 1),
        (0, "a"),
        (0, 1, "a"),
        ("a", 1, 0),
    ]
    draws = [float(torch.rand((), generator=rng_for(*key))) for key in some]
    assert len(set(draws)) == len(some)
    assert draws == [float(torch.rand((), generator=rng_for(*key))) for key in some]


# -- splits ----------------------------------------------------------------------------------------


def test_splits():
    """Catches a hash that changes between versions of Python, which would let students train on test
    captions, and splits of the wrong size."""
    sizes = Counter(split_of(meaning) for meaning in ALL)
    assert sum(sizes.values()) == 1080
    assert sizes["train"] > 0.75 * 1080 and min(sizes["select"], sizes["test"]) > 0.08 * 1080
    assert split_of(parse(RED, 1)) == "train"
    assert split_of(parse("a blue square standing still on a white background", 1)) == "test"
    assert split_of(parse("a purple triangle moving right slowly on a white background", 1)) == "select"


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_draws_its_own_captions(split):
    """Catches a split that is ignored when captions are drawn, and words that a split never shows."""
    meanings = World(Config(), split).captions(keys(400))
    assert {split_of(m) for m in meanings} == {split}
    for place, words in enumerate((COLOURS, SHAPES, MOTIONS, ["", *SPEEDS], BACKGROUNDS)):
        assert {m[place] for m in meanings} == set(words)
    moving = {(m[2], m[3]) for m in meanings}
    assert moving == {("still", ""), *product(list(MOTIONS)[:4], SPEEDS)}


# -- language --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects, drop_words", [(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)])
def test_captions_are_understood(objects, drop_words):
    """Catches a caption that means something else when it is read back, silent places included."""
    world = World(Config(objects=objects, text_length=9), drop_words=drop_words)
    batch = world.batch(keys(100), torch.zeros(1).long())
    for prompt, meaning in zip(batch.prompts, batch.words, strict=True):
        assert parse(prompt, objects) == meaning
        assert caption(parse(prompt, objects)) == prompt
    said = [{i for i, word in enumerate(words) if word or words[i - 1] == "still"} for words in batch.words]
    silent = set().union(*(set(range(4 * objects + 1)) - places for places in said))
    assert silent == ({*range(3, 4 * objects, 4), 4 * objects} if drop_words else set())


def test_forgotten_words_are_still_shown():
    """Catches a clip that changes when its caption says less."""
    whole, short = (World(Config(), drop_words=p).batch(keys(8)) for p in (0.0, 1.0))
    assert torch.equal(whole.video01, short.video01)
    assert all(words[3:] == ["", ""] for words in short.words)


@pytest.mark.parametrize(
    "prompt, meaning",
    [
        (RED, ["red", "circle", "left", "slowly", "black"]),
        ("Circle, RED; on black: slowly moving left!", ["red", "circle", "left", "slowly", "black"]),
        ("a red red circle", ["red", "circle", "", "", ""]),
        ("ａ ｒｅｄ ｃｉｒｃｌｅ　ｏｎ black", ["red", "circle", "", "", "black"]),
        ("a cross standing still", ["", "cross", "still", "", ""]),
    ],
)
def test_free_word_order(prompt, meaning):
    """Catches a parser that only knows the world's own sentences."""
    assert parse(prompt, 1) == meaning


def test_two_objects():
    """Catches attributes that stick to the wrong object, and a background that counts as one's."""
    meaning = parse("a red circle on a white background and a blue ring moving up", 3)
    assert meaning == ["red", "circle", "", "", "blue", "ring", "up", "", "", "", "", "", "white"]


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "empty"),
        ("  !?", "empty"),
        ("a red 圆 moving 左", "'圆'; known words"),
        ("2 red circles", "'2'"),
        ("a red circle 🔴", "'🔴'"),
        ("a red " + "x" * 10**6, "'x{40}'; known"),
        ("a red cirlce", "'cirlce'.*did you mean 'circle'"),
        ("a red xylophone", "'xylophone'; known words: .*circle"),
        ("red blue circle", "'red' and 'blue' contradict"),
        ("a red circle moving left and a green ring", "names 2 objects.*at most 1"),
        ("a circle on a black white background", "'black' and 'white' contradict"),
    ],
)
def test_bad_prompts(prompt, said):
    """Catches a prompt that is half understood and sampled all the same."""
    with pytest.raises(BadInput, match=said) as caught:
        parse(prompt, 1)
    assert "\n" not in str(caught.value)


def test_tokens():
    """Catches words that look alike, padding that speaks, and vectors that change from call to call."""
    captions = [["red", "circle", "", "", "black"], ["circle", "red"], ["red", "square", "left"]]
    text = tokenize(captions, 7, 32)
    assert text.shape == (3, 7, 32)
    spoken = [[bool(w) for w in words] + [False] * (7 - len(words)) for words in captions]
    assert torch.equal(text.abs().amax(-1) > 0, torch.tensor(spoken))
    assert torch.equal(text, torch.cat([tokenize([words], 7, 32) for words in captions]))
    assert torch.equal(text[0, 0], text[2, 0])
    vectors = tokenize([[w] for w in (*COLOURS, *SHAPES, *MOTIONS, *SPEEDS, *BACKGROUNDS)], 1, 32)[:, 0]
    assert torch.pdist(vectors).min() > 1
    assert not torch.allclose(text[0, 0], text[1, 1])  # the same word elsewhere
    assert 0.5 < float(vectors.std()) < 1.5


# -- motion ----------------------------------------------------------------------------------------


def steps(position: torch.Tensor, cfg: Config) -> torch.Tensor:
    """How far objects go from frame to frame, the shorter way round the torus."""
    size = torch.tensor([cfg.width, cfg.height])
    return (position.diff(dim=2) + size / 2) % size - size / 2


@pytest.mark.parametrize("cfg", [Config(), Config(height=64, width=96, objects=2, text_length=9)])
def test_objects_do_what_the_caption_says(cfg):
    """Catches a speed that depends on the canvas, a jump at its border, and motion that ends or turns."""
    batch = World(cfg).batch(keys(30), torch.arange(48))
    assert ((batch.position >= 0) & (batch.position < torch.tensor([cfg.width, cfg.height]))).all()
    weaving = {motion: [0.0] for motion in list(MOTIONS)[:4]}
    for words, step in zip(batch.words, steps(batch.position, cfg), strict=True):
        for i in range(cfg.objects):
            _, _, motion, speed = words[4 * i : 4 * i + 4]
            pace, ahead = SPEEDS.get(speed, 0.0) * cfg.height / 32, torch.tensor(MOTIONS[motion]).float()
            torch.testing.assert_close(step[i] @ ahead, torch.full((47,), pace), atol=1e-3, rtol=0)
            aside = step[i] @ ahead.flip(0)
            assert (torch.minimum(aside.abs(), (aside.abs() - WEAVE * pace).abs()) < 1e-3).all()
            weaving.get(motion, []).extend(aside.tolist())
    assert all(min(aside) < -0.1 and max(aside) > 0.1 for aside in weaving.values())


def test_the_world_is_stationary():
    """Catches objects that start in the middle, drift to a side or calm down: a stream that runs past the
    training length would then meet a world it has never seen."""
    cfg = Config()
    position = World(cfg).batch(keys(600), torch.tensor([0, 1, 200, 201])).position
    for t in (0, 2):
        bins = (position[:, 0, t] / 8).long()
        counts = torch.bincount(bins[:, 0] * 4 + bins[:, 1], minlength=16).float()
        assert float(((counts - 37.5).square() / 37.5).sum()) < 40  # 15 degrees of freedom
    sideways = steps(position, cfg).abs()[:, 0, [0, 2]].amin(-1)  # (clips, early or late)
    weaving = (sideways > 0.1).float().mean(0)
    assert (weaving[0] - weaving[1]).abs() < 0.08 and 0.4 < weaving.mean() < 0.65


def test_what_leaves_comes_back():
    """Catches an object that is cut off at the border: it must cover as much wherever it is."""
    world = World(Config())
    paint, ground = COLOURS["red"][0], BACKGROUNDS["black"]
    position = torch.tensor([[16.0, 16], [0, 16], [31.5, 0.25], [16, 31.9]])[None, None]
    for shape in SHAPES:
        video = world.render([["red", shape, "", "", "black"]], position, torch.tensor([[7.0]]))
        area = ((video[0, :, 0] - ground) / (paint - ground)).sum((1, 2))
        torch.testing.assert_close(area, area[:1].expand(4), rtol=0.05, atol=0)
        assert 40 < area[0] < 170


def test_pixels():
    """Catches colours outside [0, 1], a wrong layout, and x taken for y."""
    world = World(Config(height=32, width=48))
    at = torch.tensor([[[[40.0, 8.0]]]])
    video = world.render([["yellow", "circle", "", "", "white"]], at, torch.tensor([[6.0]]))
    assert video.shape == (1, 1, 3, 32, 48) and 0 <= video.min() and video.max() <= 1
    torch.testing.assert_close(video[0, 0, :, 8, 40], torch.tensor(COLOURS["yellow"]))
    assert (video[0, 0, :, 24, 8] == BACKGROUNDS["white"]).all()


# -- objective measures ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips():
    return World(Config(), "test").batch(keys(128))


def shares(video01, prompts) -> dict[str, float]:
    return {name: float(values.nanmean()) for name, values in measure(video01, prompts).items()}


def test_measures_of_the_truth(clips):
    """Catches a measure that is wrong about perfect clips, which would cap every student's score."""
    found = measure(clips.video01, clips.prompts)
    moving = torch.tensor(["moving" in prompt for prompt in clips.prompts])
    for name, values in found.items():
        assert values.shape == (128,) and values[moving].isfinite().all(), name
        assert values.isfinite().all() or name == "stall"
    assert min(float(values.mean()) for values in three_axes(found).values()) > 0.98
    assert max(float(found[name].nanmean()) for name in ("stall", "paint", "seams")) < 1e-3
    found = {name: float(values.mean()) for name, values in found.items()}
    assert min(found[name] for name in (*ACCURACIES, "background")) >= 0.98
    assert found["noise"] < 1e-3 and abs(found["saturation"]) < 0.01
    assert found["jitter"] < 0.3 and found["sharpness"] > 0.75


def test_measures_of_the_wrong_prompt(clips):
    """Catches a measure that agrees with whatever it is told."""
    found = shares(clips.video01, clips.prompts[1:] + clips.prompts[:1])
    chance = {"colour": 1 / 8, "shape": 1 / 5, "direction": 1 / 5, "speed": 1 / 3, "background": 1 / 3}
    for name, share in chance.items():
        assert found[name] == pytest.approx(share, abs=0.08), name


def test_measures_of_a_frozen_clip(clips):
    """Catches a direction that is guessed from looks: only what stands still may pass."""
    frozen = clips.video01[:64, :1].expand(-1, 16, -1, -1, -1)
    found = shares(frozen, clips.prompts[:64])
    assert 0.12 < found["direction"] < 0.3 and 0.12 < found["speed"] < 0.3
    assert found["colour"] > 0.98 and found["shape"] > 0.98 and found["jitter"] < 1e-3


def test_measures_of_reversed_time(clips):
    """Catches a direction without a sign; looks and speed must not notice."""
    found = shares(clips.video01[:64].flip(1), clips.prompts[:64])
    assert found["direction"] < 0.3
    assert min(found[name] for name in ("colour", "shape", "speed", "background")) >= 0.98


def test_measures_of_damage(clips):
    """Catches measures of quality that do not answer to the damage they are named after."""
    video01, prompts = clips.video01[:24], clips.prompts[:24]
    clean = shares(video01, prompts)
    noisy = shares(video01 + 0.05 * torch.randn(video01.shape, generator=rng_for("noise")), prompts)
    assert noisy["noise"] == pytest.approx(0.05, abs=0.005)
    blurred = torch.nn.functional.avg_pool3d(
        video01.flatten(0, 1), (1, 3, 3), 1, (0, 1, 1), count_include_pad=False
    )
    assert shares(blurred.view_as(video01), prompts)["sharpness"] < clean["sharpness"] - 0.1
    shaken = torch.stack([x.roll(int(2 * (f % 2)), -1) for f, x in enumerate(video01.unbind(1))], 1)
    assert shares(shaken, prompts)["jitter"] > clean["jitter"] + 1
    fade = torch.linspace(1, 0.5, 16)[:, None, None, None]
    grey = video01.mean(2, keepdim=True)
    assert shares(grey + fade * (video01 - grey), prompts)["saturation"] < -0.1


@pytest.mark.parametrize("kind", [*LOOKS, *MOTION])
def test_summary_answers_to_every_damage(clips, kind):
    """Catches a summary that a kind of damage passes by, and one that takes looks for motion."""
    rngs = [rng_for("damage", i) for i in range(24)]
    video01 = World(Config(), "test").batch(keys(24), torch.arange(32)).video01
    worse = worse_looks if kind in LOOKS else worse_motion
    given = video01[:, :16] if kind in LOOKS else video01
    bad = torch.stack([worse(x, g, kind) for x, g in zip(given, rngs, strict=True)])
    before, after = (three_axes(measure(x, clips.prompts[:24])) for x in (video01[:, :16], bad))
    lost = {axis: float((before[axis] - after[axis]).mean()) for axis in before}
    own, other = ("looks", "motion") if kind in LOOKS else ("motion", "looks")
    assert lost[own] > max(0.05, lost[other]), lost


@pytest.mark.parametrize("damage", ["nan", "blank", "gone", "snow"])
def test_nothing_to_see_scores_worst(clips, damage):
    """Catches a clip that loses its bad measures with its object: not a number, a bare ground, an object that
    leaves after a quarter, pure noise."""
    video01 = clips.video01[:32].clone()
    if damage == "nan":
        video01[:, 3, 0, 5, 5] = float("nan")
    if damage == "blank":
        video01[:] = video01[:, :1, :, :1, :1]
    if damage == "gone":
        video01[:, 4:] = video01.flatten(3).median(3).values[:, 4:, :, None, None]
    if damage == "snow":
        video01 = torch.rand(video01.shape, generator=rng_for("snow"))
    found = measure(video01, clips.prompts[:32])
    for name, values in (found | three_axes(found)).items():
        assert values.isfinite().all() or name == "stall", name
    if damage != "snow":
        assert all((found[name] == 0).all() for name in ACCURACIES)
        assert found["jitter"].min() > 10
    assert three_axes(found)["motion"].mean() < 0.4 and three_axes(found)["looks"].mean() < 0.55


def test_seams_and_contrast_on_their_own(clips):
    """Catches measures of nothing: steps at the borders of 8 x 8 blocks, a fade to grey, of known size."""
    video01, prompts = clips.video01[:24], clips.prompts[:24]
    checks = (torch.arange(32) // 8 % 2)[:, None] ^ (torch.arange(32) // 8 % 2)[None, :]
    assert shares(video01 + 0.04 * checks, prompts)["seams"] == pytest.approx(0.04, rel=0.05)
    assert shares(video01 + 0.04 * checks.roll(4, 0).roll(4, 1), prompts)["seams"] < 0.0
    fade = torch.linspace(1, 0.5, 16)[:, None, None, None]
    mean = video01.mean((2, 3, 4), keepdim=True)
    full = video01[:, 0].flatten(1).std(1).mean()
    drift = shares(mean + fade * (video01 - mean), prompts)["contrast"]
    assert drift == pytest.approx(-0.4 * float(full), rel=0.05)


def test_silence_is_not_judged(clips):
    """Catches a clip that loses points for what nobody asked for."""
    found = measure(clips.video01[:2], ["a circle", "a red ring moving left"])
    assert found["colour"].isnan().tolist() == [True, False]
    assert found["direction"].isnan().tolist() == [True, False]
    assert found["speed"].isnan().all() and found["background"].isnan().all()


def test_longer_clips_are_measured_alike():
    """Catches a measure that counts frames: a stream's hundredth frame must be judged like its first."""
    batch = World(replace(Config(), frames=16), "test").batch(keys(24), torch.arange(48))
    found = shares(batch.video01, batch.prompts)
    assert min(found[name] for name in ACCURACIES) >= 0.95


def test_intervals_are_students():
    """Catches a normal distribution's interval, which is half as wide for three seeds."""
    scipy = pytest.importorskip("scipy.stats")
    for n in (2, 3, 4, 5, 8, 128):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        half = scipy.t.ppf(0.975, n - 1) * x.std() / n**0.5
        found, width = mean(x, 4).split(" ±")
        assert float(found) == pytest.approx(float(x.mean()), abs=1e-4)
        assert float(width) == pytest.approx(float(half), rel=6e-3)
