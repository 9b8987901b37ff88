"""The nets that are shipped: they load into today's code, do what README says, and say what was measured."""

import pytest
import torch

from codec import Codec
from config import PRESETS
from engine.checkpoint import load_weights, read_header
from engine.rng import rng_for
from model import VideoDiT
from reward import RewardModel
from rollout import rollout
from world.corrupt import pairs
from world.measure import measure
from world.scene import World
from world.words import caption, tokenize

CFG = PRESETS["tiny"]
KINDS = {
    "codec": Codec,
    "teacher": VideoDiT,
    "causal": VideoDiT,
    "stream_r1": VideoDiT,
    "reward": RewardModel,
}


@pytest.fixture(scope="module")
def shipped() -> dict:
    return {
        name: load_weights(
            f"assets/tiny/{name}.safetensors", net(CFG), CFG, name.replace("stream_r1", "student")
        )
        for name, net in KINDS.items()
    }


@pytest.fixture(scope="module")
def clips():
    return World(CFG, "test").batch([("assets", i) for i in range(64)], torch.arange(2 * CFG.pixel_frames))


@pytest.mark.parametrize("name", KINDS)
def test_headers_say_how_it_was_made_and_what_was_measured(name):
    header = read_header(f"assets/tiny/{name}.safetensors")
    assert {"command", "config"} <= set(header) and {"steps", "step"} & set(header)
    assert any(key.startswith("measured") for key in header), f"{name} carries no scores"


def test_codec_keeps_what_can_be_measured(shipped, clips):
    """After a round trip the shape, colour and motion are still right, with latent noise as well."""
    video01 = clips.video01[:, : CFG.pixel_frames]
    noise = torch.randn(64, CFG.frames, *CFG.latent_shape, generator=rng_for("assets"))
    with torch.no_grad():
        x = shipped["codec"].encode(video01)
        plain, noisy = shipped["codec"].decode(x), shipped["codec"].decode(x + 0.1 * noise)
    assert abs(x.std() - 1) < 0.1 and (plain - video01).square().mean() < 1e-3, "unit variance, 30 dB"
    for decoded, least in ((plain, 0.99), (noisy, 0.95)):
        found = measure(decoded[:32], clips.prompts[:32])
        assert all(found[k].nanmean() >= least for k in ("colour", "shape", "direction", "speed"))


def test_codec_decodes_a_stream_as_it_decodes_the_whole(shipped, clips):
    with torch.no_grad():
        x = shipped["codec"].encode(clips.video01[:4])
        parts = [shipped["codec"].decode(chunk) for chunk in x.split(CFG.chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), shipped["codec"].decode(x), atol=1e-5, rtol=0)


def test_student_follows_its_prompts(shipped):
    """32 held-out captions, one noise: what a wrong asset, layout or sampler would break."""
    words = World(CFG, "test").captions([("assets", i) for i in range(32)])
    text, rngs = tokenize(words, CFG.text_length, CFG.text_width), [rng_for("assets", i) for i in range(32)]
    with torch.no_grad():
        video01 = shipped["codec"].decode(rollout(shipped["stream_r1"], text, CFG, rngs, 2 * CFG.chunks))
    found = measure(video01, [caption(w) for w in words])
    for name in ("colour", "shape", "direction", "speed"):
        assert found[name].nanmean() >= 0.9, f"{name} {found[name].nanmean():.2f}"


def test_reward_ranks_damaged_clips_below_good_ones(shipped, clips):
    rngs = [rng_for("assets", i) for i in range(32)]
    with torch.no_grad():
        long01 = shipped["codec"].decode(shipped["codec"].encode(clips.video01[:32]))
        good, damaged, captions = pairs(long01, clips.words[:32], rngs, False)
        text = [tokenize(c, CFG.text_length, CFG.text_width) for c in captions]
        best = shipped["reward"](good, text[0])
        worse = [shipped["reward"](video01, text[0]) for video01 in damaged] + [
            shipped["reward"](good, text[1])
        ]
    for axis, (scores, least) in enumerate(zip(worse, (0.95, 0.9, 0.85), strict=True)):
        assert (best[:, axis] > scores[:, axis]).float().mean() >= least
