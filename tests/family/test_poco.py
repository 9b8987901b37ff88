"""Side information in RoPE: closed forms of one head, and who is told what."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import PRESETS, BadInput, cli
from engine.rng import rng_for
from family import poco
from family.poco import choose, draw_scenes, estimate, side_turns
from model import look, rotate, turns_at

SHAPE = dict(frames=4, chunk=4, patch_time=1, patch=4, device="cpu")
CFG = replace(PRESETS["tiny"], **SHAPE, dim=64, ffn=64, layers=2, heads=2)
TURNS = turns_at(torch.arange(4), 1, 1, 32)  # 6 planes of time, 5 of rows, 5 of columns


def qkv(b=1):
    return torch.randn(3, b, 4, 2, 32, generator=rng_for("qkv")).unbind()


def test_equal_side_information_turns_nothing():
    zero, one = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    unturned = TURNS.clone()
    unturned[:, :, 4:6] = torch.tensor([1.0, 0.0])
    for arm in ("side", "side-pi"):
        assert torch.equal(side_turns(TURNS, zero, arm)[0], unturned)
        same = look(*qkv(), side_turns(TURNS, one, arm))
        assert torch.allclose(same, look(*qkv(), unturned), atol=1e-5)


def test_only_differences_count():
    s = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])[None]
    one, other = (look(*qkv(), side_turns(TURNS, z, "side-pi")) for z in (s, 1 - s))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, look(*qkv(), side_turns(TURNS, 0 * s, "side-pi")), atol=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("arm", ["side", "side-pi"])
def test_a_mismatch_weakens_each_plane_by_the_cosine_of_its_phase(k, arm):
    table = {1: [-1], 2: [0, 0], 3: [0.5, -1, 0.5], 4: [0.707, -0.707, -0.707, 0.707],
             5: [0.809, -0.309, -1, -0.309, 0.809]}  # fmt: skip
    s = torch.zeros(1, 2, k)
    s[0, 1] = 1
    turns = side_turns(turns_at(torch.tensor([0, 0]), 1, 1, 32), s, arm)
    q = rotate(torch.ones(1, 2, 1, 32), turns)[0, :, 0].unflatten(-1, (16, 2))
    logits = (q[0] * q[1]).sum(-1) / 2  # of each plane, as a share of |q||k|
    expected = torch.tensor(table[k] if arm == "side" else [-1] * k).float()
    assert torch.allclose(logits[6 - k : 6], expected, atol=1e-3)
    assert torch.allclose(logits[[*range(6 - k), *range(6, 16)]], torch.ones(16 - k))


def test_the_last_planes_of_time_alone_are_replaced_and_a_sample_for_itself():
    s = torch.randint(2, (3, 4, 2), generator=rng_for("s")).float()
    turns = side_turns(TURNS, s, "side")
    rest = [0, 1, 2, 3, *range(6, 16)]
    assert torch.equal(turns[:, :, :, rest], TURNS[:, :, rest].expand(3, -1, -1, -1, -1))
    changed = s.clone()
    changed[1] = 1 - changed[1]
    one, other = (look(*qkv(3), side_turns(TURNS, z, "side")) for z in (s, changed))
    assert torch.equal(one[[0, 2]], other[[0, 2]]) and not torch.allclose(one[1], other[1])


def test_only_arms_that_are_told_notice_which_reference_a_shot_shows(build):
    net, rng = build(replace(CFG, channels=14)), rng_for("x")
    x, s, noise = choose(torch.randn(5, 3, 2, 12, 4, 4, generator=rng), rng)
    swapped, t = torch.cat([s[:, :2], s[:, 2:].flip(-1)], dim=1), torch.full((5, 2), 0.7)
    for arm in poco.ARMS:
        one, other = (estimate(net, arm, x, told, noise, t, CFG) for told in (s, swapped))
        assert torch.equal(one, other) if arm == "none" else not torch.allclose(one, other, atol=1e-4), arm
    xt = torch.cat([x[:, :2], 0.3 * x[:, 2:] + 0.7 * noise], dim=1)
    given = torch.cat([xt, 0 * xt[:, :, :2]], dim=2), F.pad(t, (2, 0)), torch.zeros(5, 5, 64)
    plain = net(*given)[0][:, 2:, :12]  # the seam itself changes nothing
    assert torch.allclose(plain, estimate(net, "none", x, s, noise, t, CFG), atol=1e-5)


def test_scenes_show_what_they_say():
    frames, colour, cover = draw_scenes(40, poco.Flags(references=3), "test")
    x, s, _ = choose(frames, rng_for("choice"))
    inside = cover > 0.99
    seen = (x[:, 3:] * inside).sum((-1, -2)) / inside.sum((-1, -2))
    assert torch.equal(torch.cdist(seen, colour).argmin(-1), s[:, 3:].argmax(-1))
    assert torch.equal(s[:, :3], torch.eye(3).expand(40, 3, 3))
    assert s[:, 3:].mean((0, 1)).sub(1 / 3).abs().max() < 0.15  # drawn anew: no place gives it away


@pytest.mark.parametrize("words", ["--references=7", "--references=1", "--arms=sides", "--arms=", "--seeds=1",
                                   "--steps=0", "--beta=1"])  # fmt: skip
def test_bad_input_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["poco.py", words])
    with pytest.raises(SystemExit, match="2"):
        cli(poco.main)
    assert "allowed" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_side_information_is_checked():
    for s in (torch.full((1, 4, 2), 0.5), torch.zeros(1, 4, 7)):
        with pytest.raises(BadInput, match="allowed: 0 and 1, for up to 6"):
            side_turns(TURNS, s, "side")
