"""How threads wait, which matters on a machine that has something else to do."""

import ast
import os
import subprocess
import sys

import pytest
from runs import ROOT


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
