"""How threads wait, which matters on a machine that has something else to do."""

import ast
import json
import math
import os
import subprocess
import sys

import pytest
from runs import ROOT

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux knows


@pytest.mark.parametrize("name", ["train", "pretrain", "sample", "bench", "study/figures"])
def test_a_script_says_it_before_torch_loads(name):
    """Catches an import that is sorted above it: OpenMP reads the environment once."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "from engine import openmp"


@pytest.mark.parametrize("given, found", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_a_persons_own_setting_wins(given, found):
    """And nothing that it imports loads torch before."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    code = "import os, sys; import engine.openmp; print(os.getenv('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [found, "False"], done.stderr


@pytest.fixture
def busy():
    """Two cores for everything that the test starts, and a process that never rests on each of them."""
    os.sched_setaffinity(0, CORES[:2])
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for other in others:
        other.kill()
        other.wait()
    os.sched_setaffinity(0, CORES)


def milliseconds(**more) -> float:
    """Of a chunk, by two threads; inf if it takes too long to tell."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | more
    words = [sys.executable, "bench.py", "tiny", "--chunks=3", "--threads=2", "--device=cpu", "--json"]
    try:
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return math.inf  # spinning threads may well not come to an end
    return json.loads(done.stdout)["rows"][0]["diffusion ms p50"]


@pytest.mark.slow
@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores, and Linux to choose them")
def test_waiting_does_not_spin_beside_busy_processes(busy):
    """Catches the default of OpenMP, under which a chunk takes several times as long."""
    assert milliseconds() < milliseconds(OMP_WAIT_POLICY="ACTIVE") / 2
