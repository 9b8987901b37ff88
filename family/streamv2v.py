"""StreamDiffusionV2 (Feng et al., 2025), https://arxiv.org/abs/2511.07399: video to video while it arrives

Claim: chunks in flight share a pass; noise follows the motion; sinks that no longer fit are replaced.
    start: x = (1 - s) z + s ε of the input's chunk z, then the student's steps below strength s
    stream batch: row i of pass T is chunk T - i at step i; it sees the keys earlier chunks had at step i
    noise level: s ← .9 (s₀ - .1 D) + .1 s, D = min(1, rms change of a frame / .2), pixels in [-1, 1]
    stale sink j: ½ [cos(mean K_j, mean K) + cos(mean V_j, mean V)] < τ: the new chunk takes its place

simplified: one decision about a sink for all layers and samples, on keys before RoPE. One device.
differs: the network is told the level that there is, in released code .1 less.
seen here: (python -m family.streamv2v, n = 128) batched / sequential time .69 (2 steps), .47 (4).
Level by motion against its mean: jitter .57 ±.06, .58 ±.06 px: no gain. τ = .2 replaces no sink; .9 one after
a cut, none without: jitter 1.36 ±.29, kept 1.23 ±.27 px; rms from the input .088 ±.009, kept .092 ±.011.
"""

import time
from copy import copy
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice, repeat
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import KV, ListCache
from networks import load_net
from rollout import step_grid, stream
from world.measure import mean, measure
from world.scene import World
from world.words import tokenize


def side_by_side(caches: list[ListCache]) -> ListCache:
    """Caches of equal fill as one to read, along the batch: a row of the pass looks at its own."""
    joined = copy(caches[0])
    if len(caches) > 1:  # then none is empty
        joined.keys = [torch.cat(rows) for rows in zip(*(cache.keys for cache in caches), strict=True)]
        joined.values = [torch.cat(rows) for rows in zip(*(cache.values for cache in caches), strict=True)]
    return joined


def stale_sink(sinks: list[KV], new: KV, tau: float) -> int | None:
    """Which sink is least like the new chunk, if it is less like it than tau: mean over layers and batch."""
    means = [torch.stack([z.mean(1).flatten(1) for pair in kv for z in pair]) for kv in (new, *sinks)]
    alike = [float(torch.cosine_similarity(means[0], sink, dim=-1).mean()) for sink in means[1:]]
    return alike.index(min(alike)) if min(alike, default=tau) < tau else None


def noise_level(video01: Tensor, last: Tensor, start: float) -> Tensor:
    """A chunk with the frame before it (b F 3 H W), the last level (b 1) → the next: motion takes noise."""
    change = 2 * video01.diff(dim=1).square().mean((2, 3, 4)).sqrt().amax(1, keepdim=True)
    return 0.9 * (start - 0.1 * (change / 0.2).clamp(max=1)) + 0.1 * last


@torch.no_grad()
def batched(student, text, cfg, rngs, over, strength, levels=None, tau=-1.0):
    """`rollout.stream`, context=aligned, over clean chunks (b chunk c h w), but those in flight share a pass.
    → chunks, and how many sinks were replaced so far. levels: (b 1) for every chunk. tau: of `stale_sink`."""
    grid = step_grid(cfg, 0, strength)
    b, steps, seeds = len(text), len(grid), [int(torch.randint(2**62, (), generator=g)) for g in rngs]
    words, rows = student.read_text(text.repeat(steps, 1, 1)), [None] * steps  # row i: the chunk at step i
    caches, replaced, levels = [ListCache(student, cfg) for _ in grid], 0, iter(levels or repeat(strength))
    for index, z in enumerate(chain(over, [None] * (steps - 1))):
        rows = [None, *rows[:-1]]
        if z is not None:  # drawn as `stream` does
            draws, level = [rng_for(seed, index) for seed in seeds], next(levels) + torch.zeros(b, 1)
            _, first, *noise = (randn(draws, *z.shape[1:]) for _ in range(1 + steps))
            rows[0] = level, z + level[..., None, None, None] * (first - z), noise
        # while windows fill, their lengths differ: rows of one length share a pass
        for _, group in groupby((i for i in range(steps) if rows[i]), lambda i: caches[i].filled):
            group = [*group]
            t, x = (torch.cat([rows[i][part] for i in group]) for part in (0, 1))
            read = student.read_time(t), [(k[: len(t)], v[: len(t)]) for k, v in words]
            v, kv = student.run(x, t, *read, side_by_side([caches[i] for i in group]))
            kv = [[*zip(k.split(b), v.split(b), strict=True)] for k, v in kv]  # layer by layer, row by row
            for i, x0, *own in zip(group, (x - t[..., None, None, None] * v).split(b), *kv, strict=True):
                if (stale := stale_sink(caches[i].chunks[: cfg.sink], own, tau)) is not None:
                    caches[i].chunks[stale], replaced = own, replaced + 1
                caches[i].commit(own)
                if i < steps - 1:
                    rows[i] = torch.full((b, 1), grid[i + 1]), x0.lerp(rows[i][2][i], grid[i + 1]), rows[i][2]
                else:
                    yield x0, replaced


@dataclass(frozen=True)
class Flags:
    student: Path = ROOT / "assets/tiny/stream_r1.safetensors"  # its codec lies beside it
    clips: int = 128  # of the test split, and chunks that are timed
    out: Path = Path("out/family/streamv2v.png")  # the picture


@torch.no_grad()
def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    torch.set_num_threads(1)
    start, n, words = 0.75, flags.clips, read_header(flags.student)["config"]
    cfg = from_words(words, {"device": "cpu", "sink_mode": "static", "context": "aligned"})
    if typed or cfg.preset != "tiny" or n < 2:
        raise BadInput(f"{typed or flags} is not possible; allowed: a tiny student, clips above 1")
    writable_folder(str(flags.out.parent))
    student = load_net(flags.student, cfg, "student")
    codec = load_net(flags.student.with_name("codec.safetensors"), cfg, "codec")
    drawn = World(cfg, "test").batch([("v2v", i) for i in range(n)], torch.arange(6 * cfg.chunk))
    text = tokenize(drawn.meanings, cfg.text_length, cfg.text_width)  # prompt and input agree
    chunks, frames = (z.split(cfg.chunk, 1) for z in (codec.encode(drawn.video01), drawn.video01))
    levels, last = [], start
    for before, now in zip((frames[0][:, :1], *frames), frames, strict=False):
        levels.append(last := noise_level(torch.cat([before[:, -1:], now], 1), last, start))
    ways = {"level by motion": (chunks, levels), "its mean": (chunks, 6 * [torch.stack(levels).mean()])}
    inputs = {"same scene": chunks, "cut": [*(z.roll(1, 0) for z in chunks[:3]), *chunks[3:]]}
    ways |= {f"{k}, tau {tau}": (z, None, tau) for k, z in inputs.items() for tau in (0.2, 0.9)}
    rows = [("input", codec.decode(torch.cat(inputs["cut"], 1)[:1])[0])]
    print("                      jitter, px     from input   sinks replaced; of the last 3 of 6 chunks")
    for name, (parts, *how) in tqdm(ways.items()):
        rngs = [rng_for("v2v", i) for i in range(n)]
        made, replaced = zip(*batched(student, text, cfg, rngs, parts, start, *how), strict=True)
        rows += [(f"{name}: {replaced[-1]} sinks replaced", codec.decode(torch.cat(made, 1)[:1])[0])]
        shown = codec.decode(torch.cat(made[3:], 1))
        off = (shown - torch.cat(frames[3:], 1)).square().mean((1, 2, 3, 4)).sqrt()
        jitter = measure(shown, drawn.prompts)["jitter"]
        tqdm.write(f"{name:<20}{mean(jitter, 3):>15}{mean(off, 3):>15}   {replaced[-1]}")
    given, over = (student, text[:1], cfg, [rng_for(0)]), repeat(chunks[0][:1])
    for s in (start, 0.95):  # one stream; the ways take turns, chunk by chunk
        ways = cycle((stream(*given, over=over, strength=s), batched(*given, over, s)))
        ends = [time.perf_counter() for way in islice(ways, 2 * (n + 8)) for _ in islice(way, 1)]
        one, more = 1000 * torch.tensor(ends, dtype=torch.float64).diff()[15:].view(-1, 2).median(0).values
        print(f"strength {s}: {one:.1f} ms a chunk, batched {more:.1f}, ratio {more / one:.2f}")
    print(contact_sheet(flags.out, [rows[0], *rows[-2:]], every=3))


if __name__ == "__main__":
    cli(main)
