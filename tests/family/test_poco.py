"""Side information in RoPE: closed forms of one head, and who is told what."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import in_process

from engine.rng import rng_for
from family import poco
from family.poco import CFG, draw_scenes, estimate, side_turns
from model import look, rotate, turns_at

BAD = "--seeds=1 --steps=0 --seed=1"
TURNS = turns_at(torch.arange(4), 1, 1, 32)  # 6 planes of time, 5 of rows, 5 of columns


def qkv(b=1):
    return torch.randn(3, b, 4, 2, 32, generator=rng_for("qkv")).unbind()


def test_only_differences_of_side_information_turn():
    zero, unturned = torch.zeros(1, 4, 2), TURNS.clone()
    unturned[:, :, 4:6] = torch.tensor([1.0, 0.0])
    for arm in ("side", "side-pi"):
        assert torch.equal(side_turns(TURNS, zero, arm)[0], unturned)
        same = look(*qkv(), side_turns(TURNS, zero + 1, arm))
        assert torch.allclose(same, look(*qkv(), unturned), atol=1e-5)
    s = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])[None]
    one, other = (look(*qkv(), side_turns(TURNS, z, "side-pi")) for z in (s, 1 - s))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, look(*qkv(), side_turns(TURNS, 0 * s, "side-pi")), atol=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("arm", ["side", "side-pi"])
def test_a_mismatch_weakens_each_plane_by_the_cosine_of_its_phase(k, arm):
    table = {1: [-1], 2: [0, 0], 3: [0.5, -1, 0.5], 4: [0.707, -0.707, -0.707, 0.707],
             5: [0.809, -0.309, -1, -0.309, 0.809]}  # fmt: skip
    s = torch.tensor([0.0, 1.0])[None, :, None].expand(1, 2, k)
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


def test_all_tokens_of_a_frame_are_told_the_same():
    turns, s = turns_at(torch.arange(2), 1, 3, 32), torch.tensor([[[0.0, 1], [1, 0]]])
    slow = side_turns(turns, s, "side-pi")[0, :, 0, 4:6, 0]  # cos of 6 tokens, 2 planes
    assert torch.equal(slow, 1 - 2 * s[0].repeat_interleave(3, 0))


def test_only_arms_that_are_told_notice_which_reference_a_shot_shows(build):
    net, rng = build(replace(CFG, channels=14)), rng_for("x")
    x, noise = torch.randn(5, 4, 12, 4, 4, generator=rng), torch.randn(5, 2, 12, 4, 4, generator=rng)
    s, blind = draw_scenes(5, "test", len)[1], copy.deepcopy(net)
    blind.patch_embedding.weight.data[:, 12:] = 9  # of the channels that `add` alone fills
    swapped, t = torch.cat([s[:, :2], s[:, 2:].flip(-1)], dim=1), torch.full((5, 2), 0.7)
    for arm in poco.ARMS:
        one, other = (estimate(net, arm, x, told, noise, t) for told in (s, swapped))
        assert torch.equal(one, estimate(blind, arm, x, s, noise, t)) == (arm != "add")
        assert torch.equal(one, other) if arm == "none" else not torch.allclose(one, other, atol=1e-4), arm
    xt = torch.cat([torch.cat([x[:, :2], 0.3 * x[:, 2:] + 0.7 * noise], dim=1), 0 * x[:, :, :2]], dim=2)
    plain = net(xt, F.pad(t, (2, 0)), torch.zeros(5, 5, 64))[0][:, 2:, :12]  # without the seam
    assert torch.allclose(plain, estimate(net, "none", x, s, noise, t), atol=1e-5)


def test_scenes_show_what_they_say():
    x, s, colour, inside = draw_scenes(400, "test", lambda frames: frames)
    seen = (x[:, 2:] * inside).sum((-1, -2)) / inside.sum((-1, -2))
    assert torch.equal(torch.cdist(seen, colour).argmin(-1), s[:, 2:].argmax(-1))
    assert (s[:, :2] == torch.eye(2)).all()
    assert s[:, 2:].mean(0).sub(1 / 2).abs().max() < 0.1  # drawn anew: no place gives it away


@pytest.mark.parametrize("words", BAD.split())
def test_bad_input_is_one_line(words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(monkeypatch, poco, words)
    assert "allowed" in (err := capsys.readouterr().err) and err.count("\n") == 1
