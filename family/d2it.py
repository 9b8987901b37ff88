"""D²iT (Jia et al., 2025), https://arxiv.org/abs/2504.09454: dynamic compression by local information.

Claim: regions differ in information; give a region one token or four by the entropy of its pixels, and the
same number of tokens shows more. (The first of the paper's two stages: reconstruction, no diffusion.)

    p̂(b_j) ∝ Σ_i exp(-½ ((x_i - b_j) / σ)²)      pixels x_i of a region, 256 bins b_j in [0, 1], σ = .01
    E      = -Σ_j p̂ log p̂                        fine where E is above a percentile of E over train clips
    fine region: its 4 latent vectors; coarse region: their mean, copied to its 4 cells for the decoder
    tokens = 4 · fine + coarse                    a region is 2 x 2 cells (16 x 16 pixels) over a chunk

simplified: nothing is trained; the codec never saw a mean of latents, so coarse regions decode worse than by
the paper's coarse encoder. E is a mean over red, green, blue, over a chunk's frames together.
seen here: (python -m family.d2it) 256 test clips, 10.2 of 16 tokens: entropy 26.3 dB, 6.23 ±.43 over random.
The pixels' std is as good, -.23 ±.27 (10.1 tokens), so is the latents' variance, +.02 ±.25. Motion is less
good, -1.60 ±.78 (9.8 tokens), with 12.8 tokens -2.41 ±.75: what stands still has detail too.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder
from engine.rng import rng_for
from engine.sheet import contact_sheet
from networks import load_net
from world.measure import mean
from world.scene import World

BINS, SIGMA, SIDE = 256, 0.01, 2  # SIDE: cells of a region, each way
CRITERIA = "random", "entropy", "std", "motion", "latents"


def entropy(x: Tensor) -> Tensor:
    """Values (n S) in [0, 1], taken in 8 bits → (n,) entropies in nats of a histogram of Gaussian bumps."""
    level = (x * (BINS - 1)).round().long()
    counts = torch.zeros(len(x), BINS).scatter_add_(1, level, torch.ones_like(x))
    bins = torch.arange(BINS) / (BINS - 1)  # (256,)
    p = counts @ (-0.5 * ((bins[:, None] - bins) / SIGMA).square()).exp()
    return torch.special.entr(p / p.sum(1, keepdim=True)).sum(1)


def cut(x: Tensor, chunk: int, side: int) -> Tensor:
    """Pixels or latents (b f c h w) → regions (b k m n side*side chunk c), k chunks of m x n regions."""
    if x.shape[1] % chunk or x.shape[3] % side or x.shape[4] % side:
        raise BadInput(f"{tuple(x.shape)}: no whole regions; allowed: multiples of {chunk} x {side} x {side}")
    return rearrange(x, "b (k r) c (m p) (n q) -> b k m n (p q) r c", r=chunk, p=side, q=side)


def gather(x: Tensor, grain: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Latents (b f c h w), grain (b k m n) True where fine → tokens (n chunk*c), a chunk's frames in one, and
    index (b k m n 4): the token of each cell. A coarse region's four cells share their mean."""
    cells = cut(x, chunk, SIDE).flatten(-2)  # (b k m n 4 chunk*c)
    count = torch.where(grain.flatten(), SIDE**2, 1)
    index = (count.cumsum(0) - count)[:, None] + torch.arange(SIDE**2) * grain.reshape(-1, 1)
    empty = torch.zeros(int(count.sum()), cells.shape[-1])
    tokens = empty.index_add_(0, index.flatten(), cells.flatten(0, 4))
    return tokens / index.flatten().bincount()[:, None], index.view(*grain.shape, -1)


def scatter(tokens: Tensor, index: Tensor, chunk: int) -> Tensor:
    """The inverse of `gather`, but for what a mean has lost → latents (b f c h w)."""
    return rearrange(tokens[index], "b k m n (p q) (r c) -> b (k r) c (m p) (n q)", r=chunk, p=SIDE)


def scores(video01: Tensor, x: Tensor, chunk: int, names: list[tuple]) -> dict[str, Tensor]:
    """video01 (b F 3 H W), latents (b f c h w), the clips' keys → by criterion every region's score
    (b k m n), ties broken at random."""
    pixels = cut(video01, chunk, SIDE * video01.shape[-1] // x.shape[-1])  # (b k m n S r 3)
    cells = cut(x, chunk, SIDE)  # (b k m n 4 r c)
    shape = pixels.shape[:4]
    found = {
        "random": torch.stack([torch.rand(shape[1:], generator=rng_for(*name, "grain")) for name in names]),
        "entropy": entropy(rearrange(pixels, "b k m n s r c -> (b k m n c) (s r)")).view(*shape, 3).mean(-1),
        "std": pixels.flatten(4, 5).std(4).mean(-1),
        "motion": pixels.diff(dim=5).abs().mean((4, 5, 6)),
        "latents": cells.var(4, correction=0).mean((4, 5)),
    }
    return {name: score + 1e-4 * found["random"] for name, score in found.items()}


def threshold(score: Tensor, share: float) -> float:
    """Scores of train clips → the number that this share of them exceeds, to the nearest region."""
    ranked = score.flatten().sort(descending=True).values
    ranked = torch.cat([torch.tensor([torch.inf]), ranked, torch.tensor([-torch.inf])])
    k = round(share * score.numel())
    return float((ranked[k] + ranked[k + 1]) / 2)


@dataclass(frozen=True)
class Flags:
    nets: Path = ROOT / "assets/tiny"  # folder with a codec
    clips: int = 256  # of the test split; thresholds are fixed on as many of the train split
    shares: tuple[float, ...] = (0.25, 0.75, 0.5)  # of regions that are fine; the picture shows the last
    out: Path = Path("out/family/d2it.png")  # the picture


@torch.no_grad()
def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    cfg = from_words(read_header(flags.nets / "codec.safetensors")["config"], {"device": "cpu"})
    inside = flags.shares and all(0 <= share <= 1 for share in flags.shares)
    if typed or cfg.data or not inside or flags.clips < 2:
        allowed = "a codec of the procedural world, shares from 0 to 1, clips from 2"
        raise BadInput(f"{typed or flags} is not possible; allowed: {allowed}")
    writable_folder(str(flags.out.parent))
    codec = load_net(flags.nets / "codec.safetensors", cfg, "codec")
    names, found = [("d2it", i) for i in range(flags.clips)], {}
    for split in ("train", "test"):
        video01 = World(cfg, split).batch(names).video01
        x = codec.encode(video01)
        found[split] = scores(video01, x, cfg.chunk, names)
    middle = cfg.frames // 2
    print("share fine by  tokens a chunk         PSNR dB     less random    less entropy")
    for share in tqdm(flags.shares):
        quality, frames = {}, [video01[:4, middle]]
        for name in CRITERIA:
            grain = found["test"][name] > threshold(found["train"][name], share)
            decoded = codec.decode(scatter(*gather(x, grain, cfg.chunk), cfg.chunk))
            psnr = -10 * (decoded - video01).square().flatten(1).mean(1).log10()
            quality[name] = psnr, (1 + 3 * grain.float()).sum((2, 3)).mean()
            light = 0.4 + 0.6 * grain[:4, middle // cfg.chunk].float()
            frames.append(decoded[:4, middle] * F.interpolate(light[:, None], (cfg.height, cfg.width)))
        for name, (good, tokens) in quality.items():
            cells = [mean(x) for x in (good, *(good - quality[other][0] for other in CRITERIA[:2]))]
            tqdm.write(f"{share:5.2f} {name:7}{tokens:16.2f}" + "".join(f"{cell:>16}" for cell in cells))
    what = f"clip; by {', '.join(CRITERIA)}: coarse regions are dark"
    print(contact_sheet(flags.out, [(what, strip) for strip in torch.stack(frames, 1)], scale=3))


if __name__ == "__main__":
    cli(main)
