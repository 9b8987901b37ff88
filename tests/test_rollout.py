"""The autoregressive rollout: how many passes it costs, what a chunk sees, and where its gradient goes."""

import copy
import gc
from dataclasses import replace
from itertools import chain, islice, product

import pytest
import torch
from test_model import SINKS

import rollout as module
from engine.rng import rng_for
from model import ListCache, RingCache, shift_time, to_x0
from networks import for_sampling
from rollout import Ahead, exit_step, rollout, rollout_chunks, step_grid, stream


class Spy:
    """Stands in for a student and writes down what it was shown: x_t, t, the cached chunks, grad on or
    off. A pass over two chunks is written down as two, the first of which is remembered in between."""

    def __init__(self, model):
        self.model, self.patch_embedding, self.blocks = model, model.patch_embedding, model.blocks
        self.read_text, self.seen, self.passes, self.read = model.read_text, [], 0, {}

    def read_time(self, t):
        time = self.model.read_time(t)
        self.read[time[0].sum().item()] = t
        return time

    def run(self, xt, t, time, words, cache):
        self.passes += 1
        ahead = isinstance(cache, Ahead)
        past = cache.past if ahead else cache
        chunks = xt.detach().split(past.cfg.chunk, 1)
        ts = [self.read[e.sum().item()] for e in time[0].split(1, 1)] * (len(chunks) if ahead else 1)
        before, grad = [list(chunk) for chunk in past.chunks], torch.is_grad_enabled()
        out = self.model.run(xt, t, time, words, cache)
        after = before if ahead else [list(chunk) for chunk in past.chunks]
        saw = before, *[after] * (len(ts) - 1)
        self.seen += [(*each, grad) for each in zip(chunks, ts, saw, strict=True)]
        return out

    def levels(self) -> list[float]:
        return [round(float(t[0, 0]), 6) for _, t, _, _ in self.seen]


def rngs(n: int, first: int = 0) -> list[torch.Generator]:
    return [rng_for("test", i) for i in range(first, first + n)]


def words(cfg, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, cfg.text_length, cfg.text_width, generator=torch.Generator().manual_seed(seed))


def remembering(model, cfg, chunks) -> ListCache:
    """A cache that holds these keys and values, in this order."""
    cache = ListCache(model, cfg)
    for kv in chunks:
        cache.commit(kv)
    return cache


def assert_same_kv(a, b):
    for layer_a, layer_b in zip(a, b, strict=True):
        for x, y in zip(layer_a, layer_b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.fixture
def long_memory(tiny):
    """Seven chunks and more fit the window: nothing is ever evicted."""
    return replace(tiny, frames=24, window=0, sink=0, sink_mode="none")


# -- step grids and cost ---------------------------------------------------------------------------


def test_grid_is_warped_towards_noise(tiny):
    """Catches a shift that is left out or applied twice."""
    cfg = replace(tiny, shift=5.0, denoise=(1.0, 0.75, 0.5, 0.25))
    assert step_grid(cfg, 3) == pytest.approx((1, 0.9375, 0.83333, 0.625), abs=1e-4)


@pytest.mark.parametrize("taper, lengths", [("uniform", "444444"), ("5432", "543222"), ("432", "432222")])
def test_grids_of_a_taper(tiny, taper, lengths):
    """Catches a taper that starts late or goes on falling, and chunks that end on different noise levels."""
    cfg = replace(tiny, taper=taper)
    grids = [step_grid(cfg, k) for k in range(6)]
    assert "".join(str(len(g)) for g in grids) == lengths
    assert all(g[0] == 1 and list(g) == sorted(set(g), reverse=True) for g in grids)
    assert len({g[-1] for g in grids}) == 1


@pytest.mark.parametrize(
    "taper, context, passes",
    [("uniform", "clean", 35), ("uniform", "noisy", 35), ("uniform", "none", 28), ("uniform", "aligned", 28),
     ("5432", "none", 20), ("432", "none", 17)],
)  # fmt: skip
def test_passes_for_seven_chunks(tiny, model, taper, context, passes):
    """Catches a refresh that is paid for and not needed, and one that does not ride with the next chunk's
    first pass. Counted as a stream pays: with what remembers the seventh chunk, which a rollout of exactly
    seven never does."""
    cfg = replace(tiny, taper=taper, context=context, context_t=0.1)
    spy = Spy(model)
    with torch.no_grad():
        list(islice(stream(spy, words(cfg, 1), cfg, rngs(1)), 8))
    assert len(spy.seen) - len(step_grid(cfg, 7)) == passes
    assert len(spy.seen) - spy.passes == (0 if context in ("none", "aligned") else 7)


def test_last_chunk_is_not_refreshed(tiny, model):
    """Catches a pass whose result nobody reads."""
    spy = Spy(model)
    list(islice(stream(spy, words(tiny, 1), tiny, rngs(1)), 3))
    assert len(spy.seen) == 3 * 4 + 2


@pytest.mark.parametrize(
    "context, taper, exit", [("clean", "uniform", None), ("noisy", "5432", None), ("none", "uniform", 1)]
)
@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("kind", [ListCache, RingCache])
def test_one_pass_over_two_chunks_equals_two(tiny, build, monkeypatch, kind, sink, context, taper, exit):
    """Catches a chunk that is remembered at another's noise level or place, seen by the next one before it is
    there, or too late; with a full window, a prompt that changes and chunks that were given."""
    cfg = replace(tiny, context=context, context_t=0.2, taper=taper, **SINKS[sink])
    model, texts = build(cfg), {0: words(cfg, 1, 0), 5: words(cfg, 1, 1)}
    past, found, passes = (torch.ones(1, cfg.chunk, *cfg.latent_shape),), [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for separately in (False, True):
        if separately:
            monkeypatch.setattr(model, "run", lambda *args, run=model.run: one_by_one(run, *args))
        cache = ListCache(model, cfg) if kind is ListCache else RingCache(model, cfg, 1)
        with torch.no_grad():
            parts = stream(model, texts, cfg, rngs(1), past=past, cache=cache, exit=exit)
            found += [torch.cat(list(islice(parts, 8)), 1), len(passes)]
    one, fewer, other, both = found
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert both - 2 * fewer == 6  # not the first chunk, nor the one whose prompt is new


@pytest.mark.parametrize(
    "context, taper", [*product(("clean", "noisy", "none"), ("uniform", "5432")), ("aligned", "uniform")]
)
def test_a_replay_keeps_nothing_of_its_capture(tiny, build, context, taper):
    """Catches a tensor that reaches a CUDA graph past its inputs: it stays what it was then."""
    captured: dict[tuple, tuple] = {}

    def replayed(key, function, *inputs):
        """What engine.graphs.CudaGraphs does, without CUDA: outputs are overwritten in place too."""
        if key not in captured:
            captured[key] = function, [x.clone() for x in inputs], function(*inputs)
            return captured[key][2]
        function, static, out = captured[key]
        for old, new in zip(static, inputs, strict=True):
            old.copy_(new)
        again, parts = function(*static), lambda given: [given[0], *chain(*given[1])] if given else []
        for old, new in zip(parts(out), parts(again), strict=True):
            old.copy_(new)
        return out

    cfg = replace(tiny, context=context, context_t=0.2, taper=taper)
    model, text, found = build(cfg), words(cfg, 2), []
    for how in ({}, {"call": replayed}):
        parts = stream(model, text, cfg, rngs(2), cache=RingCache(model, cfg, 2), **how)
        found.append(torch.cat(list(islice(parts, 9)), 1))
    assert torch.equal(*found) and len(captured) > (context in ("none", "aligned"))


@pytest.mark.parametrize("exit", [0, 1, None])
def test_a_training_rollout_may_look_at_two_chunks(tiny, model, exit, monkeypatch):
    """The same clip and gradient when nothing is remembered on the way; catches a pass that is recomputed for
    its gradient, and then remembers a second time."""
    model.checkpointing, found = True, []
    for separately in (False, True):
        if separately:
            monkeypatch.setattr(model, "run", lambda *args, run=model.run: one_by_one(run, *args))
        x = rollout(model, words(tiny, 2), tiny, rngs(2), chunks=tiny.chunks + 2, exit=exit, grad=True)
        found.append((x, *torch.autograd.grad(x.square().mean(), list(model.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def one_by_one(run, xt, t, time, text, cache):
    """Two chunks in two passes."""
    if xt.shape[1] > cache.chunk:
        (before, xt), (e, e2), (six, six2) = (z.chunk(2, 1) for z in (xt, *time))
        cache.commit(run(before, t, (e, six), text, cache)[1])
        time = e2, six2
    return run(xt, t, time, text, cache)


# -- randomness ------------------------------------------------------------------------------------


def test_a_chunk_depends_on_its_past_alone(tiny, model, monkeypatch):
    """Catches a cache that is never read, and a chunk that sees the future."""
    cfg = replace(tiny, denoise=(1.0,))
    noise = torch.randn(4, 1, cfg.chunk, *cfg.latent_shape, generator=torch.Generator().manual_seed(0))

    def chunks(first: int, second: int) -> list[torch.Tensor]:
        context = torch.zeros_like(noise[0])
        draws = iter((context, noise[first], context, noise[second], context, noise[3]))
        monkeypatch.setattr(module, "randn", lambda rngs, *shape, device=None: next(draws, context))
        with torch.no_grad():
            return list(islice(stream(model, words(cfg, 1), cfg, rngs(1)), 3))

    base, other_first, other_second = chunks(0, 1), chunks(2, 1), chunks(0, 2)
    assert (base[1] - other_first[1]).abs().max() > 1e-3
    assert torch.equal(base[0], other_second[0])
    assert (base[2] - other_second[2]).abs().max() > 1e-3


def test_the_next_noise_is_drawn_behind_a_chunk(tiny, model, monkeypatch):
    """Catches a draw before a chunk's passes, while a GPU has nothing to do, and draws beyond the exit."""
    events, real = [], module.randn
    monkeypatch.setattr(module, "randn", lambda *args, **more: events.append("draw") or real(*args, **more))
    model.run = lambda *args, run=model.run: events.append("pass") or run(*args)
    with torch.no_grad():
        parts = stream(model, words(tiny, 1), tiny, rngs(1), exit=1)
        for drawn in (6, 3, 3):  # for what is remembered and for two steps; the first chunk's as well
            next(parts)
            assert events.count("draw") == drawn and events[-4:] == ["pass", *["draw"] * 3]
            events.clear()


def test_same_generators_same_rollout(tiny, model):
    """Catches a draw from the global generator, which would break --seed and resume."""
    with torch.no_grad():
        torch.manual_seed(0)
        a = rollout(model, words(tiny, 2), tiny, rngs(2), chunks=6)
        torch.manual_seed(1)
        b = rollout(model, words(tiny, 2), tiny, rngs(2), chunks=6)
        c = rollout(model, words(tiny, 2), tiny, rngs(2, first=5), chunks=6)
    assert torch.equal(a, b)
    assert (a - c).abs().max() > 0.1


def test_every_row_starts_a_chunk_from_the_same_noise(tiny, model):
    """Catches a chunk whose noise depends on how many steps came before it, on the exit, on the context: then
    methods could not be compared on the same noise."""
    text, first = words(tiny, 2), {}
    ways = {"uniform": {}, "taper": {"taper": "5432"}, "noisy": {"context": "noisy", "context_t": 0.2}}
    for name, changes in ways.items():
        for exit in (None, 0):
            spy = Spy(model)
            with torch.no_grad():
                list(islice(stream(spy, text, replace(tiny, **changes), rngs(2), exit=exit), 3))
            first[name, exit] = torch.stack([x for x, t, *_ in spy.seen if t[0, 0] == 1])
    base = first["uniform", None]
    assert len(base) == 3 and all(torch.equal(x, base) for x in first.values())
    assert not torch.equal(base[0], base[1]) and not torch.equal(base[:, 0], base[:, 1])


@pytest.mark.parametrize("context", ["clean", "noisy", "none", "aligned"])
def test_a_sample_does_not_know_its_batch(tiny, model, context):
    """Catches noise that is drawn for the whole batch at once, and any mixing of samples."""
    cfg = replace(tiny, context=context, context_t=0.2)
    text = words(cfg, 3)
    with torch.no_grad():
        together = rollout(model, text, cfg, rngs(3))
        alone = [rollout(model, text[i : i + 1], cfg, rngs(1, first=i)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_rollout_returns_the_last_frames(tiny, model):
    """Catches a long rollout that hands DMD its beginning."""
    with torch.no_grad():
        parts = list(islice(stream(model, words(tiny, 1), tiny, rngs(1)), 7))
        tail = rollout(model, words(tiny, 1), tiny, rngs(1), chunks=7)
    assert torch.equal(tail, torch.cat(parts[-tiny.chunks :], dim=1))


# -- video to video --------------------------------------------------------------------------------


def given(cfg, chunks: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return list(torch.randn(chunks, 2, cfg.chunk, *cfg.latent_shape, generator=g))


def made_over(model, cfg, source, strength):
    with torch.no_grad():
        return list(stream(model, words(cfg, 2), cfg, rngs(2), over=iter(source), strength=strength))


def test_all_noise_forgets_the_source(tiny, model):
    """Catches a grid of its own, other noise, and a stream that does not end with what arrives."""
    with torch.no_grad():
        plain = list(islice(stream(model, words(tiny, 2), tiny, rngs(2)), 5))
    made = made_over(model, tiny, given(tiny, 5), 1.0)
    assert len(made) == 5 and all(map(torch.equal, made, plain))


def test_a_chunk_starts_from_its_source(tiny, model):
    """Catches a start at another level than the network is told, steps above it, and a chunk that has been
    asked for before it is needed."""
    spy, source, asked = Spy(model), given(tiny, 3), []
    parts = stream(spy, words(tiny, 2), tiny, rngs(2), over=map(lambda x: asked.append(1) or x, source),
                   strength=0.8)  # fmt: skip
    with torch.no_grad():
        next(parts)
    grid = step_grid(tiny, 0)
    assert spy.levels() == [0.8, *(round(t, 6) for t in grid if t < 0.8)] and len(asked) == 1
    start = [x for x, *_ in spy.seen][0]
    noise = (start - 0.2 * source[0]) / 0.8
    with torch.no_grad():
        plain = Spy(model)
        next(stream(plain, words(tiny, 2), tiny, rngs(2)))
    torch.testing.assert_close(noise, plain.seen[0][0], rtol=1e-4, atol=1e-5)
    other = [source[0], source[1] + 1, source[2]]
    a, b = (made_over(model, tiny, each, 0.8) for each in (source, other))
    assert torch.equal(a[0], b[0]) and (a[1] - b[1]).abs().max() > 1e-2 and (a[2] - b[2]).abs().max() > 1e-3


def test_a_past_before_a_source(tiny, model):
    """Catches given chunks that are remembered at other levels than those of the steps that look back at
    them; and a source without a chunk, which is a stream without one."""
    cfg, spy = replace(tiny, context="aligned"), Spy(model)
    with torch.no_grad():
        how = {"past": given(cfg, 2), "over": given(cfg, 1), "strength": 0.8}
        list(stream(spy, words(cfg, 2), cfg, rngs(2), **how))
    grid = [round(t, 6) for t in step_grid(cfg, 0, 0.8)]
    assert spy.levels() == [*(t for t in grid for _ in range(2)), *grid]
    assert not list(stream(spy, words(cfg, 2), cfg, rngs(2), over=[]))


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("kind", [ListCache, RingCache])
def test_every_step_remembers_its_own_keys(tiny, build, kind, sink):
    """context=aligned. Catches a step that reads or fills another one's cache, and keys of another pass:
    those of a chunk at step i are what a pass at level i makes of x_i, given what step i remembers."""
    cfg = replace(tiny, context="aligned", **SINKS[sink])
    model, seen = build(cfg), []
    run = model.run

    def spied(xt, t, time, text, cache):
        v, kv = run(xt, t, time, text, cache)
        seen.append((xt, t, kv, id(cache)))
        return v, kv

    model.run = spied
    cache = kind(model, cfg, *[2] * (kind is RingCache))
    with torch.no_grad():
        made = list(islice(stream(model, words(cfg, 2), cfg, rngs(2), cache=cache), 7))
        del model.run
        own = [ListCache(model, cfg) for _ in cfg.denoise]
        for k in range(7):
            for i, (xt, t, kv, which) in enumerate(seen[4 * k : 4 * k + 4]):
                assert which == seen[i][3] and seen[i][3] != seen[i - 1][3]
                v, fresh = model(xt, t, words(cfg, 2), own[i])
                assert_same_kv(kv, fresh)
                own[i].commit(fresh)
            torch.testing.assert_close(made[k], to_x0(v, xt, t), rtol=1e-4, atol=1e-5)


def test_an_early_exit_leaves_later_caches_alone(tiny, model, monkeypatch):
    cfg, filled = replace(tiny, context="aligned"), []
    remember = module.remember_chunk
    monkeypatch.setattr(
        module,
        "remember_chunk",
        lambda given, caches, *a: remember(given, caches, *a) or filled.append(caches),
    )
    with torch.no_grad():
        list(islice(stream(model, words(cfg, 1), cfg, rngs(1), exit=1), 3))
    assert [cache.filled for cache in filled[-1]] == [2, 2, 0, 0]


# -- exit steps and gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("taper, steps", [("uniform", 4), ("5432", 5), ("432", 4)])
def test_exit_steps(tiny, taper, steps):
    """Catches an exit that some step of the grid can never get, one that does not change from update to
    update, and one that is drawn from a state that processes do not share."""
    cfg = replace(tiny, taper=taper)
    drawn = [exit_step(cfg, "student", i) for i in range(100)]
    assert set(drawn) == set(range(steps))
    torch.manual_seed(1)
    assert drawn == [exit_step(cfg, "student", i) for i in range(100)]
    assert drawn != [exit_step(replace(cfg, seed=1), "student", i) for i in range(100)]


def test_rollout_lengths(tiny):
    """Catches a horizon that is never reached or overshot."""
    cfg = replace(tiny, horizon=3)
    assert {rollout_chunks(cfg, i) for i in range(200)} == set(range(cfg.chunks, 3 * cfg.chunks + 1))


@pytest.mark.parametrize("exit", range(4))
def test_every_chunk_stops_at_the_exit(tiny, model, exit):
    """Catches chunks that go on past the exit, and a chunk that is not what the exit pass predicted."""
    spy = Spy(model)
    with torch.no_grad():
        chunks = list(islice(stream(spy, words(tiny, 2), tiny, rngs(2), exit=exit), 3))
    grid = [round(u, 6) for u in step_grid(tiny, 0)]
    assert spy.levels() == [*grid[: exit + 1], 0, *grid[: exit + 1], 0, *grid[: exit + 1]]
    assert all((t == t[0, 0]).all() for _, t, _, _ in spy.seen)
    xt, t, *_ = spy.seen[exit]
    with torch.no_grad():
        v, _ = model(xt, t, words(tiny, 2))
    torch.testing.assert_close(chunks[0], to_x0(v, xt, t))


def test_early_exit_of_a_short_grid_is_its_last_step(tiny, model):
    """Catches an exit beyond a tapered chunk's grid."""
    cfg = replace(tiny, taper="5432", context="none")
    spy = Spy(model)
    with torch.no_grad():
        list(islice(stream(spy, words(cfg, 1), cfg, rngs(1), exit=4), 4))
    assert len(spy.seen) == 5 + 4 + 3 + 2


@pytest.mark.parametrize("exit", [0, 2, None])
def test_gradient_through_the_exit_pass_only(tiny, model, exit):
    """Catches gradient through earlier steps, through the refresh, or for chunks that DMD never sees."""
    spy = Spy(model)
    x = rollout(spy, words(tiny, 1), tiny, rngs(1), chunks=tiny.chunks + 2, exit=exit, grad=True)
    passes = (exit if exit is not None else 3) + 1
    expected = ([False] * passes + [False]) * 2 + ([False] * (passes - 1) + [True, False]) * tiny.chunks
    assert [grad for *_, grad in spy.seen] == expected[:-1]
    assert x.requires_grad


@pytest.mark.parametrize("context, exit", [("clean", 1), ("none", 1), ("none", None)])
def test_no_gradient_leaks_through_the_cache(tiny, model, context, exit):
    """Catches keys and values that carry gradient from chunk to chunk, as the released code has it."""
    cfg, spy = replace(tiny, context=context), Spy(model)
    x = rollout(spy, words(cfg, 1), cfg, rngs(1), exit=exit, grad=True)
    clean = torch.autograd.grad(x[:, -cfg.chunk :].sum(), list(model.blocks.parameters()))
    xt, t, seen, _ = spy.seen[-1]
    v, _ = model(xt, t, words(cfg, 1), remembering(model, cfg, seen))
    own = torch.autograd.grad(to_x0(v, xt, t).sum(), list(model.blocks.parameters()))
    for a, b in zip(clean, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bf16_reaches_the_weights(tiny, model):
    """Catches weights that autocast has cached without gradient in the passes before the exit, and gradients
    that bf16 turns around."""
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = rollout(model, words(tiny, 2), tiny, rngs(2), exit=2, grad=True)
        parameters = dict(model.named_parameters())
        grads.append(torch.autograd.grad(x.float().square().mean(), list(parameters.values())))
    for name, exact, rough in zip(parameters, *grads, strict=True):
        assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.95, name


# -- what is remembered ----------------------------------------------------------------------------


def test_matched_context(long_memory, model):
    """Catches a `none` context that remembers something else than what the last step saw: training and
    sampling would then disagree."""
    cfg, spy = replace(long_memory, context="none"), Spy(model)
    cache, text = ListCache(spy, cfg), words(long_memory, 1)
    with torch.no_grad():
        list(islice(stream(spy, text, cfg, rngs(1), cache=cache), 3))
        for chunk in range(2):
            xt, t, seen, _ = spy.seen[4 * chunk + 3]
            assert float(t[0, 0]) == pytest.approx(step_grid(cfg, chunk)[-1])
            _, kv = model(xt, t, text, remembering(model, cfg, seen))
            assert len(seen) == chunk
            assert_same_kv(cache.chunks[chunk], kv)


@pytest.mark.parametrize("exit", [None, 1])
def test_clean_context(long_memory, model, exit):
    """Catches a refresh at the wrong noise level, and one that does not see the chunks before."""
    cfg, text = long_memory, words(long_memory, 1)
    cache = ListCache(model, cfg)
    with torch.no_grad():
        chunks = list(islice(stream(model, text, cfg, rngs(1), exit=exit, cache=cache), 3))
        fresh = ListCache(model, cfg)
        for x in chunks[:2]:
            fresh.commit(model(x, torch.zeros(x.shape[:2]), text, fresh)[1])
    assert len(cache.chunks) == 2, "the refresh did not reach the cache"
    for ours, theirs in zip(cache.chunks, fresh.chunks, strict=True):
        assert_same_kv(ours, theirs)


@pytest.mark.parametrize("context, exit, level", [("noisy", None, 0.2), ("noisy", 1, 0.2), ("none", 1, None)])
def test_noise_level_of_the_refresh(tiny, model, context, exit, level):
    """Catches an early exit whose context is cleaner or noisier than the one sampling will have."""
    cfg, spy = replace(tiny, context=context, context_t=0.2), Spy(model)
    with torch.no_grad():
        chunks = list(islice(stream(spy, words(cfg, 1), cfg, rngs(1), exit=exit), 2))
    refresh = spy.seen[4 if exit is None else exit + 1]
    level = step_grid(cfg, 0)[-1] if level is None else level
    assert float(refresh[1][0, 0]) == pytest.approx(level)
    noise = (refresh[0] - (1 - level) * chunks[0]) / level
    assert 0.7 < float(noise.std()) < 1.3


def test_list_and_ring_stream_alike(tiny, model):
    """Catches a rollout that leans on how one of the caches is built."""
    with torch.no_grad():
        slow = list(islice(stream(model, words(tiny, 2), tiny, rngs(2)), 7))
        ring = RingCache(model, tiny, batch=2)
        fast = list(islice(stream(model, words(tiny, 2), tiny, rngs(2), cache=ring), 7))
    torch.testing.assert_close(torch.cat(slow, 1), torch.cat(fast, 1), rtol=1e-3, atol=1e-4)


def test_ahead_equals_chunk_by_chunk(tiny, model):
    """Catches wrong places, a mask that is off by a chunk, a pass that writes into the cache, and chunks that
    are remembered in another order."""
    cfg = replace(tiny, window=6)
    text, cache, t = words(cfg, 2), ListCache(model, cfg), torch.zeros(2, cfg.chunk)
    x = torch.randn(2, 3, cfg.chunk, *cfg.latent_shape, generator=rng_for("x"))
    for filled in range(3):
        other, twin = torch.cat([x[:, :2], x[:, 2:] + 1], 1), copy.deepcopy(cache)
        with torch.no_grad():
            a, b = (model(z.flatten(1, 2), t.repeat(1, 3), text, Ahead(cache, 3))[0] for z in (x, other))
            assert cache.filled == filled and (a - b)[:, : 2 * cfg.chunk].abs().max() < 1e-5
            twin.commit(model(x[:, :2].flatten(1, 2), t.repeat(1, 2), text, Ahead(twin, 2))[1])
            one, own = model(x[:, 0], t, text, cache)
            cache.commit(own)
            two, own = model(x[:, 1], t, text, cache)
        torch.testing.assert_close(a[:, : 2 * cfg.chunk], torch.cat([one, two], 1), atol=1e-4, rtol=1e-4)
        assert_same_kv(twin.chunks[-1], own)


# -- prompts that change, videos that go on --------------------------------------------------------


def test_bf16_keeps_time_and_the_sum_in_fp32(tiny, model):
    """Catches weights that stay large, and times that bf16 rounds: then neighbouring levels look alike."""
    cfg = replace(tiny, bf16=True, device="cpu")
    low, rough = for_sampling(copy.deepcopy(model), cfg), copy.deepcopy(model).bfloat16()
    types = {name: p.dtype for name, p in low.named_parameters()}
    assert types["blocks.0.ffn.0.weight"] == types["head.head.weight"] == torch.bfloat16
    assert types["blocks.0.modulation"] == types["time_embedding.0.weight"] == torch.float32
    seen, text = [], words(cfg, 2)
    low.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    video = [torch.cat([*islice(stream(net, text, tiny, rngs(2)), 4)], 1) for net in (model, low, rough)]
    exact, ours, plain = (x.detach() for x in video)
    assert set(seen) == {torch.float32} and (ours - exact).norm() < (plain - exact).norm()
    assert for_sampling(low, replace(cfg, bf16=False)).patch_embedding.weight.dtype == torch.float32


def test_prompt_switch(tiny, model):
    """Catches a switch that is a chunk early or late, a cache that keeps the old prompt's keys, and a lost
    sink: what is encoded anew is the stream's first chunk and the two before the switch."""
    cfg = replace(tiny, window=4)
    assert cfg.sink == 1
    old, new = words(cfg, 1, 0), words(cfg, 1, 1)
    cache = ListCache(model, cfg)
    with torch.no_grad():
        plain = list(islice(stream(model, old, cfg, rngs(1)), 6))
        video = islice(stream(model, {0: old, 4: new}, cfg, rngs(1), cache=cache), 6)
        switched = list(islice(video, 5))  # chunk 4 is drawn and not yet remembered
        fresh = ListCache(model, cfg)
        for x in (switched[0], *switched[2:4]):
            fresh.commit(model(x, torch.zeros(x.shape[:2]), new, fresh)[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], switched[:4], strict=True))
    assert (plain[4] - switched[4]).abs().max() > 1e-2
    assert cfg.cached_chunks == len(cache.chunks) == 3
    for ours, theirs in zip(cache.chunks, fresh.chunks, strict=True):
        assert_same_kv(ours, theirs)


def test_past_is_continued(long_memory, model):
    """Catches given chunks that are ignored, forgotten or put into the wrong order."""
    cfg, text = long_memory, words(long_memory, 1)
    with torch.no_grad():
        whole = list(islice(stream(model, text, cfg, rngs(1)), 4))
        rest = list(islice(stream(model, text, cfg, rngs(1), past=tuple(whole[:2])), 2))
    torch.testing.assert_close(torch.cat(rest, 1), torch.cat(whole[2:], 1), rtol=1e-4, atol=1e-5)


def test_a_stream_does_not_grow(tiny, model):
    """Catches a list of past chunks that is kept for ever."""

    def alive() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    cache = ListCache(model, tiny)
    text = words(tiny, 1)
    with torch.no_grad():
        video = stream(model, text, tiny, rngs(1), cache=cache)
        counts = []
        for _ in range(3):
            for x in islice(video, 4):
                del x
            counts.append(alive())
            assert len(cache.chunks) == tiny.cached_chunks
    assert counts[0] == counts[1] == counts[2]


def test_shift_of_one_is_none():
    """Catches a warp that is not the identity at 1, which the tapers rely on to be read off the page."""
    assert [shift_time(u, 1.0) for u in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
