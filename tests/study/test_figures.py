"""plot.py: what a picture shows is where it should be."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import PRESETS, cli
from rollout import rollout
from study import compare, weights
from study import figures as plot
from world.measure import measure, three_axes


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["plot.py", *argv])
    cli(plot.main)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_contact_sheet_has_a_row_per_clip_and_a_column_per_frame(tmp_path):
    """Catches swapped axes and channels: one red frame in a black clip is red where it belongs."""
    clips = torch.zeros(2, 3, 3, 8, 8)
    clips[1, 2, 0] = 1.0
    plot.contact_sheet(tmp_path / "s.png", {"first": clips[0], "second": clips[1]}, scale=2)
    sheet = pixels(tmp_path / "s.png")
    frame, row = 8 * 2 + 2, 8 * 2 + 14 + 2
    assert sheet.shape == (2 * row, 3 * frame, 3)
    red = (sheet == [255, 0, 0]).all(-1)
    assert red[row + 14 : row + 30, 2 * frame : 2 * frame + 16].all() and red.sum() == 256


def test_curves_rise_where_the_numbers_do(tmp_path, monkeypatch):
    """One panel per quantity that was measured at least twice; later steps are further right."""
    rows = [{"step": i, "dmd": float(i), "critic": 3.0} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(monkeypatch, "curves", f"--run={tmp_path}")
    blue = (pixels(tmp_path / "curves.png") == [30, 90, 200]).all(-1)
    ys, xs = np.nonzero(blue[:, :260])
    assert ys[xs.argmin()] > ys[xs.argmax()], "a rising quantity falls"
    assert blue[:, 260:520].any() and not blue[:, 520:].any()


def test_saliency_of_a_student(nets, tmp_path, monkeypatch):  # noqa: F811
    """Frames, three axes, the fused map, its two factors; typed fields are used and change the picture."""
    where = [f"--nets={nets}", "--prompt", "a red circle moving left"]
    call(monkeypatch, "saliency", *where, f"--out={tmp_path}")
    call(monkeypatch, "saliency", *where, f"--out={tmp_path}/other", "--fuse_temperature=0.05")
    one, two = (pixels(folder / "saliency.png") for folder in (tmp_path, tmp_path / "other"))
    row = 32 * 2 + 14 + 2
    assert one.shape == two.shape and one.shape[0] == 7 * row
    assert (one[: 4 * row] == two[: 4 * row]).all() and (one[4 * row :] != two[4 * row :]).any()


def test_weights_are_held_against_the_errors_of_the_same_cells(nets, tmp_path, monkeypatch):  # noqa: F811
    """A reward that looks at one cell of one frame, a teacher that sees nothing but zeros: all is known."""
    clips, videos, pairs = [], [], []
    scores = torch.arange(24.0).view(8, 3) / 10

    def looks_at_one_cell(reward, video01, text):
        videos.append(video01)
        seen = torch.zeros(len(video01), 3, *video01.shape[1:2], 32, 32)
        seen[:, :, 9, 0:8, 8:16] = 1.0
        return scores, seen

    monkeypatch.setattr(weights, "reward_saliency", looks_at_one_cell)
    monkeypatch.setattr(weights, "guided_x0", lambda teacher, xt, *rest: torch.zeros_like(xt))
    monkeypatch.setattr(weights, "rollout", lambda *how: clips.append(rollout(*how)) or clips[-1])
    monkeypatch.setattr(plot, "weights_sheet", lambda path, found: pairs.append(found))
    call(monkeypatch, "weights", f"--nets={nets}", f"--out={tmp_path}", "--clips=16", "--batch=8")
    assert [len(x) for x in clips] == [8, 8]
    weight, error = pairs[0]["W_intra of cells: |x - x_T|"]
    assert (weight.argmax(1) == 9 * 16 + 1).all(), "frame 9, first row, second column"
    assert torch.equal(error, torch.cat(clips).abs().mean(2).flatten(1))
    words = data.World(PRESETS["tiny"], "test").captions([("weights", 0, i) for i in range(16)])
    prompts, video01 = [data.caption(w) for w in words], torch.cat(videos)
    time, jitter = pairs[0]["W_time of four frames: jitter"]
    heavy = time > time.min() + 1e-3
    assert time.shape == jitter.shape == (16, 13) and heavy[:, 6:10].all() and heavy.sum() == 4 * 16
    for f in (0, 7, 12):
        assert torch.equal(jitter[:, f], measure(video01[:, f : f + 4], prompts)["jitter"])
    for axis, good in three_axes(measure(video01, prompts)).items():
        inter, error = pairs[0][f"w_inter of rollouts: 1 - {axis}"]
        assert torch.allclose(inter, (0.5 * scores.mean(1)).exp().expand(2, 8))
        assert torch.equal(error, 1 - good.view(2, 8))
    fields = ("--axes=VQ", "--no-time", "--group=4", "--seed=1")
    call(monkeypatch, "weights", f"--nets={nets}", f"--out={tmp_path}", "--clips=16", "--batch=8", *fields)
    assert (pairs[1]["W_time of four frames: jitter"][0] == 1).all()
    inter, _ = pairs[1]["w_inter of rollouts: 1 - text"]
    assert torch.allclose(inter, (0.5 * scores[:, 0]).exp().expand(2, 8))
    assert not torch.equal(clips[2], clips[0])


def test_errors_by_weight():
    """ρ is 1 and bars rise where errors follow weights; equal weights share their errors; no error, no ρ."""
    weight = torch.rand(64, generator=torch.Generator().manual_seed(0))
    rho, bars = weights.by_weight(weight, weight.exp())
    assert torch.allclose(rho, torch.tensor(1.0)) and (bars.diff() > 0).all()
    rho, bars = weights.by_weight(weight, -weight.exp() + 10)
    assert torch.allclose(rho, torch.tensor(-1.0)) and (bars.diff() < 0).all()
    assert torch.allclose(bars.mean(), torch.tensor(1.0)), "in units of the mean error"
    _, bars = weights.by_weight(weight.clamp(min=0.6), weight)
    assert torch.allclose(bars[:3], bars[:1].expand(3)), "more than half of them are at the floor"
    assert weights.ranks(torch.tensor([3.0, 1.0, 1.0, 2.0])).tolist() == [3.0, 0.5, 0.5, 2.0]
    for broken in (
        torch.zeros(64),
        torch.full((64,), torch.nan),
        weight.masked_fill(weight > 0.9, torch.nan),
    ):
        assert weights.by_weight(weight, broken)[0].isnan()


def test_weights_sheet(tmp_path, capsys):
    """Bars as high as the errors are; a panel without errors is empty, not a crash."""
    weight = torch.arange(64.0).expand(3, 64) + torch.tensor([[0.0], [0.1], [0.2]])
    plot.weights_sheet(tmp_path / "w.png", {"rising": (weight, weight + 1), "none": (weight, weight * 0)})
    bars = (pixels(tmp_path / "w.png") == [150, 175, 220]).all(-1)
    middles = [int(8 + g * (260 - 24) / weights.GROUPS + 5) for g in range(weights.GROUPS)]
    heights = bars.sum(0)[middles]
    assert (np.diff(heights) > 0).all() and not bars[:, 260:].any()
    assert "rho +1.00 ± 0.00, with another's weights +1.00" in capsys.readouterr().out


@pytest.mark.parametrize("argv, needle", [
    (["weights", "--clips=8"], "clips=8"), (["weights", "--batch=4"], "batch=4"),
    (["weights", "--beta=0", "--no-space", "--no-time"], "without weights"),
    (["weights", "--student=nothing"], "nothing"),
    (["tiny"], "curves | saliency"), (["curves", "--run=nothing"], "nothing/metrics.jsonl"),
    (["saliency", "--nets=nothing"], "nothing/stream_r1.safetensors"),
    (["saliency", "--prompt", "a red cirle"], "circle"), (["saliency", "--method=diagonal"], "stream_r1"),
])  # fmt: skip
def test_bad_input(monkeypatch, capsys, argv, needle):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def results(folder, gain: dict[str, float]):
    """Two seeds of a control and of each row, which is `gain` better in every measure."""
    folder.mkdir()
    for row, more in {"windowed": 0.0, **gain}.items():
        for seed in (0, 1):
            views = {view: {name: [0.5 + 0.1 * seed + more] for name, _ in compare.COLUMNS}
                     for view in ("within", "beyond")}  # fmt: skip
            found = {"row": row, "seed": seed, "views": views, "training": {"held out": {}}, "forwards": 35}
            asked = compare.asked_for(compare.ROWS[row] | {"seed": seed}, "nets", 1)
            (folder / f"{row}-{seed}.json").write_text(json.dumps(found | {"asked": asked}))


def test_forest_puts_better_rows_to_the_right(tmp_path, monkeypatch):
    """Catches differences that are not paired (seeds differ by .1, rows by .05), signs and rows mixed up."""
    results(tmp_path / "results", {"tilted": 0.05, "diagonal": -0.05})
    call(monkeypatch, "table", f"--results={tmp_path}/results", f"--out={tmp_path}")
    image = pixels(tmp_path / "table.png").astype(int)
    green = (image[..., 1] > image[..., 0] + 60).nonzero()
    red = (image[..., 0] > image[..., 1] + 60).nonzero()
    middles = 190 + 130 * np.arange(6) + 65
    assert len(green[0]) and len(red[0])
    assert (green[1] > middles[np.abs(green[1][:, None] - middles).argmin(1)]).all()
    assert (red[1] < middles[np.abs(red[1][:, None] - middles).argmin(1)]).all()
    order = [row for row in compare.ROWS if row in ("tilted", "diagonal")]
    assert (green[0].mean() < red[0].mean()) == (order[0] == "tilted")


def test_methods_sheet(nets, tmp_path, monkeypatch):  # noqa: F811
    """A row a student, half of the first clip's frames and half of the last one's."""
    for name in ("windowed-0", "tilted-0"):
        (tmp_path / name).mkdir()
        shutil.copy(nets / "stream_r1.safetensors", tmp_path / name / "student.safetensors")
    call(monkeypatch, "methods", f"--runs={tmp_path}", f"--nets={nets}", f"--out={tmp_path}")
    sheet = pixels(tmp_path / "methods.png")
    assert sheet.shape == (2 * (64 + 14 + 2), 16 * (64 + 2), 3)
    top, bottom = sheet[14 : 14 + 64], sheet[94 : 94 + 64]
    assert np.array_equal(top, bottom), "the same weights, prompt and noise"


BAD = {"table": ["--results=/nowhere"], "methods": ["--runs=/nowhere"], "curves": ["--guidance=9"]}


@pytest.mark.parametrize("what", BAD)
def test_nothing_to_draw(what, tmp_path, monkeypatch, capsys):
    """Nothing to draw, and a field that would be ignored."""
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, what, *BAD[what], f"--out={tmp_path}")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1 and BAD[what][0].partition("=")[0] in said
