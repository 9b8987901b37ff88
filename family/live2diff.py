"""Live2Diff (Xing et al., 2024), https://arxiv.org/abs/2407.08701: a causal past for live video to video

Claim: looking back through a cache for every denoising step makes a translated live video steady.

    x = (1 - s) z + s ε    of the input's chunk z as it arrives; then the student's steps below strength s
    no past: a chunk sees itself; S passes a chunk. clean: and earlier ones, finished; S + 1 passes
    last: their keys and values of the last step; S passes. aligned: at step i those of step i; S passes, and
    a chunk need not wait for the one before. warm-up: the first chunks are made together, and stay as sinks

simplified: after the warm-up sinks are computed anew from the finished chunks. No depth prior.
differs: the student was trained with a clean past; it sees aligned and last ones for the first time.
seen here: (python -m family.live2diff, n = 128, black ground) s = .65: jitter 1.60 ±.30 px with no past, .87
±.28 clean, .98 ±.26 aligned; 1.1 ±.3 px off the input's path, colour as asked 1.00. s = .75: 3.82 ±.59, 1.45
±.37, 2.26 ±.49, 12 to 23 % of objects lost; warm-up of 2: -.54 ±.36. s = 1: clean .93 ±.09, aligned 4.01
±.44. s = .5: colour .82 to .95. --ground= (any): 3.3 ±.9 px off at .65, as opposite colours hide the input.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from networks import load_net
from rollout import Given, denoise_chunk, noised, step_grid, stream
from world.measure import mean, measure
from world.scene import World
from world.words import BACKGROUNDS, COLOURS, caption, tokenize

WAYS = {"no past": "none", "clean": "clean", "last": "none", "aligned": "aligned"}  # → context


@torch.no_grad()
def warm_up(student, text, rngs, first: list[Tensor], grid) -> tuple[Tensor, ...]:
    """Clean chunks of the input (b chunk c h w) → the same made over together, the `past` of a stream."""
    source = torch.cat(first, 1)
    start, *fresh = (randn(rngs, *source.shape[1:]) for _ in grid)
    noise = noised(source, start, grid[0]), *fresh
    # without a cache, each chunk sees all of them
    return denoise_chunk(Given(student, text), [None], grid, False, None, *noise)[0].chunk(len(first), 1)


@torch.no_grad()
def made(student, text, chunks, rngs, cfg: Config, way: str, strength: float, warm=0) -> Tensor:
    """Clean chunks → the video made over (b f c h w), each chunk seeing what `way` says."""
    how = partial(stream, student, text, replace(cfg, context=WAYS[way]), rngs, strength=strength)
    if way == "no past":
        return torch.cat([next(how(over=[z])) for z in chunks], 1)
    past = warm_up(student, text, rngs, chunks[:warm], step_grid(cfg, 0, strength)) if warm else ()
    return torch.cat([*past, *how(past=past, over=chunks[warm:])], 1)


def centre(video01: Tensor) -> Tensor:
    """(b F 3 H W) → the centre (x, y) of what differs from the ground, (b F 2) in pixels, on the torus."""
    ground = video01.transpose(1, 2).flatten(2).median(2).values[:, None, :, None, None]
    mass, size = ((video01 - ground).abs().amax(2) - 0.2).clamp(0, 0.4), video01.shape[-1]
    turn = torch.exp(2j * torch.pi / size * (torch.arange(size) + 0.5))
    phase = torch.stack([(mass.sum(axis) * turn).sum(-1) for axis in (-2, -1)], dim=-1)
    return phase.angle() / (2 * torch.pi) % 1 * size


def judged(video01: Tensor, prompts: list[str], position: Tensor) -> Tensor:
    """→ (b 4): jitter and distance to the input's true path (b F 2), pixels; lost: > 6; colour as asked."""
    found, size = measure(video01, prompts), video01.shape[-1]
    off = ((centre(video01) - position + size / 2) % size - size / 2).norm(dim=-1).mean(1)
    return torch.stack([found["jitter"], off, (off > 6).float(), found["colour"]], dim=1)


def scenes(cfg: Config, ground: str, first: int, clips: int, chunks: int):
    """Test clips on that ground, number `first` and on: video01, captions in another colour, true paths."""
    world = World(cfg, "test")
    keys = (("v2v", i) for i in count() if ground in ("", world.captions([("v2v", i)])[0][-1]))
    drawn = world.batch([*islice(keys, first, first + clips)], torch.arange(chunks * cfg.chunk))
    asked, colours = [], [*COLOURS]
    for i, (colour, *rest) in enumerate(drawn.meanings, first):
        asked.append([colours[(colours.index(colour) + 1 + i % 7) % 8], *rest])
    return drawn.video01, asked, drawn.position[:, 0]


@dataclass(frozen=True)
class Flags:
    student: Path = ROOT / "assets/tiny/stream_r1.safetensors"  # its codec lies beside it
    clips: int = 128  # of the test split
    chunks: int = 6  # of a clip
    strengths: tuple[float, ...] = (1.0, 0.8, 0.75, 0.65, 0.5)  # how much of the input turns into noise
    ground: str = "black"  # of the clips; "": any
    out: Path = Path("out/family/live2diff.png")  # the picture


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    torch.set_num_threads(1)
    cfg = from_words(read_header(flags.student)["config"], {"device": "cpu"})
    fits = flags.strengths and all(0 < s <= 1 for s in flags.strengths) and flags.ground in ("", *BACKGROUNDS)
    if typed or cfg.preset != "tiny" or not (fits and flags.clips > 1 and flags.chunks > 2):
        allowed = "a tiny student, 0 < strengths <= 1, clips > 1, chunks > 2, a known ground"
        raise BadInput(f"{typed or flags} is not possible; allowed: {allowed}")
    writable_folder(str(flags.out.parent))
    student = load_net(flags.student, cfg, "student")
    codec = load_net(flags.student.with_name("codec.safetensors"), cfg, "codec")
    found, rows, two = {}, [], replace(cfg, sink=2, sink_mode="static", window=4)
    arms = [(f"{s:g} {way}", cfg, way, s, 0) for s in flags.strengths for way in WAYS]
    arms += [(f"0.75 warm-up of {w}", two, "aligned", 0.75, w) for w in (0, 2)]
    for first in tqdm(range(0, flags.clips, 32)):
        video01, asked, paths = scenes(cfg, flags.ground, first, min(32, flags.clips - first), flags.chunks)
        text, prompts = tokenize(asked, cfg.text_length, cfg.text_width), [caption(m) for m in asked]
        chunks = codec.encode(video01).detach().split(cfg.chunk, 1)
        for name, *how in [("input",), *arms]:
            rngs = [rng_for("v2v", first + i) for i in range(len(text))]
            latents = made(student, text, chunks, rngs, *how) if how else torch.cat(chunks, 1)
            shown = codec.decode(latents).detach()
            found.setdefault(name, []).append(judged(shown, prompts, paths))
            rows += [(f"{name}: {prompts[0]}" if how else name, shown[0])] * (not first)
    found = {name: torch.cat(parts) for name, parts in found.items()}
    print(f"{'strength, way':<22}   jitter, px      off, px         lost       colour   jitter - above")
    for (name, x), above in zip(found.items(), (found["input"], *found.values()), strict=False):
        cells = [*x.unbind(1), (x - above)[:, 0]]  # jitter's difference from the arm above
        print(f"{name:<22}" + "".join(f"{mean(cell):>14}" for cell in cells))
    shown = [row for row in rows if row[0].split(":")[0] in ("input", "0.65 no past", "0.65 aligned")]
    print(contact_sheet(flags.out, shown, every=3))


if __name__ == "__main__":
    cli(main)
