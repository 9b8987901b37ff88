"""The comparison of methods: paired, resumable, and right about its own arithmetic."""

import json
import math
import sys

import pytest
from test_train import KEYS, nets  # noqa: F401  (a fixture)

import compare
import evaluate
from config import METHODS, PRESETS, build, cli
from rollout import step_grid


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", *argv])
    cli(evaluate.main)


@pytest.mark.parametrize("name", compare.ROWS)
def test_rows_are_possible(name):
    """Every row is a config that can be built, of a method that exists, and not the base under a new name."""
    cfg = build("tiny", compare.ROWS[name])
    assert cfg.method in METHODS
    assert name == compare.BASE or cfg != build("tiny", compare.ROWS[compare.BASE])


def test_rows_differ():
    made = [build("tiny", given) for given in compare.ROWS.values()]
    assert len({repr(cfg) for cfg in made}) == len(made)


@pytest.mark.parametrize("value, typed", [
    (True, "--x"), (False, "--no-x"), (0.5, "--x=0.5"), (("VQ", "MQ"), "--x=VQ,MQ"), ("ema", "--x=ema"),
])  # fmt: skip
def test_fields_as_they_are_typed(value, typed):
    assert compare.as_flag("x", value) == typed


def test_table_trains_measures_resumes(nets, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Catches rows with other prompts or noise than their base, runs that are made twice, and lost files."""
    where = [f"--nets={nets}", f"--results={tmp_path}/results", f"--runs={tmp_path}/runs", "--clips=2"]
    small = [*KEYS, "--steps=1", "--methods=diagonal"]
    call(monkeypatch, *where, *small, "--seeds=1")
    names = {p.name for p in (tmp_path / "results").iterdir()}
    assert names == {"self_forcing-0.json", "diagonal-0.json"}
    found = json.loads((tmp_path / "results/diagonal-0.json").read_text())
    assert found["forwards"] == 20 and found["config"]["method"] == "diagonal"
    assert {"looks", "saturation_drift"} <= set(found["views"]["beyond"])
    assert all(len(values) == 2 for view in found["views"].values() for values in view.values())
    assert "| diagonal | 1 |" in capsys.readouterr().out
    base = json.loads((tmp_path / "results/self_forcing-0.json").read_text())["views"]
    assert sum("sampled with context" in view for view in base) == 5 and len(found["views"]) == 2
    assert base["beyond, sampled with context 0.0"]["jitter"] == base["beyond"]["jitter"], "0 is clean"
    monkeypatch.setattr(compare, "train", lambda *a: pytest.fail("a run was made twice"))
    call(monkeypatch, *where, *small, "--seeds=1")


def test_intervals():
    """Against numbers worked out by hand: 1, 2, 3 have mean 2, deviation 1, t = 4.303 at two degrees."""
    mean, half = compare.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(4.303 / math.sqrt(3), rel=1e-3))
    assert math.isnan(compare.interval([1.0])[1])


def test_differences_are_paired():
    """Seeds that differ much and a row that is always .1 better: a wide interval, and a narrow difference."""

    def run(value):
        views = {view: {name: [value] for name, _ in compare.COLUMNS} for view in ("within", "beyond")}
        return {"views": views, "training": {}, "forwards": 35}

    base = {seed: run(0.2 * seed) for seed in range(4)}
    better = {seed: run(0.2 * seed + 0.1) for seed in range(1, 4)}
    line = compare.markdown({compare.BASE: base, "better": better}).splitlines()[-1]
    assert line.startswith("| better | 3 | 0.500 ± 0.497 (+0.100 ± 0.000)"), line


@pytest.mark.parametrize("argv, needle", [
    (["--methods=nonsense"], "nonsense"), (["--seeds=-1"], "seeds"),
    (["--seeds=0", "--results=none"], "no run"),
])  # fmt: skip
def test_bad_input(monkeypatch, capsys, tmp_path, argv, needle):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_forwards_of_seven_chunks():
    """The arithmetic behind the published speeds: with refresh 35, without 28, tapered 20 and 17."""
    rows = {"self_forcing": 35, "diagonal-no_refresh": 28, "diagonal": 20, "diagonal-432": 17}
    for name, forwards in rows.items():
        cfg = build("tiny", compare.ROWS[name])
        assert sum(len(step_grid(cfg, k)) + (cfg.context != "none") for k in range(7)) == forwards
    assert PRESETS["tiny"].method == "stream_r1"
