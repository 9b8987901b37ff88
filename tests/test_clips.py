"""A folder of real clips in place of the procedural world."""

import json
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import pretrain
from config import BadInput, build, cli
from data import ClipFolder, understand


def draw(path, frames=24, size=(48, 64), still=False):
    """A bright bar that moves to the right by two pixels a frame; written as gif, webp or mp4."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for f in range(frames):
        x = 0 if still else 2 * f % size[1]
        video[f, :, x : x + 6] = 250
    if path.suffix == ".mp4":
        iio.imwrite(path, video, plugin="FFMPEG", fps=8, macro_block_size=2)
    else:
        iio.imwrite(path, video, plugin="pillow", duration=125, loop=0)


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"file_name": f"{i}{end}", "text": f"a bar number {i}"}
        for i, end in enumerate((".gif", ".webp", ".mp4"))
    ]
    for row in rows:
        draw(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_clips_become_windows_of_the_canvas(folder):
    """All three formats; a batch is a function of its keys; a window's frames follow one another."""
    source = ClipFolder(build("tiny", {}), str(folder))
    keys = [(0, i) for i in range(6)]
    batch = source.batch(keys)
    assert batch.video01.shape == (6, 16, 3, 32, 32) and 0 <= batch.video01.min() <= batch.video01.max() <= 1
    assert torch.equal(batch.video01, source.batch(keys).video01)
    assert source.captions(keys) == batch.words and len(set(batch.prompts)) > 1
    assert (batch.video01.diff(dim=1).abs().mean((0, 2, 3, 4)) > 0.01).all(), "a frame was repeated"


def test_longer_windows_run_back_from_the_end(folder):
    source = ClipFolder(build("tiny", {}), str(folder))
    assert source.batch([(0, 1)], torch.arange(64)).video01.isfinite().all()


def test_csv_metadata(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\n0.gif,"a bar, moving"\n')
    assert ClipFolder(build("tiny", {}), str(folder)).captions([(0,)]) == [["a", "bar", "moving"]]


def test_a_broken_or_short_clip_is_left_out_by_name(folder):
    (folder / "0.gif").write_bytes(b"GIF89a nothing")
    draw(folder / "1.webp", frames=5)
    with pytest.warns(UserWarning) as warned:
        source = ClipFolder(build("tiny", {}), str(folder))
    said = " ".join(str(w.message) for w in warned)
    assert len(source.clips) == 1 and "0.gif" in said and "1.webp" in said


@pytest.mark.parametrize("content", [None, "", "not json", '{"file": "x"}'])
def test_a_folder_without_clips_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(BadInput):
        ClipFolder(build("tiny", {}), str(tmp_path))


def test_prompts_are_held_to_the_folders_words(folder):
    cfg = build("tiny", {"data": str(folder)})
    vocabulary = ClipFolder(cfg, str(folder)).vocabulary
    assert understand("a bar", cfg, vocabulary) == ["a", "bar"]
    with pytest.raises(BadInput, match="number"):
        understand("a bar nunber 2", cfg, vocabulary)


def test_all_stages_run_on_real_clips(folder, tmp_path, monkeypatch, capsys):
    """Two steps of each stage, on clips, from the command line: nets, sheets and states are written."""
    out = tmp_path / "nets"
    small = ["--dim=32", "--heads=2", "--ffn=32", "--layers=1", "--device=cpu", "--batch=4", "--steps=2"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", f"--data={folder}", f"--out={out}", *small])
    monkeypatch.setattr(pretrain, "rival_clips", lambda cfg, *a: (
        torch.rand(4, 16, 3, 32, 32), torch.rand(4, cfg.text_length, cfg.text_width)))  # fmt: skip
    cli(pretrain.main)
    for name in pretrain.NEEDED:
        assert (out / f"{name}.safetensors").exists() and (out / f"{name}.png").exists()
    assert "pair accuracy" in capsys.readouterr().out
    before = torch.load(out / "teacher-state" / "step_000002.pt", weights_only=True)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stage=teacher", "--resume"])
    cli(pretrain.main)
    after = torch.load(out / "teacher-state" / "step_000002.pt", weights_only=True)
    assert all(torch.equal(before["net"][k], after["net"][k]) for k in before["net"])
