"""KL-tracing (Kim et al., 2025), https://arxiv.org/abs/2507.09082: a frozen video model tells where points go

Claim: mark a point in the first frame, predict later frames with and without the mark; where the predictions
differ, there the point has gone. No training, no labels.

    x_t  = (1 - t) x + t ε                 x: the clean clip's latents; ε, t: fixed
    x'_t = x_t + (1 - t) δ                 δ = encode(marked clip) - x, in frame 0 alone
    R    = x̂(x'_t) - x̂(x_t) ≈ ((1 - t) / t)² Cov(x | x_t) δ       what the net thinks moves with the mark
    map  = mean over ε of |decode(x̂') - decode(x̂)| ∝ √KL of two Gaussians; flow = its centre of mass (torus)

simplified: a denoiser's mean in the place of a distribution over patches. No prompt; centre, not maximum.
differs: the mark inverts colours. Later frames are seen through noise, in the paper by a tenth of them.
seen here: (python -m family.kl_tracing) two objects, t = .5, frames 4, 8, 12: the marked one answers more in
1.00 ±.00 (n = 180), .97 ±.03 (132), .97 ±.03 (136); t = .95: .45 to .61. Off by 2.3 to 2.6 px, standing still
by 4.2 to 9.0, the prompt's pace by 0.9 to 2.3. One object (--nets=assets/tiny --clips=128): 1.1 px, in frame
12 1.28 ±.48 less than the prompt; --off=4: 3.0 px to the point, 1.1 to the centre: it finds the object.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import add_noise, to_x0
from networks import load_net
from world.measure import mean
from world.scene import World
from world.words import MOTIONS, SPEEDS

# pixels: a side of the torus; the mark; objects that are told apart; near an object
SIZE, SIGMA, CLEAR, NEAR = 32, 2.0, 14.0, 8.0
PLACES = torch.cartesian_prod(*2 * [torch.arange(SIZE) + 0.5]).flip(1).view(SIZE, SIZE, 2)  # (x, y) of pixels


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance of points (... 2), the shorter way round the torus → (...)."""
    return ((a - b + SIZE / 2) % SIZE - SIZE / 2).norm(dim=-1)


def tracer(video01: Tensor, points: Tensor) -> Tensor:
    """video01 (b F 3 H W), points (b 2) as (x, y) → the clips with a bump of inverted colour in frame 0."""
    if not ((points >= 0) & (points < SIZE)).all():
        raise BadInput(f"a point lies outside the canvas; allowed: x and y in [0, {SIZE})")
    bump = (-0.5 * (apart(PLACES, points[:, None, None]) / SIGMA).square()).exp()[:, None, None]
    first = video01[:, :1]
    return torch.cat([first.lerp(1 - first, bump), video01[:, 1:]], dim=1)


def trace(net, decode, x: Tensor, marked: list[Tensor], text, t: float, noises: Tensor, frames) -> Tensor:
    """Latents of the clean clips and of each way of marking them (b f c h w), noises (b k f c h w) → maps
    (marks b frames H W): the change of the predicted RGB, mean over noises. All passes see the same noise."""
    level, maps = torch.full(x.shape[:2], t, dtype=x.dtype), 0
    for noise in noises.unbind(1):
        seen = [add_noise(z, noise, level) for z in (x, *marked)]
        plain, *moved = (decode(to_x0(net(z, level, text)[0], z, level)[:, frames]) for z in seen)
        maps = maps + torch.stack([(m - plain).norm(dim=2) for m in moved]) / noises.shape[1]
    return maps


def flow(maps: Tensor) -> Tensor:
    """(... H W) → centre of mass on the torus (... 2) as (x, y) pixels: the angle of the mean phase."""
    turn = torch.exp(PLACES[0, :, 0] * (2j * torch.pi / SIZE))
    phase = torch.stack([(maps.sum(axis) * turn).sum(-1) for axis in (-2, -1)], dim=-1)
    return phase.angle() / (2 * torch.pi) % 1 * SIZE


def scene(cfg: Config, clips: int, off: float) -> tuple[Tensor, ...]:
    """Test clips video01 (b F 3 H W), true paths (b objects F 2), the marked object's first; (b 2) each: the
    mark; controls: the point of frame 0 farthest from all objects, pixels a frame by the prompt."""
    keys, own = [("tracing", i) for i in range(clips)], [i % cfg.objects for i in range(clips)]
    drawn = World(cfg, "test").batch(keys)
    paths = torch.stack([path.roll(-i, 0) for path, i in zip(drawn.position, own, strict=True)])
    words = [meaning[4 * i + 2 : 4 * i + 4] for meaning, i in zip(drawn.meanings, own, strict=True)]
    told = [[way * SPEEDS.get(speed, 0) for way in MOTIONS[motion]] for motion, speed in words]
    aside = 2 * torch.stack([torch.rand(2, generator=rng_for(*key, "off")) for key in keys]) - 1
    far = PLACES.view(-1, 2)[apart(PLACES.view(-1, 1, 2), paths[:, None, :, 0]).amin(-1).argmax(1)]
    return drawn.video01, paths, (paths[:, 0, 0] + off * aside) % SIZE, far, torch.tensor(told)


def row(maps: Tensor, frame: int, paths: Tensor, points: Tensor, told: Tensor) -> str:
    """Maps (2 b H W) in one frame, of the mark and of one on the background → n, then means over the n clips
    whose objects are clear of each other in frame 0 and in this one."""
    start, here = paths[:, :, 0], paths[:, :, frame]  # (b objects 2)
    clear = torch.stack([apart(at[:, :1], at[:, 1:]) > CLEAR for at in (start, here)]).all(0).all(1)
    near = apart(PLACES, here[:, :, None, None]) < NEAR  # (b objects H W)
    lit, goal, found = (maps[0, :, None] * near).sum((2, 3)), points + here[:, 0] - start[:, 0], flow(maps[0])
    error, still, said = (apart(x, goal) for x in (found, points, points + frame * told))
    cells = [(lit[:, :1] >= lit).all(1).float(), lit[:, 0] / lit.sum(1), error, apart(found, here[:, 0]),
             error - still, error - said, (maps[1] ** 2).sum((1, 2)) / (maps**2).sum((0, 2, 3))]  # fmt: skip
    return f"{int(clear.sum()):5d}" + "".join(f"{mean(x[clear]):>15}" for x in cells)


@dataclass(frozen=True)
class Flags:
    nets: Path = ROOT / "assets/two"  # folder with codec and teacher
    clips: int = 768  # of the test split
    noises: int = 4  # that a map is averaged over
    levels: tuple[float, ...] = (0.95, 0.7, 0.5)  # noise levels t; the picture shows the last
    frames: tuple[int, ...] = (4, 8, 12)  # where the point is looked for
    off: float = 0.0  # pixels, at most, each way, from the object's centre to the mark
    out: Path = Path("out/family/kl_tracing.png")  # the picture


@torch.no_grad()
def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    cfg = from_words(read_header(flags.nets / "teacher.safetensors")["config"], {"device": "cpu"})
    frames, levels, fits = list(flags.frames), flags.levels, cfg.height == cfg.width == SIZE and not cfg.data
    inside = frames and levels and all(0 < x < 1 for x in (*levels, *(k / cfg.frames for k in frames)))
    if typed or not (fits and inside and flags.noises and flags.clips > 1):
        allowed = f"{SIZE}-pixel nets, 0 < levels < 1, 0 < frames < {cfg.frames}, clips > 1"
        raise BadInput(f"{typed or flags} is not possible; allowed: {allowed}")
    writable_folder(str(flags.out.parent))
    teacher, codec = (load_net(flags.nets / f"{k}.safetensors", cfg, k) for k in ("teacher", "codec"))
    video01, paths, points, ground, told = scene(cfg, flags.clips, flags.off)
    text, spots = torch.zeros(flags.clips, cfg.text_length, cfg.text_width), tracer(video01, points)
    x, *marked = (codec.encode(clips) for clips in (video01, spots, tracer(video01, ground)))
    noises = randn([rng_for("tracing", i, "noise") for i in range(flags.clips)], flags.noises, *x.shape[1:])
    heads = "own object,its share,px to point,to centre,- standing,- by prompt,background".split(",")
    print("    t frame    n" + "".join(f"{head:>15}" for head in heads))
    for t in tqdm(levels):
        maps = trace(teacher, codec.decode, x, marked, text, t, noises, frames)  # (2 b frames H W)
        for one, frame in zip(maps.unbind(2), frames, strict=True):
            tqdm.write(f"{t:5.2f} {frame:5d}" + row(one, frame, paths, points, told))
    rows = []
    for clip, spot, heat in zip(video01[:4, frames], spots[:, :1], maps[0], strict=False):
        found = tracer(clip[:, None], flow(heat))[:, 0]  # (frames 3 H W)
        grey = (heat / heat.amax((1, 2), keepdim=True))[:, None].expand_as(found)
        rows.append(("the mark; where it was found; maps", torch.cat([spot, found, grey])))
    print(contact_sheet(flags.out, rows, scale=3))


if __name__ == "__main__":
    cli(main)
