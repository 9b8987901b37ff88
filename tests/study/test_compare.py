"""The comparison of methods: paired, resumable, and what it leaves."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from runs import KEYS, in_process

import train
from codec import Codec
from config import ROOT, build, cli
from engine import checkpoint
from model import VideoDiT
from study import compare, evaluate, results
from study.rows import as_flag, fields_of


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", *argv])
    cli(evaluate.main)


@pytest.fixture
def where(nets, tmp_path):
    folders = [f"--nets={nets}", f"--results={tmp_path}/r.csv", f"--runs={tmp_path}/runs", "--clips=2"]
    return [*folders, *KEYS, "--methods=windowed", "--seeds=1"]


def runs_of(path: Path) -> dict[str, dict]:
    """{row: {view: line}} of seed 0."""
    found: dict[str, dict] = {}
    for line in results.read(path):
        found.setdefault(line["row"], {})[line["view"]] = line
    return found


def test_table_trains_measures_resumes(where, tmp_path, monkeypatch, capsys):
    """Catches runs that are made twice or mixed with others, states left behind, and results nobody sees."""
    trainings = []

    def run(words, check):
        with monkeypatch.context() as patch:
            in_process(patch, train, *words[2:])
        return trainings.append(words) or subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare, "FAR", 2)
    monkeypatch.setattr(compare.subprocess, "run", run)
    call(monkeypatch, *where, "--steps=1")
    found = runs_of(tmp_path / "r.csv")
    assert found.keys() == {"self_forcing", "windowed"} and len(trainings) == 2
    assert found["windowed"].keys() == {"within", "beyond", "held out, step 1"}
    one = found["windowed"]["beyond"]
    assert one["forwards"] == 35 and one["prompts"] == 2 and not math.isnan(one["saturation_drift"])
    assert one["command"].startswith("python train.py --method=windowed --steps=1 ")
    assert not list((tmp_path / "runs").rglob("step_*.pt"))
    said = capsys.readouterr().out
    assert "| windowed | 1 |" in said and "| self_forcing | " in said
    call(monkeypatch, *where, "--steps=1", "--clips=3")  # measured again, on more prompts, but not trained
    more = [line for line in results.read(tmp_path / "r.csv") if line["clips"] == 3]
    assert len(more) == 2 * 3 and len(trainings) == 2
    assert all(line["seconds"] == found[line["row"]]["within"]["seconds"] for line in more)
    before = (tmp_path / "r.csv").read_bytes()
    call(monkeypatch, *where, "--steps=1", "--threads=1")
    assert (tmp_path / "r.csv").read_bytes() == before and len(trainings) == 2
    with pytest.raises(SystemExit):
        call(monkeypatch, *where, "--steps=2")
    assert "other settings" in capsys.readouterr().err


def test_what_counts_as_trained(nets, tmp_path):
    """Other settings, a field that is gone, another start, a run cut short, one to go on from: none does."""
    cfg = build("tiny", {"method": "stream_r1", "steps": 50})
    made = json.loads(json.dumps(asdict(cfg)))
    kinds = ("codec", "teacher", "causal", "reward")
    made |= {"torch": "2", "world": 1, "origin": {"nets": checkpoint.fingerprint(nets, kinds), "start": ""}}

    def ends(made: dict, step: int, cfg=cfg) -> bool:
        (tmp_path / "config.json").write_text(json.dumps(made))
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n' if step else "")
        return compare.trained(tmp_path, cfg, nets)

    assert not compare.trained(tmp_path, cfg, nets), "an empty folder"
    assert ends(made, 50) and not ends(made, 30) and not ends(made, 0)
    assert ends(made | {"threads": 3, "device": "cuda"}, 50), "another machine"
    assert not ends(made, 50, build("tiny", {"steps": 50, "seed": 1})) and not ends(made | {"gone": 1}, 50)
    assert not ends(made | {"origin": made["origin"] | {"start": "a.safetensors"}}, 50)
    assert not ends({k: v for k, v in made.items() if k != "origin"}, 50)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5')
    assert compare.last_step(tmp_path) == 50, "a kill cut the last line short"
    assert ends(made, 50) and not compare.trained(tmp_path, cfg, ROOT / "assets/tiny"), "other nets"
    (tmp_path / "step_000050.pt").touch()
    assert not ends(made, 50), "there is something to go on from"


@pytest.fixture
def failing(monkeypatch):
    """Trainings that end with exit code 1 at once."""
    done = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: done)


def test_a_run_is_left_to_whoever_took_it(where, tmp_path, monkeypatch, capsys, failing):
    """Catches two processes that write into the same folder."""
    folder = compare.writable_folder(f"{tmp_path}/runs/one/windowed-0")
    with FileLock(folder / ".taken"):
        call(monkeypatch, *where, "--steps=1")
    assert runs_of(tmp_path / "r.csv").keys() == {"self_forcing"}


def test_a_failed_run_is_counted_and_the_others_go_on(where, tmp_path, monkeypatch, capsys, failing):
    call(monkeypatch, *where, "--steps=1")
    assert runs_of(tmp_path / "r.csv")["windowed"].keys() == {"failed"}
    assert "| windowed | 0 (1 failed) |" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 143])
def test_a_run_that_was_stopped_is_not_measured(where, tmp_path, monkeypatch, capsys, code):
    """Half a training must not be taken for a whole one, nor one that a signal has ended for a failed one."""
    done, before = subprocess.CompletedProcess([], code), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(SystemExit):
        call(monkeypatch, *where, "--steps=1")
    assert "stopped at step 0 of 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before, "whoever calls this keeps what they do on a signal"
    assert not (tmp_path / "r.csv").exists()


def test_seeds_can_be_shown_alone(monkeypatch, capsys):
    """Catches a replication that is averaged with the seeds it shall replicate."""
    call(monkeypatch, "--seeds=0", "--methods=windowed-guidance3", "--shown=5,6")
    assert "| windowed-guidance3 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("argv, needle", [
    (["--methods=nonsense"], "nonsense"), (["--seeds=-1"], "seeds"), (["--world=three"], "one | two"),
    (["--seeds=0", "--results=none"], "no run"), (["--method=stream_r1"], "leave it out"),
    (["--beta=1"], "--beta"), (["--nets=none"], "none/codec.safetensors"),
    (["--against=diagonal-", "--seeds=0"], "--against=diagonal-"),  # an unknown row, and one without runs
    (["--against=windowed-2steps", "--seeds=0", "--world=two"], "--against=windowed-2steps"),
])  # fmt: skip
def test_bad_input(monkeypatch, capsys, tmp_path, argv, needle):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_few_prompts_are_streamed_far(monkeypatch):
    """Catches far streams of prompts that are not among the few, and few that change with many."""
    cfg = build("tiny", {"dim": 32, "heads": 2, "layers": 1, "device": "cpu"})
    torch.manual_seed(0)
    student, codec = VideoDiT(cfg).eval(), Codec(cfg).eval()
    monkeypatch.setattr(compare, "FEW", 32)
    monkeypatch.setattr(compare, "FAR", 2)
    seen = ("looks", "saturation", "contrast")
    monkeypatch.setattr(
        compare, "measure", lambda x, prompts: dict.fromkeys(seen, x.std((1, 2, 3, 4)) + len(prompts[0]))
    )
    monkeypatch.setattr(compare, "three_axes", lambda found: {})
    few, many = (compare.watch(student, codec, cfg, 0, clips) for clips in (32, 34))
    assert many["within"]["prompts"] == 34 and many["beyond"]["prompts"] == 32
    assert many["beyond"] == few["beyond"] and many["within"] != few["within"]


def test_drifts_do_not_cancel(monkeypatch):
    """Brighter in one clip does not make up for darker in another; what does not apply is no zero."""
    cfg = build("tiny", {"dim": 32, "heads": 2, "layers": 1, "device": "cpu"})
    values = torch.tensor([0.3, -0.3, torch.nan])
    given = dict.fromkeys(("saturation", "contrast", "looks"), values)
    monkeypatch.setattr(compare, "measure", lambda *a: given)
    monkeypatch.setattr(compare, "three_axes", lambda found: {})
    found = compare.watch(VideoDiT(cfg).eval(), Codec(cfg).eval(), cfg, 0, 3)["beyond"]
    assert found["contrast_drift"] == pytest.approx(0.3) and found["looks"] == 0 and found["prompts"] == 3


def test_shipped_runs_are_of_the_shipped_nets_and_of_todays_rows():
    """Catches results that nothing in the repository can reproduce any more: other nets, or settings that no
    row stands for today."""
    nets = {world: checkpoint.fingerprint(ROOT / folder) for world, (_, folder) in compare.WORLDS.items()}
    lines = results.read(ROOT / "study/results.csv")
    for line in [line for line in lines if not line["row"].startswith("tilted")]:  # left the code; log.md
        fields = fields_of(line["row"], line["world"], {}) | {"seed": line["seed"]}
        command = " ".join(["python train.py", *(as_flag(k, v) for k, v in fields.items())])
        assert (line["command"], line["nets"]) == (command, nets[line["world"]])
        assert (line["steps"], line["batch"]) == (100, 16)
