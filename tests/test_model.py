"""The transformer and its caches: what must be equal is computed in two ways, what must not matter is
perturbed."""

import math
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import block_causal
from einops import rearrange
from torch import nn

import rollout as rollout_module
from config import PRESETS
from engine.rng import rng_for
from model import (
    ListCache,
    RingCache,
    VideoDiT,
    add_noise,
    rotate,
    shift_time,
    teacher_forcing,
    to_x0,
    turns_at,
)
from rollout import Given, rollout, stream
from wan.memory import like_cuda

SINKS = {
    "none": dict(sink_mode="none", sink=0, window=3),
    "static": dict(sink_mode="static", sink=1, window=3),
    "static2": dict(sink_mode="static", sink=2, window=5),
    "ema": dict(sink_mode="ema", sink=1, window=4, sink_decay=0.7),
}
WHOLE_CLIP = dict(sink_mode="none", sink=0, window=0)
close = dict(atol=1e-5, rtol=1e-5)


def inputs(cfg, frames, batch=2, seed=0):
    """x_t (b f c h w), a different time for every token along time (b f), text (b l e)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, *cfg.latent_shape, generator=g)
    t = 0.2 + 0.8 * torch.rand(batch, frames // cfg.patch_time, generator=g)
    text = torch.randn(batch, cfg.text_length, cfg.text_width, generator=g)
    return x, t.repeat_interleave(cfg.patch_time, 1), text


@torch.no_grad()
def run_cached(model, cfg, cache, x, t, text):
    """The same frames chunk by chunk, each committing the keys and values of its own pass."""
    out = []
    for xk, tk in zip(x.split(cfg.chunk, 1), t.split(cfg.chunk, 1), strict=True):
        v, kv = model(xk, tk, text, cache)
        cache.commit(kv)
        out.append(v)
    return torch.cat(out, 1)


@torch.no_grad()
def run_masked(model, cfg, x, t, text):
    return model(x, t, text, mask=block_causal(x.shape[1], cfg.chunk, cfg.window, cfg.sink))[0]


def caches(model, cfg, batch=2):
    return ListCache(model, cfg), RingCache(model, cfg, batch)


def random_kv(cfg, batch, seed, dtype=torch.float32):
    g, tokens = torch.Generator().manual_seed(seed), cfg.chunk_tokens * math.prod(cfg.grid)
    shape = (batch, tokens, cfg.heads, cfg.dim // cfg.heads)
    return [tuple(torch.randn(shape, generator=g).to(dtype) for _ in "kv") for _ in range(cfg.layers)]


# -- flow, time, patches -------------------------------------------------------------------------------------


def test_noise_and_velocity_undo_each_other():
    """Would catch a swapped sign or a swapped end of time, and one time applied to all frames."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 3, 5, 4, 6, generator=g)
    t = torch.rand(2, 3, generator=g)
    torch.testing.assert_close(to_x0(noise - x, add_noise(x, noise, t), t), x, **close)
    assert torch.equal(add_noise(x, noise, torch.zeros(2, 3)), x)
    assert torch.equal(add_noise(x, noise, torch.ones(2, 3)), noise)


def test_shift_warps_time_towards_noise():
    """Would catch the inverse warp and a different formula: the numbers are those of the released
    schedules."""
    u = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    assert torch.equal(shift_time(u, 1.0), u)
    torch.testing.assert_close(shift_time(u, 5.0), torch.tensor([1, 0.9375, 5 / 6, 0.625, 0]))


@pytest.mark.parametrize("patch_time", [1, 2])
def test_patches_go_back_to_where_they_came_from(tiny, patch_time):
    """Would catch rows swapped with columns or patches put back elsewhere. Without blocks, with an embedding
    that copies and a head that puts a patch's numbers in the head's order, the network must be the
    identity."""
    cfg = replace(tiny, patch_time=patch_time, predict="v", dim=tiny.channels * patch_time * 4)
    model = VideoDiT(cfg)
    model.blocks = nn.ModuleList()
    with torch.no_grad():
        model.patch_embedding.weight.copy_(torch.eye(cfg.dim).view_as(model.patch_embedding.weight))
        model.patch_embedding.bias.zero_()
    model.head.forward = lambda x, e: rearrange(x, "b n (c rpq) -> b n (rpq c)", c=cfg.channels)
    x, t, text = inputs(cfg, 4)
    assert torch.equal(model(x, t, text)[0], x)


def test_predicting_x_is_the_same_network_read_differently(tiny, build):
    """Would catch a velocity of an x-predicting net that does not lead back to its x, or is infinite at time
    0."""
    outputs = {}
    for predict in ("x", "v"):
        cfg = replace(tiny, predict=predict)
        xt, t, text = inputs(cfg, 2)
        with torch.no_grad():
            outputs[predict] = build(cfg)(xt, t, text)[0]
            assert build(cfg)(xt, 0 * t, text)[0].isfinite().all()
    torch.testing.assert_close(to_x0(outputs["x"], xt, t), outputs["v"], **close)


def test_wan_preset_has_the_parameters_of_wan():
    """Would catch a renamed, missing or extra tensor: released 1.3B weights would no longer load."""
    with torch.device("meta"):
        tensors = VideoDiT(PRESETS["wan-1.3b"]).state_dict()
    assert len(tensors) == 825
    assert sum(x.numel() for x in tensors.values()) == 1_418_996_800
    for name, shape in {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "text_embedding.2.weight": (1536, 1536),
        "time_embedding.0.weight": (1536, 256),
        "time_projection.1.weight": (9216, 1536),
        "blocks.0.modulation": (1, 6, 1536),
        "blocks.0.self_attn.q.weight": (1536, 1536),
        "blocks.29.self_attn.norm_k.weight": (1536,),
        "blocks.0.cross_attn.o.bias": (1536,),
        "blocks.0.norm3.weight": (1536,),
        "blocks.0.ffn.0.weight": (8960, 1536),
        "blocks.0.ffn.2.bias": (1536,),
        "head.modulation": (1, 2, 1536),
        "head.head.weight": (64, 1536),
    }.items():
        assert tuple(tensors[name].shape) == shape, name


# -- cached = masked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_time", [1, 2])
@pytest.mark.parametrize("memory", [WHOLE_CLIP, SINKS["none"]], ids=["whole", "window"])
def test_chunk_by_chunk_equals_one_masked_pass(tiny, build, memory, patch_time):
    """Would catch a cache that is off by a chunk, rotates by the wrong position or evicts at the wrong time.
    In a window the cache counts positions from its oldest chunk and the masked pass from the start: only
    differences may matter."""
    cfg = replace(tiny, chunk=2 * patch_time, frames=12 * patch_time, patch_time=patch_time, **memory)
    model = build(cfg)
    x, t, text = inputs(cfg, cfg.frames)
    masked = run_masked(model, cfg, x, t, text)
    for cache in caches(model, cfg):
        torch.testing.assert_close(run_cached(model, cfg, cache, x, t, text), masked, **close)
    with torch.no_grad():
        unmasked, kept = model(x, t, text)
    assert (unmasked - masked).abs().max() > 0.1, "the mask does nothing"
    assert kept == []  # keys and values without a cache are memory that nobody asked for


@pytest.mark.parametrize("patch_time", [1, 2])
def test_teacher_forcing_equals_clean_chunks_in_the_cache(tiny, build, patch_time):
    """Would catch a noisy chunk that sees itself in the clean half (it would only have to copy) or positions
    that run on through the second half: the causal start would then train for a different job than the
    student's."""
    cfg = replace(tiny, chunk=2 * patch_time, frames=8 * patch_time, patch_time=patch_time, **WHOLE_CLIP)
    model = build(cfg)
    x, _, text = inputs(cfg, cfg.frames)
    noisy, t, _ = inputs(cfg, cfg.frames, seed=1)
    clean_t = torch.zeros_like(t)
    mask, positions = teacher_forcing(cfg.frames, cfg.chunk)
    both = torch.cat([x, noisy], 1), torch.cat([clean_t, t], 1)
    with torch.no_grad():
        forced = model(*both, text, mask=mask, positions=positions)[0][:, cfg.frames :]
        cache, out = ListCache(model, cfg), []
        for clean, xk, tk in zip(*(z.split(cfg.chunk, 1) for z in (x, noisy, t)), strict=True):
            out.append(model(xk, tk, text, cache)[0])
            cache.commit(model(clean, torch.zeros_like(tk), text, cache)[1])
    torch.testing.assert_close(forced, torch.cat(out, 1), **close)


# -- who sees whom -------------------------------------------------------------------------------------------


WAYS = [(way, sink) for way in ("masked", "list", "ring") for sink in ("whole", *SINKS)]
WAYS.remove(("masked", "ema"))  # an average of chunks is not a mask


@pytest.mark.parametrize("way, sink", WAYS)
def test_who_sees_whom(tiny, build, way, sink):
    """Would catch any leak from the future, a causal order inside a chunk, a window that is a chunk too long
    or short and a sink that gets lost. In one layer, every frame is perturbed in turn; which outputs move is
    compared with what the definition of chunk, window and sink says."""
    cfg = replace(tiny, layers=1, frames=16, **SINKS.get(sink, WHOLE_CLIP))
    model, frames = build(cfg), 16
    x, t, text = inputs(cfg, frames, batch=1)
    x = x.repeat(frames + 1, 1, 1, 1, 1)
    x[range(frames), range(frames)] += 1  # the last row stays as it was
    args = x, t.expand(frames + 1, -1), text.expand(frames + 1, -1, -1)
    if way == "masked":
        out = run_masked(model, cfg, *args)
    else:
        cache = ListCache(model, cfg) if way == "list" else RingCache(model, cfg, frames + 1)
        out = run_cached(model, cfg, cache, *args)
    moved = (out[:-1] - out[-1]).abs().amax((2, 3, 4)) > 1e-4  # (perturbed, looked at)
    expected = torch.zeros(frames, frames, dtype=torch.bool)
    for source in range(frames):
        for target in range(frames):
            ago = target // cfg.chunk - source // cfg.chunk
            recent = ago < (cfg.window or 99) - cfg.sink
            kept = cfg.sink_mode == "ema" or source // cfg.chunk < cfg.sink
            expected[source, target] = ago >= 0 and (recent or kept)
    assert torch.equal(moved, expected)


def test_deep_masked_pass_never_sees_the_future(tiny, model):
    """Would catch a block that does not get the mask: one layer cannot show what leaks through the second."""
    x, t, text = inputs(tiny, 8)
    before = run_masked(model, tiny, x, t, text)
    x[:, 4:6] += 1
    moved = (run_masked(model, tiny, x, t, text) - before).abs().amax((0, 2, 3, 4)) > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("kind", [ListCache, RingCache])
def test_rollout_goes_only_forward(tiny, model, kind, monkeypatch):
    """Would catch a stream that forgets to commit (nothing later would change) or that hands out a tensor
    which later chunks overwrite (something earlier would)."""

    def chunks(other=None):
        cache = ListCache(model, tiny) if kind is ListCache else RingCache(model, tiny, 2)

        def changed(*key):
            return rng_for(*key, "other" * (key[-1] == other))

        monkeypatch.setattr(rollout_module, "rng_for", changed)
        return torch.stack(list(islice(stream(model, text, tiny, [rng_for(0), rng_for(1)], cache=cache), 7)))

    text = inputs(tiny, 2)[2]
    moved = (chunks() - chunks(other=3)).abs().amax((1, 2, 3, 4, 5))
    assert (moved[:3] < 1e-5).all() and (moved[3:] > 1e-4).all()


# -- the caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", SINKS)
def test_ring_equals_list(tiny, model, sink):
    """Would catch a ring that overwrites the wrong slot, misplaces its slots in time after wrapping around,
    shows empty or stale slots, or lets samples mix. Afterwards reset() must leave nothing of the first stream
    behind."""
    cfg = replace(tiny, **SINKS[sink])
    slow, fast = caches(model, cfg)
    for seed in range(2):
        x, t, text = inputs(cfg, 24 * cfg.chunk, seed=seed)
        a, b = run_cached(model, cfg, slow, x, t, text), run_cached(model, cfg, fast, x, t, text)
        torch.testing.assert_close(a, b, **close)
        alone = run_cached(model, cfg, RingCache(model, cfg, 1), x[1:], t[1:], text[1:])
        torch.testing.assert_close(alone, b[1:], **close)
        slow.reset()
        fast.reset()


@pytest.mark.parametrize("sink", SINKS)
def test_stream_is_the_same_from_either_cache(tiny, model, sink):
    """Would catch a ring that is right for the pass that commits and wrong for the several passes before
    it."""
    cfg = replace(tiny, **SINKS[sink])
    text = inputs(cfg, 2)[2]
    with torch.no_grad():
        a, b = (
            torch.cat(list(islice(stream(model, text, cfg, [rng_for(0), rng_for(1)], cache=cache), 24)), 1)
            for cache in caches(model, cfg)
        )
    torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ListCache, RingCache])
def test_ema_sink_equals_its_definition(tiny, model, kind, dtype):
    """Would catch a decay on the wrong side, an average that takes in the newest chunk instead of the evicted
    one, one of rotated keys, and one kept in bf16, which at 0.99 a chunk hardly moves."""
    cfg = replace(tiny, sink_mode="ema", sink=1, window=4, sink_decay=0.99)
    cache = ListCache(model, cfg) if kind is ListCache else RingCache(model, cfg, 2, dtype)
    given = [random_kv(cfg, 2, seed, dtype) for seed in range(40)]
    for kv in given:
        cache.commit(kv)
    evicted = given[1 : 40 - (cfg.cached_chunks - cfg.sink)]
    assert len(evicted) >= 6
    turns = turns_at(torch.arange(cfg.chunk_tokens), *cfg.grid, cfg.dim // cfg.heads)
    for layer in range(cfg.layers):
        sink = [x.double() for x in given[0][layer]]
        for kv in evicted:
            sink = [0.99 * old + 0.01 * new.double() for old, new in zip(sink, kv[layer], strict=True)]
        keys, values = (z[layer].flatten(1, -3) for z in (cache.keys, cache.values))
        rounding = close if dtype == torch.float32 else dict(atol=1e-2, rtol=1e-2)
        first = slice(0, given[0][0][0].shape[1])
        torch.testing.assert_close(keys[:, first].double(), rotate(sink[0], turns).double(), **rounding)
        torch.testing.assert_close(values[:, first].double(), sink[1], **rounding)
        kept = cache.chunks[0][layer] if kind is ListCache else cache.sink[layer]
        for mine, exact in zip(kept, sink, strict=True):
            torch.testing.assert_close(mine.double(), exact, **close)


# -- positions -----------------------------------------------------------------------------------------------


def test_angles_are_exact():
    """Wan's split 44 + 42 + 42 against float64: catches frequencies in bf16, where position 80 is wrong by a
    third of a radian."""
    turns = turns_at(torch.tensor([0, 7, 80]), 2, 3, 128)
    place = torch.cartesian_prod(torch.tensor([0, 7, 80]), torch.arange(2), torch.arange(3)).double()
    freqs = [10000.0 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) for n in (44, 42, 42)]
    angle = torch.cat([place[:, i : i + 1] * f for i, f in enumerate(freqs)], dim=1)[:, None]
    exact = torch.stack([angle.cos(), angle.sin()], -1)
    torch.testing.assert_close(turns.to(exact), exact, atol=2e-5, rtol=0)


def test_a_compiler_rotates_as_torch_does(monkeypatch):
    """Real numbers for a compiler, complex ones without: catches a sign, or pairs that are put back apart."""
    x = torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(0))
    turns = turns_at(torch.arange(2), 2, 3, 16)
    plain = rotate(x, turns)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turns), plain, atol=1e-6, rtol=0)
    assert (plain - x).abs().max() > 0.1


def test_only_differences_of_positions_matter(tiny, model):
    """Would catch an absolute position anywhere, and a rotation of queries that is not the keys'."""
    x, t, text = inputs(tiny, 8)
    mask = block_causal(8, tiny.chunk)
    with torch.no_grad():
        here, there, stretched = (
            model(x, t, text, mask=mask, positions=p)[0]
            for p in (torch.arange(8), 300 + torch.arange(8), 2 * torch.arange(8))
        )
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert (here - stretched).abs().max() > 1e-2, "positions do nothing"


def test_text_has_no_positions(tiny, model):
    """Would catch rotated text keys: the words' places are already in their vectors."""
    x, t, text = inputs(tiny, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, text)[0], model(x, t, text.flip(1))[0], **close)
        assert (model(x, t, text)[0] - model(x, t, text.flip(0))[0]).abs().max() > 1e-2, "text does nothing"


def test_keys_are_committed_before_rotation(tiny, model):
    """Would catch keys that carry the position of the moment, which is wrong as soon as the window moves
    on."""
    x, t, text = inputs(tiny, 2)
    for cache in caches(model, tiny):
        with torch.no_grad():
            first = model(x, t, text, cache)[1]
            for seed in range(3):
                cache.commit(random_kv(tiny, 2, seed))
            later = model(x, t, text, cache)[1]
        for a, b in zip(first[0], later[0], strict=True):  # the first layer: deeper ones have seen the past
            torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("kind", [ListCache, RingCache])
def test_long_stream_equals_a_fresh_one(tiny, build, kind):
    """Would catch positions that grow with the stream: at chunk 30 it would no longer be what it was at chunk
    3."""
    cfg = replace(tiny, layers=1, **SINKS["none"])
    model = build(cfg)
    x, t, text = inputs(cfg, 30 * cfg.chunk)
    long, short = (ListCache(model, cfg) if kind is ListCache else RingCache(model, cfg, 2) for _ in range(2))
    seen = cfg.window * cfg.chunk
    a = run_cached(model, cfg, long, x, t, text)[:, -cfg.chunk :]
    b = run_cached(model, cfg, short, x[:, -seen:], t[:, -seen:], text)[:, -cfg.chunk :]
    torch.testing.assert_close(a, b, **close)


# -- purity and gradients ------------------------------------------------------------------------------------


def tensors_in(thing):
    """All tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    return [x for part in parts for x in tensors_in(part)]


def remembered(cache):
    buffers = [z for z in (*cache.keys, *cache.values) if z.dim() == 5]
    return deepcopy(
        [x[:, : cache.filled] if any(x is z for z in buffers) else x for x in tensors_in(vars(cache))]
    )


def test_forward_is_pure(tiny, model):
    """Would catch a forward pass that writes to the cache: every denoising step would then be remembered. The
    place of the chunk in hand in a RingCache's buffers is nothing that is remembered."""
    x, t, text = inputs(tiny, 2)
    for cache in caches(model, tiny):
        for seed in range(4):
            cache.commit(random_kv(tiny, 2, seed))
        before = remembered(cache)
        with torch.no_grad():
            first, second = model(x, t, text, cache), model(x, t, text, cache)
        torch.testing.assert_close(tensors_in(first), tensors_in(second), **close)
        after = remembered(cache)
        assert len(before) == len(after) and all(map(torch.equal, before, after))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a, b):
    """The largest relative difference of a parameter's gradient. (To the bit, a CPU need not repeat
    itself.)"""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


@pytest.mark.parametrize("sink", ["none", "ema"])
def test_checkpointing_changes_nothing(tiny, model, sink):
    """Would catch a cache that is overwritten in place: the backward pass recomputes a block after the
    rollout is over, when the window has moved on, and would quietly get the gradient of another context."""
    cfg = replace(tiny, **SINKS[sink])
    text, calls = inputs(cfg, 2)[2], [0]
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    results = []
    for model.checkpointing in (False, True):
        calls[0] = 0
        x = rollout(model, text, cfg, [rng_for(0), rng_for(1)], chunks=7, exit=1, grad=True)
        results.append((x.detach(), gradients(model, x.square().mean()), calls[0]))
    (x1, plain, few), (x2, recomputed, more) = results
    assert more == few + cfg.chunks, "nothing was recomputed"
    torch.testing.assert_close(x1, x2, **close)
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert distance(plain, recomputed) < 1e-4


@pytest.mark.parametrize("context", ["clean", "none"])
def test_the_cache_carries_no_gradient(tiny, model, monkeypatch, context):
    """Would catch a gradient that leaks through keys and values into the passes that made earlier chunks. The
    loss is on chunk 1 alone; chunk 0 is either part of the rollout, or
    made beforehand and only given."""
    cfg = replace(tiny, context=context, **WHOLE_CLIP)
    text, made, run = inputs(cfg, 2)[2], [], model.run

    def keep(*args):
        v, kv = run(*args)
        if torch.is_grad_enabled():
            made.append([x for pair in kv for x in pair])
        return v, kv

    rngs = [rng_for(0), rng_for(1)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "run", keep)
        parts = list(islice(stream(model, text, cfg, rngs, grad_from=0), 2))
    assert len(made) == 2, "two exit passes should have carried gradient"
    loss = parts[1].square().mean()
    through = torch.autograd.grad(loss, made[0], retain_graph=True, allow_unused=True)
    assert all(g is None for g in through)

    joint = gradients(model, loss)
    given = tuple(islice(stream(model, text, cfg, [rng_for(0), rng_for(1)]), 1))
    (again,) = islice(stream(model, text, cfg, [rng_for(0), rng_for(1)], grad_from=0, past=given), 1)
    alone = gradients(model, again.square().mean())
    if context == "clean":  # with "none" a given chunk is remembered by a pass of its own, so its keys differ
        torch.testing.assert_close(again, parts[1], **close)
        assert distance(joint, alone) < 1e-4


@pytest.mark.parametrize("kind", [ListCache, RingCache])
@pytest.mark.parametrize("cuda", [False, True])
def test_a_cache_has_the_dtype_of_autocast(tiny, model, cuda, kind):
    """Catches norms that CUDA's autocast computes in fp32, and that make the whole cache fp32."""
    x, t, text = inputs(tiny, 2)
    cache = ListCache(model, tiny) if kind is ListCache else RingCache(model, tiny, 2, torch.bfloat16)
    norms = like_cuda() if cuda else nullcontext()
    with torch.no_grad(), norms, torch.autocast("cpu", torch.bfloat16):
        cache.commit(model(x, t, text, cache)[1])
        Given(model, text)(torch.cat([x, x], 1), cache, 0.0, 1.0)  # two chunks
        cache.commit(model(x, t, text, cache)[1])
        kv, words = model(x, t, text, cache)[1], tensors_in(model.read_text(text))
    found = [*cache.keys, *cache.values, *tensors_in(kv), *words]
    assert {x.dtype for x in found} == {torch.bfloat16}


# -- compilation ---------------------------------------------------------------------------------------------


def test_streaming_is_one_graph(tiny, build):
    """One for every chunk that the window lacks, then one for ever. Would catch a Python number in the ring
    cache that changes from chunk to chunk, or a question to the device: each chunk would be compiled anew, or
    would wait for an answer that no CUDA graph can give."""
    cfg = replace(tiny, layers=1)
    model = build(cfg)
    cache, reference, graphs = RingCache(model, cfg, 2), RingCache(model, cfg, 2), []

    def backend(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    def step(cache, x, t, text):
        v, kv = model(x, t, text, cache)
        cache.commit(kv)
        return to_x0(v, x, t)

    torch._dynamo.reset()
    torch._dynamo.allow_in_graph(rearrange)  # to trace through it takes longest
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in range(8):
            args = inputs(cfg, cfg.chunk, seed=seed)
            made = (compiled if seed else step)(cache, *args)  # tracing takes long: the first fill as it is
            torch.testing.assert_close(made, step(reference, *args), **close)
    assert len(graphs) == cfg.cached_chunks
    assert all(node.target != "item" for graph in graphs for node in graph.nodes)
