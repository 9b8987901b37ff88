"""Machines other than ours: Windows, whose Python lacks modules, and Macs with a GPU of another make."""

import math
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT

import bench
from config import BadInput, Config, build
from engine import processes
from engine.checkpoint import write_atomically
from engine.processes import autocast, pick_device

CORE = "train, pretrain, sample, bench, hubconf, networks, data, wan.memory"
STUDY = "study.evaluate, study.figures, study.goodhart, study.reliability"


def complaint(names: str, then: str = "") -> str:
    """Of a Python that lacks what Windows lacks and imports them; none: ""."""
    code = f"""
import signal, sys
import torch, imageio.v3, tqdm, numpy  # which know Windows
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGCHLD"):
    delattr(signal, name)
import {names}
{then}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=170)
    return (done.stderr or f"exit code {done.returncode}") if done.returncode else ""


def test_imports_without_what_windows_lacks():
    """Catches a module or signal of Unix alone that is read at import, and a script that reads the study."""
    assert not complaint(CORE, "assert not [name for name in sys.modules if name.startswith('study')]")


def test_the_study_imports_without_what_windows_lacks():
    """The same of what needs the extra `study`."""
    for name in ("filelock", "scipy", "matplotlib"):
        pytest.importorskip(name)
    assert not complaint(STUDY)


def test_a_flush_needs_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """Catches fsync of a file that is open for reading, an error on Windows."""
    flags = []
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(os, "fsync", lambda number: flags.append(fcntl.fcntl(number, fcntl.F_GETFL)))
    write_atomically(tmp_path / "x", lambda name: name.write_text("new"))
    assert flags and flags[0] & os.O_ACCMODE == os.O_RDWR


def test_memory_is_unknown_on_windows(monkeypatch):
    """Catches a speed table that needs Unix, and a number that is made up."""
    assert 10 < processes.largest_process("RUSAGE_SELF") < 1e5
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(processes.largest_process("RUSAGE_SELF"))


@pytest.mark.parametrize(
    "cuda, mps, processes, asked, picked",
    [
        (False, True, 1, "auto", "mps"),
        (True, True, 1, "auto", "cuda"),
        (False, False, 1, "auto", "cpu"),
        (False, True, 2, "auto", "cpu"),
        (False, True, 1, "cpu", "cpu"),
        (False, True, 1, "mps", "mps"),
        (False, True, 2, "mps", "allowed: auto | cpu"),
        (False, False, 1, "mps", "allowed: auto | cpu"),
        (False, True, 1, "cuda", "allowed: auto | mps | cpu"),
    ],
)
def test_devices(cuda, mps, processes, asked, picked, monkeypatch):
    """Catches a Mac's GPU that is not used, and one that two processes are to share, which gloo cannot."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = build("tiny", {"device": asked})
    if picked.startswith("allowed"):
        with pytest.raises(BadInput, match=picked.replace("|", r"\|") + "$"):
            pick_device(cfg)
    else:
        assert pick_device(cfg) == picked


def test_what_only_cuda_has_is_not_asked_of_others(monkeypatch):
    """Catches `not cpu` where CUDA is meant, in what times a stream."""
    cfg = Config(device="mps")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    assert len(bench.seconds_of(iter("x"), cfg, 1)) == 1
    with autocast(cfg):
        pass
