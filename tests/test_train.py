"""The loop as people run it, on tiny random nets."""

import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import KEYS, ROOT, SMALL, call, command, in_process, launch, metrics, state
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import run as run_module
import train
from config import build
from engine import checkpoint, processes
from engine.rng import rng_for
from model import VideoDiT
from reward import effective_share
from rollout import rollout
from run import NETS, STATE


def test_killed_and_resumed_equals_uninterrupted(nets, tmp_path):
    """SIGKILL in the middle of a step; the resumed run ends in the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(command(nets, whole, "--steps=6", "--save_every=6"))
    # many steps, saved one by one, so that the kill lands inside one of them
    (process,) = launch(command(nets, parts, "--steps=6", "--save_every=1"))
    for _ in range(1200):
        if (parts / "step_000003.pt").exists():
            break
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 4, "dm')  # killed while it wrote a line
    call(command(nets, parts, "--steps=6", "--save_every=6", "--resume"))
    one, two = state(whole, 6), state(parts, 6)
    for name in (*NETS, *STATE):
        assert_close(one[name], two[name], rtol=0, atol=0, msg=f"{name} differs after resuming")
    assert [m["step"] for m in metrics(parts)] == [1, 2, 3, 4, 5, 6]
    drop = lambda m: {k: v for k, v in m.items() if k != "seconds"}  # noqa: E731
    assert [drop(m) for m in metrics(parts)] == [drop(m) for m in metrics(whole)]


def test_death_while_saving_leaves_the_last_checkpoint(tmp_path):
    """Killed with half of the bytes written: the old checkpoint is still the newest, and readable."""
    script = f"""
import os, signal, torch
from dataclasses import asdict
from config import Config
from engine.checkpoint import save_state
save_state({str(tmp_path)!r}, 1, {{"config": asdict(Config()), "x": torch.ones(3)}})
def half(state, name):
    open(name, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
save_state({str(tmp_path)!r}, 2, {{"config": asdict(Config()), "x": torch.zeros(3)}})
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    loaded = checkpoint.load_state(tmp_path, build("tiny", {}))
    assert loaded["step"] == 1 and loaded["x"].sum() == 3


def test_two_processes_equal_one(nets, tmp_path, monkeypatch):
    """gloo, half the batch each: the same rollouts, rewards and gradients as one process with all of it; in
    step 2 the last sample's caption is not a number, which one of two processes meets."""
    real = train.draw

    def poisoned(run, *key, micro):
        rngs, text, about = real(run, *key, micro=micro)
        last = rng_for(run.cfg.seed, "student", 1, 3).initial_seed()
        text[[i for i, g in enumerate(rngs) if g.initial_seed() == last]] = float("nan")
        return rngs, text, about

    monkeypatch.setattr(train, "draw", poisoned)  # forked processes have it too
    for world in (1, 2):
        more = ("--steps=3", "--group=2", "--balance_window=2")
        call(command(nets, tmp_path / str(world), *more), processes=world)
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        for key in ("dmd", "critic", "VQ", "MQ", "TA", "w_inter", "ess", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), key
    assert [row["dropped"] for row in one] == [row["dropped"] for row in two] == [0, 1, 0]
    alone, pair = state(tmp_path / "1", 3), state(tmp_path / "2", 3)
    assert_close(torch.tensor(alone["balancer"]), torch.tensor(pair["balancer"]), atol=1e-4, rtol=2e-3)
    a, b = alone["student"], pair["student"]
    gap = torch.cat([(a[k] - b[k]).abs().flatten() for k in a]).mean()
    # with beta1 = 0 Adam turns the sign of a vanishing gradient into a whole step of 2e-4: hence the mean
    assert gap < 5e-6


def test_sigterm_saves_and_exits_143(nets, tmp_path, capfd):
    (process,) = launch(command(nets, tmp_path, "--steps=100000", "--save_every=100000"))
    for _ in range(1200):
        if (tmp_path / "metrics.jsonl").exists() and metrics(tmp_path):
            break
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and "--resume goes on" in capfd.readouterr().out
    assert len(list(tmp_path.glob("step_*.pt"))) == 1


def test_default_run_leaves_pictures_and_a_student(nets, tmp_path, monkeypatch, capsys):
    in_process(monkeypatch, train, f"--nets={nets}", f"--out={tmp_path}", *KEYS, "--steps=1")
    names = {p.name for p in tmp_path.iterdir()}
    assert {"before.png", "after.png", "student.safetensors", "config.json", "metrics.jsonl"} <= names
    assert str(tmp_path) in capsys.readouterr().out


def test_accumulation_equals_one_batch(nets, tmp_path, monkeypatch):
    """Two micro-batches of two = one batch of four (plain DMD, where no weight looks across the batch)."""
    for n in (1, 2):
        out = tmp_path / str(n)
        in_process(monkeypatch, train, f"--nets={nets}", f"--out={out}", *KEYS, "--steps=1",
                   "--method=self_forcing", f"--accumulate={n}")  # fmt: skip
    one, two = metrics(tmp_path / "1")[0], metrics(tmp_path / "2")[0]
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    assert one["critic"] == pytest.approx(two["critic"], rel=1e-3)


@pytest.mark.parametrize("method", ["self_forcing", "reward_forcing", "diagonal"])
def test_every_method_takes_a_step(nets, tmp_path, monkeypatch, method):
    argv = (f"--nets={nets}", f"--out={tmp_path}", *KEYS, "--steps=1", f"--method={method}")
    in_process(monkeypatch, train, *argv)
    assert metrics(tmp_path)[0]["grad_norm"] > 0


def test_the_critic_learns_and_the_student_waits(nets, tmp_path):
    """Catches a critic that is measured and never moved, and a critic's loss that moves the student."""
    cfg = build("tiny", SMALL | {"device": "cpu"})
    run = train.prepare(cfg, train.Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    before = [[p.clone() for p in net.parameters()] for net in (run.critic, run.student)]
    train.update_critic(run, "critic", 0, 0)
    after = [list(net.parameters()) for net in (run.critic, run.student)]
    moved = [
        any(not torch.equal(a, b) for a, b in zip(*pair, strict=True))
        for pair in zip(before, after, strict=True)
    ]
    assert moved == [True, False]


def test_weights_of_rollouts(nets, tmp_path):
    """Every rollout gets its own weights. Catches a first one that is judged for all, as released."""
    cfg = build("tiny", SMALL | {"device": "cpu", "beta": 4.0})
    run = train.prepare(cfg, train.Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    _, text, _ = train.draw(run, "student", 0, micro=0)
    x = 3 * torch.randn(4, cfg.frames, *cfg.latent_shape, generator=torch.Generator().manual_seed(0))
    _, _, before = train.weigh(run, x, text)
    run.balancer.load_state_dict([[0.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 5.0]] * 3)
    w, inter, after = train.weigh(run, x, text)
    delta = run.balancer.improvement()
    assert before["penalty"] == 0 and float(after["penalty"]) == pytest.approx(
        0.5 * float(delta.std()), rel=1e-4
    )
    assert len(w) == 4 and not any(torch.equal(own, w[0]) for own in w[1:])
    assert effective_share(inter) < 0.999


@pytest.mark.parametrize("broken", [1, 4])
def test_broken_samples_are_left_out_of_the_step(nets, tmp_path, monkeypatch, broken):
    """Captions that are not numbers break their rollouts. One of four: the other three still teach, and count
    for three quarters. All: no weight moves. Catches a NaN that reaches every weight through a product with
    zero, and a step along no gradient at all."""
    real = train.draw

    def poisoned(run, *key, micro):
        rngs, text, _ = real(run, *key, micro=micro)
        text[:broken] = float("nan")
        return rngs, text, text

    for name, draw in (("whole", real), ("broken", poisoned)):
        monkeypatch.setattr(train, "draw", draw)
        argv = (f"--nets={nets}", f"--out={tmp_path / name}", *KEYS, "--steps=1", "--critic_warmup=0")
        in_process(monkeypatch, train, *argv)
    whole, found = metrics(tmp_path / "whole")[0], metrics(tmp_path / "broken")[0]
    assert (whole["dropped"], found["dropped"]) == (0, 2 * broken), "the student's and the critic's"
    start = load_file(nets / "causal.safetensors")
    after = state(tmp_path / "broken", 1)["student"]
    assert all(x.isfinite().all() for x in after.values())
    for norm in ("grad_norm", "critic_grad_norm"):
        assert found[norm] == 0 if broken == 4 else 0.2 < found[norm] / whole[norm] < 2
    assert any(not torch.equal(after[k], start[k].float()) for k in start) == (broken < 4)


@pytest.mark.parametrize("where", ["reward", "decode"])
def test_a_rollout_without_a_finite_reward_is_dropped_and_counted(nets, tmp_path, where):
    """One nan score of four: the step goes on with three. Catches a nan that costs the whole update, and a
    rollout that gets the weight zero and is not counted."""
    cfg = build("tiny", SMALL | {"device": "cpu"})
    run = train.prepare(cfg, train.Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    real, before = run.reward, [p.clone() for p in run.student.parameters()]

    class OneIsNan(torch.nn.Module):
        reads = "text"
        sampled = staticmethod(real.sampled)

        def forward(self, video01, text):
            scores = real(video01, text)
            return torch.cat([scores[:1] * torch.nan, scores[1:]])

    if where == "reward":
        run.reward = OneIsNan()
    else:
        decode = run.codec.decode
        run.codec.decode = lambda x: torch.cat([decode(x[:1]) * torch.nan, decode(x[1:])])
    stats = train.update_student(run, 0)
    assert stats["dropped"] == 1 and 0 < stats["grad_norm"] < 100
    assert all(math.isfinite(stats[k]) for k in ("VQ", "MQ", "TA", "w_inter", "ess", "w_intra_max"))
    assert any(not torch.equal(p, q) for p, q in zip(before, run.student.parameters(), strict=True))


def test_the_effective_sample_size_is_that_of_the_whole_step(nets, tmp_path):
    """Catches an average over micro-batches: with one rollout in each it is 1 whatever the weights are."""
    cfg = build("tiny", SMALL | {"device": "cpu", "accumulate": 4, "beta": 8.0, "balance": "none"})
    run = train.prepare(cfg, train.Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    scores = iter([-1.0, 0.0, 0.5, 1.0])

    def judge(clip, text):
        return next(scores) + 0 * clip.flatten(1).mean(1, keepdim=True).repeat(1, 3)

    run.reward.forward = judge
    stats = train.update_student(run, 0)
    w = (8 * torch.tensor([-1.0, 0.0, 0.5, 1.0])).exp()
    assert stats["ess"] == pytest.approx(effective_share(w), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bf16_every_parameter_gets_gradient_at_every_exit(checkpointing):
    """Catches autocast's cache of weights that a pass without gradient has cast (torch before 2.11)."""
    cfg = build("tiny", SMALL | {"device": "cpu", "bf16": True, "checkpointing": checkpointing})
    torch.manual_seed(0)
    student = VideoDiT(cfg)
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    text = torch.randn(2, cfg.text_length, cfg.text_width)
    for exit in range(len(cfg.denoise)):
        student.zero_grad()
        with processes.autocast(cfg):
            rngs = [rng_for("bf16", i) for i in range(2)]
            x = rollout(student, text, cfg, rngs, exit=exit, grad=True)
        x.square().mean().backward()
        missing = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing, f"exit {exit}: {missing}"


def test_non_finite_samples_are_counted_and_stop_the_run(nets, tmp_path, monkeypatch):
    """No finite sample: no weight moves, all are counted, the run stops, its checkpoint stays."""
    argv = (f"--nets={nets}", f"--out={tmp_path}", *KEYS, "--method=self_forcing", "--save_every=1")
    in_process(monkeypatch, train, *argv, "--steps=1")
    good = state(tmp_path, 1)
    real = train.dmd_gradient

    def poisoned(*args):
        g, finite = real(*args)
        return g * 0, finite & False

    monkeypatch.setattr(train, "dmd_gradient", poisoned)
    monkeypatch.setattr(train, "update_critic", lambda *a: {"critic": 0.0, "dropped": 0.0, "grad_norm": 0.0})
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *argv, "--steps=50", "--max_bad=3", "--save_every=100", "--resume")
    assert "non-finite" in str(stopped.value)
    assert [m["dropped"] for m in metrics(tmp_path)[1:]] == [4.0, 4.0]
    assert_close(state(tmp_path, 1)["student"], good["student"], rtol=0, atol=0)


BAD = {
    "preset": (["huge"], "huge"),
    "key": (["--stepz=3"], "--steps"),
    "method": (["--method=gan"], "stream_r1"),
    "type": (["--lr=fast"], "lr"),
    "negative": (["--batch=-2"], "batch"),
    "indivisible": (["--frames=15"], "multiple"),
    "nets": (["--nets=nowhere"], "nowhere"),
    "other config": (["--channels=8"], "channels"),
    "out": (["--out=/proc/nothing"], "--out"),
    "data": (["--data=/nowhere"], "is not there; allowed here: a folder of clips"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(nets, tmp_path, monkeypatch, capsys, name):
    argv, needle = BAD[name]
    first = argv if name == "preset" else []
    rest = [] if name == "preset" else argv
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *first, f"--nets={nets}", f"--out={tmp_path}", *KEYS, *rest)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_world_size_must_divide_the_batch(nets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, f"--nets={nets}", f"--out={tmp_path}", *KEYS)
    assert stopped.value.code == 2 and "3 processes" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_config(nets, tmp_path, monkeypatch, capsys):
    argv = (f"--nets={nets}", f"--out={tmp_path}", *KEYS)
    in_process(monkeypatch, train, *argv, "--steps=1")
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *argv, "--steps=2", "--beta=1.5", "--resume")
    assert stopped.value.code == 2 and "beta=2.0" in capsys.readouterr().err


def test_plain_dmd_needs_no_reward(nets, tmp_path, monkeypatch):
    """The rivals that a reward model learns from are trained before there is one."""
    own = shutil.copytree(nets, tmp_path / "nets")
    (own / "reward.safetensors").unlink()
    argv = (f"--nets={own}", f"--out={tmp_path / 'out'}", *KEYS, "--steps=1", "--method=self_forcing")
    in_process(monkeypatch, train, *argv)
    assert (tmp_path / "out" / "student.safetensors").exists()


def test_a_run_is_not_resumed_from_other_nets(nets, tmp_path, monkeypatch, capsys):
    """Catches a run that goes on against another teacher than it began with."""
    own = shutil.copytree(nets, tmp_path / "nets")
    argv = (f"--nets={own}", f"--out={tmp_path / 'out'}", *KEYS)
    in_process(monkeypatch, train, *argv, "--steps=1")
    path = own / "teacher.safetensors"
    header, tensors = checkpoint.read_header(path), load_file(path)
    tensors["head.head.bias"] += 1
    save_file(tensors, path, header)
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *argv, "--steps=2", "--resume")
    assert stopped.value.code == 2 and "began from others" in capsys.readouterr().err


def test_a_refused_run_leaves_the_metrics_of_the_one_before(tmp_path, monkeypatch):
    """Catches a table that is emptied before the networks are looked for."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "dmd": 0.5}\n')
    with pytest.raises(SystemExit):
        in_process(monkeypatch, train, "--nets=/nowhere", f"--out={tmp_path}", *KEYS)
    assert path.read_text() == '{"step": 1, "dmd": 0.5}\n'


def test_the_way_to_the_nets_follows_links(tmp_path):
    """Catches ../ that is taken from a link's own place and not from where it leads."""
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    way = run_module.relative(tmp_path / "nets", tmp_path / "link")
    assert (tmp_path / "link").resolve() / way == tmp_path.resolve() / "deep/er/../../nets"
