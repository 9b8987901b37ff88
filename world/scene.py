"""An endless captioned world drawn from a seed: coloured shapes that move on a torus.

The world is stationary by construction: an object lives on a torus (what leaves on the right comes back on
the left), starts anywhere, keeps its kind of motion for ever and weaves from side to side at random. Any
window of the process looks like any other, so a model can be streamed past the length it was trained on; and
because the weaving is random the future is not determined by the past.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from config import Config
from engine.rng import pick, rng_for
from world.words import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPEEDS, VOCABULARY, caption

RADIUS = (6.0, 7.5)  # pixels on a 32-pixel canvas
WEAVE, TURN = 0.35, 0.125  # sideways speed as a share of forward speed; chance of a turn in each frame


@dataclass
class Batch:
    video01: Tensor | None  # (b F 3 H W) in [0, 1]; None: drawn, not yet rendered
    prompts: list[str]
    words: list[list[str]]  # what `embed` takes
    position: Tensor | None = None  # (b objects F 2) centres in pixels (x, y)
    radius: Tensor | None = None  # (b objects)
    meanings: list[list[str]] | None = None  # the scenes, of which `words` may leave something out
    latents: Tensor | None = None  # (b F c h w), of a folder's clips that have been encoded


def shape_alpha(shape: int, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Coverage in [0, 1] of shape number `shape` at offsets (dx, dy) in pixels from its centre."""
    far = (dx.square() + dy.square() + 1e-9).sqrt()
    ax, ay = dx.abs(), dy.abs()
    if SHAPES[shape] == "circle":
        inside = 0.9 * radius - far
    elif SHAPES[shape] == "square":
        inside = 0.9 * radius - torch.maximum(ax, ay)
    elif SHAPES[shape] == "triangle":
        inside = torch.minimum(0.55 * radius - dy, 0.55 * radius + dy / 2 - ax * 0.8660254)
    elif SHAPES[shape] == "cross":
        arm, long = 0.32 * radius, radius
        inside = torch.maximum(torch.minimum(arm - ax, long - ay), torch.minimum(arm - ay, long - ax))
    else:
        inside = 0.26 * radius - (far - 0.76 * radius).abs()
    return (inside + 0.5).clamp(0, 1)


class World:
    """`World(cfg).batch(keys)` draws clips. `split`: train | select | test have disjoint captions."""

    vocabulary = VOCABULARY

    def __init__(self, cfg: Config, split: str = "train", drop_words: float = 0.0):
        self.cfg, self.split, self.drop_words = cfg, split, drop_words
        self.scale = min(cfg.height, cfg.width) / 32

    def batch(self, keys: list[tuple], times: Tensor | None = None) -> Batch:
        """One clip per key (a tuple of ints and words). `times` (F,) or (b F): frames to show, from 0."""
        drawn = self.draw(keys, times)
        return replace(drawn, video01=self.pixels(drawn, "cpu"))

    def pixels(self, drawn: Batch, device: str) -> Tensor:
        """video01 (b F 3 H W), rendered on that device, of what `draw` has drawn."""
        return self.render(drawn.meanings, drawn.position.to(device), drawn.radius.to(device))

    def draw(self, keys: list[tuple], times: Tensor | None = None) -> Batch:
        """The same before it is rendered: a few numbers a clip."""
        times = torch.arange(self.cfg.pixel_frames) if times is None else times
        rngs = [rng_for("world", self.split, *key) for key in keys]
        meanings = [self.meaning(g) for g in rngs]
        shown = [self._forget(m, g) for m, g in zip(meanings, rngs, strict=True)]
        radius = torch.stack([torch.rand(self.cfg.objects, generator=g) for g in rngs])
        frames = int(times.max()) + 1
        position = torch.stack([self._move(m, g, frames) for m, g in zip(meanings, rngs, strict=True)])
        radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * radius) * self.scale
        times = times.expand(len(keys), -1)
        position = position.gather(2, times[:, None, :, None].expand(-1, self.cfg.objects, -1, 2))
        return Batch(None, [caption(m) for m in shown], shown, position, radius, meanings)

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        """Words for `embed`, one caption per key: those `batch` would draw."""
        return [self.meaning(rng_for("world", self.split, *key)) for key in keys]

    def meaning(self, rng: torch.Generator) -> list[str]:
        """Draw a scene of this split. The split is a hash of the caption, the same for ever."""
        while True:
            colours = torch.randperm(len(COLOURS), generator=rng)
            words = []
            for i in range(self.cfg.objects):
                motion = tuple(MOTIONS)[pick(rng, len(MOTIONS))]
                speed = "" if motion == "still" else tuple(SPEEDS)[pick(rng, len(SPEEDS))]
                words += [tuple(COLOURS)[colours[i]], SHAPES[pick(rng, len(SHAPES))], motion, speed]
            words.append(tuple(BACKGROUNDS)[pick(rng, len(BACKGROUNDS))])
            if split_of(words) == self.split:
                return words

    def _forget(self, meaning: list[str], rng: torch.Generator) -> list[str]:
        """Leave out speed and background now and then, so that shorter prompts are understood as well."""
        keep = torch.rand(len(meaning), generator=rng) >= self.drop_words
        return [w if k or i % 4 in (0, 1, 2) and i < 4 * self.cfg.objects else ""
                for i, (w, k) in enumerate(zip(meaning, keep, strict=True))]  # fmt: skip

    def _move(self, meaning: list[str], rng: torch.Generator, frames: int) -> Tensor:
        """(objects frames 2): uniform start, constant forward speed, sideways a random telegraph."""
        canvas = torch.tensor([self.cfg.width, self.cfg.height])
        start = torch.rand(self.cfg.objects, 2, generator=rng)
        draws = torch.rand(frames + 1, self.cfg.objects, 2, generator=rng)
        paths = []
        for i in range(self.cfg.objects):
            _, _, motion, speed = meaning[4 * i : 4 * i + 4]
            ahead = torch.tensor(MOTIONS[motion]) * SPEEDS.get(speed, 0.0) * self.scale
            turns = draws[1:, i, 0] < TURN
            side = (3 * draws[:, i, 1]).long() - 1
            since = torch.where(turns, torch.arange(1, frames + 1), 0).cummax(0).values
            velocity = ahead + WEAVE * side[since][:, None] * ahead.flip(0)
            paths.append(start[i] * canvas + velocity.cumsum(0) - velocity[:1])
        return torch.stack(paths) % canvas

    def render(self, meanings: list[list[str]], position: Tensor, radius: Tensor) -> Tensor:
        """(b objects F 2), (b objects) → video01 (b F 3 H W), on their device; later objects hide earlier
        ones.

        Clips whose objects have one shape are painted together: ten things to do for a GPU, not hundreds.
        """
        h, w, device = self.cfg.height, self.cfg.width, position.device
        ys, xs = torch.arange(h, device=device) + 0.5, torch.arange(w, device=device) + 0.5
        ground = torch.tensor([BACKGROUNDS[m[-1]] for m in meanings], device=device)
        video = ground.view(-1, 1, 1, 1, 1).repeat(1, position.shape[2], 3, h, w)
        for i in range(self.cfg.objects):
            for number, shape in enumerate(SHAPES):
                which = [b for b, m in enumerate(meanings) if m[4 * i + 1] == shape]
                paint = torch.tensor([COLOURS[meanings[b][4 * i]] for b in which], device=device)
                # (b F 1 W), (b F H 1): the shorter way round the torus
                x, y = position[which, i, :, None].unbind(-1)
                dx = ((xs - x + w / 2) % w - w / 2)[:, :, None]
                dy = ((ys - y + h / 2) % h - h / 2)[..., None]
                alpha = shape_alpha(number, dx, dy, radius[which, i].view(-1, 1, 1, 1))[:, :, None]
                below = video[which]
                video[which] = below.add_((paint.view(-1, 1, 3, 1, 1) - below).mul_(alpha))
        return video


def split_of(meaning: list[str]) -> str:
    """train (80 %), select (10 %) or test (10 % of all captions), by a hash of the caption."""
    bucket = int(np.random.SeedSequence(list(" ".join(meaning).encode())).generate_state(1)[0]) % 10
    return "test" if bucket == 0 else "select" if bucket == 1 else "train"
