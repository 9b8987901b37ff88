"""Ways to make a clip worse, one axis at a time: the losing halves of the pairs a reward model learns from.

VQ  blur, noise, wash-out, over-saturation, patch seams, ghosting          `worse_looks`
MQ  jump, jitter, stall, wrong speed, reversed time                        `worse_motion`
TA  one attribute of the caption is wrong                                  `wrong_words`
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.rng import pick
from world.words import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPEEDS

LOOKS = ("blur", "noise", "wash", "oversaturate", "seams", "ghost")
MOTION = ("jump", "jitter", "stall", "speed", "reverse")


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def worse_looks(video01: Tensor, rng: torch.Generator, kind: str = "") -> Tensor:
    """(F 3 H W) in [0, 1] → the same content, visibly worse; the kind is drawn unless named."""
    kind = kind or LOOKS[pick(rng, len(LOOKS))]
    x = video01
    if kind == "blur":
        x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), _uniform(rng, 0.3, 1.0))
    elif kind == "noise":
        x = x + _uniform(rng, 0.02, 0.2) * torch.randn(x.shape, generator=rng).to(x.device)
    elif kind == "wash":
        x = x.mean((0, 2, 3), keepdim=True).lerp(x, _uniform(rng, 0.5, 0.85))
    elif kind == "oversaturate":
        x = x.mean(1, keepdim=True).lerp(x, _uniform(rng, 1.2, 1.8))
        x = 0.5 + (x - 0.5) * _uniform(rng, 1.0, 1.3)
    elif kind == "seams":
        coarse = torch.randn(len(x), 3, x.shape[2] // 8, x.shape[3] // 8, generator=rng)
        x = x + _uniform(rng, 0.03, 0.12) * F.interpolate(coarse.to(x.device), scale_factor=8)
    else:
        x = x.lerp(x.roll(pick(rng, 3) + 2, dims=0), _uniform(rng, 0.2, 0.5))
    x = x.clamp(0, 1)
    unseen = (x - video01).abs().max() < 0.02  # nothing that stands still leaves a ghost
    return worse_looks(video01, rng, "blur") if unseen else x


def worse_motion(long01: Tensor, rng: torch.Generator, kind: str = "") -> Tensor:
    """(2F 3 H W) in [0, 1] → F frames, each of them fine, that move badly; long01[:F] moves well."""
    frames = len(long01) // 2
    kind = kind or MOTION[pick(rng, len(MOTION))]
    time = torch.arange(frames)
    if kind == "jump":
        cut = 1 + pick(rng, frames - 1)
        bad = long01[time + (time >= cut) * (2 + pick(rng, frames - 1))]
    elif kind == "stall":
        start, length = pick(rng, frames // 2), frames // 4 + pick(rng, frames // 2)
        bad = long01[torch.maximum(time.clamp(max=start), time - length)]
    elif kind == "speed":
        bad = long01[2 * time if pick(rng, 2) else time // 2]
    elif kind == "reverse":
        bad = long01[:frames].flip(0)
    else:
        bad = _jitter(long01[:frames], rng)
    unmoved = (bad - long01[:frames]).abs().max() < 0.02  # a still object cannot stall
    return _jitter(long01[:frames], rng) if unmoved else bad


def _jitter(video01: Tensor, rng: torch.Generator) -> Tensor:
    """Shift whole frames by a pixel or two at random."""
    reach = 1 + pick(rng, 2)
    shifts = torch.randint(-reach, reach + 1, (len(video01), 2), generator=rng)
    shifts[pick(rng, len(video01))] = reach  # at least one frame moves
    return torch.stack([x.roll(tuple(s), dims=(1, 2)) for x, s in zip(video01, shifts.tolist(), strict=True)])


def wrong_words(meaning: list[str], rng: torch.Generator) -> list[str]:
    """The same caption with one of its words replaced by another of its kind. Silent places stay silent."""
    kinds = [COLOURS, SHAPES, MOTIONS, SPEEDS] * (len(meaning) // 4) + [BACKGROUNDS]
    spoken = [i for i, word in enumerate(meaning) if word]
    place = spoken[pick(rng, len(spoken))]
    others = [w for w in kinds[place] if w != meaning[place]]
    if meaning[place] in MOTIONS and place + 1 < len(meaning) and meaning[place + 1]:
        others = [w for w in others if w != "still"]  # "still slowly" is no caption
    return [*meaning[:place], others[pick(rng, len(others))], *meaning[place + 1 :]]


def pairs(long01: Tensor, words: list[list[str]], rngs: list, free: bool) -> tuple[Tensor, list, list]:
    """(b 2F 3 H W) → good (b F 3 H W), [worse looks, worse motion], captions [right, 3 x wrong]."""
    good = long01[:, : long01.shape[1] // 2]
    looks = torch.stack([worse_looks(x, g) for x, g in zip(good, rngs, strict=True)])
    motion = torch.stack([worse_motion(x, g) for x, g in zip(long01, rngs, strict=True)])
    if free:  # captions of real clips have no grammar: somebody else's caption is the wrong one
        wrong = [words[i:] + words[:i] for i in (1, 2, 3)]
    else:
        wrong = [[wrong_words(w, g) for w, g in zip(words, rngs, strict=True)] for _ in range(3)]
    return good, [looks, motion], [words, *wrong]
