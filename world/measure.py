"""What a clip shows, compared with what its prompt asks for: from pixels alone, no learned network.

Each clip gives, per object and then averaged over objects:
colour, shape, direction, speed, background: 1 = as the prompt says, 0 = not, nan = unsaid. An object that is
             not there is not as the prompt says, and neither is anything in a clip that is not finite.
jitter       rms second difference of the object's centre, in pixels of a 32-pixel canvas (real clips: 0.19)
stall        share of frames in which an object that shall move does not; nan where none shall
sharpness    mean |2a - 1| over the object's pixels, a = coverage; 1 = every pixel decided
paint        distance of the object's median colour from the one that was asked for, in RGB
noise        standard deviation of background pixels away from the object
seams        how much more those pixels change across the borders of 8 x 8 blocks than elsewhere
saturation, contrast   of the object, of the whole frame: last quarter of the frames minus the first, drift

`three_axes` sums them up, without any learned reward:
looks  = mean exp(-excess / scale) over sharpness, paint, noise, seams      1 = like a real clip
motion = mean of direction and speed, and exp(-excess / scale) of jitter and stall
text   = mean of colour, shape, direction and background
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from world.scene import RADIUS, shape_alpha
from world.words import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPEEDS, parse

ACCURACIES = ("colour", "shape", "direction", "speed")
_PALETTE = torch.tensor(list(COLOURS.values()))
_WAYS = torch.tensor(list(MOTIONS.values())).float()
_GREYS = torch.tensor(list(BACKGROUNDS.values()))
_GONE = 16  # pixels on a 32-pixel canvas: less of an object than this in most frames is no object (real: 70)
_WORST = {"colour": 0, "shape": 0, "direction": 0, "speed": 0, "background": 0, "jitter": 16, "stall": 1,
          "sharpness": 0, "paint": 1, "noise": 1, "seams": 1}  # fmt: skip
_STILL = 0.3  # pixels per frame on a 32-pixel canvas: slower than this is standing still
_QUICK = (SPEEDS["slowly"] * SPEEDS["quickly"]) ** 0.5


def measure(video01: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """video01 (b F 3 H W) in [0, 1], F >= 4, and a prompt for each → {measure: (b,)}."""
    clips = []
    for clip, prompt in zip(video01.float().cpu(), prompts, strict=True):
        broken = not clip.isfinite().all()
        clip = torch.zeros_like(clip) if broken else clip
        things = len(prompt.lower().split(" and "))
        *words, background = parse(prompt, things)
        wanted = [words[4 * i : 4 * i + 4] for i in range(things)]
        base = clip.transpose(0, 1).flatten(1).median(dim=1).values  # objects never cover half the canvas
        per_object = [_measure_object(clip, base, want, wanted) for want in wanted]
        result = {k: torch.stack([m[k] for m in per_object]).nanmean() for k in per_object[0]}
        nearest = int((base.mean() - _GREYS).abs().argmin())
        result |= {"background": _agree(background, tuple(BACKGROUNDS), nearest), **_quiet(clip, base)}
        result["contrast"] = _drift(clip.flatten(1).std(1))
        clips.append(result | {k: result[k] * 0 + worst for k, worst in _WORST.items() if broken})
    return {k: torch.stack([c[k] for c in clips]) for k in clips[0]}


# what a real clip shows after a round trip through the codec, and an excess that a person plainly sees
_LOOKS = {"sharpness": (0.73, -0.1), "paint": (0.03, 0.1), "noise": (0.003, 0.02), "seams": (0.0, 0.01)}
_MOVES = {"jitter": (0.25, 1.0), "stall": (0.0, 0.25)}


def three_axes(measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `measure` gave → looks, motion, text, each (b,) in [0, 1]; what is nan does not count."""

    def like_real(scales: dict[str, tuple[float, float]]) -> list[Tensor]:
        return [(-((measured[k] - real) / scale).clamp(min=0)).exp() for k, (real, scale) in scales.items()]

    parts = {
        "looks": like_real(_LOOKS),
        "motion": [measured["direction"], measured["speed"], *like_real(_MOVES)],
        "text": [measured[k] for k in ("colour", "shape", "direction", "background")],
    }
    return {axis: torch.stack(values).nanmean(0) for axis, values in parts.items()}


def mean(x: Tensor, digits: int = 2) -> str:
    """Measures (n,) of n clips or seeds → "mean ±half a 95 % interval" (Student's t)."""
    v = len(x) - 1
    t = (12.71, 4.30, 3.18)[v - 1] if v < 4 else 1.96 + 2.37 / v + 2.82 / v**2 + 2.56 / v**3
    return f"{x.mean():.{digits}f} ±{t * x.std() / len(x) ** 0.5:.{digits}f}"


def _agree(word: str, words: tuple, found: int) -> Tensor:
    return torch.tensor(float("nan") if not word else float(words[found] == word))


def _measure_object(clip: Tensor, base: Tensor, want: list[str], wanted: list) -> dict[str, Tensor]:
    colour, shape, motion, speed = want
    scale = min(clip.shape[-2:]) / 32
    found, raw, paint = _segment(clip, base, colour, [w[0] for w in wanted])
    alpha = _soft_step(raw)
    centre = _centre(alpha)
    size = torch.tensor([alpha.shape[-1], alpha.shape[-2]])
    step = (centre.diff(dim=0) + size / 2) % size - size / 2  # (F-1 2), the shorter way round
    velocity = step.median(dim=0).values / scale
    pace = velocity.abs().max()
    way = tuple(MOTIONS).index("still") if pace < _STILL else int((_WAYS @ velocity).argmax())
    quick = int(pace > _QUICK)
    gone = (alpha.sum((1, 2)) < _GONE * scale**2).float().mean() > 0.5
    fast_enough = pace < _STILL if motion == "still" else (pace >= _STILL) & (quick == (speed == "quickly"))
    silent = torch.tensor(float("nan"))
    vivid, core = clip.amax(1) - clip.amin(1), raw > 0.8
    idle = (step.abs().amax(1) / scale < _STILL).float().mean()
    result = {
        "colour": _agree(colour, tuple(COLOURS), found),
        "shape": _agree(shape, SHAPES, _which_shape(alpha, centre, scale)),
        "direction": _agree(motion, tuple(MOTIONS), way),
        "speed": fast_enough.float() if speed or motion == "still" else silent,
        "jitter": step.diff(dim=0).square().sum(1).mean().sqrt() / scale,
        "stall": silent if motion in ("", "still") else idle,
        "paint": _paint_error(clip, raw, colour),
        "sharpness": ((2 * raw - 1).abs() * (raw > 0.1)).sum() / (raw > 0.1).sum().clamp(min=1),
        "saturation": _drift((vivid * core).sum((1, 2)) / core.sum((1, 2)).clamp(min=1)),
    }
    return result | {k: result[k] * 0 + worst for k, worst in _WORST.items() if gone and k in result}


def _drift(per_frame: Tensor) -> Tensor:
    """(F,) → last quarter minus first."""
    quarter = max(1, len(per_frame) // 4)
    return per_frame[-quarter:].mean() - per_frame[:quarter].mean()


def _paint_error(clip: Tensor, raw: Tensor, colour: str) -> Tensor:
    core = clip.permute(0, 2, 3, 1)[raw > 0.8]
    if not colour or not len(core):
        return torch.tensor(float("nan") if not colour else 1.0)
    return (core.median(0).values - torch.tensor(COLOURS[colour])).norm()


def _segment(clip: Tensor, base: Tensor, colour: str, all_colours: list[str]) -> tuple[int, Tensor, Tensor]:
    """Find one object → its palette colour, its coverage (F H W) in [0, 1], its mean paint (3,)."""
    pixels = clip.permute(0, 2, 3, 1)
    front = (pixels - base).abs().amax(-1) > 0.25
    nearest = torch.cdist(pixels.reshape(1, -1, 3), _PALETTE[None])[0].argmin(-1).view(front.shape)
    votes = torch.bincount(nearest[front], minlength=len(_PALETTE))
    top = votes.topk(len(all_colours)).indices.tolist()
    wished = tuple(COLOURS).index(colour) if colour else top[0]
    others = [i for i in top if tuple(COLOURS)[i] not in all_colours]
    found = wished if wished in top else (others or top)[0]
    core = front & (nearest == found)
    paint = pixels[core].mean(0) if core.any() else _PALETTE[found]
    along = paint - base
    raw = ((pixels - base) @ along / along.square().sum().clamp(min=1e-6)).clamp(0, 1)
    if len(all_colours) > 1:
        raw = raw * (core | ~front)
    return found, raw, paint


def _soft_step(raw: Tensor) -> Tensor:
    """Ignore faint noise, saturate the core: applied to pictures and templates alike."""
    return ((raw - 0.2) / 0.6).clamp(0, 1)


def _centre(alpha: Tensor) -> Tensor:
    """Centre of mass on the torus, (F H W) → (F 2) as (x, y) pixels: the angle of the mean phase."""
    h, w = alpha.shape[-2:]
    centres = []
    for size, mass in ((w, alpha.sum(-2)), (h, alpha.sum(-1))):
        phase = 2 * torch.pi * (torch.arange(size) + 0.5) / size
        angle = torch.atan2((mass * phase.sin()).sum(-1), (mass * phase.cos()).sum(-1))
        centres.append(angle / (2 * torch.pi) * size % size)
    return torch.stack(centres, dim=-1)


def _which_shape(alpha: Tensor, centre: Tensor, scale: float) -> int:
    """The shape whose rendering at the measured centre overlaps most, soft IoU over all frames."""
    h, w = alpha.shape[-2:]
    radii = torch.linspace(RADIUS[0] - 0.5, RADIUS[1] + 0.5, 6) * scale
    xs, ys = torch.arange(w) + 0.5, torch.arange(h) + 0.5
    scores = []
    for shape in range(len(SHAPES)):
        middle = (xs - w / 2)[None, None], (ys - h / 2)[None, :, None]
        still = _soft_step(shape_alpha(shape, *middle, radii[:, None, None]))
        offset = _centre(still) - torch.tensor([w, h]) / 2  # a triangle's mass lies off its origin
        at = centre[:, None] - offset[None]  # (F radii 2)
        dx = ((xs - at[..., :1] + w / 2) % w - w / 2)[:, :, None]
        dy = ((ys - at[..., 1:] + h / 2) % h - h / 2)[..., None]
        drawn, seen = _soft_step(shape_alpha(shape, dx, dy, radii[None, :, None, None])), alpha[:, None]
        union = torch.maximum(drawn, seen).sum((-1, -2)).clamp(min=1e-6)
        scores.append((torch.minimum(drawn, seen).sum((-1, -2)) / union).max(1).values.mean())
    return int(torch.stack(scores).argmax())


def _quiet(clip: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Noise and seams of what is surely background, no pixel within three standing out; of all if none is."""
    away = clip - base[:, None, None]
    front = (away.abs().amax(1, keepdim=True) > 0.25).float()
    quiet = F.max_pool2d(F.pad(front, (3, 3, 3, 3), mode="circular"), 7, stride=1) == 0
    quiet = quiet if quiet.any() else torch.ones_like(quiet)
    noise = away[quiet.expand_as(clip)].square().mean().sqrt()
    return {"noise": noise, "seams": (_seams(away, quiet) + _seams(away.mT, quiet.mT)) / 2}


def _seams(away: Tensor, quiet: Tensor, block: int = 8) -> Tensor:
    """Change from column to column across block borders, minus that elsewhere, (F 3 H W) → a number."""
    change = away.diff(dim=-1).abs()
    known = (quiet[..., 1:] & quiet[..., :-1]).expand_as(change)
    border = (torch.arange(1, away.shape[-1]) % block == 0).expand_as(change)
    return change[known & border].mean() - change[known & ~border].mean()
