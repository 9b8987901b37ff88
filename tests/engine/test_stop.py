"""Ctrl-C under torchrun, which sends it on to its workers and then prints a traceback of its own."""

import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, command


@pytest.mark.slow
def test_a_stop_under_torchrun_says_whose_the_traceback_is(nets, tmp_path):
    """Catches a run that is not saved, and thirty lines that hide it."""
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    words = [*head, *command(nets, tmp_path, "--steps=10000")]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode and "; --resume goes on from there; the traceback below is torchrun's" in out
    assert len(list(tmp_path.glob("step_*.pt"))) == 1
