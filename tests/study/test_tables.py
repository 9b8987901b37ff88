"""Intervals, paired differences, and the file of what was measured."""

import math
import threading

import pytest

from config import ROOT, BadInput
from study import results, tables

SHIPPED = ROOT / "study/results.csv"


def run(value: float, **held_out) -> dict:
    """What a run left, with one value for every measure."""
    line = dict.fromkeys(results.MEASURES, value) | {"ess": math.nan, "forwards": 35, "chosen step": 50}
    steps = {f"held out, step {k.removeprefix('at')}": {"jitter": v} for k, v in held_out.items()}
    return {"within": line, "beyond": line} | steps


def test_intervals():
    """Against numbers worked out by hand: 1, 2, 3 have mean 2, deviation 1, t = 4.303 at two degrees; 30
    degrees have t = 2.042."""
    mean, half = tables.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(4.303 / math.sqrt(3), rel=1e-3))
    many = [0.0, 1.0] * 15 + [0.5]
    assert tables.interval(many)[1] == pytest.approx(2.042 * 0.5 / math.sqrt(31), rel=1e-3)
    assert math.isnan(tables.interval([1.0])[1]) and tables.interval([1.0, math.nan])[0] == 1
    assert math.isnan(tables.interval([])[0])


def test_differences_are_paired():
    """Seeds that differ much and a row that is always .1 better: a wide interval, and a narrow difference."""
    base = {seed: run(0.2 * seed) for seed in range(4)}
    better = {seed: run(0.2 * seed + 0.1) for seed in range(1, 4)}
    line = tables.markdown({"windowed": base, "diagonal": better}).splitlines()[-1]
    assert line.startswith("| diagonal | 3 | 0.500 ± 0.497 (+0.100 ± 0.000)"), line
    table = {"windowed": base, "diagonal": better, "diagonal-motion0": {1: run(0.0), 2: run(0.2)}}
    line = tables.markdown(table, "diagonal-motion0").splitlines()[-2]
    assert line.startswith("| diagonal | 3 | 0.500 ± 0.497 (+0.300 ± 0.000)"), "against the row named"


def test_failed_runs_are_counted_not_averaged():
    table = {"windowed": {0: run(0.5), 1: {"failed": {}}}, "reward_forcing": {0: {"failed": {}}}}
    lines = tables.markdown(table).splitlines()
    assert (
        lines[-2].startswith("| windowed | 1 (1 failed) | 0.500")
        and "| reward_forcing | 0 (1 failed) |" in lines[-1]
    )


def test_every_table_begins_with_what_it_shows():
    table = {"self_forcing": {0: run(0.5, at25=1.0)}}
    first = [text.splitlines()[0] for text in (tables.markdown(table), tables.over_time(table, "jitter"))]
    assert all(f"{axis} " in first[0] for axis in ("looks", "motion", "text")) and "shake" in first[1]


def test_what_was_held_out_over_time():
    """Catches steps in the order of their digits, and seeds that stopped early counted as zero."""
    runs = {0: run(0.5, at100=100.0, at25=25.0), 2: run(0.5, at25=27.0)}
    lines = tables.over_time({"reward_forcing": runs}, "jitter").splitlines()
    assert lines[2] == "| jitter after | 25 steps | 100 steps |"
    assert lines[4].startswith("| reward_forcing | 26.00 ± 12.71 | 100.00 ± nan |")


def line(seed: int, view: str = "within", **more) -> dict:
    facts = {"row": "reward_forcing", "seed": seed, "world": "one", "clips": 8, "prompts": 8, "nets": "x"}
    return facts | {"view": view, "looks": 0.5, "jitter": math.nan, "steps": 100, "batch": 4} | more


def test_what_is_appended_is_read(tmp_path):
    """Catches numbers that come back as words, nan that becomes 0, and lines of other worlds mixed in."""
    path = tmp_path / "r.csv"
    results.append(path, [line(1), line(1, "beyond", looks=0.25)])
    results.append(path, [line(0), line(2, world="two"), line(3, clips=9)])
    table = results.load(path, "one", 8, ["windowed", "reward_forcing"])
    assert list(table) == ["reward_forcing"] and sorted(table["reward_forcing"]) == [0, 1]
    found = table["reward_forcing"][1]
    assert found["within"]["looks"] == 0.5 and found["beyond"]["looks"] == 0.25
    assert math.isnan(found["within"]["jitter"]) and found["within"]["prompts"] == 8
    assert list(results.load(path, "one", 8, ["reward_forcing"], (0,))["reward_forcing"]) == [0]
    results.append(path, [line(4, nets="y")])
    with pytest.raises(BadInput, match="mixes"):
        results.load(path, "one", 8, ["reward_forcing"])


def test_runs_that_end_together_are_all_kept(tmp_path):
    """Catches a file that is read, changed and written without a lock."""
    path = tmp_path / "r.csv"
    threads = [threading.Thread(target=results.append, args=(path, [line(i)])) for i in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(found["seed"] for found in results.read(path)) == list(range(12))


@pytest.mark.parametrize("text", ["", "junk", "row,seed\nwindowed,0\n", "seed of another kind"])
def test_foreign_files_are_named_and_stay(tmp_path, text):
    """Catches a stranger's file that is overwritten."""
    path = tmp_path / "a.csv"
    results.append(path, [line(0)])
    path.write_text(
        text if "kind" not in text else path.read_text().replace("reward_forcing,0", "reward_forcing,zero")
    )
    before = path.read_text()
    with pytest.raises(BadInput, match="a.csv"):
        results.append(path, [line(1)])
    assert path.read_text() == before


def test_the_shipped_file_is_whole():
    """Every run has both views, on the prompts it names, and the same file comes out of its lines."""
    lines = results.read(SHIPPED)
    runs: dict[tuple, dict] = {}
    for found in lines:
        key = tuple(found[k] for k in ("row", "seed", "world", "clips"))
        assert found["view"] not in runs.setdefault(key, {}), "twice"
        runs[key][found["view"]] = found
    assert len(runs) > 150
    for key, views in runs.items():
        assert views["within"]["prompts"] == key[3] and views["beyond"]["prompts"] == 64
