"""The comparison of methods: paired, resumable, and right about its own arithmetic."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import KEYS
from safetensors.torch import load_file

from codec import Codec
from config import PRESETS, ROOT, build, cli
from engine import checkpoint
from model import VideoDiT
from rollout import step_grid
from study import compare, evaluate


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", *argv])
    cli(evaluate.main)


@pytest.mark.parametrize("name", compare.ROWS)
def test_rows_are_possible(name):
    """Every row can be built; its control has the same cache (but for rows about it) and nothing else."""
    cfg = build("tiny", compare.ROWS[name])
    control = build("tiny", compare.ROWS[compare.reference(name)])
    assert not (control.space or control.time or control.motion)
    if control.taper != "uniform":
        assert replace(cfg, motion=0.0) == control, "about the motion term, and nothing else"
    elif name.startswith("reward_forcing-"):
        sinks = {k: getattr(control, k) for k in ("sink", "sink_mode", "sink_decay", "sink_dtype")}
        assert replace(cfg, **sinks) == control, "about sinks, and nothing else"
    else:
        assert not control.beta and (cfg.window, cfg.sink_mode) == (control.window, control.sink_mode)


def test_rows_differ():
    """Catches two names for one thing."""
    made = [repr(replace(build("tiny", given), method="")) for given in compare.ROWS.values()]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("value, typed", [
    (True, "--x"), (False, "--no-x"), (0.5, "--x=0.5"), (("VQ", "MQ"), "--x=VQ,MQ"), ("ema", "--x=ema"),
])  # fmt: skip
def test_fields_as_they_are_typed(value, typed):
    assert compare.as_flag("x", value) == typed


@pytest.fixture
def where(nets, tmp_path):  # noqa: F811
    folders = [f"--nets={nets}", f"--results={tmp_path}/results", f"--runs={tmp_path}/runs", "--clips=2"]
    return [*folders, *KEYS, "--methods=diagonal", "--seeds=1"]


def test_table_trains_measures_resumes(where, tmp_path, monkeypatch, capsys):
    """Catches runs that are made twice or mixed with others, states left behind, and results nobody sees."""
    call(monkeypatch, *where, "--steps=1")
    names = {p.name for p in (tmp_path / "results").iterdir()}
    assert names == {"self_forcing-0.json", "windowed-0.json", "diagonal-0.json"}
    found = json.loads((tmp_path / "results/diagonal-0.json").read_text())
    assert found["forwards"] == 20 and found["asked"]["method"] == "diagonal"
    assert {"looks", "saturation_drift"} <= set(found["views"]["beyond"])
    assert all(len(values) == 2 for view in found["views"].values() for values in view.values())
    base = json.loads((tmp_path / "results/self_forcing-0.json").read_text())["views"]
    assert sum("sampled with context" in view for view in base) == 5 and len(found["views"]) == 2
    assert base["beyond, sampled with context 0.0"]["jitter"] == base["beyond"]["jitter"], "0 is clean"
    assert not list((tmp_path / "runs").rglob("step_*.pt"))
    said = capsys.readouterr().out
    assert "| diagonal | 1 |" in said and "| self_forcing | " in said.rpartition("trained with")[2]
    with monkeypatch.context() as patch:  # other results: measured again, on more prompts, but not trained
        patch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("trained a second time"))
        call(patch, *where, "--steps=1", "--clips=3", f"--results={tmp_path}/more")
    more = json.loads((tmp_path / "more/diagonal-0.json").read_text())
    assert more["views"]["within"]["looks"][:2] == found["views"]["within"]["looks"]
    assert len(more["views"]["within"]["looks"]) == 3 and more["training"] == found["training"]
    monkeypatch.setattr(compare, "run", lambda *a: pytest.fail("a run was made twice"))
    call(monkeypatch, *where, "--steps=1")
    with pytest.raises(SystemExit):
        call(monkeypatch, *where, "--steps=2")
    assert "other settings" in capsys.readouterr().err


def test_what_counts_as_trained(nets, tmp_path):  # noqa: F811
    """Other settings, a field that is gone, another start, a run cut short, one to go on from: none does."""
    given = compare.ROWS["stream_r1"] | {"steps": 50}
    made = json.loads(json.dumps(asdict(build("tiny", given))))
    kinds = ("codec", "teacher", "causal", "reward")
    made |= {"torch": "2", "world": 1, "origin": {"nets": checkpoint.fingerprint(nets, kinds), "start": ""}}

    def ends(made: dict, step: int, given: dict = given) -> bool:
        (tmp_path / "config.json").write_text(json.dumps(made))
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n' if step else "")
        return compare.trained(tmp_path, given, nets)

    assert not compare.trained(tmp_path, given, nets), "an empty folder"
    assert ends(made, 50) and not ends(made, 30) and not ends(made, 0)
    assert not ends(made, 50, given | {"seed": 1}) and not ends(made | {"gone": 1}, 50)
    assert not ends(made | {"origin": made["origin"] | {"start": "a.safetensors"}}, 50)
    assert not ends({k: v for k, v in made.items() if k != "origin"}, 50)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')
    assert compare.last_step(tmp_path) == 50, "a kill cut the last line short"
    assert ends(made, 50) and not compare.trained(tmp_path, given, Path("assets/tiny")), "other nets"
    (tmp_path / "step_000050.pt").touch()
    assert not ends(made, 50), "there is something to go on from"


def test_an_interrupted_run_goes_on(where, tmp_path, monkeypatch):
    """Half of a training lies there: the rest is added, and the student equals an uninterrupted one's."""
    call(monkeypatch, *where, "--steps=2", "--methods=windowed")
    shutil.move(tmp_path / "runs/windowed-0", tmp_path / "whole")
    for path in (tmp_path / "results").glob("windowed*"):
        path.unlink()
    half = [*KEYS, *map(lambda kv: compare.as_flag(*kv), compare.ROWS["windowed"].items())]
    command = ["train.py", where[0], f"--out={tmp_path}/runs/windowed-0", *half, "--steps=1", "--seed=0"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    call(monkeypatch, *where, "--steps=2", "--methods=windowed")
    one, two = (load_file(folder / "student.safetensors") for folder in
                (tmp_path / "whole", tmp_path / "runs/windowed-0"))  # fmt: skip
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_is_left_to_whoever_took_it(where, tmp_path, monkeypatch, capsys):
    """Catches two processes that write into the same folder."""
    compare.writable_folder(f"{tmp_path}/runs/diagonal-0")
    with open(tmp_path / "runs" / "diagonal-0" / ".taken", "w") as file:
        assert compare.taken(file)
        call(monkeypatch, *where, "--steps=1")
    assert {p.stem for p in (tmp_path / "results").glob("*.json")} == {"self_forcing-0", "windowed-0"}


def test_a_training_keeps_its_claim_when_its_parent_is_killed(tmp_path):
    """Catches a second training in the folder of one that goes on without its parent."""
    path, sleep = tmp_path / ".taken", [sys.executable, "-c", "input()"]
    with open(path, "w") as file:
        assert compare.taken(file)
        child = subprocess.Popen(sleep, stdin=subprocess.PIPE, pass_fds=[file.fileno()])
    with open(path, "w") as file:
        assert not compare.taken(file)
    child.communicate(b"done")
    with open(path, "w") as file:
        assert compare.taken(file)


def test_the_claim_is_handed_to_the_training(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(compare.subprocess, "run", lambda words, **how: seen.update(how) or done)
    done = subprocess.CompletedProcess([], 1)
    with open(tmp_path / ".taken", "w") as file:
        found = compare.run("windowed", {}, 0, tmp_path, evaluate.Flags(nets="nets"), file)
        assert seen["pass_fds"] == [file.fileno()] and found["failed"] == 1


@pytest.mark.parametrize("text", ["junk", "[]", '{"row": "windowed"}'])
def test_foreign_results_are_named(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, f"--results={tmp_path}", "--seeds=0")
    assert stopped.value.code == 2 and "a.json" in capsys.readouterr().err


def test_controls_come_along():
    names = compare.rows_named("nudged", {})
    assert names == ["self_forcing", "windowed", "windowed-guidance3", "nudged"]
    assert compare.reference("steered") == "windowed-guidance3"  # which its method, not its name, asks for
    assert compare.reference("steered-2steps") == "windowed-2steps-guidance3"
    assert compare.rows_named("reward_forcing-no_sink", {})[2] == "reward_forcing"
    assert all(compare.reference(row) in compare.ROWS for row in compare.ROWS)


def test_a_failed_run_is_counted_and_the_others_go_on(where, tmp_path, monkeypatch, capsys):
    done = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: done)
    call(monkeypatch, *where, "--steps=1")
    assert json.loads((tmp_path / "results/diagonal-0.json").read_text())["failed"] == 1
    assert "| diagonal | 0 (1 failed) |" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_not_measured(where, tmp_path, monkeypatch, capsys):
    """train.py ends a SIGTERM with exit code 0; half a training must not be taken for a whole one."""
    real = subprocess.run
    monkeypatch.setattr(compare.subprocess, "run", lambda a, **k: real([*a, "--steps=1"], **k))
    monkeypatch.setattr(compare.json, "loads", lambda text, loads=json.loads: loads(text) | {"steps": 2})
    with pytest.raises(SystemExit):
        call(monkeypatch, *where, "--steps=1")
    assert "stopped at step 1 of 2" in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())


def test_intervals():
    """Against numbers worked out by hand: 1, 2, 3 have mean 2, deviation 1, t = 4.303 at two degrees."""
    mean, half = compare.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(4.303 / math.sqrt(3), rel=1e-3))
    assert math.isnan(compare.interval([1.0])[1])


def test_differences_are_paired():
    """Seeds that differ much and a row that is always .1 better: a wide interval, and a narrow difference."""

    def run(value):
        views = {view: {name: [value] for name, _ in compare.COLUMNS} for view in ("within", "beyond")}
        return {"views": views, "training": {"held out": {}}, "forwards": 35, "chosen step": 50}

    base = {seed: run(0.2 * seed) for seed in range(4)}
    better = {seed: run(0.2 * seed + 0.1) for seed in range(1, 4)}
    line = compare.markdown({compare.WINDOWED: base, "diagonal": better}).splitlines()[-1]
    assert line.startswith("| diagonal | 3 | 0.500 ± 0.497 (+0.100 ± 0.000)"), line
    table = {compare.WINDOWED: base, "diagonal": better, "diagonal-motion0": {1: run(0.0), 2: run(0.2)}}
    line = compare.markdown(table, "diagonal-motion0").splitlines()[3]
    assert line.startswith("| diagonal | 3 | 0.500 ± 0.497 (+0.300 ± 0.000)"), "against the row named"


@pytest.mark.parametrize("row", ["diagonal-", "steered-tilt-2steps"])
def test_a_row_without_runs_to_be_held_against_is_refused(monkeypatch, capsys, tmp_path, row):
    """An unknown row, and one that has not been run."""
    found = (ROOT / "results/windowed-0.json").read_bytes()
    (tmp_path / "windowed-0.json").write_bytes(found)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "--seeds=0", f"--results={tmp_path}", "--methods=windowed", f"--against={row}")
    assert stopped.value.code == 2 and f"--against={row}" in capsys.readouterr().err


def test_seeds_can_be_shown_alone(monkeypatch, capsys):
    """Catches a replication that is averaged with the seeds it shall replicate."""
    root = ROOT / "results"
    both = compare.load_results(root, ["tilted"])["tilted"]
    fresh = compare.load_results(root, ["tilted"], (5, 6))["tilted"]
    assert fresh == {5: both[5], 6: both[6]} and len(both) > 2
    call(monkeypatch, f"--results={root}", "--seeds=0", "--methods=tilted", "--shown=5,6")
    assert "| tilted | 2 |" in capsys.readouterr().out


def test_what_was_held_out_over_time():
    """Catches steps in the order of their digits, and seeds that stopped early counted as zero."""
    runs = {seed: {"training": {"held out": {str(step): {"jitter": step + seed} for step in (25, 100)}}}
            for seed in (0, 2)}  # fmt: skip
    runs[2]["training"]["held out"].pop("100")
    lines = compare.over_time({"tilted": runs}, "jitter").splitlines()
    assert lines[0] == "| jitter after | 25 steps | 100 steps |"
    assert lines[2].startswith("| tilted | 26.00 ± 12.71 | 100.00 ± nan |")


def test_drifts_do_not_cancel():
    found = {"views": {"beyond": {"contrast_drift": [0.3, -0.3, None], "looks": [0.3, -0.3, None]}}}
    assert compare.mean_of(found, "beyond", "contrast_drift") == pytest.approx(0.3)
    assert compare.mean_of(found, "beyond", "looks") == 0


@pytest.mark.parametrize("argv, needle", [
    (["--methods=nonsense"], "nonsense"), (["--seeds=-1"], "seeds"),
    (["--seeds=0", "--results=none"], "no run"), (["--method=stream_r1"], "leave it out"),
    (["--beta=1"], "--beta"), (["--nets=none"], "none/codec.safetensors"),
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


def test_shipped_results_say_how_far_and_how_many():
    """Without it, streams of another length would be taken for these (`alike` fills in what is missing)."""
    for path in (ROOT / "results").rglob("*.json"):
        assert {"far": 9, "few": 64}.items() <= compare.read_result(path)["asked"].items(), path


def test_results_outlive_new_fields():
    """Catches results that are refused because a field was added since, and others that are not refused."""
    now = compare.asked_for({"seed": 1}, "nets", 8)
    then = {k: v for k, v in now.items() if k != "tilt"}
    assert compare.alike(then, now) and compare.alike(now, now)
    assert not compare.alike(then, now | {"tilt": 1.0})
    assert not compare.alike(now | {"lr": 1.0}, now)
    assert not compare.alike(now | {"gone": 1}, now)


def test_few_prompts_are_streamed_far(monkeypatch):
    """Catches far streams of prompts that are not among the few, and few that change with many."""
    cfg = build("tiny", {"dim": 32, "heads": 2, "layers": 1, "device": "cpu"})
    torch.manual_seed(0)
    student, codec = VideoDiT(cfg).eval(), Codec(cfg).eval()
    monkeypatch.setattr(compare, "FEW", 32)
    few, many = (compare.watch(student, codec, cfg, 0, clips)[0] for clips in (32, 34))
    assert len(many["within"]["jitter"]) == 34 and len(many["beyond"]["jitter"]) == 32
    assert many["beyond"] == few["beyond"] and many["within"]["noise"][:32] == few["within"]["noise"]
