"""Objective measures, from pixels alone, against what the prompt asked for. No learned network takes part.

    python evaluate.py                                   # the shipped nets: a table with 95 % intervals
    python evaluate.py --student=out/train/student.safetensors --clips=64
    python evaluate.py --nets=out/pretrain --stamp       # and write what was measured into the nets' headers

Each clip gives, per object and then averaged over objects:
colour, shape, direction, speed, background: 1 = as the prompt says, 0 = not, nan = unsaid
jitter       rms second difference of the object's centre, in pixels of a 32-pixel canvas (real clips: 0.19)
sharpness    mean |2a - 1| over the object's pixels, a = coverage; 1 = every pixel decided
noise        standard deviation of background pixels away from the object
saturation   of the object, last quarter of the frames minus the first: drift

The table adds VQ, MQ and TA, the learned reward's scores: not a measure of quality, but a student above the
real clips of the first row would have fooled the reward that trained it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import annotate, load_weights, read_header, writable_folder, write_atomically
from codec import Codec
from config import BadInput, Config, build, cli, from_words, read_cli
from data import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RADIUS,
    SHAPES,
    SPEEDS,
    World,
    caption,
    parse,
    rng_for,
    shape_alpha,
    tokenize,
)
from model import VideoDiT
from processes import pick_device
from reward import AXES, RewardModel
from rollout import rollout, sample_teacher

ACCURACIES = ("colour", "shape", "direction", "speed")
_PALETTE = torch.tensor(list(COLOURS.values()))
_GREYS = torch.tensor(list(BACKGROUNDS.values()))
_STILL = 0.3  # pixels per frame on a 32-pixel canvas: slower than this is standing still
_QUICK = (SPEEDS["slowly"] * SPEEDS["quickly"]) ** 0.5


def measure(video01: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """video01 (b F 3 H W) in [0, 1], F >= 4, and a prompt for each → {measure: (b,)}."""
    clips = []
    for clip, prompt in zip(video01.float().cpu(), prompts, strict=True):
        things = len(prompt.lower().split(" and "))
        *words, background = parse(prompt, things)
        wanted = [words[4 * i : 4 * i + 4] for i in range(things)]
        base = clip.transpose(0, 1).flatten(1).median(dim=1).values  # objects never cover half the canvas
        per_object = [_measure_object(clip, base, want, wanted) for want in wanted]
        result = {k: torch.stack([m[k] for m in per_object]).mean() for k in per_object[0]}
        nearest = (base.mean() - _GREYS).abs().argmin()
        result["background"] = _agree(background, tuple(BACKGROUNDS), int(nearest))
        result["noise"] = _noise(clip, base)
        clips.append(result)
    return {k: torch.stack([c[k] for c in clips]) for k in clips[0]}


def _agree(word: str, words: tuple, found: int) -> Tensor:
    return torch.tensor(float("nan") if not word else float(words[found] == word))


def _measure_object(clip: Tensor, base: Tensor, want: list[str], wanted: list) -> dict[str, Tensor]:
    colour, shape, motion, speed = want
    scale = min(clip.shape[-2:]) / 32
    found, raw, paint = _segment(clip, base, colour, [w[0] for w in wanted])
    alpha = _soft_step(raw)
    centre = _centre(alpha)
    step = _shorter(centre.diff(dim=0), alpha)  # (F-1 2)
    velocity = step.median(dim=0).values / scale
    pace = velocity.abs().max()
    kind = "still" if pace < _STILL else _direction(velocity)
    quick = int(pace > _QUICK)
    fast_enough = pace < _STILL if motion == "still" else (pace >= _STILL) & (quick == (speed == "quickly"))
    silent = torch.tensor(float("nan"))
    quarter = max(1, len(clip) // 4)
    saturation = _saturation(clip, raw)
    return {
        "colour": _agree(colour, tuple(COLOURS), found),
        "shape": _agree(shape, SHAPES, _which_shape(alpha, centre, scale)),
        "direction": _agree(motion, tuple(MOTIONS), tuple(MOTIONS).index(kind)),
        "speed": fast_enough.float() if speed or motion == "still" else silent,
        "jitter": step.diff(dim=0).square().sum(1).mean().sqrt() / scale,
        "sharpness": ((2 * raw - 1).abs() * (raw > 0.1)).sum() / (raw > 0.1).sum().clamp(min=1),
        "saturation": saturation[-quarter:].mean() - saturation[:quarter].mean(),
    }


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


def _shorter(step: Tensor, alpha: Tensor) -> Tensor:
    size = torch.tensor([alpha.shape[-1], alpha.shape[-2]])
    return (step + size / 2) % size - size / 2


def _direction(velocity: Tensor) -> str:
    x, y = velocity.tolist()
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


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
        dx = (xs - at[..., :1] + w / 2) % w - w / 2
        dy = (ys - at[..., 1:] + h / 2) % h - h / 2
        drawn = shape_alpha(shape, dx[:, :, None, :], dy[:, :, :, None], radii[None, :, None, None])
        drawn, seen = _soft_step(drawn), alpha[:, None]
        union = torch.maximum(drawn, seen).sum((-1, -2)).clamp(min=1e-6)
        scores.append((torch.minimum(drawn, seen).sum((-1, -2)) / union).max(1).values.mean())
    return int(torch.stack(scores).argmax())


def _noise(clip: Tensor, base: Tensor) -> Tensor:
    """Standard deviation of what is surely background: no pixel within three of it stands out."""
    away = clip - base[:, None, None]
    front = (away.abs().amax(1, keepdim=True) > 0.25).float()
    front = F.max_pool2d(F.pad(front, (3, 3, 3, 3), mode="circular"), 7, stride=1)
    quiet = (front == 0).expand_as(clip)
    return away[quiet].square().mean().sqrt() if quiet.any() else torch.tensor(float("nan"))


def _saturation(clip: Tensor, raw: Tensor) -> Tensor:
    """Mean (max - min channel) over the object's core, per frame (F,)."""
    core = raw > 0.8
    colourful = clip.amax(1) - clip.amin(1)
    return (colourful * core).sum((1, 2)) / core.sum((1, 2)).clamp(min=1)


# -- the table ----------------------------------------


@dataclass(frozen=True)
class Flags:
    nets: str = ""  # folder with codec, teacher, causal, stream_r1; default assets/<preset>
    student: str = ""  # one student instead of the shipped nets
    clips: int = 128  # held-out prompts
    noises: int = 3  # noise seeds
    stamp: bool = False  # write what was measured into the headers of the nets
    out: str = "out/evaluation.json"


@torch.no_grad()
def score(net, codec: Codec, reward: RewardModel, cfg: Config, flags: Flags, how: str) -> dict[str, Tensor]:
    """Measures of `clips` x `noises` samples for prompts of the test split → {measure: (noises clips)}.

    how: real (clips of the world, through the codec; no net) | teacher (25 steps, the whole clip at once) |
    within (a rollout of the training length) | beyond (the last clip's worth of frames of a rollout four
    times that long).
    """
    rows = []
    for noise in range(1 if how == "real" else flags.noises):
        parts = []
        for first in range(0, flags.clips, 32):
            keys = [("evaluate", i) for i in range(first, min(first + 32, flags.clips))]
            words = World(cfg, "test").captions(keys)
            text = tokenize(words, cfg.text_length, cfg.text_width).to(cfg.device)
            rngs = [rng_for("evaluate", noise, i) for _, i in keys]
            if how == "real":
                x = codec.encode(World(cfg, "test").batch(keys).video01.to(cfg.device))
            elif how == "teacher":
                x = sample_teacher(net, text, cfg, rngs)
            else:
                x = rollout(net, text, cfg, rngs, cfg.chunks * (4 if how == "beyond" else 1))
            video01 = codec.decode(x).float()
            judged = dict(zip(AXES, reward(video01, text).cpu().unbind(1), strict=True))
            parts.append(measure(video01, [caption(w) for w in words]) | judged)
        rows.append({k: torch.cat([part[k] for part in parts]) for k in parts[0]})
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def interval(values: Tensor) -> tuple[float, float]:
    """(noises clips) → mean, half a 95 % interval over prompts: one prompt's noises are not independent."""
    per_prompt = values.nanmean(0)
    per_prompt = per_prompt[per_prompt.isfinite()]
    return float(per_prompt.mean()), float(1.96 * per_prompt.std() / len(per_prompt) ** 0.5)


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    device = pick_device(build(preset, typed))
    nets = Path(flags.nets or f"assets/{preset}")
    jobs = [("real, through the codec", "codec", "real")]
    jobs += [("teacher", "teacher", "teacher"), ("causal start", "causal", "within")]
    jobs += [("stream_r1", "stream_r1", "within"), ("stream_r1, 4x length", "stream_r1", "beyond")]
    paths = {kind: nets / f"{kind}.safetensors" for _, kind, _ in jobs}
    if flags.student:
        paths = {"student": Path(flags.student)}
        jobs = [("student", "student", "within"), ("student, 4x length", "student", "beyond")]
    if flags.clips < 2 or flags.noises < 1:
        raise BadInput(f"clips={flags.clips} noises={flags.noises} is not possible; allowed: from 2, from 1")
    if flags.stamp and set(typed) - {"device"}:
        raise BadInput(f"--stamp notes what the nets do as trained; leave out --{' --'.join(typed)}")
    out, table = Path(flags.out), {}
    writable_folder(str(out.parent))
    headers = {name: read_header(path) for name, path in paths.items()}
    for label, name, how in jobs:
        header = headers[name]
        made = from_words(header["config"], typed | {"device": device})
        codec = load_weights(nets / "codec.safetensors", Codec(made), made, "codec").to(device)
        reward = load_weights(nets / "reward.safetensors", RewardModel(made), made, "reward").to(device)
        net = codec
        if how != "real":
            net = load_weights(paths[name], VideoDiT(made), made, header["kind"]).to(device)
        measured = score(net, codec, reward, made, flags, how)
        table[label] = {k: interval(v) for k, v in measured.items()}
        cells = " ".join(f"{k} {m:.3f}±{h:.3f}" for k, (m, h) in table[label].items())
        print(f"{label:24} {cells}", flush=True)
        if flags.stamp:
            annotate(paths[name], **{f"measured, {how}": f"{cells} ({flags.clips} prompts x {flags.noises})"})
    text = json.dumps({"clips": flags.clips, "noises": flags.noises, "rows": table}, indent=1)
    write_atomically(out, lambda name: name.write_text(text))
    print(out)


if __name__ == "__main__":
    cli(main)
