"""How good are the nets, and does a method help? Measures on held-out prompts, with 95 % intervals.

    python -m study.evaluate                                # the shipped nets
    python -m study.evaluate --student=out/train/student.safetensors --clips=64
    python -m study.evaluate --nets=out/pretrain --stamp    # scores into their headers
    python -m study.evaluate table --seeds=0                # the comparison of methods: print results.csv
    python -m study.evaluate table --seeds=0 --world=two    # with two objects; --clips=1024: more prompts
    python -m study.evaluate table --seeds=5 --methods=stream_r1 --results=out/mine.csv    # train and measure

The first three add VQ, MQ and TA, the learned reward's scores: not a measure of quality, but a student above
the real clips of the first row would have fooled the reward that trained it.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from codec import Codec
from config import PRESETS, ROOT, BadInput, Config, build, cli, from_words, read_cli
from engine.checkpoint import annotate, read_header, writable_folder, write_atomically
from engine.processes import pick_device
from engine.rng import rng_for
from networks import load_net
from reward import AXES, RewardModel
from rollout import rollout, sample_teacher
from study import results
from study.compare import compare
from study.rows import ROWS, WORLDS, rows_named
from study.tables import LEGEND, extra, interval, markdown, over_time
from world.measure import measure, three_axes
from world.scene import World
from world.words import caption, tokenize


@dataclass(frozen=True)
class Flags:
    nets: str = ""  # folder with codec, reward, teacher, causal, perhaps stream_r1; default assets/<preset>
    student: str = ""  # one student instead of the shipped nets
    clips: int = 0  # held-out prompts; default 128, of the table 256
    noises: int = 3  # noise seeds
    stamp: bool = False  # write what was measured into the headers of the nets
    out: str = "out/evaluation.json"  # the same numbers as a file
    # of `study.evaluate table`
    methods: str = ""  # rows of study/rows.py, comma-separated; default all
    seeds: int = 5  # 0: only print what has been measured
    first: int = 0  # the first of these seeds
    shown: tuple[int, ...] = ()  # print these seeds alone; default all
    world: str = "one"  # objects in a clip: one | two
    against: str = ""  # the row all others are compared with, by seeds both have; default: their controls
    results: Path = ROOT / "study/results.csv"  # read, and appended to
    runs: Path = Path("out/table")  # what training leaves


@torch.no_grad()
def score(net, codec: Codec, reward: RewardModel, cfg: Config, flags: Flags, how: str) -> dict[str, Tensor]:
    """Measures of `clips` x `noises` samples for prompts of the test split → {measure: (noises clips)}.

    how: real (clips of the world, through the codec; no net) | teacher (25 steps, the whole clip at once) |
    within (a rollout of the training length) | beyond (the last clip's worth of frames of a rollout four
    times that long).
    """
    parts, world = [], World(cfg, "test")
    runs = list(product(range(1 if how == "real" else flags.noises), range(flags.clips)))
    for some in (runs[first : first + 32] for first in range(0, len(runs), 32)):
        keys, rngs = [("evaluate", i) for _, i in some], [rng_for("evaluate", *run) for run in some]
        words = world.captions(keys)
        text = tokenize(words, cfg.text_length, cfg.text_width).to(cfg.device)
        if how == "real":
            x = codec.encode(world.batch(keys).video01.to(cfg.device))
        elif how == "teacher":
            x = sample_teacher(net, text, cfg, rngs)
        else:
            x = rollout(net, text, cfg, rngs, cfg.chunks * (4 if how == "beyond" else 1))
        video01 = codec.decode(x).float()
        judged = dict(zip(AXES, reward(video01, text).cpu().unbind(1), strict=True))
        found = measure(video01, [caption(w) for w in words])
        parts.append(found | three_axes(found) | judged)
    return {k: torch.cat([part[k] for part in parts]).view(-1, flags.clips) for k in parts[0]}


def table_of_methods(typed: dict, flags: Flags) -> None:
    """Train and measure what is missing (study/compare.py), then print the tables (study/tables.py)."""
    flags = replace(flags, clips=flags.clips or 256)
    if not 0 <= flags.seeds <= 10 or flags.clips < 2:
        raise BadInput(f"seeds={flags.seeds} clips={flags.clips} is not possible; allowed: 0 to 10, from 2")
    if flags.against not in ("", *ROWS):
        raise BadInput(f"--against={flags.against} is not possible; allowed: {' '.join(ROWS)}")
    names = rows_named(f"{flags.methods},{flags.against}" if flags.methods else "", typed)
    if flags.world not in WORLDS:
        raise BadInput(f"--world={flags.world} is not possible; allowed: {' | '.join(WORLDS)}")
    if flags.seeds:
        compare(names, typed, flags)
    table = results.load(flags.results, flags.world, flags.clips, names, flags.shown)
    where = f"{flags.results} holds no runs with --world={flags.world} --clips={flags.clips} of"
    if not table:
        raise BadInput(f"{where} these rows; --seeds=1 or more makes some")
    if flags.against and flags.against not in table:
        raise BadInput(f"{where} --against={flags.against}; --seeds=1 makes one")
    held_out = [over_time(table, name) for name in ("jitter", "shape", "speed")]
    print(markdown(table, flags.against), *held_out, sep="\n\n")


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.get("threads", 0))
    extra("scipy.stats")
    if preset == "table":
        return table_of_methods(typed, flags)
    if preset not in PRESETS:
        allowed = f"table, or the nets of {' | '.join(PRESETS)}"
        raise BadInput(f"study.evaluate {preset} is not possible; allowed: {allowed}")
    flags = replace(flags, clips=flags.clips or 128)
    device = pick_device(build(preset, typed))
    nets = Path(flags.nets or ROOT / "assets" / preset)
    jobs = [("codec", "real"), ("teacher", "teacher"), ("causal", "within")]
    if flags.student:
        jobs = [("student", "within"), ("student", "beyond")]
    elif (trained := nets / "stream_r1.safetensors").exists():
        jobs += [("stream_r1", "within"), ("stream_r1", "beyond")]
    else:
        print(f"no {trained}, so no student is measured")  # pretrain.py leaves none
    paths = {name: Path(flags.student or nets / f"{name}.safetensors") for name, _ in jobs}
    if flags.clips < 2 or flags.noises < 1:
        raise BadInput(f"clips={flags.clips} noises={flags.noises} is not possible; allowed: from 2, from 1")
    if flags.stamp and set(typed) - {"device"}:
        raise BadInput(f"--stamp notes what the nets do as trained; leave out --{' --'.join(typed)}")
    out, table = Path(flags.out), {}
    writable_folder(str(out.parent))
    headers = {name: read_header(path) for name, path in paths.items()}
    print(LEGEND)
    for name, how in jobs:
        label, header = f"{name}, {how}", headers[name]
        made = from_words(header["config"], typed | {"device": device})
        if made.data:
            raise BadInput(f"{paths[name]} learnt from clips; measured is the procedural world alone")
        if how == "teacher":  # guidance is nothing that it was trained with
            made = replace(made, guidance=build(preset, typed).guidance)
        codec, reward = (load_net(nets / f"{kind}.safetensors", made, kind) for kind in ("codec", "reward"))
        net = load_net(paths[name], made, header["kind"])
        measured = score(net, codec, reward, made, flags, how)
        # one prompt's noises are not independent, so the intervals are over prompts
        table[label] = {k: interval(v.nanmean(0)) for k, v in measured.items()}
        cells = " ".join(f"{k} {m:.3f}±{h:.3f}" for k, (m, h) in table[label].items())
        print(f"{label:24} {cells}", flush=True)
        if flags.stamp:
            annotate(paths[name], **{f"measured, {how}": f"{cells} ({flags.clips} prompts x {flags.noises})"})
    text = json.dumps({"clips": flags.clips, "noises": flags.noises, "rows": table}, indent=1)
    write_atomically(out, lambda name: name.write_text(text))
    print(out)


if __name__ == "__main__":
    cli(main)
