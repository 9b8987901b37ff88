"""Tables of what was measured: means and 95 % intervals over seeds, in Markdown."""

import importlib

import numpy as np

from config import BadInput
from study.compare import FAR
from study.rows import reference

COLUMNS = (
    ("looks", "within"), ("motion", "within"), ("text", "within"), ("shape", "within"), ("jitter", "within"),
    ("looks", "beyond"), ("motion", "beyond"), ("text", "beyond"),
    ("saturation_drift", "beyond"), ("contrast_drift", "beyond"),
)  # fmt: skip
LEGEND = (
    "Measured from pixels, 1 is best: looks is how close sharpness, colours, noise and block edges are to a "
    "real clip's, motion whether objects move in the prompt's direction at its speed, steadily and without "
    "stops, text whether colour, shape, direction and background are the prompt's."
)
MEANING = {
    "jitter": "how much objects shake: rms second difference of their centre, in pixels of a 32-pixel canvas",
    "shape": "share of objects with the prompt's shape",
    "speed": "share of objects with the prompt's speed",
}


def extra(name: str):
    """A module of the extra `study`. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        what = f"study needs {package}: pip install {package}"
        raise BadInput(f"{what}, or the extra study: pip install -e '.[study]'") from error


def interval(values) -> tuple[float, float]:
    """Mean of the finite ones of (n,) numbers, half a 95 % interval (Student's t); nan for a single one."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return float(x.mean()) if len(x) else float("nan"), float("nan")
    t = extra("scipy.stats").t.ppf(0.975, len(x) - 1)
    return float(x.mean()), float(t * x.std(ddof=1) / len(x) ** 0.5)


def finished(table: dict[str, dict[int, dict]], row: str) -> dict[int, dict]:
    return {seed: found for seed, found in table.get(row, {}).items() if "failed" not in found}


def gains(table: dict[str, dict[int, dict]], row: str, columns, against="") -> dict[tuple, list[float]]:
    """{(measure, view): a row minus its control, seed by seed}; empty where no seed has both."""
    other = against or reference(row)
    runs, control = finished(table, row), finished(table, other)
    shared = sorted(runs.keys() & control.keys()) if row != other else []
    return {
        (name, view): [runs[s][view][name] - control[s][view][name] for s in shared]
        for name, view in columns if shared
    }  # fmt: skip


def markdown(table: dict[str, dict[int, dict]], against: str = "") -> str:
    """One line a row: means and 95 % intervals over seeds, in brackets the paired difference to one row, or,
    if none is named, to each row's `reference`.

    Failed runs are counted, not averaged. Of many intervals one in twenty excludes zero by chance.
    """
    heads = [f"{name}{f' x{FAR}' if view == 'beyond' else ''}" for name, view in COLUMNS]
    heads = ["row", "n", *heads, "ess", "forwards", "chosen step"]
    where = f"Columns without x{FAR}: the first clip; with it: the last of a stream of {FAR} clips."
    lines = [f"{LEGEND} {where}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table:
        runs = finished(table, row)
        n = f"{len(runs)}" + (f" ({lost} failed)" if (lost := len(table[row]) - len(runs)) else "")
        if not runs:
            lines.append(f"| {row} | {n} |" + " |" * (len(heads) - 2))
            continue
        gained = gains(table, row, COLUMNS, against)
        cells = []
        for name, view in COLUMNS:
            mean, half = interval([found[view][name] for found in runs.values()])
            paired = " ({:+.3f} ± {:.3f})".format(*interval(gained[name, view])) if gained else ""
            cells.append(f"{mean:.3f} ± {half:.3f}{paired}")
        facts = [found["within"] for found in runs.values()]
        ess = [fact["ess"] for fact in facts if fact["ess"] == fact["ess"]]
        cells += [f"{sum(ess) / len(ess):.2f}" if ess else "", str(facts[0]["forwards"])]
        cells += [" ".join(str(fact["chosen step"]) for fact in facts)]
        lines.append(f"| {row} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_time(table: dict[str, dict[int, dict]], name: str) -> str:
    """Rows: methods. Columns: steps of training. The averaged student on the prompts that select one."""
    prefix = "held out, step "
    runs = {row: list(finished(table, row).values()) for row in table}
    views = {view for found in runs.values() for run in found for view in run if view.startswith(prefix)}
    steps = sorted(int(view.removeprefix(prefix)) for view in views)
    lines = [f"On held-out prompts during training: {name} is {MEANING[name]}.", ""]
    lines += [f"| {name} after | " + " | ".join(f"{step} steps" for step in steps) + " |"]
    lines += ["|---" * (len(steps) + 1) + "|"]
    for row, found in runs.items():
        seen = [[run[f"{prefix}{s}"][name] for run in found if f"{prefix}{s}" in run] for s in steps if found]
        cells = ["{:.2f} ± {:.2f}".format(*interval(values)) for values in seen]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
