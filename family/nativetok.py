"""NativeTok: a tokenizer with an order (https://arxiv.org/abs/2601.22837), 2026.

Claim: tokens made one after another, each from those before it, are easier to generate than unordered ones.

    X = MIT(image)                            what all experts look at, made once
    z_i = VQ(T_i([X; z_1 ... z_{i-1}; mask])) expert i makes token i; image' = decoder(z_1 ... z_L)
    native training: few experts first; then new ones and the decoder, the old ones frozen; then all
    how easy: Σ_i H(z_i | z_1 ... z_{i-1}), the bits of an autoregressive prior on held-out frames

simplified: latents of single frames; MLPs, which see a frame or tokens as one vector, and a GRU as the prior.
differs: FSQ (8·6·5 = 240 codes), not a learned codebook: no code dies and no loss asks for commitment.
seen here: no advantage. python -m family.nativetok, 3 seeds, 2,048 held-out frames: native 48.3 ±1.8 bits at
    21.07 dB; minus native: at once +1.6 ±1.4 bits and +.22 ±.06 dB, causal -.2 ±2.8 and +.22 ±.09,
    flat +1.2 ±3.0 and +.21 ±.09. In all arms later tokens cost less, and frames lose their shapes.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import PRESETS, ROOT, BadInput, cli, read_cli
from engine.checkpoint import writable_folder
from engine.rng import rng_for
from engine.sheet import contact_sheet
from networks import load_net
from world.measure import mean
from world.scene import World

ARMS = ("native", "at-once", "causal", "flat")  # experts see: codes, made in stages; codes; unrounded; none
LEVELS, BASE, CODES, TOKENS = torch.tensor([8, 6, 5]), torch.tensor([1, 8, 48]), 240, 8


@dataclass(frozen=True)
class Flags:
    steps: int = 600  # updates of each tokenizer and of its prior, of 256 of 8192 frames
    seeds: int = 3  # tokenizers an arm
    out: str = "out/family"  # folder of the picture


def quantise(z: Tensor) -> tuple[Tensor, Tensor]:
    """z (... 3) → the nearest code (... 3) in [-1, 1], with z's gradient, and its number (...)."""
    soft = z.sigmoid() * (LEVELS - 1)
    digits = soft.round()
    return (soft + (digits - soft).detach()) / (LEVELS - 1) * 2 - 1, (digits.long() * BASE).sum(-1)


def mlp(*widths: int) -> nn.Sequential:
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(part for pair in pairs for part in (nn.Linear(*pair), nn.GELU())))[:-1]


class Tokenizer(nn.Module):
    def __init__(self, arm: str, tokens: int):
        super().__init__()
        self.arm, self.mit = arm, mlp(192, 256, 256)
        self.experts = nn.ModuleList(mlp(256 + 3 * tokens, 128, 3) for _ in range(tokens))
        self.decoder = mlp(3 * tokens, 256, 256, 192)

    def forward(self, x: Tensor, upto: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (b 192) → from the first `upto` tokens: latents (b 192), codes (b l 3), numbers (b l)."""
        known, room, made = [self.mit(x)], 3 * len(self.experts), []
        for i, expert in enumerate(self.experts[:upto]):
            z = expert(F.pad(torch.cat(known, dim=1), (0, room - 3 * i)))
            made.append(own := quantise(z))
            known.append({"causal": 2 * z.sigmoid() - 1, "flat": 0 * z}.get(self.arm, own[0]))
        codes, numbers = (torch.stack(parts, dim=1) for parts in zip(*made, strict=True))
        return self.decoder(F.pad(codes.flatten(1), (0, room - 3 * upto))), codes, numbers


class Prior(nn.Module):
    def __init__(self, width: int = 96):
        super().__init__()
        self.words, self.gru = nn.Embedding(CODES + 1, width), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, width)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers (b L) → how many bits each takes, given those before it (b L)."""
        hidden, _ = self.gru(self.words(F.pad(numbers[:, :-1], (1, 0), value=CODES)))
        logits = self.out(hidden) @ self.words.weight[:CODES].T
        return F.cross_entropy(logits.mT, numbers, reduction="none") / torch.log(torch.tensor(2.0))


def descend(parameters, x: Tensor, loss_of, steps: int, what: str) -> None:
    """Minimise loss_of(batches of x) over these parameters alone; the rate falls in the second half."""
    opt = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99))
    slope = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / 20, 1, 2 - 2 * i / steps))
    for step in tqdm(range(steps), desc=what, mininterval=2, leave=False):
        opt.zero_grad()
        loss_of(x[torch.randint(len(x), (256,), generator=rng_for("nativetok", what, step))]).backward()
        opt.step(), slope.step()


def train_tokenizer(net: Tokenizer, x: Tensor, steps: int, what: str) -> None:
    """Reconstruct latents x (n 192). Native: half of the experts; the others and the decoder; everything."""
    few, every, how = len(net.experts) // 2, len(net.experts), net.parameters
    new = [*net.experts[few:].parameters(), *net.decoder.parameters()]
    native = (few, how(), steps // 2), (every, new, steps // 4), (every, how(), steps // 4)
    for upto, parameters, share in native if net.arm == "native" else [(every, how(), steps)]:
        descend(parameters, x, lambda z, n=upto: F.mse_loss(net(z, n)[0], z), share, f"{what}, {upto} tokens")


def measure(arm: str, seed: int, learn: Tensor, test: Tensor, codec, truth: Tensor, steps: int) -> tuple:
    """→ bits of each token, their sum and PSNR (L+2,), on frames (m 1 3 32 32) held out; and those frames."""
    torch.manual_seed(seed)
    net, prior, what = Tokenizer(arm, TOKENS), Prior(), f"{arm}, seed {seed}"
    train_tokenizer(net, learn, steps, what)
    x, _, new = net.requires_grad_(False)(test, TOKENS)
    descend(prior.parameters(), net(learn, TOKENS)[2], lambda z: prior(z).mean(), steps, f"{what}, prior")
    bits, shown = prior.requires_grad_(False)(new).mean(0), codec.decode(x.view(-1, 1, 12, 4, 4))
    return torch.stack([*bits, bits.sum(), -10 * F.mse_loss(shown, truth).log10()]), shown


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if typed or flags.steps < 4 or flags.seeds < 2:
        raise BadInput(f"{typed or flags} is not possible; allowed: steps from 4, seeds from 2")
    out, cfg = writable_folder(flags.out) / "nativetok.png", replace(PRESETS["tiny"], device="cpu")
    codec, sets = load_net(ROOT / "assets/tiny/codec.safetensors", cfg, "codec").requires_grad_(False), []
    for split, count in (("train", 8192), ("test", 2048)):
        truth = World(cfg, split).batch([("nativetok", i) for i in range(count)], torch.tensor([0])).video01
        sets.append(codec.encode(truth).flatten(1))
    rows, found = [("held-out frames", truth[:12, 0])], {}
    print("bits a frame, PSNR in dB, both minus native's; ± 95 % over seeds; then bits of each token")
    for arm in ARMS:
        made = [measure(arm, i, *sets, codec, truth, flags.steps) for i in range(flags.seeds)]
        found[arm] = torch.stack([numbers for numbers, _ in made]).T  # (L+2 seeds)
        cells = [f"{mean(x):>12}" for x in (*found[arm][-2:], *(found[arm] - found["native"])[-2:])]
        print(f"{arm:<8}", *cells, *(f"{x:.2f}" for x in found[arm][:-2].mean(1)), sep="  ", flush=True)
        rows.append((f"{arm}: {cells[0]} bits, {cells[1]} dB", made[0][1][:12, 0]))
    print(contact_sheet(out, rows))


if __name__ == "__main__":
    cli(main)
