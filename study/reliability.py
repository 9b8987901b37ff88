"""When does a reward help? exp(β r) as a weight on how far the teacher can be relied on.

    python -m study.reliability                     # tables and figure of what study/reliability.csv holds
    python -m study.reliability usefulness          # (b) one step: its signal to noise and its direction
    python -m study.reliability trained             # (c) students whose teacher is wrong somewhere
    python -m study.reliability capacity            # (d) students of 2, 3 and 6 layers
    python -m study.reliability all --device=cuda   # (b) to (d); `jobs` lists them, any prefix names some

(a), the law in one dimension, is computed with the tables. A command may be started several times side by
side, and goes on where it stopped. A wrong teacher: on the worse half of each prompt's rollouts, odd chunks
of its clean estimate lie one latent cell too far to the right; worse by the learned reward (low), by what
pixels show (pixels), or by lot (random).
"""

from engine import openmp  # isort: skip  (before torch loads)

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from einops import rearrange
from filelock import FileLock, Timeout
from torch import Tensor

from config import ROOT, BadInput, Config, build, cli, read_cli
from dmd import dmd_gradient, dmd_loss, sample_t
from engine.checkpoint import save_weights, writable_folder
from engine.processes import pick_device
from engine.rng import randn, rng_for
from model import VideoDiT, add_noise, guided_x0, shift_time, to_x0
from networks import load_net, own_networks
from pretrain import STAGES, train_causal
from pretrain import Flags as Pretraining
from reward import Balancer, rollout_weight
from rollout import exit_step, rollout, rollout_chunks
from run import Run
from saliency import intra_weight, reward_saliency, to_latent_grid
from study import results
from study.compare import FAR, watch
from study.figures import BLUE, GREY, ORANGE, canvas, finish
from study.tables import interval
from train import draw, update_critic, update_student
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption

NETS = ROOT / "assets/tiny"
COLUMNS = ("job", "seed", "setting", "weight", "measure", "value", "device")
FAULTS = {  # where the teacher errs, and how that is drawn
    "exact": ("nowhere", GREY), "low": ("where the reward is low", BLUE),
    "pixels": ("where pixels are bad", "#5b8f3a"), "random": ("at random", ORANGE),
}  # fmt: skip
WEIGHTS = {b: {"method": "windowed", "beta": float(b)} for b in "024"} | {"full": {"method": "stream_r1"}}
STEPS, CLIPS = {"trained": 24, "capacity": 60}, 96
MAPS = ("no map", "min-max", "percentiles", "another clip's", "residual")
PAIRS = [(MAPS[0], b) for b in (0.0, 0.5, 2.0, 8.0, -2.0)] + [(m, 0.0) for m in MAPS[1:]] + [(MAPS[1], 2.0)]
LOOKS = ("looks", "motion", "text", "jitter")
TRAINED = ("0", *LOOKS, f"looks x{FAR}", f"motion x{FAR}", "ess")
# of each part: the weight that others are compared with, and what its table shows
SHOWN = {
    "usefulness": ("no map, β = 0", "cosine", "signal to noise"),
    "trained": TRAINED,
    "capacity": TRAINED,
}


@dataclass(frozen=True)
class Flags:
    results: Path = ROOT / "study/reliability.csv"  # the file jobs append to
    out: Path = Path("out/reliability")  # folder of the figure, of small students' starts and of locks


def jobs() -> list[str]:
    """part/setting/weight/seed, what matters most first."""
    names = [f"trained/{f}/{w}/{s}" for s, f, w in product(range(1, 6), ("low", "exact"), "024")]
    names += [f"trained/{f}/{w}/{s}" for f, s, w in product(("pixels", "random"), range(1, 6), "024")]
    names += [f"usefulness/{start}/0/{s}" for start, s in product(("causal", "stream_r1"), range(1, 7))]
    return names + [f"capacity/{k}/{w}/{s}" for s, k, w in product(range(1, 4), "236", ("0", "2", "full"))]


# -- (a) one dimension ----------------------------------------
def law(s: float, beta: float, t: Tensor) -> float:
    """Gain in E r over the teacher N(0, 1), r = x, where weighted DMD at times t (n,) in (0, 1) leaves a
    student N(θ, s²) that can move its mean alone.

    Its clips under weights exp(β x) are N(θ + β s², s²). With a = 1 - t and k = a v / (a² v + t²), the slope
    of the posterior mean for variance v, the force is zero where θ Σ(1 - a k_1) = β s² Σ a (k_1 - k_s²). As
    t → 0, that is β (1 - s²).
    """
    t = t.double()
    a = 1 - t
    own, teacher = (a * v / (a**2 * v + t**2) for v in (s**2, 1.0))
    return float(beta * s**2 * (a * (teacher - own)).sum() / (1 - a * teacher).sum())


def law_measured(s: float, beta: float, t: Tensor, seed: int, steps: int = 300, batch: int = 2048) -> float:
    """The same by steps along the weighted gradient of samples: mean θ of the later half."""
    rng, theta, path = rng_for("law", seed), torch.zeros(()), []
    cfg = build("tiny", {"beta": beta, "group": batch, "batch": batch})
    pull = (t**2 / ((1 - t) ** 2 + t**2)).mean()  # how hard the teacher pulls sets the step size
    for _ in range(steps):
        x, noise = theta + s * torch.randn(batch, generator=rng), torch.randn(batch, generator=rng)
        at = t[torch.randint(len(t), (batch,), generator=rng)]
        a = 1 - at
        xt = a * x + at * noise
        fake = theta + a * s**2 / (a**2 * s**2 + at**2) * (xt - a * theta)
        theta = theta - 0.1 / pull * (rollout_weight(x, cfg) * (fake - a / (a**2 + at**2) * xt)).mean()
        path.append(theta)
    return float(torch.stack(path[steps // 2 :]).mean())


def law_rows(cfg: Config, beta: float = 0.5) -> list[tuple]:
    """(which times, s, exact, measured, half a 95 % interval of five seeds), gains in units of β."""
    warped = cfg.t_min + (cfg.t_max - cfg.t_min) * shift_time((torch.arange(256) + 0.5) / 256, cfg.shift)
    rows, times = [], {"t = .02": torch.tensor([0.02]), "t as in training": warped}
    for (when, t), s in product(times.items(), (0.25, 0.5, 0.75, 1.0, 1.25)):
        tried = [law_measured(s, beta, t, seed) / beta for seed in range(5)]
        rows.append((when, s, law(s, beta, t) / beta, *interval(tried)))
    return rows


# -- the fault ----------------------------------------
def shifted(teacher: Callable, wrong: Tensor, chunk: int) -> Callable:
    """The teacher; for samples `wrong` (b,) bool odd chunks of its clean estimate lie one cell further."""

    def call(xt: Tensor, t: Tensor, text: Tensor):
        v, kv = teacher(xt, t, text)
        clean = to_x0(v.float(), xt, t)
        odd = (torch.arange(xt.shape[1]) // chunk) % 2 == 1
        bad = wrong.repeat(len(xt) // len(wrong))[:, None]  # guidance asks for two estimates at once
        error = (clean.roll(1, -1) - clean) * rearrange(bad & odd, "b f -> b f 1 1 1").to(xt.device)
        return v - error / rearrange(t, "b f -> b f 1 1 1"), kv

    return call


@torch.no_grad()
def worse(run: Run, fault: str, x: Tensor, text: Tensor, words: list, *key, group: int) -> Tensor:
    """The rollouts x (b f c h w) that the teacher is wrong on (b,) bool: half of every `group` neighbours."""
    video01 = run.codec.decode(x).float()
    if fault == "low":
        score = run.reward(video01, text).mean(1).cpu()
    elif fault == "pixels":
        score = torch.stack([*three_axes(measure(video01, [caption(w) for w in words])).values()]).mean(0)
    else:
        score = torch.rand(len(x), generator=rng_for(run.cfg.seed, "fault", *key))
    rank = score.view(-1, group).argsort(1).argsort(1).flatten()
    return (rank < group // 2) & (fault != "exact")


# -- (b) one step ----------------------------------------
def begin(nets: Path, cfg: Config, student: VideoDiT) -> Run:
    """Networks and optimizers, the reward also for students without weights; the critic has caught up."""
    held = own_networks(replace(cfg, beta=1.0), nets, "")
    held.student, held.ema = student, copy.deepcopy(student)
    opts = {}
    for name, lr in (("student", cfg.lr), ("critic", cfg.critic_lr)):
        betas, params = (cfg.beta1, cfg.beta2), vars(held)[name].parameters()
        opts[f"{name}_opt"] = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.01)
    alone = dict(out=Path(), rank=0, world=1, source=World(cfg), track=None, balancer=Balancer(cfg))
    run = Run(**vars(held), **opts, **alone, cfg=cfg)
    for i in range(cfg.critic_warmup):
        update_critic(run, "warm-up", i)
    return run


def step_gradients(run: Run, p: int, rollouts: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of rollouts of one prompt: parameter gradients (2 maps rollouts n), teacher exact and wrong; rewards
    (rollouts,); {fault: where the teacher is wrong (rollouts,)}."""
    cfg, key = replace(run.cfg, space=True, time=True), (run.cfg.seed, "usefulness", p)
    words, exit = run.source.captions([key] * rollouts), p % len(cfg.denoise)
    text, rngs = run.read(words).to(cfg.device), [rng_for(*key, i) for i in range(rollouts)]
    with torch.no_grad():
        x = rollout(run.student, text, cfg, rngs, exit=exit)
        t, noise = sample_t(rngs, cfg, cfg.device), randn(rngs, *x.shape[1:], device=cfg.device)
        change = x - guided_x0(run.teacher, add_noise(x, noise, t), t, text, run.null, cfg.guidance)
    scores, pixels = reward_saliency(run.reward, run.codec.decode(x).float(), text)
    cells = to_latent_grid(pixels, *cfg.latent_shape[1:], cfg.time_stride)
    published, residual = intra_weight(cells, scores, cfg), change.abs().mean(2)[:, None]
    gentle = replace(cfg, saliency_range="percentile", floor_time=0.5, floor_space=0.5)
    maps = torch.ones_like(published), published, intra_weight(cells, scores, gentle), published.roll(1, 0)
    maps = torch.stack([*maps, intra_weight(residual, scores[:, :1], cfg)])  # as in MAPS
    teachers = run.teacher, shifted(run.teacher, torch.ones(rollouts, dtype=torch.bool), cfg.chunk)
    g = [dmd_gradient(x, text, run.null, net, run.critic, t, noise, cfg.guidance)[0] for net in teachers]
    params = list(run.student.parameters())
    found = torch.empty(2, len(MAPS), rollouts, sum(q.numel() for q in params), device=cfg.device)
    how = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    for i in range(rollouts):  # alone: a batch's backward pass would run over all of it each time
        own = rollout(run.student, text[:1], cfg, [rng_for(*key, i)], exit=exit, grad=True)
        for k, m in product(range(2), range(len(MAPS))):
            grads = torch.autograd.grad(dmd_loss(own, g[k][i : i + 1], maps[m, i : i + 1]), params, **how)
            found[k, m, i] = torch.cat([q.flatten() for q in grads])
    wrong = {f: worse(run, f, x, text, words, p, group=rollouts) for f in FAULTS}
    return found, scores.mean(1), wrong


def usefulness(nets: Path, cfg: Config, start: str, prompts: int = 8, rollouts: int = 8) -> list[dict]:
    """Signal to noise of a rollout's weighted gradient; cosine of its mean over all rollouts with that of the
    exact teacher without weights on the same rollouts.

    Signal is |E gradient|², without bias from pairs of prompts; noise is the rest of E |gradient|².
    """
    kind = "causal" if start == "causal" else "student"
    run = begin(nets, cfg, load_net(nets / f"{start}.safetensors", cfg, kind))
    settings, total, between, size = list(product(FAULTS, PAIRS)), 0.0, 0.0, 0.0
    for p in range(prompts):
        found, r, wrong = step_gradients(run, p, rollouts)
        means, sizes = [], []
        for fault, (name, beta) in settings:
            given = replace(cfg, beta=abs(beta), group=rollouts, batch=rollouts)
            w = rollout_weight(-r if beta < 0 else r, given)[:, None]
            own = w * found[wrong[fault].long(), MAPS.index(name), range(rollouts)]
            means.append(own.mean(0))
            sizes.append(own.square().sum(1).mean())
        means = torch.stack(means)
        total, size = total + means, size + torch.stack(sizes) / prompts
        between = between + means.square().sum(1)
    signal = (total.square().sum(1) - between) / (prompts * (prompts - 1))
    cosine = torch.cosine_similarity(total.double(), total[:1].double(), dim=1)
    lines = []
    for i, (fault, (name, beta)) in enumerate(settings):
        facts = {"setting": f"{start}, {fault}", "weight": f"{name}, β = {beta:g}"}
        lines += [facts | {"measure": "cosine", "value": float(cosine[i])}]
        lines += [facts | {"measure": "signal to noise", "value": float(signal[i] / (size[i] - signal[i]))}]
    return lines


# -- (c), (d) trained students ----------------------------------------
def train_student(
    nets: Path, cfg: Config, fault: str, layers: int, steps: int, out: Path
) -> dict[str, float]:
    """train.py's steps, the teacher wrong somewhere → {measure of the first clip, and of the last of FAR}."""
    run = begin(nets, cfg, start_of(nets, cfg, layers, out))
    teacher, shares = run.teacher, []
    for step in range(steps):
        rngs, text, _ = draw(run, "student", step, micro=0)
        words = run.source.captions([(cfg.seed, "student", step, i // cfg.group) for i in range(cfg.batch)])
        with torch.no_grad():  # the rollouts that the step is about to make, to know which of them are bad
            chunks, exit = rollout_chunks(cfg, "student", step), exit_step(cfg, "student", step)
            x = rollout(run.student, text, cfg, rngs, chunks, exit)
        run.teacher = shifted(teacher, worse(run, fault, x, text, words, step, group=cfg.group), cfg.chunk)
        shares.append(update_student(run, step)["ess"])
        for i in range(cfg.critic_steps):
            update_critic(run, "critic", step, i)
    views, _ = watch(run.ema, run.codec, cfg, cfg.seed, CLIPS)
    early, late = (views[view] for view in ("within", "beyond"))
    found = {name: early[name] for name in LOOKS} | {f"{name} x{FAR}": late[name] for name in LOOKS}
    return found | {"ess": sum(shares) / steps}


def start_of(nets: Path, cfg: Config, layers: int, out: Path, steps: int = 300) -> VideoDiT:
    """The causal start, or every second or third block of it, trained a little: once, for all who ask."""
    if layers == cfg.layers:
        return load_net(nets / "causal.safetensors", cfg, "causal")
    folder, small = writable_folder(str(out / f"{layers}-layers")), replace(cfg, layers=layers, seed=0)
    path = folder / "causal.safetensors"
    with FileLock(folder / ".taken"):
        if not path.exists():
            net = load_net(nets / "causal.safetensors", cfg, "causal")
            net.blocks = net.blocks[:: cfg.layers // layers]
            save_weights(folder / "teacher.safetensors", net, small, "teacher")  # where train_causal starts
            stage = replace(STAGES["causal"], steps=steps, ema=0.98)
            codec, flags = (
                load_net(nets / "codec.safetensors", cfg, "codec"),
                Pretraining(out=str(folder), resume=True),
            )
            save_weights(path, train_causal(small, stage, World(small), codec, flags), small, "causal")
    return load_net(path, small, "causal")


# -- jobs ----------------------------------------
def do(name: str, device: str, out: Path) -> list[dict]:
    """Measure what a job is about → its lines."""
    part, setting, weight, seed = name.split("/")
    how = {"group": 4, "weight": "softmax", "ema": 0.9, "seed": int(seed), "device": device}
    cfg = build("tiny", WEIGHTS[weight] | how)
    if part == "usefulness":
        lines = usefulness(NETS, cfg, setting)
    else:
        fault, layers = (setting, cfg.layers) if part == "trained" else ("exact", int(setting))
        found = train_student(NETS, cfg, fault, layers, STEPS[part], out)
        lines = [{"setting": setting, "weight": weight, "measure": k, "value": v} for k, v in found.items()]
    return [{"job": name, "seed": int(seed), "device": device} | line for line in lines]


def work(names: list[str], path: Path, device: str, out: Path) -> None:
    """Do what the file does not hold yet and nobody else is doing."""
    taken = writable_folder(str(out / "taken"))
    for name in names:
        try:
            with FileLock(taken / f"{name.replace('/', '-')}.lock", timeout=0):
                if name not in {line["job"] for line in results.read(path, COLUMNS)}:
                    results.append(path, do(name, device, out), COLUMNS, ("job",))
                    print(name, flush=True)
        except Timeout:
            continue


# -- what they say ----------------------------------------
def known(lines: list[dict], part: str, setting: str, weight: str, measure: str) -> dict[int, float]:
    """{seed: value}."""
    asked = setting, weight, measure
    mine = (line for line in lines if line["job"].startswith(part))
    return {x["seed"]: x["value"] for x in mine if (x["setting"], x["weight"], x["measure"]) == asked}


def gain(lines: list[dict], part: str, setting: str, weight: str, measure: str) -> tuple[float, float]:
    """Mean and half a 95 % interval of the differences from no weights, over the seeds that have both."""
    one, other = (known(lines, part, setting, w, measure) for w in (weight, SHOWN[part][0]))
    return interval([one[seed] - other[seed] for seed in one.keys() & other.keys()])


def table(lines: list[dict], part: str) -> str:
    """Markdown: means with 95 % intervals over seeds, in brackets the gain over no weights."""
    plain, *measures = SHOWN[part]
    text = ["| setting | weight | n | " + " | ".join(measures) + " |", "|---" * (3 + len(measures)) + "|"]
    found = ((x["setting"], x["weight"]) for x in lines if x["job"].startswith(part))
    for setting, weight in dict.fromkeys(found):
        values = [[*known(lines, part, setting, weight, k).values()] for k in measures]
        cells = ["{:.3f} ± {:.3f}".format(*interval(x)) for x in values]
        if weight != plain:
            gains = [gain(lines, part, setting, weight, k) for k in measures]
            cells = [f"{c} ({mean:+.3f} ± {half:.3f})" for c, (mean, half) in zip(cells, gains, strict=True)]
        text.append(f"| {setting} | {weight} | {len(values[0])} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def picture(path: Path, rows: list[tuple], lines: list[dict]) -> None:
    """Three panels: the law; the direction of a step, and motion of trained students, by β and by fault."""
    figure, (one, two, three) = canvas(3, 1, 3.2)
    for when, colour in {"t = .02": BLUE, "t as in training": ORANGE}.items():
        _, s, exact, mean, half = zip(*(row for row in rows if row[0] == when), strict=True)
        one.plot(s, exact, color=colour, label=when)
        one.errorbar(s, mean, yerr=half, fmt="o", color=colour)
    betas, shift = sorted(b for _, b in PAIRS[:5]), 0.04
    for i, (fault, (label, colour)) in enumerate(FAULTS.items()):
        how = {"color": colour, "label": label, "fmt": "o-", "linewidth": 2.5}
        step = [("usefulness", f"causal, {fault}", f"{MAPS[0]}, β = {b:g}", "cosine") for b in betas]
        student = [("trained", fault, b, "motion") for b in "024"]
        for panel, at, asked in ((two, betas, step), (three, (0, 2, 4), student)):
            mean, half = zip(*(interval([*known(lines, *each).values()]) for each in asked), strict=True)
            panel.errorbar([x + shift * i for x in at], mean, yerr=half, **how)
    one.set(xlabel="student's spread / teacher's", ylabel="gain / β", title="A student that moves its mean")
    two.set(ylabel="cosine", title="One step against the exact teacher's; the teacher errs")
    three.set(xlabel="β", ylabel="motion", title="Trained students", xticks=[0, 2, 4])
    for panel in (one, two):
        panel.legend(frameon=False, fontsize=12)
    finish(figure, path)


def report(lines: list[dict], out: Path) -> None:
    """Print the tables and draw the figure."""
    rows, path = law_rows(build("tiny", {})), writable_folder(str(out)) / "reliability.png"
    print("| times | s/τ | exact gain / β | measured |", "|---|---|---|---|", sep="\n")
    for when, s, exact, mean, half in rows:
        print(f"| {when} | {s} | {exact:+.3f} | {mean:+.3f} ± {half:.3f} |")
    print("", *(table(lines, part) + "\n" for part in SHOWN), sep="\n")
    picture(path, rows, lines)
    print(path)


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.pop("threads", 1))
    device = typed.pop("device", "auto")
    if typed:
        raise BadInput(f"study.reliability does not depend on --{min(typed)}; leave it out")
    names = [name for name in jobs() if what == "all" or f"{name}/".startswith(f"{what}/")]
    if what == "jobs":
        print(*(f"python -m study.reliability {name}" for name in jobs()), sep="\n")
    elif names:
        work(names, flags.results, pick_device(build("tiny", {"device": device})), flags.out)
    elif what != "tiny":  # which no word at all is read as
        raise BadInput(f"study.reliability {what} is not possible; allowed: all | jobs | what jobs prints")
    else:
        report(results.read(flags.results, COLUMNS), flags.out)


if __name__ == "__main__":
    cli(main)
