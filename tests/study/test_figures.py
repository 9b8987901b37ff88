"""study/figures.py: what a picture shows is where it should be."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from config import BadInput, cli
from study import figures, tables


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["figures.py", *argv])
    cli(figures.main)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_contact_sheet_has_a_row_per_clip_and_a_column_per_frame(tmp_path):
    """Catches swapped axes and channels: one red frame in a black clip is red where it belongs."""
    clips = torch.zeros(2, 3, 3, 8, 8)
    clips[1, 2, 0] = 1.0
    figures.contact_sheet(tmp_path / "s.png", [("same", clips[0]), ("same", clips[1])], scale=2)
    sheet = pixels(tmp_path / "s.png")
    frame, row = 8 * 2 + 2, 8 * 2 + 20 + 2
    assert sheet.shape == (2 * row, 3 * frame, 3)
    red = (sheet == [255, 0, 0]).all(-1)
    assert red[row + 20 : row + 36, 2 * frame : 2 * frame + 16].all() and red.sum() == 256


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Figures as they are when they are written, which they are all the same."""
    seen, finish = [], figures.finish
    monkeypatch.setattr(figures, "finish", lambda figure, path: seen.append(figure) or finish(figure, path))
    return seen


def test_curves(tmp_path, monkeypatch, drawn):
    """A panel per quantity that was measured at least twice, held-out ones first; steps to the right; noise
    is smoothed, and nothing moves sideways."""
    rows = [{"step": i, "dmd": float(i), "critic": float(i % 2)} for i in range(1, 41)]
    rows[19]["held_out_shape"], rows[39]["held_out_shape"], rows[0]["VQ"] = 0.5, 1.0, 3.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(monkeypatch, "curves", f"--run={tmp_path}")
    panels = [panel for panel in drawn[0].axes if panel.get_title()]
    assert [p.get_title() for p in panels] == ["held out: right shape", "DMD gradient", "critic's loss"]
    held_out, dmd, critic = (panel.get_lines()[-1].get_xydata() for panel in panels)
    assert held_out.tolist() == [[20, 0.5], [40, 1.0]]
    assert np.array_equal(dmd[10:-10, 0], dmd[10:-10, 1]) and (np.diff(dmd[:, 1]) > 0).all()
    assert np.abs(critic[:, 1] - 0.5).max() < 0.2, "noise stays"
    assert panels[-1].get_xlabel().startswith("step") and all(panel.get_ylabel() for panel in panels)
    assert pixels(tmp_path / "curves.png").shape[1] == 780


def test_saliency_of_a_student(nets, tmp_path, monkeypatch):  # noqa: F811
    """Frames, three axes, the fused map, its two factors; typed fields are used and change the picture."""
    where = [f"--nets={nets}", "--prompt", "a red circle moving left"]
    call(monkeypatch, "saliency", *where, f"--out={tmp_path}")
    call(monkeypatch, "saliency", *where, f"--out={tmp_path}/other", "--fuse_temperature=0.05")
    one, two = (pixels(folder / "saliency.png") for folder in (tmp_path, tmp_path / "other"))
    row = 32 * 2 + 20 + 2
    assert one.shape == two.shape == (7 * row, 8 * (32 * 2 + 2), 3)
    assert (one[: 4 * row] == two[: 4 * row]).all() and (one[4 * row :] != two[4 * row :]).any()


@pytest.mark.parametrize("argv, needle", [
    (["tiny"], "curves | saliency"), (["curves", "--guidance=9"], "guidance"),
    (["curves", "--run=nothing"], "nothing/metrics.jsonl"),
    (["saliency", "--nets=nothing"], "nothing/stream_r1.safetensors"),
    (["saliency", "--prompt", "a red cirle"], "circle"), (["saliency", "--method=diagonal"], "stream_r1"),
])  # fmt: skip
def test_bad_input(monkeypatch, capsys, argv, needle):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_a_missing_package_is_named(monkeypatch):
    def nothing(name):
        raise ImportError(name)

    monkeypatch.setattr(tables.importlib, "import_module", nothing)
    with pytest.raises(BadInput, match="pip install matplotlib, or"):
        figures.canvas(1, 1, 1.0)
