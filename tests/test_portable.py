"""Machines other than ours: Windows, whose Python lacks modules, and Macs with a GPU of another make."""

import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from runs import ROOT

import bench
from config import BadInput, Config, build
from engine import processes
from engine.checkpoint import write_atomically
from engine.processes import autocast, pick_device

CODE = """
import signal, sys
import torch, imageio.v3, tqdm, numpy  # which know Windows
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGCHLD"):
    delattr(signal, name)
import train, pretrain, sample, bench, hubconf, networks, data, wan.memory
assert not [name for name in sys.modules if name.startswith('study')]
print(ascii(data.ClipFolder(bench.build("tiny", {}), sys.argv[1]).vocabulary))
import study.evaluate, study.figures, study.goodhart, study.reliability
"""


def test_imports_and_captions_where_windows_lacks_things(tmp_path):
    """Catches a module or signal of Unix alone that is read at import, a script that reads the study, and
    files that are read in the machine's encoding, which is not UTF-8 there."""
    for name in ("filelock", "scipy", "matplotlib"):
        pytest.importorskip(name)
    first, *rest = [Image.new("L", (32, 32), 9 * n) for n in range(24)]
    first.save(tmp_path / "0.gif", save_all=True, append_images=rest, duration=125)
    row = '{"file_name": "0.gif", "text": "ein grüner Balken"}'
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    other = {"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=other, capture_output=True, text=True, timeout=170)
    assert done.stdout.strip() == ascii(["balken", "ein", "grüner"]), done.stderr
    assert not done.returncode, done.stderr


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
