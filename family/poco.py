"""PoCo: position embedding as a context controller (https://arxiv.org/abs/2604.03738), 2026.

Claim: beside look-alike references attention by content fetches the wrong one; a coordinate in RoPE that says
which reference a token belongs to fetches the right one, for no parameter.

    s(n) in {0, 1}^K    which of K references the shot of token n shows; a reference's token: itself
    plane i             one of a head's K slowest time planes: the angle of token n becomes s_i(n) φ_i
    φ_i = (2πi - π)/K   the paper's phases; pi: φ_i = π for all
    equal s             no turn; where s_i differs, and q and k are parallel, plane i gives |q||k| cos φ_i

simplified: K = 2; references and shots are frames of one token; without a mask, a text hardly tells which.
differs: the turn is φ_i (s_i(m) - s_i(n)), RoPE's, not its absolute value; for φ = π that is the same.
seen here: python -m family.poco (4 seeds, 1,024 shots; the codec lets .88 through). Right at t = .7: none
    .621 ±.014, text .640 ±.017, add .700 ±.027, side .728 ±.031, side-pi .738 ±.040; minus add, paired:
    none -.079 ±.020, side +.028 ±.022, side-pi +.037 ±.025. At t = .9 all lie between .51 and .54.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from tqdm import tqdm

from config import PRESETS, ROOT, BadInput, cli, read_cli
from engine.checkpoint import writable_folder
from engine.rng import rng_for
from engine.sheet import contact_sheet
from model import VideoDiT, add_noise, look, shift_time, to_x0, turns_at
from networks import load_net
from world.measure import mean
from world.scene import RADIUS, shape_alpha
from world.words import BACKGROUNDS, COLOURS, tokenize

ARMS = ("add", "none", "text", "side", "side-pi")  # how a net is told which reference a shot shows
K, SHOTS, HUE = 2, 2, 0.35  # references, which differ by 35 % of the way between two colours
LEVELS = (0.0, 0.9, 0.8, 0.7)  # at 0 nothing is hidden: what the codec lets through
CFG = replace(PRESETS["tiny"], patch_time=1, patch=4, dim=64, ffn=256, layers=3, heads=2, device="cpu")


@dataclass(frozen=True)
class Flags:
    steps: int = 400  # updates of each net, of 64 samples
    seeds: int = 4  # nets an arm
    out: str = "out/family"  # folder of the picture


def side_turns(turns: Tensor, s: Tensor, arm: str) -> Tensor:
    """Turns (f*n 1 d/2 2) of tokens and side information s (b f K) of 0 and 1 → turns (b f*n 1 d/2 2) whose K
    slowest time planes say s, by the paper's phases or by π."""
    (b, f, k), (n, _, planes, _) = s.shape, turns.shape
    time = planes - 2 * (2 * planes // 6)  # planes of time come first, the slowest last
    phi = torch.pi * ((2 * torch.arange(k) + 1) / k if arm == "side" else torch.ones(k))
    angle = repeat(s * phi, "b f k -> b (f n) 1 k", n=n // f)
    own, given = torch.stack([angle.cos(), angle.sin()], dim=-1), turns.expand(b, -1, -1, -1, -1)
    return torch.cat([given[..., : time - k, :], own, given[..., time:, :]], dim=-2)


def draw_scenes(n: int, split: str, encode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n scenes → frames [K references | shots] (n K+2 3 32 32), encoded; s (n K+2 K), the references' colours
    (n K 3), the pixels that the shots' circles cover (n 2 1 32 32)."""
    rand = partial(torch.rand, generator=rng_for("poco", split))
    paint = torch.tensor([*COLOURS.values()])[rand(n, len(COLOURS)).argsort(1)[:, :K]]
    colour = torch.lerp(paint[:, :1], paint, HUE)
    ground = torch.tensor([*BACKGROUNDS.values()])[(3 * rand(n, 1, 1, 1, 1)).long()]
    radius, at = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rand(n, 1, 1, 1), torch.arange(32) + 0.5
    x, y = (8 + 16 * rand(2, n, K + SHOTS, 1, 1)).unbind()
    cover = shape_alpha(0, at - x, at[:, None] - y, radius).unsqueeze(2)  # circles
    s = torch.cat([torch.eye(K).expand(n, K, K), F.one_hot((K * rand(n, SHOTS)).long(), K)], dim=1)
    return encode(ground + ((s @ colour)[..., None, None] - ground) * cover), s, colour, cover[:, K:] > 0.9


def estimate(net: VideoDiT, arm: str, x: Tensor, s: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x (b K+2 c h w), s (b K+2 K), noise of the shots at t (b 2) → their velocity (b 2 c h w). K channels
    beside the latents hold s in `add`, else 0. `places`, no cache, tells a pass where its tokens are."""
    bits = repeat(s * (arm == "add"), "b f k -> b f k h w", h=x.shape[3], w=x.shape[4])
    xt = torch.cat([torch.cat([x[:, :K], add_noise(x[:, K:], noise, t)], dim=1), bits], dim=2)
    words = [[str(i) for i in row] if arm == "text" else [] for row in s[:, K:].argmax(-1).tolist()]
    turns = turns_at(torch.arange(K + SHOTS), *CFG.grid, net.head_dim)
    turns = side_turns(turns, s, arm) if arm.startswith("side") else turns
    places = SimpleNamespace(chunk=K + SHOTS, looks=lambda both: [partial(look, turns=turns)] * CFG.layers)
    return net(xt, F.pad(t, (K, 0)), tokenize(words, CFG.text_length, CFG.text_width), places)[0][:, K:, :-K]


def train_net(arm: str, latents: Tensor, told: Tensor, steps: int, seed: int) -> VideoDiT:
    """Flow matching of the shots in latents (n K+2 c h w): E |v - (ε - x)|²."""
    torch.manual_seed(seed)
    net = VideoDiT(replace(CFG, channels=CFG.channels + K))
    opt = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.99))
    slope = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / 50, 1, 2 - 2 * i / steps))
    for step in tqdm(range(steps), desc=f"{arm}, seed {seed}", mininterval=2, leave=False):
        rng = rng_for("poco", seed, step)
        pick = torch.randint(len(latents), (64,), generator=rng)
        x, s, noise = latents[pick], told[pick], torch.randn(64, *latents[0, K:].shape, generator=rng)
        t = shift_time(torch.randn(64, SHOTS, generator=rng).sigmoid(), CFG.shift)
        F.mse_loss(estimate(net, arm, x, s, noise, t), noise - x[:, K:]).backward()
        opt.step(), slope.step(), net.zero_grad()
    return net.eval().requires_grad_(False)


def measure(net: VideoDiT, arm: str, codec, x: Tensor, s: Tensor, colour: Tensor, inside: Tensor) -> tuple:
    """→ per level the share of shots whose object, decoded, within its true disc, is nearest in colour to the
    right reference; three scenes at the last level (3*(K+2) 3 32 32)."""
    shares, noise = [], torch.randn(x[:, K:].shape, generator=rng_for("poco", "measure"))
    for level in LEVELS:
        t = torch.full(noise.shape[:2], level)
        x0 = to_x0(estimate(net, arm, x, s, noise, t), add_noise(x[:, K:], noise, t), t)
        seen = (codec.decode(x0) * inside).sum((-1, -2)) / inside.sum((-1, -2))  # (n 2 3)
        shares.append((torch.cdist(seen, colour).argmin(-1) == s[:, K:].argmax(-1)).float().mean())
    return torch.stack(shares), codec.decode(torch.cat([x[:3, :K], x0[:3]], dim=1)).flatten(0, 1)


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if typed or flags.seeds < 2 or not flags.steps:
        raise BadInput(f"{typed or flags} is not possible; allowed: seeds from 2, steps from 1")
    out, seeds = writable_folder(flags.out) / "poco.png", range(flags.seeds)
    codec = load_net(ROOT / "assets/tiny/codec.safetensors", CFG, "codec").requires_grad_(False)
    learn, test = (draw_scenes(n, split, codec.encode) for n, split in ((3072, "learn"), (512, "test")))
    rows, found = [("true", codec.decode(test[0][:3]).flatten(0, 1))], {}
    print("right colour at t =", *LEVELS, "and the same minus add's; ± 95 % over seeds")
    for arm in ARMS:
        made = [measure(train_net(arm, *learn[:2], flags.steps, i), arm, codec, *test) for i in seeds]
        shares = found[arm] = torch.stack([share for share, _ in made])  # (seeds levels)
        cells = [f"{mean(x, 3):>14}" for x in (*shares.T, *(shares - found["add"]).T)]
        print(f"{arm:<8}", *cells, flush=True)
        rows.append((f"{arm}: {shares[:, -1].mean():.2f} right at t = {LEVELS[-1]}", made[0][1]))
    print(contact_sheet(out, rows))


if __name__ == "__main__":
    cli(main)
