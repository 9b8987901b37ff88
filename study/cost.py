"""What does a step of a method cost, beside one of plain DMD with the same cache?

    python -m study.cost                                   # stream_r1
    python -m study.cost --method=reward_forcing --rounds=2

Short runs of train.py take turns, for a machine's speed changes within minutes; medians over their steps, the
first of each run left out.
"""

from engine import openmp  # isort: skip  # noqa: F401  (before torch loads)

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from config import METHODS, ROOT, BadInput, build, cli, read_cli
from engine.processes import largest_process
from study.rows import as_flag


@dataclass(frozen=True)
class Flags:
    rounds: int = 4  # 5 steps of each method a round
    nets: str = ""  # as train.py's; default assets/<preset>


def seconds_of(preset: str, fields: dict, nets: str) -> list[float]:
    """`seconds` of metrics.jsonl, the first step left out. Raises BadInput if train.py does not end well."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            as_flag(k, v) for k, v in ({"steps": 6, "critic_warmup": 0, "eval_clips": 1} | fields).items()
        ]
        words = [sys.executable, str(ROOT / "train.py"), preset, *argv, f"--out={folder}"]
        done = subprocess.run([*words, *[f"--nets={nets}"] * bool(nets)], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.splitlines() or ["no message"])[-1]
            raise BadInput(f"train.py ended with {done.returncode}: {said}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["seconds"] for line in lines]


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    if flags.rounds < 1:
        raise BadInput(f"rounds={flags.rounds} is not possible; allowed: from 1")
    method = build(preset, typed).method
    plain = typed | METHODS["windowed"] | {"method": "windowed"}
    methods = {"windowed": plain, method: typed | {"method": method}}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _, (name, fields) in product(range(flags.rounds), methods.items()):
        seconds[name] += seconds_of(preset, fields, flags.nets)
    medians = {name: sorted(taken)[len(taken) // 2] for name, taken in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["windowed"]
        print(f"a step of {name}: {median:.2f} s, {ratio:.2f} of plain DMD's ({len(seconds[name])} steps)")
    print(f"largest run: {largest_process('RUSAGE_CHILDREN'):.0f} MiB")


if __name__ == "__main__":
    cli(main)
