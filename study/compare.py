"""Does it do what the papers say? Every method and every part of it, trained alike, measured alike.

Each row (study/rows.py) is trained once per seed from the same teacher and causal start, with the same
prompts and the same noise (rollout.stream; only a taper draws its exit from more steps), so that rows are
compared pair by pair. A finished run appends to one CSV file (study/results.py); a comparison that was
interrupted goes on where it stopped. Reported are prompts of the test split; prompts of the select split
choose the checkpoint (train.py). No learned reward takes part in the measures (world/measure.py).
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from codec import Codec
from config import ROOT, BadInput, Config, build, from_words
from engine.checkpoint import fingerprint, read_header, writable_folder
from engine.processes import pick_device
from engine.rng import rng_for
from model import VideoDiT
from networks import load_net
from rollout import step_grid, stream
from run import read_metrics
from study import results
from study.rows import WORLDS, as_flag, fields_of
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption, tokenize

FAR, FEW = 9, 64  # drift is measured at this many times the training length, on that many prompts
STOPPED = (130, 143, -2, -15)  # exit codes of a training that a person or a machine has ended, to go on
MACHINE = ("device", "threads", "save_every")  # how and where a run computes, not what


def compare(names: list[str], typed: dict, how) -> None:
    """Train and measure every row with every seed, seed by seed, unless it is in the file already.

    The same command may be started several times side by side: a run is left to whoever took it first. A run
    that fails is noted as failed, and the others go on. Raises BadInput for a run with other settings.
    """
    writable_folder(str(how.results.parent), "--results")
    nets = Path(how.nets or ROOT / WORLDS[how.world][1])
    facts = {"world": how.world, "clips": how.clips, "nets": fingerprint(nets)}
    for seed, name in product(range(how.first, how.first + how.seeds), names):
        fields = fields_of(name, how.world, typed) | {"seed": seed}
        command = " ".join(["python train.py", *(as_flag(k, fields[k]) for k in fields if k not in MACHINE)])
        run = {"row": name, "seed": seed, **facts, "command": command}
        folder = writable_folder(str(how.runs / how.world / f"{name}-{seed}"), "--runs")
        try:
            with FileLock(folder / ".taken", timeout=0):
                if not measured(how.results, run):
                    results.append(how.results, train_and_measure(run, fields, folder, nets))
                    print(f"{name}, seed {seed}: {how.results}", flush=True)
                for state in folder.glob("step_*.pt"):  # 50 MB each, and of no more use
                    state.unlink()
        except Timeout:
            continue


def measured(path: Path, run: dict) -> bool:
    """Whether the file holds a run. Raises BadInput if it holds one with other settings or nets."""
    for line in results.read(path):
        if all(line[k] == run[k] for k in ("row", "seed", "world", "clips")):
            if any(line[k] != run[k] for k in ("nets", "command")):
                what = f"{path} holds {run['row']} of seed {run['seed']} with other settings or nets"
                raise BadInput(f"{what}; choose another --results")
            return True
    return False


def train_and_measure(run: dict, fields: dict, folder: Path, nets: Path) -> list[dict]:
    """Run train.py, or what is left of it, and measure its student → a line a view. Raises BadInput."""
    cfg = build("tiny", fields)
    run = run | {"steps": cfg.steps, "batch": cfg.batch}
    if not trained(folder, cfg, nets):
        words = [sys.executable, str(ROOT / "train.py"), *(as_flag(k, v) for k, v in fields.items())]
        resume = ["--resume"] if list(folder.glob("step_*.pt")) else []
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # takes the run along
        try:
            done = subprocess.run([*words, f"--nets={nets}", f"--out={folder}", *resume], check=False)
        finally:
            signal.signal(signal.SIGTERM, before)
        if done.returncode == 2:  # it has said why
            raise BadInput(f"{run['command']} was refused")
        if done.returncode not in (0, *STOPPED):
            return [run | {"view": "failed"}]
    if (last := last_step(folder)) < cfg.steps:
        raise BadInput(f"{folder} stopped at step {last} of {cfg.steps}; the same command goes on from there")
    facts, views = judge(folder, run["seed"], nets, run["clips"], pick_device(cfg))
    return [run | facts | {"view": view} | found for view, found in views.items()]


def trained(folder: Path, cfg: Config, nets: Path) -> bool:
    """Whether a run of these settings, from these nets, has ended there: it is not trained again."""
    path = folder / "config.json"
    if not path.exists() or list(folder.glob("step_*.pt")) or last_step(folder) != cfg.steps:
        return False
    kinds = ("codec", "teacher", "causal", *["reward"] * cfg.weighted)
    asked = asdict(cfg) | {"origin": {"nets": fingerprint(nets, kinds), "start": ""}}
    made, free = json.loads(path.read_text()), (*MACHINE, "torch", "world", "flags")
    one, two = ({k: v for k, v in each.items() if k not in free} for each in (made, asked))
    return one == json.loads(json.dumps(two))  # lists for tuples, as in the file


def last_step(folder: Path) -> int:
    """The last one that metrics.jsonl knows of; 0 without any."""
    return max((row["step"] for row in read_metrics(folder)), default=0)


def judge(folder: Path, seed: int, nets: Path, clips: int, device: str) -> tuple[dict, dict]:
    """A run's student → facts of the run (of steps the median), {view: measures}."""
    path = folder / "student.safetensors"
    header = read_header(path)
    cfg = from_words(header["config"], {"device": device})
    student, codec = load_net(path, cfg, "student"), load_net(nets / "codec.safetensors", cfg, "codec")
    views = watch(student, codec, cfg, seed, clips)
    forwards = sum(len(step_grid(cfg, k)) + (cfg.context in ("clean", "noisy")) for k in range(7))
    facts = {"chosen step": int(header["step"]), "forwards": forwards}
    rows = read_metrics(folder)
    facts |= {k: sorted(row[k] for row in rows)[len(rows) // 2] for k in results.FACTS if k in rows[-1]}
    for row in rows:
        seen = {k.removeprefix("held_out_"): v for k, v in row.items() if k.startswith("held_out_")}
        if seen:
            views[f"held out, step {row['step']}"] = seen | {"prompts": cfg.eval_clips}
    return facts, views


@torch.no_grad()
def watch(student: VideoDiT, codec: Codec, cfg: Config, seed: int, clips: int) -> dict:
    """Stream a clip per prompt, FAR clips' worth of frames for the first FEW → {"within": measures of the
    first clip, "beyond": of the last one, with the drift from one to the other}."""
    views: dict[str, list[dict[str, Tensor]]] = {"within": [], "beyond": []}
    for first in range(0, clips, 32):  # FEW is two of these
        ids, far = range(first, min(first + 32, clips)), FAR if first < FEW else 1
        words = World(cfg, "test").captions([("compare", i) for i in ids])
        prompts = [caption(w) for w in words]
        text = tokenize(words, cfg.text_length, cfg.text_width).to(cfg.device)
        rngs = [rng_for("compare", seed, i) for i in ids]
        x = list(islice(stream(student, text, cfg, rngs), far * cfg.chunks))
        ends = x[: cfg.chunks], x[-cfg.chunks :]
        start01, end01 = (codec.decode(torch.cat(part, 1)).float().cpu() for part in ends)
        found = measure(start01, prompts)
        views["within"].append(found | three_axes(found))
        if far > 1:
            found, both = measure(end01, prompts), measure(torch.cat([start01, end01], 1), prompts)
            drift = {f"{k}_drift": both[k].abs() for k in ("saturation", "contrast")}  # of each clip alone
            views["beyond"].append(found | three_axes(found) | drift)
    return {view: over_prompts(parts) for view, parts in views.items()}


def over_prompts(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over the prompts that a measure applies to, and how many prompts there are."""
    joined = {k: torch.cat([part[k] for part in parts]).double() for k in results.MEASURES if k in parts[0]}
    means = {k: round(float(x.nanmean()), 8) for k, x in joined.items()}
    return means | {"prompts": sum(len(part["looks"]) for part in parts)}
