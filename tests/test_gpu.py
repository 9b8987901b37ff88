"""What only a GPU can show: `pytest -m gpu`. Skipped where there is none."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from test_model import SINKS

from engine.graphs import CudaGraphs
from engine.rng import rng_for
from model import RingCache
from rollout import directly, stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def streamed(model, cfg, texts, call, dtype=torch.float32, chunks=12):
    cache = RingCache(model, cfg, 1, dtype)
    with torch.inference_mode():
        parts = islice(stream(model, texts, cfg, [rng_for(0)], cache=cache, call=call), chunks)
        return torch.cat(list(parts), dim=1)


def prompt(cfg, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, cfg.text_length, cfg.text_width, generator=g).cuda()


@pytest.mark.parametrize("context", ["clean", "noisy", "none"])
@pytest.mark.parametrize("taper", ["uniform", "5432"])
@pytest.mark.parametrize("sink", SINKS)
def test_graphs_equal_eager(tiny, build, sink, taper, context):
    """Catches what a captured chunk keeps from its capture: a prompt, a count, noise. The window fills and
    turns over, and the prompt changes on the way."""
    cfg = replace(tiny, context=context, context_t=0.2, taper=taper, **SINKS[sink])
    model, texts = build(cfg).cuda(), {0: prompt(cfg, 0), 8: prompt(cfg, 1)}
    graphs = CudaGraphs()
    eager, replayed = streamed(model, cfg, texts, directly), streamed(model, cfg, texts, graphs)
    assert len(graphs.captured) >= 2
    assert torch.equal(eager, replayed)


def test_bf16_stays_close(tiny, build):
    model, texts = build(tiny).cuda(), {0: prompt(tiny, 0)}
    exact = streamed(model, tiny, texts, directly, chunks=3)
    rough = streamed(model.bfloat16(), tiny, texts, CudaGraphs(), torch.bfloat16, chunks=3)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.98


def test_a_chunk_asks_the_device_nothing(tiny, build):
    """Catches a synchronisation inside a chunk; the first ones, which read text and times, may have some."""
    model = build(tiny).cuda()
    cache, seen = RingCache(model, tiny, 1), []
    with torch.inference_mode():
        for i, x in enumerate(islice(stream(model, prompt(tiny, 0), tiny, [rng_for(0)], cache=cache), 8)):
            torch.cuda.set_sync_debug_mode("error" if 2 <= i < 7 else "default")
            seen.append(x)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(seen).isfinite().all()
