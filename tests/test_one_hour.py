"""The notebook: its cells are those of docs/one_hour.py, short, and they run."""

import json
import os
import re
import subprocess
import sys

import pytest

from config import ROOT

SCRIPT, NOTEBOOK = ROOT / "docs/one_hour.py", ROOT / "docs/one_hour.ipynb"


def cells() -> list[tuple[str, str]]:
    """(kind, text) of each cell of the script."""
    _, *parts = re.split(r"^# %%(.*)\n", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    kinds = ["markdown" if "markdown" in mark else "code" for mark in parts[::2]]
    texts = [part.strip("\n") for part in parts[1::2]]
    bare = [
        re.sub("^# ?", "", t, flags=re.M) if k == "markdown" else t for k, t in zip(kinds, texts, strict=True)
    ]
    return list(zip(kinds, bare, strict=True))


def test_the_notebook_is_the_script():
    """Catches a cell that was changed in one of the two; jupytext --to ipynb makes one of the other."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"]).strip("\n")) for cell in found] == cells()


def test_cells_are_short():
    for kind, text in cells():
        assert kind == "markdown" or len([line for line in text.splitlines() if line.strip()]) <= 16, text


@pytest.mark.slow
def test_the_notebook_runs():
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT / "docs", env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
