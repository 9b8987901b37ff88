"""Does it do what the papers say? Every method and every part of it, trained alike, measured alike.

A row is a name for a handful of Config fields. Each row is trained once per seed from the same teacher and
causal start, with the same prompts and the same noise (rollout.stream; only a taper draws its exit from more
steps), so rows are compared pair by pair, a part of a method with its own control. Each run leaves one JSON
file, from which the table is computed; a comparison that was interrupted goes on where it stopped.

Reported are prompts of the test split; prompts of the select split choose the checkpoint (train.py). No
learned reward takes part in the measures (world/measure.py).
"""

import fcntl
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice, product
from pathlib import Path

import torch
from torch import Tensor

from codec import Codec
from config import METHODS, ROOT, BadInput, Config, build, from_words
from engine.checkpoint import fingerprint, read_header, read_metrics, writable_folder, write_atomically
from engine.rng import rng_for
from model import VideoDiT
from networks import load_net
from rollout import step_grid, stream
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption, tokenize

BASE, WINDOWED = "self_forcing", "windowed"  # plain DMD: the whole clip in view; with window and EMA sink
_RF, _SR1, _DIAGONAL = ({"method": name} for name in ("reward_forcing", "stream_r1", "diagonal"))
PARTLESS = _SR1 | {"beta": 0.0, "space": False, "time": False, "balance": "none"}
ROWS: dict[str, dict] = {name: {"method": name} for name in METHODS} | {
    WINDOWED: PARTLESS,
    # Reward Forcing's parts: the sink, its decay, its precision
    "reward_forcing-no_sink": _RF | {"sink": 0, "sink_mode": "none"},
    "reward_forcing-static_sink": _RF | {"sink_mode": "static"},
    "reward_forcing-ema.9": _RF | {"sink_decay": 0.9},
    "reward_forcing-ema.999": _RF | {"sink_decay": 0.999},
    "reward_forcing-ema.999_bf16": _RF | {"sink_decay": 0.999, "sink_dtype": "bf16"},
    # Stream-R1's parts; penalty and axis weights with a history short enough to act in a short run
    "stream_r1-inter": PARTLESS | {"beta": 0.5},
    "stream_r1-space": PARTLESS | {"space": True},
    "stream_r1-space_scrambled": PARTLESS | {"space": True, "released_patch_order": True},
    "stream_r1-time": PARTLESS | {"time": True},
    "stream_r1-time_space": PARTLESS | {"time": True, "space": True},
    "stream_r1-unbalanced": _SR1 | {"balance": "none"},
    "stream_r1-penalty10": _SR1 | {"balance_window": 10},
    "stream_r1-axis_weights10": _SR1 | {"balance": "axis_weights", "balance_window": 10},
    "stream_r1-group4": _SR1 | {"group": 4},
    "stream_r1-one_weight": _SR1 | {"released_weight": True},
    "stream_r1-kv_grad": _SR1 | {"kv_grad": True},
    # Diagonal Distillation's parts
    "diagonal-432": _DIAGONAL | {"taper": "432", "motion": 0.2},
    "diagonal-taper": _DIAGONAL | {"motion": 0.0, "context": "clean"},
    "diagonal-no_refresh": _DIAGONAL | {"motion": 0.0, "taper": "uniform"},
    "diagonal-motion": _DIAGONAL | {"motion": 0.2, "taper": "uniform", "context": "clean"},
    "diagonal-motion0": _DIAGONAL | {"motion": 0.0},
    "diagonal-motion.2": _DIAGONAL | {"motion": 0.2},
    "diagonal-motion1": _DIAGONAL | {"motion": 1.0},
    # ours: a tilted critic and all of Stream-R1 on top
    "tilted-stream_r1": _SR1 | {"tilt": 6.0},
    # where there is more to gain, with two denoising steps
    "windowed-2steps": PARTLESS | {"denoise": (1.0, 0.5)},
    "stream_r1-2steps": _SR1 | {"denoise": (1.0, 0.5)},
    "tilted-2steps": {"method": "tilted", "denoise": (1.0, 0.5)},
    "windowed-2steps-guidance3": PARTLESS | {"denoise": (1.0, 0.5), "guidance": 3.0},
    "steered-2steps": {"method": "steered", "denoise": (1.0, 0.5)},
    # ours: with a tilted critic, at every noise level, without more guidance
    "steered-tilt": {"method": "steered", "tilt": 6.0},
    "steered-tilt-2steps": {"method": "steered", "tilt": 6.0, "denoise": (1.0, 0.5)},
    "steered-from0": {"method": "steered", "steer_from": 0.0},
    "steered-guidance1.5": {"method": "steered", "guidance": 1.5},
    # ours: more of the reward's gradient, an average that lags less; `combined` without a reward
    "nudged-3-ema.95": {"method": "nudged", "steer": 3.0, "ema": 0.95},
    "windowed-guidance3-motion4": PARTLESS | {"guidance": 3.0, "motion": 4.0},
    # the teacher's guidance
    "windowed-guidance3": PARTLESS | {"guidance": 3.0},
    "windowed-guidance3-slow": PARTLESS | {"guidance": 3.0, "lr": 1e-4},  # as a strong pull beside DMD does
    "windowed-guidance3-ema.95": PARTLESS | {"guidance": 3.0, "ema": 0.95},  # an average that lags less
    "stream_r1-guidance3-ema.95": _SR1 | {"guidance": 3.0, "ema": 0.95},
    # what later chunks see, in training and in sampling
    **{f"context-{t}": {"method": BASE, "context": "noisy", "context_t": t} for t in (0.1, 0.2, 0.357, 0.6)},
    "self_forcing-kv_grad": {"method": BASE, "kv_grad": True},
}
CONTEXTS = (0.0, 0.1, 0.2, 0.357, 0.6)  # where the base's and the context rows' students are sampled
FAR, FEW = 9, 64  # drift is looked for at this many times the training length, on that many prompts
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 1.96)  # t for 2 to 10, more


def reference(row: str) -> str:
    """What a row is compared with: the same cache and guidance without the row's own idea; other guidance
    with the usual one, other sinks with the EMA sink, weights of the motion term beside a taper with none."""
    cfg = build("tiny", ROWS[row])
    if row.startswith("reward_forcing-"):
        return "reward_forcing"
    if row in ("diagonal-motion.2", "diagonal-motion1"):
        return "diagonal-motion0"
    if not cfg.window:
        return BASE
    plain = build("tiny", PARTLESS | {"denoise": cfg.denoise, "guidance": cfg.guidance})
    plain = build("tiny", PARTLESS | {"denoise": cfg.denoise}) if cfg == plain else plain
    return [name for name in ROWS if build("tiny", ROWS[name]) == plain][0]


def rows_named(names: str, typed: dict) -> list[str]:
    """Comma-separated names (empty: all rows) → row names, controls first. Raises BadInput, also for a
    typed field that a row is made of."""
    wanted = [name for name in names.split(",") if name] or list(ROWS)
    for name in wanted:
        if name not in ROWS:
            raise BadInput(f"--methods: {name!r} is not possible; allowed: {' '.join(ROWS)}")
    wanted = list(dict.fromkeys([BASE, WINDOWED, *map(reference, wanted), *wanted]))
    for name in wanted:
        own = {"seed"} | ROWS[name].keys() | METHODS[ROWS[name]["method"]].keys()
        if clash := own & typed.keys():
            raise BadInput(f"--{min(clash)} is part of what the row {name!r} stands for; leave it out")
    return wanted


def compare(names: list[str], typed: dict, how) -> None:
    """Train and measure every row with every seed, seed by seed, unless its file is there already.

    The same command may be started several times side by side: a run is left to whoever took it first. A run
    that fails is noted as failed, and the others go on. Raises BadInput for a file of other settings.
    """
    writable_folder(str(how.results), "--results")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # takes the running training along
    nets = fingerprint(how.nets)
    for seed, name in product(range(how.seeds), names):
        path, folder = how.results / f"{name}-{seed}.json", how.runs / f"{name}-{seed}"
        asked = asked_for(ROWS[name] | typed | {"seed": seed}, nets, how.clips)
        if path.exists():
            if not alike(read_result(path)["asked"], asked):
                raise BadInput(f"{path} was made with other settings or nets; choose another --results")
            continue
        with open(writable_folder(str(folder), "--runs") / ".taken", "w") as file:
            if not taken(file) or path.exists():
                continue
            found = {"row": name, "seed": seed, "asked": asked} | run(name, typed, seed, folder, how, file)
            text = json.dumps(found)
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        for state in folder.glob("step_*.pt"):  # 50 MB each, and of no more use
            state.unlink()
        print(path, flush=True)


def taken(file) -> bool:
    """Take a file for this process, until it is closed or the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def asked_for(given: dict, nets: str, clips: int) -> dict:
    """What makes results comparable: every field of the config that matters, the prompts, and the nets."""
    cfg = json.loads(json.dumps(asdict(build("tiny", given))))  # lists for tuples, as in the file
    del cfg["device"], cfg["save_every"]
    return cfg | {"clips": clips, "nets": nets, "far": FAR, "few": FEW}


def alike(then: dict, now: dict) -> bool:
    """A field that has been added since is alike at its default."""
    default = asked_for({}, "", 0)
    return then.keys() <= now.keys() and all(then.get(k, default[k]) == v for k, v in now.items())


def run(name: str, typed: dict, seed: int, folder: Path, how, claim) -> dict:
    """Run train.py, or what is left of it, and measure its student → what was found, or how it failed."""
    argv = [as_flag(k, v) for k, v in (ROWS[name] | typed).items()]
    argv += [f"--seed={seed}", f"--nets={how.nets}", f"--out={folder}"]
    found = {"command": f"python train.py {' '.join(argv)}"}
    argv += ["--resume"] if list(folder.glob("step_*.pt")) else []
    words = [sys.executable, str(ROOT / "train.py"), *argv]
    if not trained(folder, ROWS[name] | typed | {"seed": seed}, how.nets):
        # if we are killed it keeps the claim
        done = subprocess.run(words, check=False, pass_fds=[claim.fileno()])
        if done.returncode == 2:  # it has said why
            raise BadInput(f"{found['command']} was refused")
        if done.returncode:
            return found | {"failed": done.returncode}
    steps = json.loads((folder / "config.json").read_text())["steps"]
    if (last := last_step(folder)) < steps:
        raise BadInput(f"{folder} stopped at step {last} of {steps}; the same command goes on from there")
    return found | judge(name, folder, seed, how)


def trained(folder: Path, given: dict, nets: Path) -> bool:
    """Whether a run of these settings, from these nets, has ended there: other --results measure it again."""
    path, asked = folder / "config.json", asked_for(given, "", 0)
    if not path.exists() or list(folder.glob("step_*.pt")) or last_step(folder) != asked["steps"]:
        return False
    made = json.loads(path.read_text())
    kinds = ("codec", "teacher", "causal", *["reward"] * build("tiny", given).weighted)
    origin = {"nets": fingerprint(nets, kinds), "start": ""}
    facts = {k: made.pop(k, None) for k in ("device", "save_every", "torch", "world", "origin")}
    return facts["origin"] == origin and alike(made | {"nets": "", "clips": 0}, asked)


def last_step(folder: Path) -> int:
    """The last one that metrics.jsonl knows of; 0 without any."""
    return max((row["step"] for row in read_metrics(folder)), default=0)


def as_flag(name: str, value) -> str:
    """A Config field as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def judge(name: str, folder: Path, seed: int, how) -> dict:
    """Measure a run's student, and one of the context rows or the base under every level of context noise."""
    path = folder / "student.safetensors"
    header = read_header(path)
    cfg = from_words(header["config"], {"device": "cpu"})
    student, codec = load_net(path, cfg, "student"), load_net(how.nets / "codec.safetensors", cfg, "codec")
    views, seconds = watch(student, codec, cfg, seed, how.clips)
    if name == BASE or name.startswith("context-"):
        for t in CONTEXTS:
            sampled = replace(cfg, context="noisy", context_t=t)
            other, _ = watch(student, codec, sampled, seed, min(how.clips, 32))
            views[f"beyond, sampled with context {t}"] = other["beyond"]
    return {
        "chosen step": int(header["step"]),
        "training": training(folder),
        "forwards": sum(len(step_grid(cfg, k)) + (cfg.context != "none") for k in range(7)),
        "seconds per chunk of 32 clips": seconds,
        "views": views,
    }


@torch.no_grad()
def watch(student: VideoDiT, codec: Codec, cfg: Config, seed: int, clips: int) -> tuple[dict, float]:
    """Stream a clip per prompt, FAR clips' worth of frames for the first FEW → measures of the first clip, of
    the last one with the drift from one to the other, and the seconds a chunk took."""
    views: dict[str, list[dict[str, Tensor]]] = {"within": [], "beyond": []}
    seconds = []
    for first in range(0, clips, 32):  # FEW is two of these
        ids, far = range(first, min(first + 32, clips)), FAR if first < FEW else 1
        words = World(cfg, "test").captions([("compare", i) for i in ids])
        text, prompts = tokenize(words, cfg.text_length, cfg.text_width), [caption(w) for w in words]
        start = time.perf_counter()
        rngs = [rng_for("compare", seed, i) for i in ids]
        x = list(islice(stream(student, text, cfg, rngs), far * cfg.chunks))
        seconds += [(time.perf_counter() - start) / len(x)] * (far > 1)
        start01, end01 = (
            codec.decode(torch.cat(part, 1)).float() for part in (x[: cfg.chunks], x[-cfg.chunks :])
        )
        found = measure(start01, prompts)
        views["within"].append(found | three_axes(found))
        if far > 1:
            found, both = measure(end01, prompts), measure(torch.cat([start01, end01], 1), prompts)
            drift = {f"{k}_drift": both[k] for k in ("saturation", "contrast")}
            views["beyond"].append(found | three_axes(found) | drift)
    return {view: per_prompt(parts) for view, parts in views.items()}, sorted(seconds)[len(seconds) // 2]


def training(folder: Path) -> dict:
    """Medians over the run of what metrics.jsonl says about its weights and its speed, and all that was held
    out: {step: {measure: value}}."""
    rows = read_metrics(folder)
    known = [k for k in ("seconds", "ess", "w_inter", "w_intra_max") if k in rows[-1]]
    held_out = {}
    for row in rows:
        if seen := {k.removeprefix("held_out_"): v for k, v in row.items() if k.startswith("held_out_")}:
            held_out[str(row["step"])] = seen
    return {k: sorted(row[k] for row in rows)[len(rows) // 2] for k in known} | {"held out": held_out}


def per_prompt(parts: list[dict[str, Tensor]]) -> dict[str, list[float | None]]:
    """Raw numbers, one a prompt; None where a measure does not apply."""
    joined = {k: torch.cat([part[k] for part in parts]).tolist() for k in parts[0]}
    return {k: [None if v != v else round(v, 4) for v in values] for k, values in joined.items()}


# -- the table ----------------------------------------
def read_result(path: Path) -> dict:
    """What a run has left. Raises BadInput for a file that no run has written."""
    try:
        found = json.loads(path.read_text())
        return {"row": found["row"], "seed": found["seed"], "asked": found["asked"]} | found
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} was not written by study.evaluate table: {error!r}") from error


def load_results(results: Path, names: list[str], seeds: tuple[int, ...] = ()) -> dict[str, dict[int, dict]]:
    """{row: {seed: what was found}} of the rows that have been run, with these seeds (none named: with any).
    Raises BadInput if mixed."""
    table: dict[str, dict[int, dict]] = {}
    made = set()
    for path in sorted(results.glob("*.json")):
        found = read_result(path)
        if found["row"] in names and (not seeds or found["seed"] in seeds):
            table.setdefault(found["row"], {})[found["seed"]] = found
            made.add(tuple(found["asked"][k] for k in ("nets", "clips", "steps", "batch")))
    if len(made) > 1:
        raise BadInput(f"{results} mixes runs of other nets, prompts, steps or batches: {sorted(made)}")
    return {name: table[name] for name in names if name in table}


def mean_of(found: dict, view: str, name: str) -> float:
    """Over prompts; of a drift its size: brighter in one clip does not make up for darker in another."""
    values = [v for v in found["views"][view][name] if v is not None]
    return sum(abs(v) if name.endswith("drift") else v for v in values) / max(1, len(values))


def interval(values: list[float] | Tensor) -> tuple[float, float]:
    """Mean of the finite ones, half a 95 % interval (Student's t); nan for a single one."""
    x = torch.as_tensor(values, dtype=torch.float64)
    x = x[x.isfinite()]
    spread = float(x.std()) if len(x) > 1 else float("nan")
    return float(x.mean()), _T95[min(len(x), 11) - 2] * spread / max(1, len(x)) ** 0.5


COLUMNS = (
    ("looks", "within"), ("motion", "within"), ("text", "within"), ("shape", "within"), ("jitter", "within"),
    ("looks", "beyond"), ("motion", "beyond"), ("text", "beyond"),
    ("saturation_drift", "beyond"), ("contrast_drift", "beyond"),
)  # fmt: skip


def markdown(table: dict[str, dict[int, dict]], against: str = "") -> str:
    """One line a row: means and 95 % intervals over seeds, in brackets the paired difference to one row, or,
    if none is named, to each row's `reference`.

    Failed runs are counted, not averaged. Of many intervals one in twenty excludes zero by chance.
    """
    heads = [f"{name}{f' x{FAR}' if view == 'beyond' else ''}" for name, view in COLUMNS]
    heads = ["row", "n", *heads, "ess", "forwards", "chosen step"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table:
        runs = finished(table, row)
        n = f"{len(runs)}" + (f" ({lost} failed)" if (lost := len(table[row]) - len(runs)) else "")
        if not runs:
            lines.append(f"| {row} | {n} |" + " |" * (len(heads) - 2))
            continue
        gained = gains(table, row, COLUMNS, against)
        cells = []
        for name, view in COLUMNS:
            mean, half = interval([mean_of(found, view, name) for found in runs.values()])
            paired = " ({:+.3f} ± {:.3f})".format(*interval(gained[name, view])) if gained else ""
            cells.append(f"{mean:.3f} ± {half:.3f}{paired}")
        ess = [found["training"]["ess"] for found in runs.values() if "ess" in found["training"]]
        cells += [f"{sum(ess) / len(ess):.2f}" if ess else "", str(next(iter(runs.values()))["forwards"])]
        cells += [" ".join(str(found["chosen step"]) for found in runs.values())]
        lines.append(f"| {row} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_time(table: dict[str, dict[int, dict]], name: str) -> str:
    """Rows: methods. Columns: steps of training. The averaged student on the prompts that select one."""
    found = {row: [f["training"]["held out"] for f in finished(table, row).values()] for row in table}
    steps = sorted({step for runs in found.values() for run in runs for step in run}, key=int)
    lines = [
        f"| {name} after | " + " | ".join(f"{s} steps" for s in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for row, runs in found.items():
        values = [interval([run[step][name] for run in runs if step in run]) for step in steps if runs]
        lines.append(f"| {row} | " + " | ".join("{:.2f} ± {:.2f}".format(*v) for v in values) + " |")
    return "\n".join(lines)


def finished(table: dict[str, dict[int, dict]], row: str) -> dict[int, dict]:
    return {seed: found for seed, found in table.get(row, {}).items() if "failed" not in found}


def gains(table: dict[str, dict[int, dict]], row: str, columns, against="") -> dict[tuple, list[float]]:
    """{(measure, view): a row minus its control, seed by seed}; empty where no seed has both."""
    other = against or reference(row)
    runs, control = finished(table, row), finished(table, other)
    shared = sorted(runs.keys() & control.keys()) if row != other else []
    return {
        (name, view): [mean_of(runs[s], view, name) - mean_of(control[s], view, name) for s in shared]
        for name, view in columns if shared
    }  # fmt: skip


def crossed(table: dict[str, dict[int, dict]], name: str) -> str:
    """Rows: the context noise in training. Columns: in sampling. Mean size of the drift over seeds."""
    lines = [f"| {name}, trained with | " + " | ".join(f"sampled {t}" for t in CONTEXTS) + " |"]
    lines.append("|---" * (len(CONTEXTS) + 1) + "|")
    for row in table:
        found = list(finished(table, row).values())
        if found and (row == BASE or row.startswith("context-")):
            views = [f"beyond, sampled with context {t}" for t in CONTEXTS]
            cells = ["{:.3f} ± {:.3f}".format(*interval([mean_of(f, v, name) for f in found])) for v in views]
            lines.append(f"| {row.removeprefix('context-')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
