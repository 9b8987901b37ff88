"""The stages before distillation."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import pretrain
from codec import Codec
from config import build, cli
from engine.checkpoint import annotate
from engine.rng import rng_for
from reward import RewardModel, bradley_terry
from rollout import sample_teacher
from world.scene import World

SMALL = ["--dim=32", "--heads=2", "--ffn=32", "--layers=1", "--device=cpu", "--batch=2"]


@pytest.fixture(autouse=True)
def short_report(monkeypatch):
    """Eight clips are reconstructed after every codec's stage, not 128."""
    monkeypatch.setitem(pretrain.REPORTS, "codec", partial(pretrain.report_codec, count=8))


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *argv])
    cli(pretrain.main)


def test_an_interrupted_stage_ends_in_the_same_bits(monkeypatch, tmp_path):
    """Stopped after 2 of 4 steps by a signal and resumed, other processes drawing = never stopped."""
    call(monkeypatch, *SMALL, "--stage=codec", "--steps=4", f"--out={tmp_path / 'whole'}")
    parts = tmp_path / "parts"

    class Two(list):
        """True from the second time it is asked for inside a step."""

        asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked >= 3

    monkeypatch.setattr(pretrain.checkpoint, "stop_on_signal", lambda: Two([15]))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *SMALL, "--stage=codec", "--steps=4", f"--out={parts}")
    assert stopped.value.code == 143
    assert not (parts / "codec.safetensors").exists()
    monkeypatch.setattr(pretrain.checkpoint, "stop_on_signal", list)
    call(monkeypatch, *SMALL, "--stage=codec", "--steps=4", f"--out={parts}", "--resume", "--workers=2")
    one, two = (
        torch.load(d / "codec-state" / "step_000004.pt", weights_only=True)
        for d in (tmp_path / "whole", parts)
    )
    assert_close(one["net"], two["net"], rtol=0, atol=0)
    assert_close(one["averaged"], two["averaged"], rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["teacher", "causal"])
def test_what_other_processes_draw_is_the_same(monkeypatch, tmp_path, nets, stage):
    """Clips, noise, texts, times: two steps with three processes leave the bits that one leaves."""
    weights = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        shutil.copytree(nets, out)
        call(monkeypatch, *SMALL, f"--stage={stage}", "--steps=2", f"--out={out}", f"--workers={workers}")
        weights.append(torch.load(out / f"{stage}-state" / "step_000002.pt", weights_only=True)["net"])
    assert_close(*weights, rtol=0, atol=0)


def test_a_stage_goes_on_from_nets_that_knew_one_object(monkeypatch, tmp_path, capsys):
    """--start reads codec and teacher of the shorter captions; its weights are where the new ones begin."""
    one, two = tmp_path / "one", tmp_path / "two"
    for stage in ("codec", "teacher"):
        call(monkeypatch, *SMALL, f"--stage={stage}", "--steps=1", "--seed=1", f"--out={one}")
    rest = ("--objects=2", "--text_length=9", "--steps=1", "--lr=1e-9", f"--out={two}")
    for stage in ("codec", "teacher"):
        call(monkeypatch, *SMALL, *rest, f"--stage={stage}", f"--start={one / stage}.safetensors")
        then, now = (load_file(folder / f"{stage}.safetensors") for folder in (one, two))
        for name in (name for name in then if not name.startswith("unit.")):  # statistics of other clips
            assert_close(then[name], now[name], rtol=0, atol=2e-4, msg=f"{stage}: {name}")
    with pytest.raises(SystemExit) as stopped:
        argv = (*SMALL, "--dim=64", *rest[:-1], f"--out={tmp_path / 'wide'}")
        call(monkeypatch, *argv, "--stage=codec")
        call(monkeypatch, *argv, "--stage=teacher", f"--start={one / 'teacher'}.safetensors")
    assert stopped.value.code == 2 and "does not fit the network" in capsys.readouterr().err
    for argv in (("--stage=codec",), ("--stage=all", f"--start={one / 'causal'}.safetensors")):
        (one / "causal.safetensors").write_bytes((one / "teacher.safetensors").read_bytes())
        annotate(one / "causal.safetensors", kind="causal")
        with pytest.raises(SystemExit) as stopped:
            start = f"--start={one / 'teacher'}.safetensors"
            call(monkeypatch, *SMALL, start, *argv, "--steps=1", f"--out={tmp_path / 'other'}")
        assert stopped.value.code == 2 and "for its own stage" in capsys.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(monkeypatch, tmp_path, capsys):
    argv = (*SMALL, "--stage=codec", "--steps=1", f"--out={tmp_path}")
    call(monkeypatch, *argv)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv)
    assert stopped.value.code == 2 and "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, needle",
    [
        ("--stage=gan", "teacher"),
        ("--steps=-1", "steps=-1"),
        ("--data=/x", "/x"),
        ("--cache", "--data=FOLDER"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, capsys, flag, needle):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *SMALL, f"--out={tmp_path}", flag)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and needle in error and len(error.splitlines()) == 1


def test_a_broken_step_is_skipped_and_many_end_the_run(monkeypatch, tmp_path):
    """One NaN loss changes no weight; cfg.max_bad of them in a row stop the stage, its last state intact."""
    real, poison = Codec.loss, set()

    def loss(self, video01, noise):
        poison.add(len(poison))
        return real(self, video01, noise) * (float("nan") if len(poison) in bad else 1)

    monkeypatch.setattr(Codec, "loss", loss)
    bad = {2}
    call(monkeypatch, *SMALL, "--stage=codec", "--steps=3", f"--out={tmp_path / 'one'}")
    net = torch.load(tmp_path / "one" / "codec-state" / "step_000003.pt", weights_only=True)["net"]
    assert all(v.isfinite().all() for v in net.values())
    poison.clear()
    bad = set(range(2, 99))
    with pytest.raises(SystemExit, match="not finite"):
        call(monkeypatch, *SMALL, "--stage=codec", "--steps=50", f"--out={tmp_path / 'two'}", "--max_bad=3")
    assert not (tmp_path / "two" / "codec.safetensors").exists()


def test_a_stage_is_not_resumed_with_another_length(monkeypatch, tmp_path, capsys):
    argv = (*SMALL, "--stage=codec", f"--out={tmp_path}")
    call(monkeypatch, *argv, "--steps=1")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv, "--steps=2", "--resume")
    assert stopped.value.code == 2 and "'steps': 1" in capsys.readouterr().err


def test_straight_paths_cost_nothing_and_bent_ones_do():
    """Three equal frames do not bend, so the straightness term vanishes; three different ones do."""
    cfg = build("tiny", {})
    codec = Codec(cfg).eval()
    video = World(cfg).batch([("bend", i) for i in range(2)], torch.tensor([0, 2, 4])).video01
    noise = torch.zeros(2, 3, *cfg.latent_shape)
    still = video[:, :1].expand_as(video)
    terms = []
    for clip in (still, video):
        full = codec.loss(clip, noise)
        codec.straight = 0.0
        terms.append((full - codec.loss(clip, noise)).item())
        codec.straight = cfg.codec_straight
    assert abs(terms[0]) < 1e-7 and terms[1] > 1e-7


def test_the_teachers_sampler_follows_the_flow():
    """With the exact velocity of a single data point, 25 Euler steps end on that point from any noise."""
    cfg = build("tiny", {})
    point = torch.randn(1, cfg.frames, *cfg.latent_shape)

    def exact(xt, t, text):
        return (xt - point) / t[..., None, None, None], None

    rngs = [rng_for("flow", i) for i in range(2)]
    x = sample_teacher(exact, torch.zeros(2, cfg.text_length, cfg.text_width), cfg, rngs)
    assert_close(x, point.expand_as(x), atol=1e-4, rtol=1e-4)


def test_bradley_terry_pulls_good_above_bad():
    """Steps on one batch raise the margin on the damaged axis of every pair."""
    torch.manual_seed(0)
    cfg = build("tiny", {})
    net = RewardModel(cfg)
    clips, text = torch.rand(7 * 2, 16, 3, 32, 32)[:7], torch.randn(4, 2, cfg.text_length, cfg.text_width)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = bradley_terry(net, clips, text, text[0, :1])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end(tmp_path):
    """Every command of .ci/gpu on tiny shapes; what it brings home fits; a second call does nothing."""
    script = Path(__file__).resolve().parent.parent / ".ci" / "gpu"
    env = os.environ | {"WORK": str(tmp_path / "work")}
    words = ["bash", str(script), str(tmp_path / "out"), "--rehearse"]
    first, second = (subprocess.run(words, env=env, capture_output=True, text=True) for _ in range(2))
    rows = (tmp_path / "out" / "table.txt").read_text().splitlines()
    parts = "bench-small bench-wan causal codec probe step student teacher tests".split()
    assert sorted(row.split(" | ")[0] for row in rows) == parts, first.stdout + first.stderr
    assert all(" | exit 0 | " in row for row in rows), first.stdout
    assert second.stdout.splitlines() == rows and not second.stderr
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and {"teacher.safetensors", "student.safetensors"} <= {f.name for f in files}
