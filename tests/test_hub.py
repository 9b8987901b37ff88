"""The student through torch.hub, from another folder: it yields the frames of sample.py."""

import subprocess
import sys
from itertools import islice

import pytest
import torch
from runs import ROOT

import hubconf
import sample
from config import BadInput

PROMPT = "a red circle moving left slowly"


def test_streams_from_another_folder(tmp_path):
    """Catches weights or modules that are found from the project's folder only, and a later import."""
    code = f"""
import sys, torch
student = torch.hub.load({str(ROOT)!r}, "student", source="local", trust_repo=True, device="cpu")
assert {str(ROOT)!r} not in sys.path
parts = list(student.stream({PROMPT!r}, seed=3, frames=10))
torch.save(parts, "parts.pt")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    parts = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert [x.shape for x in parts] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)]
    assert all(x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 for x in parts)
    flags = sample.Flags(prompt=[PROMPT], seed=3, frames=10)
    cfg, net, codec, read = sample.open_networks("tiny", {"device": "cpu"}, flags)
    parts_there = sample.decoded(net, codec, {0: read(PROMPT)}, cfg, seed=3)
    frames = torch.cat(list(islice(parts_there, 3)))[:10] / 255
    assert torch.equal(torch.cat(parts), frames)


@pytest.fixture
def student(nets):
    return hubconf.student(path=f"{nets}/stream_r1.safetensors", device="cpu")


def test_streams_for_ever(student):
    """Catches a stream that ends, that does not repeat, or that puts its caller under no_grad."""
    parts = []
    for video01 in islice(student.stream(PROMPT), 20):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        parts.append(video01)
    assert len(parts) == 20
    assert torch.equal(torch.cat(parts[:2]), torch.cat(list(student.stream(PROMPT, frames=8))))
    assert not torch.equal(parts[0], next(student.stream(PROMPT, seed=1)))
    torch.ones(1, requires_grad=True).mul(parts[0]).sum().backward()


def test_an_unknown_word_is_named(student):
    with pytest.raises(BadInput, match="circle"):
        next(student.stream("a red cirle"))


def test_names_what_it_needs():
    """Catches an import that torch.hub does not check for."""
    assert hubconf.dependencies == ["torch", "numpy", "einops", "filelock", "imageio", "safetensors", "tqdm"]
    with pytest.raises(BadInput, match="unknown preset"):
        hubconf.student("huge")
