"""The folder that VBench reads: names, counts, going on, shares of processes, scores."""

import csv
import sys

import pytest
import torch
from runs import SMALL

from config import build, cli
from data import read_clip
from examples import vbench


@pytest.fixture
def call(monkeypatch, nets, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moving left\n\na blue ring, moving up\na red circle moving left\n")

    def call(*more, prompts=prompts, rank=0, world=1):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(world))
        own = [f"--prompts={prompts}", f"--student={nets}/stream_r1.safetensors", "--device=cpu", "--count=2"]
        monkeypatch.setattr(sys, "argv", ["vbench.py", *own, f"--out={tmp_path / 'out'}", *more])
        cli(vbench.main)
        return sorted(p.name for p in (tmp_path / "out").glob("*.mp4"))

    return call


def test_names_counts_and_going_on(call, tmp_path):
    """Two processes share the work; what is there is not made again; the seeds are the numbers'."""
    first = call(rank=1, world=2)
    assert first == ["a blue ring, moving up-1.mp4", "a red circle moving left-1.mp4"]
    one, two = (tmp_path / "out" / name for name in first)
    kept = one.read_bytes()
    one.write_bytes(b"mine"), two.unlink()
    names = [f"{p}-{i}.mp4" for p in ("a blue ring, moving up", "a red circle moving left") for i in (0, 1)]
    assert call() == names and one.read_bytes() == b"mine"
    one.write_bytes(kept)
    cfg = build("tiny", SMALL)
    clips = [read_clip(tmp_path / "out" / name, cfg) for name in names]
    assert {len(clip) for clip in clips} == {cfg.pixel_frames}
    assert not torch.equal(clips[0], clips[1])
    call("--seed=1", f"--out={tmp_path / 'other'}")
    assert (tmp_path / "other" / names[0]).read_bytes() == kept


def test_what_cannot_be_a_file(call, tmp_path, capsys):
    for text, needle in (
        ("a cat / a dog", "cannot be a file name"),
        ("x" * 240, "230 bytes"),
        ("\n", "nothing"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            call(prompts=tmp_path / "bad.txt")
        assert stopped.value.code == 2 and needle in capsys.readouterr().err


def test_scores_as_a_table(call, tmp_path, monkeypatch, capsys):
    class Reward(torch.nn.Module):
        def forward(self, video01, prompts):
            sizes.add((*video01.shape,))
            return torch.tensor([[1.0, 2.0, float("ring" in prompts[0])]])

    sizes, rates, cfg = set(), set(), build("tiny", SMALL)
    monkeypatch.setattr("wan.videoalign.load_videoalign", lambda folder, fps: rates.add(fps) or Reward())
    call("--videoalign=x")
    said = capsys.readouterr().out
    assert sizes == {(1, cfg.pixel_frames, 3, cfg.height, cfg.width)} and rates == {cfg.fps}
    with pytest.raises(SystemExit):
        call("--videoalign=x", world=2)
    assert "afterwards, with one" in capsys.readouterr().err
    assert "VQ 1.000, MQ 2.000, TA 0.500" in said
    rows = list(csv.reader(open(tmp_path / "out/scores.csv")))
    assert rows[0] == ["prompt", "video", "VQ", "MQ", "TA"] and len(rows) == 5
    assert ["a blue ring, moving up", "1", "1.0", "2.0", "1.0"] in rows
