"""Does it do what the papers say? Every method and every part of it, trained alike, measured alike.

A row is a name for a handful of Config fields. Each row is trained once per seed from the same teacher and
causal start, with the same prompts and the same noise (a draw depends on its seed, step and sample alone), so
rows are compared pair by pair. Each run leaves one JSON file, from which the table is computed; a comparison
that was interrupted goes on where it stopped.

Reported are prompts of the test split; prompts of the select split choose the checkpoint (train.py). No
learned reward takes part in the measures (measure.py).
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_weights, read_header, writable_folder, write_atomically
from codec import Codec
from config import METHODS, BadInput, Config, from_words
from data import World, caption, rng_for, tokenize
from measure import measure, three_axes
from model import VideoDiT
from rollout import step_grid, stream

BASE = "self_forcing"
_RF, _SR1, _DIAGONAL = ({"method": name} for name in ("reward_forcing", "stream_r1", "diagonal"))
_INTER = _SR1 | {"space": False, "time": False, "balance": "none"}
ROWS: dict[str, dict] = {name: {"method": name} for name in METHODS} | {
    # Reward Forcing's parts: the sink, its decay, its precision
    "reward_forcing-window_only": _RF | {"sink": 0, "sink_mode": "none", "beta": 0.0},
    "reward_forcing-no_sink": _RF | {"sink": 0, "sink_mode": "none"},
    "reward_forcing-static_sink": _RF | {"sink_mode": "static"},
    "reward_forcing-ema.9": _RF | {"sink_decay": 0.9},
    "reward_forcing-ema.999": _RF | {"sink_decay": 0.999},
    "reward_forcing-ema.999_bf16": _RF | {"sink_decay": 0.999, "sink_dtype": "bf16"},
    # Stream-R1's parts
    "stream_r1-inter": _INTER,
    "stream_r1-space": _INTER | {"beta": 0.0, "space": True},
    "stream_r1-space_scrambled": _INTER | {"beta": 0.0, "space": True, "released_patch_order": True},
    "stream_r1-time": _INTER | {"beta": 0.0, "time": True},
    "stream_r1-time_space": _INTER | {"beta": 0.0, "time": True, "space": True},
    "stream_r1-unbalanced": _SR1 | {"balance": "none"},
    "stream_r1-axis_weights": _SR1 | {"balance": "axis_weights", "balance_window": 10},
    "stream_r1-group4": _SR1 | {"group": 4},
    "stream_r1-one_weight": _SR1 | {"released_weight": True},
    "stream_r1-kv_grad": _SR1 | {"kv_grad": True},
    # Diagonal Distillation's parts
    "diagonal-432": _DIAGONAL | {"taper": "432"},
    "diagonal-taper": {"method": BASE, "taper": "5432"},
    "diagonal-no_refresh": {"method": BASE, "context": "none"},
    "diagonal-motion0": _DIAGONAL | {"motion": 0.0},
    "diagonal-motion1": _DIAGONAL | {"motion": 1.0},
    "diagonal-motion4": _DIAGONAL | {"motion": 4.0},
    # what later chunks see, in training and in sampling
    **{f"context-{t}": {"method": BASE, "context": "noisy", "context_t": t} for t in (0.1, 0.2, 0.357, 0.6)},
    "self_forcing-kv_grad": {"method": BASE, "kv_grad": True},
}
CONTEXTS = (0.0, 0.1, 0.2, 0.357, 0.6)  # levels at which students of the context rows are sampled
FAR = 9  # drift is looked for at this many times the training length
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 2 to 10 seeds


@dataclass(frozen=True)
class Protocol:
    nets: Path
    results: Path  # one JSON file a run
    runs: Path  # what training leaves
    seeds: int
    clips: int  # prompts of the test split


def rows_named(names: str) -> list[str]:
    """ "a,b" → row names, the base first; empty: all of them. Raises BadInput."""
    wanted = [name for name in names.split(",") if name] or list(ROWS)
    for name in wanted:
        if name not in ROWS:
            raise BadInput(f"--methods: {name!r} is not possible; allowed: {' '.join(ROWS)}")
    return [BASE, *(name for name in wanted if name != BASE)]


def compare(names: list[str], typed: dict, how: Protocol) -> None:
    """Train and measure every row with every seed, seed by seed, unless its file is there already."""
    writable_folder(str(how.results))
    for seed in range(how.seeds):
        for name in names:
            path = how.results / f"{name}-{seed}.json"
            if path.exists():
                continue
            folder = how.runs / f"{name}-{seed}"
            command = train(ROWS[name] | typed, seed, folder, how)
            found = judge(folder, seed, how) | {"row": name, "seed": seed, "command": command}
            text = json.dumps(found)
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
            print(f"{path}", flush=True)


def train(given: dict, seed: int, folder: Path, how: Protocol) -> str:
    """Run train.py, or what is left of it → its command line. Raises BadInput when it fails."""
    argv = [as_flag(k, v) for k, v in given.items()]
    argv = ["train.py", *argv, f"--seed={seed}", f"--nets={how.nets}", f"--out={folder}"]
    resume = ["--resume"] if list(folder.glob("step_*.pt")) else []
    script = Path(__file__).with_name("train.py")
    done = subprocess.run([sys.executable, str(script), *argv[1:], *resume], check=False)
    if done.returncode:
        raise BadInput(f"python {' '.join(argv)} ended with exit code {done.returncode}")
    return f"python {' '.join(argv)}"


def as_flag(name: str, value) -> str:
    """A Config field as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def judge(folder: Path, seed: int, how: Protocol) -> dict:
    """Measure a run's student, and one of the context rows or the base under every level of context noise."""
    path = folder / "student.safetensors"
    header = read_header(path)
    cfg = from_words(header["config"], {"device": "cpu"})
    student = load_weights(path, VideoDiT(cfg), cfg, "student")
    codec = load_weights(how.nets / "codec.safetensors", Codec(cfg), cfg, "codec")
    views, seconds = watch(student, codec, cfg, seed, how.clips)
    if cfg.context == "noisy" or cfg == replace(cfg, **METHODS[BASE]):
        for t in CONTEXTS:
            sampled = replace(cfg, context="noisy", context_t=t)
            other, _ = watch(student, codec, sampled, seed, min(how.clips, 32))
            views[f"beyond, sampled with context {t}"] = other["beyond"]
    return {
        "config": {f.name: value for f in fields(Config) if (value := getattr(cfg, f.name)) != f.default},
        "chosen step": int(header["step"]),
        "training": training(folder),
        "forwards": sum(len(step_grid(cfg, k)) + (cfg.context != "none") for k in range(7)),
        "seconds per chunk of 32 clips": seconds,
        "views": views,
    }


@torch.no_grad()
def watch(student: VideoDiT, codec: Codec, cfg: Config, seed: int, clips: int) -> tuple[dict, float]:
    """Stream FAR clips' worth of frames per prompt → measures of the first clip, of the last one with the
    drift from one to the other, and the seconds a chunk took."""
    views: dict[str, list[dict[str, Tensor]]] = {"within": [], "beyond": []}
    seconds = []
    for first in range(0, clips, 32):
        ids = range(first, min(first + 32, clips))
        words = World(cfg, "test").captions([("compare", i) for i in ids])
        text, prompts = tokenize(words, cfg.text_length, cfg.text_width), [caption(w) for w in words]
        start = time.perf_counter()
        x = list(stream(student, text, cfg, [rng_for("compare", seed, i) for i in ids], FAR * cfg.chunks))
        seconds.append((time.perf_counter() - start) / len(x))
        ends = [codec.decode(torch.cat(part, 1)).float() for part in (x[: cfg.chunks], x[-cfg.chunks :])]
        for parts, video01 in zip(views.values(), ends, strict=True):
            found = measure(video01, prompts)
            parts.append(found | three_axes(found))
        both = measure(torch.cat(ends, 1), prompts)
        views["beyond"][-1] |= {f"{k}_drift": both[k] for k in ("saturation", "contrast")}
    return {view: per_prompt(parts) for view, parts in views.items()}, sorted(seconds)[len(seconds) // 2]


def training(folder: Path) -> dict[str, float]:
    """Medians over the run of what metrics.jsonl says about its weights and its speed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = [k for k in ("seconds", "ess", "w_inter", "w_intra_max") if k in rows[-1]]
    return {k: sorted(row[k] for row in rows)[len(rows) // 2] for k in known}


def per_prompt(parts: list[dict[str, Tensor]]) -> dict[str, list[float | None]]:
    """Raw numbers, one a prompt; None where a measure does not apply."""
    joined = {k: torch.cat([part[k] for part in parts]).tolist() for k in parts[0]}
    return {k: [None if v != v else round(v, 4) for v in values] for k, values in joined.items()}


# -- the table ----------------------------------------


def load_results(results: Path, names: list[str]) -> dict[str, dict[int, dict]]:
    """{row: {seed: what `judge` found}} of the rows that have been run."""
    table: dict[str, dict[int, dict]] = {}
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if found["row"] in names:
            table.setdefault(found["row"], {})[found["seed"]] = found
    return {name: table[name] for name in names if name in table}


def mean_of(found: dict, view: str, name: str) -> float:
    values = [v for v in found["views"][view][name] if v is not None]
    return sum(values) / len(values)


def interval(values: list[float]) -> tuple[float, float]:
    """Seeds' means → mean, half a 95 % interval (Student's t); nan for one seed."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(_T95[min(len(x), 10) - 2] * x.std() / len(x) ** 0.5)


COLUMNS = (
    ("looks", "within"), ("motion", "within"), ("text", "within"), ("shape", "within"), ("jitter", "within"),
    ("looks", "beyond"), ("motion", "beyond"), ("text", "beyond"),
    ("saturation_drift", "beyond"), ("contrast_drift", "beyond"),
)  # fmt: skip


def markdown(table: dict[str, dict[int, dict]]) -> str:
    """One line a row: means and 95 % intervals over seeds, and in brackets the paired difference to BASE."""
    heads = [f"{name}{' x9' if view == 'beyond' else ''}" for name, view in COLUMNS]
    lines = ["| row | n | " + " | ".join(heads) + " | ess | forwards |", "|---" * (len(heads) + 4) + "|"]
    for row, runs in table.items():
        cells = []
        for name, view in COLUMNS:
            mean, half = interval([mean_of(found, view, name) for found in runs.values()])
            cell = f"{mean:.3f} ± {half:.3f}"
            shared = runs.keys() & table[BASE].keys()
            if row != BASE and shared:
                gains = [mean_of(runs[s], view, name) - mean_of(table[BASE][s], view, name) for s in shared]
                cell += " ({:+.3f} ± {:.3f})".format(*interval(gains))
            cells.append(cell)
        some = next(iter(runs.values()))
        ess = some["training"].get("ess")
        cells += ["" if ess is None else f"{ess:.2f}", str(some["forwards"])]
        lines.append(f"| {row} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
