"""What was measured: one CSV file, a line a run and view, to which runs append.

A run is a row (study/rows.py), a seed, a world and a number of test prompts (`clips`). Its views: `within`,
the first clip; `beyond`, the last of FAR; "held out, step n", the prompts that choose the
checkpoint; or `failed`. Numbers are means over `prompts` prompts (of drifts: of their size),
empty where nothing could be measured.
"""

import csv
import io
from pathlib import Path

from filelock import FileLock

from config import BadInput
from engine.checkpoint import write_atomically

MEASURES = (
    "looks motion text colour shape direction speed background jitter stall sharpness paint noise seams "
    "saturation_drift contrast_drift"
).split()
_TEXTS = "row world view nets command job setting weight measure device".split()
_WHOLE = ("seed", "clips", "prompts", "steps", "batch", "chosen step", "forwards")
FACTS = ("seconds", "ess", "w_inter", "w_intra_max")
COLUMNS = (
    "row", "seed", "world", "clips", "view", "prompts", *MEASURES, "chosen step", *FACTS, "forwards", "steps",
    "batch", "nets", "command",
)  # fmt: skip
ORDER = ("world", "clips", "row", "seed")


def read(path: Path, columns: tuple = COLUMNS) -> list[dict]:
    """Lines as dictionaries, numbers as numbers, nan where a measure is empty; none if there is no file.
    Raises BadInput for a file of another kind."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != columns:
                raise ValueError("other columns")
            return [{name: _value(name, line[name]) for name in columns} for line in table]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise BadInput(f"--results={path} was not written by study.evaluate table: {error!r}") from error


def _value(name: str, text: str) -> str | int | float:
    if name in _TEXTS:
        return text
    return int(text or 0) if name in _WHOLE else float(text or "nan")


def append(path: Path, lines: list[dict], columns: tuple = COLUMNS, order: tuple = ORDER) -> None:
    """Add lines, sorted by some columns; whoever reads sees all of them or none."""
    with FileLock(path.with_suffix(".lock")):
        known = sorted([*read(path, columns), *lines], key=lambda line: [line[k] for k in order])
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for line in known:
            writer.writerow({k: "" if v != v else v for k, v in line.items()})
        write_atomically(path, lambda name: name.write_text(text.getvalue()))


def load(path: Path, world: str, clips: int, names: list[str], seeds: tuple[int, ...] = ()) -> dict:
    """{row: {seed: {view: line}}} of the rows that have been run, with these seeds (none named: with any).
    Raises BadInput if the nets, steps or batches of some differ."""
    table: dict[str, dict[int, dict]] = {name: {} for name in names}
    made = set()
    for line in read(path):
        known = (line["world"], line["clips"]) == (world, clips) and line["row"] in table
        if known and (not seeds or line["seed"] in seeds):
            table[line["row"]].setdefault(line["seed"], {})[line["view"]] = line
            made.add(tuple(line[k] for k in ("nets", "steps", "batch")))
    if len(made) > 1:
        raise BadInput(f"{path} mixes runs of other nets, steps or batches: {sorted(made)}")
    return {name: runs for name, runs in table.items() if runs}
