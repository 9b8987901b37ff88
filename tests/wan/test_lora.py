"""LoRA: what learns, what is exported, what a step and a resumed run make of it."""

import sys
from dataclasses import replace

import pytest
import torch
from runs import call
from safetensors.torch import load_file
from test_bridge import CFG, KEYS, learn, prompts, run, videoreward, wan  # noqa: F401

from config import PRESETS, BadInput
from model import VideoDiT
from train import Flags, prepare
from wan import memory
from wan.lora import adapt, merged
from wan.weights import open_wan

pytest.importorskip("peft")


def test_what_is_exported_computes_the_same(build):
    cfg = replace(CFG, lora=4)
    plain, export, adapted = build(cfg), build(cfg), adapt(build(cfg), cfg)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), merged(adapted), strict=True))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) / 10
    for p, x in zip(export.parameters(), merged(adapted), strict=True):
        p.data = x.detach()
    x, t = torch.randn(2, 6, *cfg.latent_shape), torch.full((2, 6), 0.5)
    text = torch.randn(2, cfg.text_length, cfg.text_width)
    with torch.no_grad():
        one, two, before = (net(x, t, text)[0] for net in (adapted, export, plain))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert (one - before).abs().max() > 0.01
    named = dict(adapted.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {n for n in named if ".lora_" in n}
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    assert len([n for n in named if "lora_A" in n]) == 10 * cfg.layers
    assert trained == cfg.lora * cfg.layers * (18 * cfg.dim + 2 * cfg.ffn)  # as wan/memory.py counts them


def test_the_frozen_part_may_be_in_bf16():
    cfg = replace(CFG, lora=4)
    net = VideoDiT(cfg)
    adapt(net.to(torch.bfloat16), cfg)
    kinds = {p.requires_grad: p.dtype for p in net.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_it_takes_less_memory(monkeypatch):
    monkeypatch.setattr(memory, "rehearse", lambda *given: {"updates": 0})
    cfg = replace(CFG, bf16=True, beta=0.0, space=0.0, time=0.0)
    full, small = (memory.estimate(replace(cfg, lora=rank), cfg, 1) for rank in (0, 4))
    assert all(small[k] < full[k] for k in ("their optimizers", "gradients", "student, average, critic"))


def test_only_with_wan(tmp_path):
    with pytest.raises(BadInput, match="--lora go with --wan"):
        prepare(replace(PRESETS["tiny"], lora=4), Flags(out=str(tmp_path)), 0, 1)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match=r"peft is needed: pip install 'stream-r1\[wan\]'"):
        adapt(VideoDiT(CFG), replace(CFG, lora=4))


@pytest.mark.slow
def test_steps_and_a_resumed_run(learn, wan, tmp_path):  # noqa: F811
    """Frozen parts stay as they are, matrices of the blocks move; resumed = uninterrupted, bit for bit."""
    how = ("--lora=2", "--method=self_forcing", "--lr=0.01", "--ema=0.1")
    learn(tmp_path / "whole", *how, "--steps=2")
    learn(tmp_path / "parts", *how, "--steps=1")
    learn(tmp_path / "parts", *how, "--steps=2", "--resume")
    whole, parts = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    start = open_wan(wan, CFG).half().state_dict()
    moved = {k for k in whole if not torch.equal(whole[k], start[k])}
    assert moved and all(k.startswith("blocks.") and "norm" not in k and k.endswith("weight") for k in moved)


@pytest.mark.slow
def test_two_processes_equal_one(wan, prompts, tmp_path):  # noqa: F811
    """Sharded: frozen weights, updates and the average lie in shares on two processes."""
    own = [f"--wan={wan}", f"--data={prompts}", *KEYS, "--lora=2", "--lr=0.01", "--method=self_forcing"]
    found = []
    for n in (1, 2):
        call(["train.py", "wan-1.3b", *own, "--steps=2", f"--out={tmp_path / str(n)}"], processes=n)
        found.append(load_file(tmp_path / str(n) / "student.safetensors"))
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x, atol=2e-3, rtol=0, msg=name)
