"""CausVid's distillation (Yin et al., 2025), https://arxiv.org/abs/2412.07772: DMD on noised real clips

Claim: after its start (family/causvid.py) a causal student learns by DMD with a bidirectional teacher.

    student  x̂((1 - t_k) x + t_k ε) of real clips x, block-causal mask, t_k drawn for every chunk k from the
             student's levels; all else is DMD as in dmd.py, critic included
    so the student never meets its own videos: exposure bias, which Self Forcing removes by rollouts

Three arms, seeds paired: rollouts from teacher forcing's start, rollouts from the ODE's start, noised clips
from teacher forcing's start. Test prompts; the first clip of a rollout, and the last of nine (x9).

simplified: 12 steps, running average .9. differs: without stage 1's long training.
seen here: SEEN
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ROOT, BadInput, Config, build, cli, read_cli
from engine.checkpoint import writable_folder, write_atomically
from engine.rng import randn, rng_for
from model import add_noise, to_x0
from rollout import rollout, step_grid
from run import Run, prepare
from train import Flags as Training
from train import update_critic, update_student
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption, tokenize

ARMS = {"teacher forcing": "causal", "ODE": "ode", "noised clips": "causal"}  # and where they start
SHOWN = [f"{name} x{clips}" for name in ("looks", "motion", "text", "jitter") for clips in (1, 9)]
STUDENT_T = 0, 0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31  # 97.5 % quantile, by number of values


def on_data(net, x: Tensor, noise: Tensor, level: Tensor, text: Tensor, cfg: Config) -> Tensor:
    """Real clips and noise (b f c h w), which of the student's levels every chunk is at (b k) → x̂."""
    t = torch.tensor(step_grid(cfg, 0))[level].repeat_interleave(cfg.chunk, 1)  # (b f)
    chunk, xt = torch.arange(cfg.frames) // cfg.chunk, add_noise(x, noise, t)
    return to_x0(net(xt, t, text, mask=chunk[:, None] >= chunk)[0], xt, t)


class Noised:
    """In the place of a run's rollouts: noised clips of the world that have the same captions."""

    def __init__(self, run: Run):
        self.world, self.codec, self.keys = run.source, run.codec, []
        run.source, run.dream = self, self.dream

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        self.keys = keys
        return self.world.captions(keys)

    def dream(self, net, text, cfg, rngs, chunks=None, exit=None, grad=False) -> Tensor:
        """As `rollout`; chunks and exit have no meaning here."""
        with torch.no_grad():
            x = self.codec.encode(self.world.batch(self.keys).video01)
        level = [torch.randint(len(step_grid(cfg, 0)), (cfg.chunks,), generator=g) for g in rngs]
        with torch.set_grad_enabled(grad):
            return on_data(net, x, randn(rngs, *x.shape[1:]), torch.stack(level), text, cfg)


def drawn(cfg: Config, count: int) -> tuple[list[str], Tensor, list[torch.Generator]]:
    """Test prompts, their text (n l e), generators."""
    words = World(cfg, "test").captions([("causvid", i) for i in range(count)])
    rngs = [rng_for("causvid", i) for i in range(count)]
    return [caption(w) for w in words], tokenize(words, cfg.text_length, cfg.text_width), rngs


@torch.no_grad()
def quality(net, codec, cfg: Config, count: int) -> dict[str, float]:
    """What the pixels of rollouts show: means over test prompts."""
    found = {}
    for clips in (1, 9):
        prompts, text, rngs = drawn(cfg, count)
        seen = measure(codec.decode(rollout(net, text, cfg, rngs, clips * cfg.chunks)), prompts)
        seen |= three_axes(seen)
        found |= {
            name: float(seen[name.split()[0]].nanmean()) for name in SHOWN if name.endswith(f"x{clips}")
        }
    return found


def trained(arm: str, seed: int, steps: int, flags) -> dict[str, float]:
    """Distil for that many steps; what is done already is read from a file."""
    path = flags.out / f"{arm}-{seed}-{steps}.json".replace(" ", "_")
    if not path.exists():
        cfg = build("tiny", {"method": "windowed", "seed": seed, "ema": 0.9, "device": "cpu"})
        folder = {"causal": flags.nets, "ode": flags.ode}[ARMS[arm]]
        start = str(folder / f"{ARMS[arm]}.safetensors")
        run = prepare(cfg, Training(nets=str(flags.nets), out=str(path.with_suffix("")), start=start), 0, 1)
        if arm == "noised clips":
            Noised(run)
        for i in range(cfg.critic_warmup if steps else 0):
            update_critic(run, "warm-up", i)
        for step in tqdm(range(steps), desc=path.stem):
            update_student(run, step)
            for i in range(cfg.critic_steps):
                update_critic(run, "critic", step, i)
        found = quality(run.ema, run.codec, cfg, flags.prompts)
        write_atomically(path, lambda name: name.write_text(json.dumps(found)))
    return json.loads(path.read_text())


def interval(values: list[float]) -> str:
    """Mean ± half a 95 % interval."""
    x = torch.tensor(values)
    half = STUDENT_T[len(x)] * x.std() / len(x) ** 0.5
    return f"{x.mean():.3f} ±{half:.3f}"


@dataclass(frozen=True)
class Flags:
    nets: Path = ROOT / "assets/tiny"  # folder with codec, teacher and the start by teacher forcing
    ode: Path = Path("out/family/causvid")  # where family.causvid has left its start
    out: Path = Path("out/family/causvid_dmd")  # the folder of runs and results
    steps: int = 12  # of DMD
    seeds: int = 3  # of every arm
    prompts: int = 128  # of the test split


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 0))
    if typed or not 2 <= flags.seeds < len(STUDENT_T) or flags.prompts < 2:
        raise BadInput(f"allowed: 2 to {len(STUDENT_T) - 1} seeds, 2 prompts or more")
    if not (flags.ode / "ode.safetensors").exists():
        raise BadInput(f"{flags.ode} holds no ode.safetensors; 'python -m family.causvid' makes it")
    writable_folder(str(flags.out))
    print(f"{'':28}" + "".join(f"{name:>15}" for name in SHOWN))
    for arm in ("teacher forcing", "ODE"):
        start = trained(arm, 0, 0, flags)
        print(f"{arm + ', the start':28}" + "".join(f"{start[name]:15.3f}" for name in SHOWN))
    found = {arm: [trained(arm, s, flags.steps, flags) for s in range(flags.seeds)] for arm in ARMS}
    for arm, lines in found.items():
        pairs = [*zip(lines, found["teacher forcing"], strict=True)]
        for name, rows in ((f"{arm}, {flags.steps} steps", lines), ("  minus teacher forcing", pairs)):
            values = [[r[k] if rows is lines else r[0][k] - r[1][k] for r in rows] for k in SHOWN]
            if rows is lines or arm != "teacher forcing":
                print(f"{name:28}" + "".join(f"{interval(v):>15}" for v in values))


if __name__ == "__main__":
    cli(main)
