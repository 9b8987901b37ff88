"""Next-Frame Diffusion (Cheng et al., 2025), https://arxiv.org/abs/2506.01380: speculation

Claim: actions mostly stay, so make n chunks at once and discard those whose action turns out to be another.

    speculate: n chunks in a pass; each sees the past, itself, and those before it, noisy as itself
    keep:      the longest prefix with the action that was guessed; one clean pass remembers it
    passes:    S + 1 a round; kept: E = Σ_{j<n} (1 - p)^j if an action changes with probability p a chunk
    hedge:     (ours) one chunk for every action in one batch, all but one thrown away: nothing is guessed

simplified: the action is the word for the direction; chunks of 4 frames, not frames; no training of its own.
differs: the clean pass is one of its own; `rollout.stream` lets it ride with the next chunk's first one.
seen here: (python -m family.nfd, 128 clips) p = 0: jitter 1.12 ±.10, 1.53 ±.15, 2.49 ±.26, 3.09 ±.28 px for
n = 1 to 4, motion .85, .83, .80, .78 ±.01; p = .25, n = 4: +1.18 ±.28 px. Time a chunk: .57, .43, .35 of
n = 1's, which takes 1.2 times as long as `stream`. Kept of 4, p = .25: 2.14 in 8 short streams.
"""

import time
from dataclasses import dataclass
from itertools import cycle, islice, product, takewhile
from pathlib import Path

import torch
from tqdm import tqdm

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder
from engine.rng import randn, rng_for
from engine.sheet import contact_sheet
from model import ListCache
from networks import load_net
from rollout import Ahead, Given, denoise_chunk, step_grid, stream
from world.measure import mean, measure, three_axes
from world.scene import World
from world.words import MOTIONS, caption, tokenize


@torch.no_grad()
def play(student, texts, cfg: Config, rngs, actions, n: int, hedge=False):
    """Rounds: the chunks that are kept (b kept*chunk c h w), how many were made. texts: (b l e) an action.
    actions: of every chunk; of a round's chunks the first one's is known, with hedge none."""
    cache, grid, ways, k = ListCache(student, cfg), step_grid(cfg, 0), len(texts) if hedge else 1, 0
    seeds = ways * [int(torch.randint(2**62, (), generator=g)) for g in rngs]  # futures share their noise
    every, givens = Given(student, torch.cat(texts)), [Given(student, t.repeat(ways, 1, 1)) for t in texts]
    while k < len(actions):
        now, made = actions[k], min(n, len(actions) - k)
        gens = [[rng_for(seed, index) for seed in seeds] for index in range(k, k + made)]  # as `stream` does
        _, *noise = (torch.cat([randn(g, cfg.chunk, *cfg.latent_shape) for g in gens], 1) for _ in (0, *grid))
        x, _ = denoise_chunk(every if hedge else givens[now], [Ahead(cache, made)], grid, False, None, *noise)
        kept = len([*takewhile(now.__eq__, actions[k : k + made])])
        x = x.chunk(ways)[now if hedge else 0][:, : kept * cfg.chunk]
        cache.commit(givens[now](x.repeat(ways, 1, 1, 1, 1), Ahead(cache, kept), 0.0)[1])
        yield x, made
        k += kept


def switching(rng: torch.Generator, p: float, chunks: int) -> list[int]:
    """An action of four for every chunk; with probability p another one than before."""
    moves = torch.randint(1, 4, (chunks,), generator=rng) * (torch.rand(chunks, generator=rng) < p)
    return (moves.cumsum(0) % 4).tolist()


@torch.no_grad()
def speed(student, cfg: Config, ahead) -> str:
    """Median ms a chunk of one stream whose action stays, all n and `rollout.stream` taking turns."""
    text, names = torch.zeros(1, cfg.text_length, cfg.text_width), [*(f"n = {n}" for n in ahead), "stream"]
    ways = [play(student, [text], cfg, [rng_for(0)], [0] * 999, n) for n in ahead]
    turns = islice(cycle([*ways, stream(student, text, cfg, [rng_for(0)])]), 40 * len(names))
    ends = [0.0, *(time.perf_counter() for way in turns for _ in islice(way, 1))]
    took = 1000 * torch.tensor(ends, dtype=torch.float64).diff().view(40, -1)[4:].median(0).values
    took /= torch.tensor([*ahead, 1])
    return ", ".join(f"{name}: {ms:.1f}" for name, ms in zip(names, took, strict=True))


@dataclass(frozen=True)
class Flags:
    student: Path = ROOT / "assets/tiny/stream_r1.safetensors"  # its codec lies beside it
    ahead: tuple[int, ...] = (1, 2, 3, 4)  # n, chunks in a pass
    change: tuple[float, ...] = (0.0, 0.1, 0.25)  # p, how likely an action changes from chunk to chunk
    groups: int = 8  # of 16 clips of 12 chunks, each with actions of its own
    out: Path = Path("out/family/nfd.png")  # the picture


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    torch.set_num_threads(1)
    cfg = from_words(read_header(flags.student)["config"], {"device": "cpu"})
    fits = flags.ahead and flags.change and flags.groups and all(0 <= p <= 1 for p in flags.change)
    if typed or cfg.preset != "tiny" or not (fits and all(1 <= n <= cfg.chunks for n in flags.ahead)):
        allowed = f"a tiny student, 1 <= ahead <= {cfg.chunks}, 0 <= change <= 1, groups > 0"
        raise BadInput(f"{typed or flags} is not possible; allowed: {allowed}")
    writable_folder(str(flags.out.parent))
    student, rows, found = load_net(flags.student, cfg, "student"), {}, {}
    codec, world = load_net(flags.student.with_name("codec.safetensors"), cfg, "codec"), World(cfg, "test")
    print("   p  n    kept formula       jitter, px    minus first n  motion if p = 0    shape", flush=True)
    for p, n in tqdm([*product(flags.change, flags.ahead)]):
        got, kept = [], []
        for group in range(flags.groups):
            keys, actions = [("nfd", group, i) for i in range(16)], switching(rng_for("nfd", group), p, 12)
            asked = [[(m[0], m[1], [*MOTIONS][(i + a) % 4], ("slowly", "quickly")[i // 4 % 2], m[4])
                      for i, m in enumerate(world.captions(keys))] for a in range(4)]  # fmt: skip
            texts = [tokenize(m, cfg.text_length, cfg.text_width) for m in asked]
            parts = [*play(student, texts, cfg, [rng_for(*key) for key in keys], actions, n)]
            kept += [x.shape[1] / cfg.chunk for x, made in parts if made == n]
            shown = codec.decode(torch.cat([x for x, _ in parts], 1)[:, -6 * cfg.chunk :]).detach()
            seen = measure(shown, [*map(caption, asked[0])])
            got.append(torch.stack([seen["jitter"], three_axes(seen)["motion"], seen["shape"]]))
            rows.setdefault(f"n = {n}, p = {flags.change[0]:g}", shown[0])
        found[p, n] = jitter, motion, shape = torch.cat(got, 1)
        each = jitter, jitter - found[p, flags.ahead[0]][0], motion, shape
        cells, formula = "".join(f"{mean(x, 3):>15}" for x in each), sum((1 - p) ** j for j in range(n))
        tqdm.write(f"{p:5.2f} {n} {sum(kept) / len(kept):7.2f} {formula:7.2f} {cells}")
    print("ms a chunk,", speed(student, cfg, flags.ahead))
    print(contact_sheet(flags.out, rows.items(), every=3))


if __name__ == "__main__":
    cli(main)
