"""The protocol of bench.py, on a tiny network: what it prints is there and is about the right thing."""

import json
import sys

import pytest
import torch

import bench
from config import build, cli
from engine.rng import rng_for
from model import ListCache, RingCache, VideoDiT
from rollout import directly, stream


def call(monkeypatch, capsys, *argv) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench.py", "tiny", "--json", "--device=cpu", *argv])
    cli(bench.main)
    return json.loads(capsys.readouterr().out)


def test_sampling(monkeypatch, capsys):
    """Catches numbers that contradict each other or are missing."""
    found = call(monkeypatch, capsys, "--dim=64", "--layers=2", "--chunks=20")
    (row,) = found["rows"]
    assert row["mode"] == "eager" and found["attention"] == "auto"
    assert 0 < row["diffusion ms p50"] <= row["diffusion ms p99"]
    assert row["diffusion frames/s"] == pytest.approx(4000 / row["diffusion ms p50"])
    assert min(row[k] for k in ("decoded frames/s", "peak MiB", "first chunk ms")) > 0


def test_a_profile(monkeypatch, capsys):
    """Catches a table of something else than the network."""
    monkeypatch.setattr(
        sys, "argv", ["bench.py", "tiny", "--device=cpu", "--dim=64", "--layers=2", "--profile"]
    )
    cli(bench.main)
    table = capsys.readouterr().out
    assert "aten::addmm" in table and "Self CPU" in table and "mode eager | profiled ms" in table


@pytest.mark.parametrize("cache", [ListCache, lambda model, cfg: RingCache(model, cfg, 1)])
def test_a_late_chunk_costs_what_an_early_one_does(cache):
    """Catches a window that grows: operations, attention included, of chunks 7 and 60."""
    cfg = build("tiny", {"dim": 32, "heads": 2, "layers": 1, "device": "cpu"})
    model, text = VideoDiT(cfg).eval(), torch.zeros(1, cfg.text_length, cfg.text_width)
    with torch.inference_mode():
        parts = stream(model, text, cfg, [rng_for(0)], cache=cache(model, cfg))
        counts = {i: bench.count_flops(parts) if i in (1, 6, 59) else next(parts) for i in range(60)}
    assert counts[6] == counts[59] > 0
    if cache is ListCache:
        assert counts[1] < counts[6], "a count that cannot see the window fill would not see it grow"


def test_operations_are_counted(monkeypatch, capsys):
    """Catches passes that the count misses: of 9 and 5 chunks' lengths, two share the first pass."""
    small = ("--chunks=2", "--dim=64", "--layers=2")
    few = call(monkeypatch, capsys, *small)["rows"][0]
    grid = "--denoise=1,.875,.75,.625,.5,.375,.25,.125"
    many = call(monkeypatch, capsys, *small, grid)["rows"][0]
    flops = [row["TFLOP/s"] * row["diffusion ms p50"] for row in (few, many)]
    assert flops[1] / flops[0] == pytest.approx(9 / 5, rel=0.02)


def test_attention_is_counted():
    """A longer window changes nothing but what is attended to: two products per layer and pass."""
    given = {"dim": 32, "heads": 2, "layers": 1, "device": "cpu"}
    short, long = (build("tiny", given | {"window": window}) for window in (3, 4))
    with torch.inference_mode():
        streams = [bench.start_stream(VideoDiT(cfg).eval(), cfg, directly)[0] for cfg in (short, long)]
        counts = [bench.count_flops(parts) for parts in streams]
    assert counts[1] - counts[0] == 5 * 2 * 2 * 16 * 16 * 32


@pytest.mark.parametrize("context", ["clean", "aligned"])
def test_passes_are_counted(context, monkeypatch, capsys):
    """A chunk is remembered in the next one's first pass, or without one: counted on the network."""
    typed = {"dim": 32, "heads": 2, "layers": 1, "context": context, "denoise": (1.0, 0.5), "device": "cpu"}
    seen, model = [], VideoDiT(cfg := build("tiny", typed)).eval()
    argv = [f"--{k}={','.join(map(str, v)) if k == 'denoise' else v}" for k, v in typed.items()]
    said = call(monkeypatch, capsys, "--chunks=1", *argv)["passes per chunk"]
    with torch.inference_mode():
        parts, _ = bench.start_stream(model, cfg, directly)
        model.run = lambda *args, run=model.run: seen.append(1) or run(*args)
        next(parts), next(parts)
    assert len(seen) == 2 * said == 4


@pytest.mark.parametrize(
    "argv", [["--chunks=0"], ["--chunks=-1"], ["--attention=flash"], ["--attention=fast"]]
)
def test_bad_input(argv, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, capsys, *argv)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
