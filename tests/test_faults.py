"""What goes wrong outside of the code: names of a person's own, full disks, broken encoders, a second run."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from filelock import Timeout
from PIL import Image
from runs import KEYS, ROOT, call, command, in_process

import pretrain
import sample
import train
from config import BadInput, build, cli
from engine import checkpoint, sheet
from engine.sheet import contact_sheet
from run import read_metrics

FORK = multiprocessing.get_context("fork")  # a new process would take seconds to import torch
ROW = [("red", torch.zeros(2, 3, 8, 8))]
RED = ("--prompt", "a red circle moving left", "--frames=8")


@pytest.fixture
def refused(monkeypatch, capsys):
    """(script, arguments) → the one line with which it ends; exit code 2."""

    def refused(script, *argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            in_process(monkeypatch, script, *map(str, argv))
        lines = capsys.readouterr().err.strip().splitlines()
        ours = [line for line in lines if line.startswith(f"{script.__name__}.py: ")]
        assert stopped.value.code == 2 and len(ours) == 1, lines
        return ours[0]

    return refused


@pytest.fixture
def tried(nets, tmp_path):
    """Arguments of train.py for a run of the random nets in tmp_path/run."""
    return (f"--nets={nets}", f"--out={tmp_path / 'run'}", *KEYS)


@pytest.fixture(scope="module")
def one_step(nets, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    call(command(nets, out, "--steps=1"))
    return out


@pytest.fixture
def ran(one_step, tmp_path):
    """The folder of `tried` after a run of one step."""
    return shutil.copytree(one_step, tmp_path / "run")


@pytest.fixture
def drawn(nets, tmp_path):
    """Arguments of sample.py for a short clip, tmp_path/clip.mp4."""
    return (f"--student={nets}/stream_r1.safetensors", f"--out={tmp_path}/clip.mp4", *RED)


# -- nothing of the person's is lost ----------------------------------------
def test_a_persons_picture_stays(nets, tmp_path, monkeypatch, capsys):
    """Catches a contact sheet that takes the place of the picture a clip was made from."""
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "clip.png")
    before = (tmp_path / "clip.png").read_bytes()
    argv = (f"--student={nets}/stream_r1.safetensors", f"--out={tmp_path}/clip.mp4", *RED)
    for _ in range(2):
        in_process(monkeypatch, sample, *argv, f"--init={tmp_path}/clip.png")
        assert (tmp_path / "clip.png").read_bytes() == before
        assert f"{tmp_path}/clip_sheet.png" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.png", "clip_sheet.png"]


def test_what_is_no_picture_of_ours_stays(tmp_path, monkeypatch):
    """A folder of that name, and a file that may not be read (root may: here the system says no)."""
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.png").write_bytes(contact_sheet(tmp_path / "c.png", ROW).read_bytes())
    monkeypatch.setattr(sheet, "access", lambda path, how: path.name != "b.png")
    for name in ("a", "b"):
        assert contact_sheet(tmp_path / f"{name}.png", ROW).name == f"{name}_sheet.png"


def test_a_clip_is_not_replaced_by_its_continuation(drawn, tmp_path, monkeypatch, refused):
    in_process(monkeypatch, sample, *drawn)
    before = (tmp_path / "clip.mp4").read_bytes()
    assert "would replace --init" in refused(sample, *drawn, f"--init={tmp_path}/clip.mp4")
    assert "no such file" in refused(sample, *drawn, f"--init={tmp_path}/lost.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == before


def test_rotation_touches_only_what_it_wrote(tmp_path):
    """Catches copies that vanish with the states they were made of, and a copy that is resumed from."""
    keep = {"config": {}, "x": torch.ones(2)}
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, keep)
    names = ("step_000001_best.pt", "step_2.pt", "step_000009.pt.bak", "step_best.pt")
    for name in names:
        shutil.copy(tmp_path / "step_000001.pt", tmp_path / name)
    (tmp_path / "step_notes").mkdir()
    for step in (3, 1000000, 1000001):
        checkpoint.save_state(tmp_path, step, keep)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {*names, "step_notes", "step_1000000.pt", "step_1000001.pt"}
    assert checkpoint.states(tmp_path)[-1].name == "step_1000001.pt"


def encoder(folder: Path, end: str) -> str:
    """ffmpeg, but `end` happens to the file after every encoding ("$last" is its name)."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    script = f"""#!/bin/sh
for last in "$@"; do :; done
{real} "$@"; code=$?
case "$last" in *.mp4) {end};; esac
exit $code
"""
    path = folder / "ffmpeg.sh"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("end", ['head -c 900 "$last" > "$last.x"; mv "$last.x" "$last"', 'rm "$last"'])
def test_an_encoder_that_fails_at_its_end(drawn, tmp_path, monkeypatch, refused, end):
    """Catches exit code 0, a broken file under the final name, and the loss of an earlier good one."""
    in_process(monkeypatch, sample, *drawn)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", encoder(tools, end))
    assert "clip.mp4 cannot be written" in refused(sample, *drawn)
    shutil.rmtree(tools)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_encoder_that_drops_frames(tmp_path, monkeypatch):
    real = sheet.imageio.get_writer

    def get_writer(*args, **kwargs):
        writer = real(*args, **kwargs)
        whole, seen = writer.append_data, []

        def append_data(frame):
            seen.append(frame)
            if len(seen) < 5:
                whole(frame)

        writer.append_data = append_data
        return writer

    monkeypatch.setattr(sheet.imageio, "get_writer", get_writer)
    with pytest.raises(OSError, match="4 of 6 frames"):
        sheet.write_video(tmp_path / "a.mp4", iter(np.zeros((6, 32, 32, 3), np.uint8)), 8)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_a_full_disk_while_pictures_are_written(nets, tmp_path, monkeypatch, refused, name):
    """One line; a clip that was there before stays. The contact sheet (.png) comes last."""
    real = Image.Image.save

    def save(self, path, *args, **kwargs):
        if Path(path).suffix == Path(name).suffix:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    video = tmp_path / name.replace("png", "webp")
    (tmp_path / name).write_bytes(b"earlier")
    line = refused(sample, f"--student={nets}/stream_r1.safetensors", f"--out={video}", *RED)
    assert f"no space left in {tmp_path}" in line
    assert (tmp_path / name).read_bytes() == b"earlier"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_while_a_state_is_written(tried, ran, tmp_path, monkeypatch, refused):
    """Torch then speaks of an "unexpected pos"; the state before stays and can be resumed from."""
    before = (tmp_path / "run" / "step_000001.pt").read_bytes()

    def save(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
        line = refused(train, *tried, "--steps=2", "--resume")
    assert f"no space left in {tmp_path / 'run'}, needs " in line and " MB" in line

    def touch(path, real=Path.touch):
        if path.suffix in (".pt", ".png"):
            raise OSError(errno.ENOSPC, "no inode is left, of which torch says: open file failed")
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", touch)
        assert f"no space left in {tmp_path / 'run'}" in refused(train, *tried, "--steps=2", "--resume")
        new = f"--out={tmp_path / 'new'}"  # at the first picture no progress bar stands in the line
        assert f"no space left in {tmp_path / 'new'}" in refused(train, *tried, new, "--steps=2")
    assert (tmp_path / "run" / "step_000001.pt").read_bytes() == before
    in_process(monkeypatch, train, *tried, "--steps=2", "--resume")


def test_a_folder_takes_one_run(tried, tmp_path, monkeypatch, refused):
    """Catches two runs that mix their numbers; a lock whose process was killed is none."""
    held = FORK.Event()

    def hold():
        with checkpoint.locked(tmp_path / "run"):
            held.set()
            time.sleep(100)

    holder = FORK.Process(target=hold)
    holder.start()
    try:
        assert held.wait(20)
        assert "another run is writing to" in refused(train, *tried, "--steps=1")
        assert not list((tmp_path / "run").glob("*.p*"))
    finally:
        holder.kill()
        holder.join()
    in_process(monkeypatch, train, *tried, "--steps=1")


def test_a_lock_that_a_run_meets_is_not_its_folders(tmp_path):
    """Catches another file's lock, of a download say, reported as another run."""
    with pytest.raises(Timeout), checkpoint.locked(tmp_path):
        raise Timeout("a download's lock")
    with checkpoint.locked(tmp_path):
        pass


def test_a_training_takes_no_kernel_for_sampling(refused, tried):
    assert "allowed here: auto" in refused(train, *tried, "--attention=flash")


def test_two_pretrainings_do_not_share_a_stage(tmp_path, refused):
    with checkpoint.locked(tmp_path / "codec-state"):
        assert "another run" in refused(pretrain, "--stage=codec", "--steps=1", f"--out={tmp_path}")


def test_resuming_where_nothing_is_names_what_is(tried, ran, tmp_path, refused):
    """Catches a typed error that becomes a new run."""
    typo = f"--out={tmp_path}/rum"
    line = refused(train, *tried, typo, "--resume")
    assert f"{tmp_path}/rum holds no saved step" in line and f"there is {tmp_path}/run" in line
    assert "holds no saved step" in refused(pretrain, typo, "--resume")
    assert not (tmp_path / "rum").exists()


def test_torchruns_restart_resumes_what_there_is(tried, tmp_path, monkeypatch, refused):
    """With --max-restarts the same words are typed again: a run goes on, or begins where none was saved. With
    the agent's store, in which the addresses of the dead are kept, it would wait for them."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refused(train, *tried, "--steps=1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for steps in (1, 2):
        in_process(monkeypatch, train, *tried, f"--steps={steps}", "--save_every=1")
    assert {p.name for p in checkpoint.states(tmp_path / "run")} == {"step_000001.pt", "step_000002.pt"}


# -- nothing is silently wrong ----------------------------------------
@pytest.mark.parametrize("word", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize("name", ["lr", "critic_lr", "beta", "guidance", "t_max", "clip", "denoise"])
def test_numbers_that_are_not_finite(refused, tried, name, word):
    assert name in refused(train, *tried, f"--{name}={word}")


def test_numbers_of_a_config_and_of_other_scripts(refused, tmp_path):
    assert "lr" in refused(pretrain, "--lr=inf", f"--out={tmp_path}")
    with pytest.raises(BadInput, match="lr=inf is not possible"):
        build("tiny", {"lr": float("inf")})


def test_weights_that_are_not_finite_end_the_run(tried, ran, tmp_path, monkeypatch):
    """Catches a NaN that is saved over a good state and shown as the student. The update is at fault here."""
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("st*")}
    real = train.update_student

    def breaks(run, step):
        stats = real(run, step)
        next(run.student.parameters()).data.flatten()[0] = float("nan")
        return stats

    monkeypatch.setattr(train, "update_student", breaks)
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *tried, "--steps=2", "--resume")
    assert "weights (student) are not finite, stopped in step 2" in stopped.value.code
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("st*")} == before


def test_weights_too_large_for_a_file(tried, tmp_path, refused):
    """With --lr=1e9 fp32 weights stay finite for a step; as fp16 they are not. Catches a black video."""
    assert "tensors are not finite" in refused(train, *tried, "--steps=1", "--lr=1e9")
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_weights_that_are_not_finite_are_not_sampled(tmp_path, nets, refused):
    path = tmp_path / "student.safetensors"
    header, tensors = checkpoint.read_header(nets / "causal.safetensors"), {}
    tensors = checkpoint.load_file(nets / "stream_r1.safetensors")
    tensors["head.head.bias"][:] = float("nan")
    checkpoint.save_file(tensors, path, header | {"kind": "student"})
    line = refused(
        sample, f"--student={path}", f"--codec={nets}/codec.safetensors", f"--out={tmp_path}/a.mp4"
    )
    assert f"1 of {len(tensors)} tensors are not finite, the first is head.head.bias" in line


def test_a_student_that_is_worse_than_its_start_says_so(tried, monkeypatch, capsys):
    scores = iter([0.5, -0.25])
    real = train.held_out
    monkeypatch.setattr(train, "held_out", lambda run: ({}, next(scores)))
    monkeypatch.setattr("run.held_out", lambda run: (real(run)[0], next(scores)))
    in_process(monkeypatch, train, *tried, "--steps=1")
    assert "(held-out score -0.250, 0.750 worse than its start)" in capsys.readouterr().out


def test_a_score_that_is_no_number_still_leaves_a_student(tried, tmp_path, monkeypatch):
    """Catches a run that ends without a student because none could be measured."""
    measure = sys.modules["run"].measure
    monkeypatch.setattr("run.measure", lambda *a: {k: v * torch.nan for k, v in measure(*a).items()})
    in_process(monkeypatch, train, *tried, "--steps=1")
    assert (tmp_path / "run" / "student.safetensors").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[0]["held_out_direction"] is None
    assert np.isnan(read_metrics(tmp_path / "run")[0]["held_out_direction"])


# -- every fault has its words, before the work ----------------------------------------
def test_words_of_sample(drawn, refused, nets, tmp_path, monkeypatch):
    assert "seed=-1 is not possible" in refused(sample, *drawn, "--seed=-1")
    (tmp_path / "step_000001.pt").write_bytes(b"PK and more that is no safetensors")
    line = refused(sample, *drawn, f"--student={tmp_path}/step_000001.pt")
    assert "a run's state" in line and f"its student is {tmp_path}/student.safetensors" in line
    monkeypatch.setattr(sample, "open_networks", lambda *a: pytest.fail("the work began"))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere")
    assert "there is no ffmpeg" in refused(sample, *drawn)


def test_an_at_sign_in_a_prompt():
    """Catches a text that is cut at its @; only digits at the very end are a frame, and what was typed is
    quoted."""
    cfg = build("tiny", {})

    def plan(*prompts):
        return [(p, f) for p, f, _ in sample.schedule(sample.Flags(prompt=list(prompts), frames=64), cfg, 0)]

    assert plan("mail me@home", "a sign, @ work@8") == [("mail me@home", 0), ("a sign, @ work", 8)]
    assert plan("route @66@0") == [("route @66", 0)]
    for prompts in (("a@8",), ("a", "b"), ("a", "b @ home"), ("a", "b@9"), ("a", "b" * 10**6)):
        with pytest.raises(BadInput) as caught:
            plan(*prompts)
        assert f"--prompt {prompts[-1][:200]!r} is not" in str(caught.value)


def test_what_a_terminal_cannot_show_ends_no_script():
    """Catches a UnicodeEncodeError after hours: pretrain.py prints an arrow, people write Chinese."""
    script = r"""
from config import BadInput, cli
def main():
    print("\u2192 \u5706")
    raise BadInput("\u5706")
cli(main)
"""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"\\u2192 \\u5706\n") and b"\\u5706" in done.stderr


def test_words_that_are_no_numbers_in_a_header(tmp_path, nets, refused):
    """Catches a traceback for weights whose header is damaged, and one for a Ctrl-C before the first step."""
    header, tensors = checkpoint.read_header(nets / "stream_r1.safetensors"), {"x": torch.ones(1)}
    made = json.loads(header["config"])
    for config in ("{", "[1]", json.dumps(made | {"fps": "eight"})):
        checkpoint.save_file(tensors, tmp_path / "x.safetensors", header | {"config": config})
        refused(sample, f"--student={tmp_path}/x.safetensors", f"--out={tmp_path}/a.gif")
    checkpoint.die_on_signal()  # what an earlier test's training caught
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == 130


def test_a_lost_student_is_written_again(tried, ran, tmp_path, monkeypatch):
    student = tmp_path / "run" / "student.safetensors"
    before = checkpoint.load_file(student)
    student.unlink()
    in_process(monkeypatch, train, *tried, "--steps=1", "--resume")
    after = checkpoint.load_file(student)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_state_without_a_part(tried, ran, tmp_path, refused):
    path = tmp_path / "run" / "step_000001.pt"
    whole = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in whole.items() if k != "ema"}, path)
    assert "step_000001.pt does not fit this run: it lacks 'ema'" in refused(
        train, *tried, "--steps=2", "--resume"
    )
    torch.save(whole | {"ema": {"other": torch.ones(1)}}, path)
    assert "does not fit this run" in refused(train, *tried, "--steps=2", "--resume")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_warm_up(tried, tmp_path, monkeypatch, capsys, number):
    """Catches a stop that waits for the whole warm-up, and one that looks like success."""
    real, calls = train.update_critic, []

    def update_critic(run, *key):
        calls.append(key)
        os.kill(os.getpid(), number)
        return real(run, *key)

    monkeypatch.setattr(train, "update_critic", update_critic)
    try:
        with pytest.raises(SystemExit) as stopped:
            in_process(monkeypatch, train, *tried, "--critic_warmup=50")
    finally:
        checkpoint.die_on_signal()
    assert stopped.value.code == 128 + number and calls == [("warm-up", 0)]
    assert "nothing is saved before the first" in capsys.readouterr().out


@pytest.mark.parametrize("pause, code", [(0.0, 0), (1.2, 130)])
def test_a_second_signal_ends_at_once(pause, code):
    """Not the one that torchrun hands on, which comes within milliseconds."""

    def main():
        stop = checkpoint.stop_on_signal()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        assert len(stop) == 2

    process = FORK.Process(target=main)
    process.start()
    process.join(20)
    assert process.exitcode == code


def test_resume_takes_the_runs_own_settings(nets, tried, tmp_path, monkeypatch, refused):
    """Catches a --resume that has to be told all flags again; what is typed wins where it may change."""
    in_process(monkeypatch, train, *tried, "--method=windowed", "--seed=3", "--threads=1", "--steps=1")
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    out = f"--out={tmp_path / 'run'}"
    in_process(monkeypatch, train, out, "--resume", "--steps=2")
    assert [p.name for p in checkpoint.states(tmp_path / "run")] == ["step_000001.pt", "step_000002.pt"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == before | {"steps": 2}
    assert before["flags"]["nets"] == str(nets)
    assert "seed=3, this run has seed=4" in refused(train, out, "--resume", "--seed=4")
