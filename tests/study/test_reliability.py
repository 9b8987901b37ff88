"""study/reliability.py, law.py, usefulness.py: the law, the fault, the tables' arithmetic, jobs."""

import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from runs import SMALL

import train
from config import build as build_config
from config import cli
from engine.checkpoint import save_weights
from model import VideoDiT, to_x0
from networks import load_net
from study import law, results, usefulness
from study import reliability as study
from study.tables import interval

FACTS = {"method": "windowed", "group": 2, "weight": "softmax", "device": "cpu"}


def test_the_law():
    """As noise vanishes β (1 - s²), at every t nothing for a student as wide as its teacher, a loss for a
    wider one, and what steps along weighted gradients arrive at."""
    for s in (0.5, 1.25):
        assert law.law(s, 0.3, torch.tensor([1e-3])) == pytest.approx(0.3 * (1 - s**2), rel=1e-4)
    t = torch.tensor([0.1, 0.5, 0.9])
    assert law.law(1.0, 2.0, t) == 0 and law.law(1.5, 2.0, t) < 0
    assert law.law_measured(0.5, 0.5, t, 0, steps=200) == pytest.approx(law.law(0.5, 0.5, t), abs=0.004)


def test_the_fault_is_where_it_is_said_to_be():
    """Odd chunks of wrong samples move one cell, in both estimates that guidance asks for; nothing else."""
    clean, xt = torch.randn(4, 8, 3, 2, 5), torch.randn(4, 8, 3, 2, 5)
    t, wrong = torch.full((4, 8), 0.3), torch.tensor([False, True])

    def teacher(xt, t, text):
        return (xt - clean) / 0.3, "kv"

    v, kv = usefulness.shifted(teacher, wrong, 2)(xt, t, None)
    moved = clean.clone()
    for b in (1, 3):
        for f in (2, 3, 6, 7):
            moved[b, f] = clean[b, f].roll(1, -1)
    assert kv == "kv" and torch.allclose(to_x0(v, xt, t), moved, atol=1e-5)


def test_the_worse_half_of_each_prompt(monkeypatch):
    """By the reward, by pixels, by lot; of an exact teacher none."""
    x = torch.tensor([3.0, 1.0, 2.0, 0.0, 10.0, 13.0, 11.0, 12.0])
    judge = SimpleNamespace(codec=SimpleNamespace(decode=lambda x: x), cfg=SimpleNamespace(seed=0))
    judge.reward = lambda video01, text: video01[:, None].expand(-1, 3)
    monkeypatch.setattr(usefulness, "measure", lambda video01, prompts: {"looks": -video01})
    monkeypatch.setattr(usefulness, "three_axes", lambda found: found)
    words = [["red", "circle", "left", "slowly", "black"]] * 8
    low, pixels, lot, exact = (
        usefulness.worse(judge, fault, x, None, words, 1, group=4)
        for fault in ("low", "pixels", "random", "exact")
    )
    assert low.tolist() == [False, True, False, True, True, False, True, False] == (~pixels).tolist()
    assert lot.view(2, 4).sum(1).tolist() == [2, 2] and not exact.any()


def test_the_teacher_errs_on_the_rollouts_that_are_trained_on(nets, tmp_path, monkeypatch):  # noqa: F811
    """Catches rollouts judged that are not those of the step, and an exact teacher's step that is not
    train.py's own."""
    cfg = build_config("tiny", SMALL | FACTS | {"beta": 2.0})
    judged, weighed, ends, worse, weigh = [], [], [], study.worse, train.weigh

    def judge(run, fault, x, *how, **more):
        judged.append(x)
        return worse(run, fault, x, *how, **more)

    def watch(net, *how):
        ends.append(net)
        return {view: dict.fromkeys(study.LOOKS, 0.0) for view in ("within", "beyond")}

    monkeypatch.setattr(study, "worse", judge)
    monkeypatch.setattr(study, "watch", watch)
    monkeypatch.setattr(train, "weigh", lambda run, x, about: weighed.append(x) or weigh(run, x, about))
    for fault in ("exact", "low"):
        study.train_student(nets, cfg, fault, 1, 1, tmp_path)
    for one, other in zip(judged, weighed, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    run = usefulness.begin(nets, cfg, load_net(nets / "causal.safetensors", cfg, "causal"))
    train.update_student(run, 0)
    plain, exact, low = (torch.cat([p.flatten() for p in net.parameters()]) for net in (run.ema, *ends))
    assert torch.equal(plain, exact) and not torch.equal(plain, low)


def test_single_steps(nets):  # noqa: F811
    """An exact teacher's plain step has cosine one with itself; where it errs, less; all is finite."""
    cfg = build_config("tiny", SMALL | FACTS)
    lines = usefulness.usefulness(nets, cfg, "stream_r1", prompts=2, rollouts=2)
    found = {(x["setting"], x["weight"]): x["value"] for x in lines if x["measure"] == "cosine"}
    plain = study.SHOWN["usefulness"][0]
    assert found["stream_r1, exact", plain] == pytest.approx(1.0, abs=1e-4)
    assert found["stream_r1, low", plain] < 0.999 and len(found) == len(study.FAULTS) * len(study.PAIRS)
    assert all(math.isfinite(x["value"]) for x in lines)


def test_a_student_of_fewer_layers(nets, tmp_path, monkeypatch):  # noqa: F811
    """Every second block, trained once; and a training from there is measured."""
    cfg, folder = build_config("tiny", SMALL | FACTS | {"layers": 2}), tmp_path / "nets"
    shutil.copytree(nets, folder)
    for kind in ("teacher", "causal"):
        save_weights(folder / f"{kind}.safetensors", VideoDiT(cfg), cfg, kind)
    small = study.start_of(folder, cfg, 1, tmp_path, steps=1)
    monkeypatch.setattr(study, "train_causal", None)
    again = study.start_of(folder, cfg, 1, tmp_path)
    assert len(small.blocks) == 1 and torch.equal(small.head.head.weight, again.head.head.weight)
    monkeypatch.setattr(study, "CLIPS", 2)
    found = study.train_student(folder, replace(cfg, critic_warmup=1), "random", 1, 1, tmp_path)
    assert {"looks", "motion", "jitter x9", "ess"} <= found.keys()


def line(job: str, value: float, **more) -> dict:
    part, setting, weight, seed = job.split("/")
    facts = {"job": job, "seed": int(seed), "setting": setting, "weight": weight, "device": "cpu"}
    return facts | {"measure": "looks", "value": value} | more


def test_differences_are_paired():
    """Seeds that differ much, a weight that is always .1 better, a seed without a partner, another part."""
    lines = [line(f"trained/low/0/{s}", float(s)) for s in (1, 2, 3)]
    lines += [line(f"trained/low/4/{s}", s + 0.1 + 0.01 * s) for s in (1, 2, 9)]
    lines += [line("capacity/low/4/1", 7.0), line("trained/low/4/1", 7.0, measure="motion")]
    mean, half = study.gain(lines, "trained", "low", "4", "looks")
    assert (mean, half) == pytest.approx((0.115, interval([0.11, 0.12])[1]))
    assert study.table(lines, "trained").splitlines()[2].startswith("| low | 0 | 3 | 2.000 ± 2.484 |")


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["reliability.py", *argv])
    cli(study.main)


def test_jobs_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    """What is in the file, and what another process has taken, is not done again."""
    done, where = [], [f"--results={tmp_path}/r.csv", f"--out={tmp_path}"]
    monkeypatch.setattr(study, "do", lambda name, *how: done.append(name) or [line(name, 0.5)])
    with FileLock(tmp_path / "trained-low-2-1.lock"):
        monkeypatch.setattr(study, "writable_folder", lambda path: tmp_path)
        call(monkeypatch, "trained/low", *where, "--device=cpu")
    assert len(done) == 14 and "trained/low/2/1" not in done
    call(monkeypatch, "trained/low/2", *where, "--device=cpu")
    assert done[14:] == ["trained/low/2/1"] and len(results.read(tmp_path / "r.csv", study.COLUMNS)) == 15
    call(monkeypatch, "jobs")
    listed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("python")]
    assert f"python -m study.reliability {done[0]}" in listed and len(set(listed)) == len(study.jobs()) == 99


def test_report(tmp_path, monkeypatch, capsys):
    """Tables and the figure of a file that holds a part of it all."""
    results.append(tmp_path / "r.csv", [line("trained/low/0/1", 0.5)], study.COLUMNS, ("job",))
    monkeypatch.setattr(law, "law_measured", lambda s, beta, t, seed: law.law(s, beta, t))
    call(monkeypatch, f"--results={tmp_path}/r.csv", f"--out={tmp_path}")
    assert "| t = .02 | 0.5 | +0.749 | +0.749 ± 0.000 |" in capsys.readouterr().out
    assert (tmp_path / "reliability.png").exists()


@pytest.mark.parametrize("argv", [["trained/lower"], ["all", "--beta=3"], ["all", "--device=tpu"]])
def test_bad_input(argv, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *argv)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
