"""The estimate against what a tiny run really allocates."""

import sys
from dataclasses import replace

import pytest
import torch
from runs import KEYS, SMALL, in_process

from config import PRESETS, BadInput, build
from train import Flags, prepare, update_critic, update_student
from wan import memory


def test_tally_by_hand():
    """Outputs count, views and what was there before do not, and what dies is taken off."""
    layer, before = torch.nn.Linear(1000, 1000), torch.zeros(100, 1000)
    with memory.Tally() as tally:
        a = layer(before)
        assert (tally.now, tally.peak) == (400_000, 400_000)
        b = a.view(-1)[:10].view(2, 5)
        before.add_(1), layer.weight.t()
        c = a + 1
        del a
        assert tally.now == 800_000  # b still holds it
        del b, c
        assert (tally.now, tally.peak) == (0, 800_000)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bf16": True, "checkpointing": True},
        {"window": 0, "sink": 0},
        pytest.param({"bf16": True, "lora": 32}, marks=pytest.mark.slow),
    ],  # to import peft takes seconds
)
def test_rehearsed_without_numbers_equals_for_real(tiny, change):
    change = change | ({"sink_mode": "none"} if "window" in change else {})
    cfg = replace(tiny, layers=1, frames=6, **change)
    if cfg.lora:
        pytest.importorskip("peft")
        few = memory.rehearse(replace(cfg, lora=1), cfg, False)
        assert all(n > 1.2 * few[k] for k, n in memory.rehearse(cfg, cfg, False).items())  # of the branches
    assert memory.rehearse(cfg, cfg, False) == memory.rehearse(cfg, cfg, False, fake=False)


def test_what_it_depends_on(tiny):
    cfg = replace(tiny, frames=4)
    base, twice = memory.rehearse(cfg, cfg, False), memory.rehearse(cfg, cfg, False, 2)
    spare = memory.rehearse(replace(cfg, checkpointing=True), cfg, False)
    assert all(1.8 < twice[k] / base[k] < 2.1 and spare[k] < 0.8 * base[k] for k in base)


def test_a_real_update_stays_below_the_rehearsed_peak(nets, tmp_path):  # noqa: F811
    """train.py's own updates under the same tally: the rehearsal misses neither of them, nor adds much."""
    cfg = build("tiny", SMALL | {"device": "cpu", "method": "self_forcing", "batch": 2, "horizon": 1})
    run = prepare(cfg, Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    weights = sum(p.numel() * 4 for p in run.student.parameters())
    update_student(run, 0), update_critic(run, "warm-up", 0)  # Adam's state and the gradients exist from here
    expected, found = memory.rehearse(cfg, cfg, False, 2), []
    for update in (lambda: update_student(run, 3), lambda: update_critic(run, "critic", 0, 0)):
        with memory.Tally() as tally:
            update()
        found.append(tally.peak)
    for real, peak in zip(found, expected.values(), strict=True):
        assert 0.6 * peak < real < peak + 3 * weights, (real, peak, weights)


def test_what_lasts(nets, tmp_path):  # noqa: F811
    cfg = build("tiny", SMALL | {"device": "cpu"})
    run = prepare(cfg, Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    update_student(run, 0), update_critic(run, "warm-up", 0)
    held = [p for net in (run.student, run.ema, run.critic) for p in net.parameters()]
    states = [s for opt in (run.student_opt, run.critic_opt) for s in opt.state.values()]
    moments = [s[k] for s in states for k in ("exp_avg", "exp_avg_sq")]
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors) / memory.GB  # noqa: E731
    found = memory.estimate(cfg, cfg, 1)
    assert found["student, average, critic"] == pytest.approx(size(held))
    assert found["their optimizers"] == pytest.approx(size(moments))
    assert found["teacher"] == pytest.approx(size(run.teacher.parameters()))
    assert memory.estimate(cfg, cfg, 4)["their optimizers"] == pytest.approx(size(moments))
    four = memory.estimate(replace(cfg, shard=True), cfg, 4)
    assert four["their optimizers"] == pytest.approx(size(moments) / 4) and four["blocks in passing"] > 0


def test_too_little_memory_is_said_before(tiny):
    cfg = replace(tiny, batch=8, layers=1, frames=4)
    memory.check(cfg, cfg, 2, 80)
    with pytest.raises(BadInput, match=r"2 GPUs with 4 clips each need about .* --accumulate=4"):
        memory.check(cfg, cfg, 2, 0.0001)


@pytest.mark.slow
def test_wan_codec_at_real_size():
    """Gigabytes at the real shapes, in seconds and without them."""
    pytest.importorskip("diffusers")
    found = memory.judging(PRESETS["wan-1.3b"], 1)
    assert 4.5e9 < found["codec and reward"] < 5.5e9 and 5e9 < found["judging rollouts"] < 30e9


def test_without_the_extra(monkeypatch, capsys):
    memory.judging.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, memory, "wan-1.3b")
    assert stopped.value.code == 2 and "pip install 'stream-r1[wan]'" in capsys.readouterr().err


def test_unknown_teacher(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, memory, "--teacher_size=3b")
    assert stopped.value.code == 2 and "1.3b | 14b" in capsys.readouterr().err


def test_the_table(monkeypatch, capsys):
    in_process(monkeypatch, memory, "tiny", *KEYS)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].count("|") == 6 and rows[-1].startswith("| total")
