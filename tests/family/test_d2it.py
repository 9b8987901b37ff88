"""family/d2it.py: entropy is an entropy, tokens are counted and come back, thresholds hold their share."""

from dataclasses import replace

import pytest
import torch
from runs import in_process

from codec import Codec
from config import PRESETS, ROOT, BadInput
from engine.rng import randn, rng_for
from family import d2it
from world.scene import World


def test_entropy_counts_bumps_and_not_pixels():
    flat = d2it.entropy(torch.tensor([0.1, 0.3337, 0.5, 0.9])[:, None].expand(-1, 64))
    assert flat.max() / flat.min() < 1.02 and abs(flat[0] - 2.354) < 0.01  # log(.01 · 255 · sqrt(2πe))
    halves = torch.tensor([0.2] * 32 + [0.7] * 32)
    two = d2it.entropy(torch.stack([halves, halves[torch.randperm(64)]]))
    assert torch.allclose(two, flat[0] + torch.tensor(2.0).log(), atol=0.01)
    assert flat.max() + 0.1 < d2it.entropy(torch.tensor([[0.2] * 60 + [0.7] * 4])) < two.min()


def test_tokens_are_four_a_fine_region_and_one_a_coarse_one():
    x = randn([rng_for(0), rng_for(1)], 8, 3, 4, 6)  # 2 chunks of 2 x 3 regions
    grain = torch.rand(2, 2, 2, 3, generator=rng_for(2)) < 0.5
    tokens, index = d2it.gather(x, grain, 4)
    assert tokens.shape == (4 * grain.sum() + (~grain).sum(), 4 * 3) and index.shape == (2, 2, 2, 3, 4)
    back = d2it.scatter(tokens, index, 4)
    cells, seen = (d2it.cut(z, 4, 2) for z in (x, back))  # (b k m n 4 4 3)
    assert torch.equal(seen[grain], cells[grain]), "fine: as it was"
    assert torch.allclose(seen[~grain], cells[~grain].mean(1, keepdim=True).expand(-1, 4, -1, -1), atol=1e-6)
    assert torch.equal(cells[1, 1, 0, 2, 3], x[1, 4:, :, 1, 5]), "regions lie where they are"
    alone, _ = d2it.gather(x[1:], grain[1:], 4)
    assert torch.equal(alone, tokens[-len(alone) :]), "a sample does not know its batch"
    for odd in (x[:, :7], x[..., :5], x[..., :3, :]):
        with pytest.raises(BadInput, match="multiples of 4 x 2 x 2"):
            d2it.gather(odd, grain, 4)


def test_all_fine_is_the_plain_decode_bit_for_bit():
    codec, x = Codec(PRESETS["tiny"]).eval(), randn([rng_for(0)], 8, 12, 4, 4)
    back = d2it.scatter(*d2it.gather(x, torch.ones(1, 2, 2, 2, dtype=torch.bool), 4), 4)
    assert torch.equal(codec.decode(back), codec.decode(x))


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.8, 1])
def test_a_threshold_keeps_its_share_ties_included(share):
    names, cfg = [("t", i) for i in range(8)], replace(PRESETS["tiny"], frames=8)
    video01 = World(cfg, "train").batch(names).video01
    video01[:4] = 0.25  # half of the clips: nothing to see, ties by every criterion
    x = video01[:, :, :1, ::8, ::8].expand(-1, -1, 12, -1, -1)
    for name, score in d2it.scores(video01, x, 4, names).items():
        grain = score > d2it.threshold(score, share)
        assert abs(int(grain.sum()) - share * grain.numel()) <= 1, name
        assert name == "random" or share > 0.25 or not grain[:4].any(), name


def test_scores_are_about_their_own_region():
    video01, names = torch.full((1, 8, 3, 32, 32), 0.5), [("a",)]  # detail and motion: chunk 1, region (0, 1)
    video01[:, 4::2, :, 2:9, 20:30] = 0.9
    video01[:, 5::2, :, 4:11, 20:30] = 0.9
    x = torch.nn.functional.avg_pool2d(video01[0], 8)[None]
    for name, score in d2it.scores(video01, x, 4, names).items():
        assert name == "random" or score.argmax() == 4 + 1, name
    still = d2it.scores(video01[:, 4:5].expand(-1, 8, -1, -1, -1), x, 4, names)["motion"]
    assert still.max() < 2e-4, "detail that does not move"
    one, two = World(PRESETS["tiny"], "test").batch([("a",), ("b",)]).video01.split(1)
    x = torch.zeros(2, 16, 12, 4, 4)
    both = d2it.scores(torch.cat([two, one]), x, 4, [("b",), *names])
    alone = d2it.scores(one, x[1:], 4, names)
    assert all(torch.allclose(both[name][1:], alone[name], atol=1e-5) for name in both), "nor its batch"


@pytest.mark.parametrize("words", "shares=1.5 shares= clips=1 seed=1 nets=no".split())
def test_bad_input_is_said_before_the_work(words, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(monkeypatch, d2it, f"--{words}", f"--out={tmp_path}/x.png")
    assert capsys.readouterr().err.count("\n") == 1


def run(monkeypatch, capsys, out, *words):
    in_process(monkeypatch, d2it, f"--nets={ROOT}/assets/tiny", f"--out={out}", *words)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(out) and out.is_file()
    rows = [line.split() for line in lines[1:]]
    return {(share, name): [float(x) for x in row if x[0] != "±"] for share, name, *row in rows}


def test_a_run_prints_a_table_and_its_picture(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, capsys, tmp_path / "a/x.png", "--clips=2", "--shares=1")
    assert {name for _, name in rows} == {*d2it.CRITERIA} and all(row[0] == 16 for row in rows.values())


@pytest.mark.slow
def test_the_shipped_codec_gains_by_entropy_and_with_more_tokens(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, capsys, tmp_path / "x.png", "--clips=8")
    assert rows["0.50", "entropy"][2] > 2, "dB over random"
    assert rows["0.25", "latents"][1] < rows["0.50", "latents"][1] < rows["0.75", "latents"][1]
