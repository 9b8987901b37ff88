"""PoCo: position embedding as a context controller (https://arxiv.org/abs/2604.03738), 2026.

Claim: beside look-alike references attention by content fetches the wrong one; a coordinate in RoPE that says
which reference a token belongs to fetches the right one, for no parameter.

    s(n) in {0, 1}^K    which of K references the shot of token n shows; a reference's token: itself
    plane i             one of a head's K slowest time planes: the angle of token n becomes s_i(n) φ_i
    φ_i = (2πi - π)/K   the paper's phases; pi: φ_i = π for all
    equal s             no turn; where s_i differs, and q and k are parallel, plane i gives |q||k| cos φ_i

simplified: references and shots are single frames, a frame is one token; a shot shows one reference, drawn
anew in each scene; without a mask on the text, `text` hardly tells a shot which of the two it is.
differs: the turn is φ_i (s_i(m) - s_i(n)), RoPE's, not its absolute value; for φ = π that is the same.
seen here: python -m family.poco (4 seeds, 1,024 shots; the codec lets .88 through). Right at t = .7: none
    .621 ± .014, text .640 ± .017, add .700 ± .027, side .728 ± .031, side-pi .738 ± .040; minus add, paired:
    none -.079 ± .020, side +.028 ± .022, side-pi +.037 ± .025. At t = .9 all lie between .51 and .54.
"""

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
from world.scene import RADIUS, shape_alpha
from world.words import BACKGROUNDS, COLOURS, tokenize

ARMS = ("add", "none", "text", "side", "side-pi")  # how a net is told which reference a shot shows
SHOTS, HUE = 2, 0.35  # look-alikes differ by 35 % of the way between two colours
LEVELS = (0.0, 0.9, 0.8, 0.7)  # at 0 nothing is hidden: what the codec lets through
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # Student's t for 2, 3, ... seeds


@dataclass(frozen=True)
class Flags:
    references: int = 2  # look-alikes to choose from, K
    steps: int = 400  # updates of each net, of 64 samples
    seeds: int = 4  # nets an arm
    arms: tuple[str, ...] = ARMS  # some of add, none, text, side, side-pi
    out: str = "out/family"  # folder of the picture


def side_turns(turns: Tensor, s: Tensor, arm: str) -> Tensor:
    """Turns (f*n 1 d/2 2) of tokens and side information s (b f K) → turns (b f*n 1 d/2 2) whose K slowest
    time planes say s, by the paper's phases or by π. Raises BadInput."""
    (b, f, k), (n, _, planes, _) = s.shape, turns.shape
    time = planes - 2 * (2 * planes // 6)  # planes of time come first, the slowest last
    if k > time or not ((s == 0) | (s == 1)).all():
        raise BadInput(f"s {(b, f, k)} is not possible; allowed: 0 and 1, for up to {time} references")
    phi = torch.pi * ((2 * torch.arange(k) + 1) / k if arm == "side" else torch.ones(k))
    angle = repeat(s * phi, "b f k -> b (f n) 1 k", n=n // f)
    own, given = torch.stack([angle.cos(), angle.sin()], dim=-1), turns.expand(b, -1, -1, -1, -1)
    return torch.cat([given[..., : time - k, :], own, given[..., time:, :]], dim=-2)


def draw_scenes(n: int, flags: Flags, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n scenes → frames [K references | shots] (n K+2 3 32 32), s (n K+2 K), the references' colours (n K 3),
    what the shots' circles cover (n 2 1 32 32)."""
    rand, k = partial(torch.rand, generator=rng_for("poco", split)), flags.references
    colour = torch.tensor([*COLOURS.values()])[rand(n, len(COLOURS)).argsort(1)[:, :k]]
    colour = torch.lerp(colour[:, :1], colour, HUE)
    ground = torch.tensor([*BACKGROUNDS.values()])[(3 * rand(n, 1, 1, 1, 1)).long()]
    radius, at = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rand(n, 1, 1, 1), torch.arange(32) + 0.5
    x, y = (8 + 16 * rand(2, n, k + SHOTS, 1, 1)).unbind()
    cover = shape_alpha(0, at - x, at[:, None] - y, radius).unsqueeze(2)  # circles
    s = torch.cat([torch.eye(k).expand(n, k, k), F.one_hot((k * rand(n, SHOTS)).long(), k)], dim=1)
    return ground + ((s @ colour)[..., None, None] - ground) * cover, s, colour, cover[:, k:]


def estimate(net: VideoDiT, arm: str, x: Tensor, s: Tensor, noise: Tensor, t: Tensor, cfg) -> Tensor:
    """x (b K+2 c h w), s (b K+2 K), noise of the shots at t (b 2) → their velocity (b 2 c h w). Every arm has
    K channels beside the latents: 0, or s in `add`, which adds learned vectors to the tokens. `places` stands
    where a cache stands, but remembers nothing: it tells a pass where its tokens are."""
    (_, f, k), c = s.shape, x.shape[2]
    bits = repeat(s * (arm == "add"), "b f k -> b f k h w", h=x.shape[3], w=x.shape[4])
    xt = torch.cat([torch.cat([x[:, :k], add_noise(x[:, k:], noise, t)], dim=1), bits], dim=2)
    words = [[str(i) for i in row] if arm == "text" else [] for row in s[:, k:].argmax(-1).tolist()]
    turns = turns_at(torch.arange(f), *cfg.grid, net.head_dim)
    turns = side_turns(turns, s, arm) if arm.startswith("side") else turns
    places = SimpleNamespace(chunk=f, looks=lambda both: [partial(look, turns=turns)] * cfg.layers)
    return net(xt, F.pad(t, (k, 0)), tokenize(words, cfg.text_length, cfg.text_width), places)[0][:, k:, :c]


def train_net(arm: str, latents: Tensor, told: Tensor, cfg, steps: int, seed: int) -> VideoDiT:
    """Flow matching of the shots in latents (n K+2 c h w): E |v - (ε - x)|²."""
    torch.manual_seed(seed)
    net = VideoDiT(replace(cfg, channels=cfg.channels + told.shape[2]))
    opt = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.99))
    slope = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / 50, 1, 2 - 2 * i / steps))
    for step in tqdm(range(steps), desc=f"{arm}, seed {seed}", mininterval=2, leave=False):
        rng = rng_for("poco", seed, step)
        pick = torch.randint(len(latents), (64,), generator=rng)
        x, s, noise = latents[pick], told[pick], torch.randn(64, *latents[0, -SHOTS:].shape, generator=rng)
        t = shift_time(torch.randn(64, SHOTS, generator=rng).sigmoid(), cfg.shift)
        F.mse_loss(estimate(net, arm, x, s, noise, t, cfg), noise - x[:, -SHOTS:]).backward()
        opt.step(), slope.step(), net.zero_grad()
    return net.eval()


@torch.no_grad()
def measure(net, arm: str, codec, x: Tensor, s: Tensor, colour: Tensor, cover: Tensor, cfg) -> tuple:
    """→ per level the share of shots whose object, decoded, within its true disc, is nearest in colour to the
    right reference; three scenes at the last level (3*(K+2) 3 32 32)."""
    shares, k, inside = [], s.shape[2], cover > 0.9
    noise = torch.randn(x[:, k:].shape, generator=rng_for("poco", "measure"))
    for level in LEVELS:
        t = torch.full(noise.shape[:2], level)
        x0 = to_x0(estimate(net, arm, x, s, noise, t, cfg), add_noise(x[:, k:], noise, t), t)
        seen = (codec.decode(x0) * inside).sum((-1, -2)) / inside.sum((-1, -2))  # (n 2 3)
        shares.append((torch.cdist(seen, colour).argmin(-1) == s[:, k:].argmax(-1)).float().mean())
    return torch.stack(shares), codec.decode(torch.cat([x[:3, :k], x0[:3]], dim=1)).flatten(0, 1)


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    k, n, arms = flags.references, flags.seeds, flags.arms
    if typed or not (arms and {*arms} <= {*ARMS} and 2 <= k <= 6 and 2 <= n <= 8 and flags.steps):
        allowed = f"references 2 to 6, seeds 2 to 8, steps from 1, arms of {', '.join(ARMS)}"
        raise BadInput(f"{typed or flags} is not possible; allowed: {allowed}")
    size = dict(frames=k + SHOTS, chunk=k + SHOTS, patch_time=1, patch=4, dim=64, ffn=256, layers=3, heads=2)
    cfg, out = replace(PRESETS["tiny"], **size, device="cpu"), writable_folder(flags.out) / "poco.png"
    codec, sets = load_net(ROOT / "assets/tiny/codec.safetensors", cfg, "codec").requires_grad_(False), []
    for split, count in (("learn", 3072), ("test", 512)):
        frames, *truth = draw_scenes(count, flags, split)
        sets.append([torch.cat([codec.encode(part) for part in tqdm(frames.split(64), desc=split)]), *truth])
    rows, first = [("true", frames[:3].flatten(0, 1))], None
    print("right colour at t =", *LEVELS, "and the same minus the first arm's; ± 95 % over seeds")
    for arm in arms:
        nets = [train_net(arm, *sets[0][:2], cfg, flags.steps, seed) for seed in range(n)]
        shares, clips = zip(*(measure(net, arm, codec, *sets[1], cfg) for net in nets), strict=True)
        first, shares = first if rows[1:] else torch.stack(shares), torch.stack(shares)  # (seeds levels)
        table = torch.cat([shares, shares - first], dim=1)
        cells = [f"{x.mean():6.3f} ± {T95[n - 2] * x.std() / n**0.5:.3f}" for x in table.T]
        print(f"{arm:<8}", *cells, sep="  ", flush=True)
        rows.append((f"{arm}: {shares[:, -1].mean():.2f} right at t = {LEVELS[-1]}", clips[0]))
    print(contact_sheet(out, rows))


if __name__ == "__main__":
    cli(main)
