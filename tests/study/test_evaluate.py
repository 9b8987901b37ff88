"""evaluate.py as people run it, on the random nets of test_train. What it measures is tested in test_data."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import cli
from engine.checkpoint import read_header
from study import evaluate


def call(monkeypatch, nets, out, *argv):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--nets={nets}", f"--out={out}", *argv])
    cli(evaluate.main)


def test_table_and_stamp(nets, tmp_path, monkeypatch):  # noqa: F811
    """Every row is measured and written; --stamp adds the scores to the headers and changes no weight."""
    own = shutil.copytree(nets, tmp_path / "nets")
    call(monkeypatch, own, tmp_path / "e.json", "--clips=2", "--noises=1", "--stamp")
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert len(rows) == 5 and all({"colour", "jitter", "VQ"} <= set(row) for row in rows.values())
    header = read_header(own / "stream_r1.safetensors")
    assert {"measured, within", "measured, beyond"} <= set(header) and header["kind"] == "student"
    assert "measured, real" in read_header(own / "codec.safetensors")
    for name in ("codec", "teacher", "stream_r1"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (nets, own))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_nets_without_a_student(nets, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Catches what pretrain.py has just written being refused, and a missing student not being named."""
    own = shutil.copytree(nets, tmp_path / "nets", ignore=shutil.ignore_patterns("stream_r1*"))
    monkeypatch.setattr(evaluate, "score", lambda *a: {"colour": torch.ones(1, 2)})
    call(monkeypatch, own, tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert list(rows) == ["codec, real", "teacher, teacher", "causal, within"]
    assert f"no {own}/stream_r1.safetensors" in capsys.readouterr().out


def test_typed_fields_reach_the_sampler(nets, tmp_path, monkeypatch):  # noqa: F811
    """Catches flags that are read and dropped."""
    seen = []
    monkeypatch.setattr(evaluate, "score", lambda *a: seen.append(a[3]) or {"colour": torch.ones(1, 2)})
    call(monkeypatch, nets, tmp_path / "e.json", "--guidance=4.5", "--denoise=1.0,0.5")
    assert all((c.guidance, c.denoise, c.dim) == (4.5, (1.0, 0.5), 32) for c in seen) and len(seen) == 5


@pytest.mark.parametrize("argv, needle", [
    (["--out=/proc/none/e.json"], "cannot be written"), (["--student=no.safetensors"], "no.safetensors"),
    (["--clips=1"], "from 2"), (["--stamp", "--guidance=4"], "--guidance"), (["--window=1"], "window"),
])  # fmt: skip
def test_bad_input_fails_before_the_work(nets, tmp_path, monkeypatch, capsys, argv, needle):  # noqa: F811
    monkeypatch.setattr(evaluate, "score", lambda *a: pytest.fail("it was measured first"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, nets, tmp_path / "e.json", *argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_nets_of_real_clips_are_refused(nets, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Catches scores for captions that the nets have never seen."""
    path, header = tmp_path / "student.safetensors", read_header(nets / "stream_r1.safetensors")
    config = json.loads(header["config"]) | {"data": "clips"}
    save_file(load_file(nets / "stream_r1.safetensors"), path, header | {"config": json.dumps(config)})
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, nets, tmp_path / "e.json", f"--student={path}")
    assert stopped.value.code == 2 and "clips" in capsys.readouterr().err
