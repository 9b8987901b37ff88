"""When does a reward help? exp(β r) as a weight on how far the teacher can be relied on.

    python -m study.reliability                     # tables and figure of what study/reliability.csv holds
    python -m study.reliability usefulness          # (b) one step: its signal to noise and its direction
    python -m study.reliability trained             # (c) students whose teacher is wrong somewhere
    python -m study.reliability capacity            # (d) students of 2, 3 and 6 layers
    python -m study.reliability all --device=cuda   # (b) to (d); `jobs` lists them, any prefix names some

(a), the law in one dimension, is computed with the tables. A command may be started several times side by
side, and goes on where it stopped. How a teacher is made wrong: study/usefulness.py.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from config import ROOT, BadInput, Config, build, cli, read_cli
from engine.checkpoint import save_weights, writable_folder
from engine.processes import pick_device
from model import VideoDiT
from networks import load_net
from pretrain import STAGES, train_causal
from pretrain import Flags as Pretraining
from rollout import exit_step, rollout, rollout_chunks
from study import results
from study.compare import FAR, watch
from study.figures import BLUE, GREY, ORANGE, canvas, finish
from study.law import law_rows
from study.tables import interval
from study.usefulness import FAULTS, MAPS, PAIRS, begin, shifted, usefulness, worse
from train import draw, update_critic, update_student
from world.scene import World

NETS = ROOT / "assets/tiny"
COLUMNS = ("job", "seed", "setting", "weight", "measure", "value", "device")
WEIGHTS = {b: {"method": "windowed", "beta": float(b)} for b in "024"} | {"full": {"method": "stream_r1"}}
STEPS, CLIPS = {"trained": 24, "capacity": 60}, 96
LOOKS = ("looks", "motion", "text", "jitter")
TRAINED = ("0", *LOOKS, f"looks x{FAR}", f"motion x{FAR}", "ess")
# of each part: the weight that others are compared with, and what its table shows
SHOWN = dict.fromkeys(("usefulness", "trained", "capacity"), TRAINED)
SHOWN["usefulness"] = "no map, β = 0", "cosine", "signal to noise"


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


# -- (c), (d) trained students ----------------------------------------
def train_student(nets: Path, cfg: Config, fault: str, layers: int, steps: int, out: Path) -> dict:
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
    views = watch(run.ema, run.codec, cfg, cfg.seed, CLIPS)
    when = {"": views["within"], f" x{FAR}": views["beyond"]}
    return {k + end: view[k] for end, view in when.items() for k in LOOKS} | {"ess": sum(shares) / steps}


def start_of(nets: Path, cfg: Config, layers: int, out: Path, steps: int = 300) -> VideoDiT:
    """The causal start, or every second or third block of it, trained a little: once, for all who ask."""
    net = load_net(nets / "causal.safetensors", cfg, "causal")
    if layers == cfg.layers:
        return net
    folder, small = writable_folder(str(out / f"{layers}-layers")), replace(cfg, layers=layers, seed=0)
    path = folder / "causal.safetensors"
    with FileLock(folder / ".taken"):
        if not path.exists():
            net.blocks = net.blocks[:: cfg.layers // layers]
            save_weights(folder / "teacher.safetensors", net, small, "teacher")  # where train_causal starts
            stage = replace(STAGES["causal"], steps=steps, ema=0.98)
            codec = load_net(nets / "codec.safetensors", cfg, "codec")
            flags = Pretraining(out=str(folder), resume=True)
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
    mine = (x for x in lines if x["job"].startswith(part) and x["measure"] == measure)
    return {x["seed"]: x["value"] for x in mine if (x["setting"], x["weight"]) == (setting, weight)}


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
    for i, (fault, label) in enumerate(FAULTS.items()):
        how = {"color": (GREY, BLUE, "#5b8f3a", ORANGE)[i], "label": label, "fmt": "o-", "linewidth": 2.5}
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
