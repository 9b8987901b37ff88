"""The autoregressive rollout that training and sampling share: chunk after chunk, a few steps each.

Self Forcing (Huang et al., 2025): the student learns on what it generates itself, with its own cache. Between
steps the prediction is noised afresh (consistency-style), x ← (1 - t') x̂ + t' ε; when training, a rollout
stops at one random "exit" step and only that forward pass carries gradient. Everything the family varies is
an argument: the number of steps per chunk, and what later chunks get to see of this one.

Each sample's generator is asked once, for a seed; every chunk draws from generators of its own. So a chunk's
noise depends neither on the exit nor on how many steps the chunks before it took, methods can be compared on
the same noise, and given the first chunks as `past` a stream goes on as it did.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, islice, repeat

import torch
from torch import Tensor

from config import Config
from engine.rng import randn, rng_for
from model import KV, Cache, ListCache, VideoDiT, guided_x0, look, shift_time, turns_at

# before the shift; Diagonal Distillation: early chunks get more steps, all chunks the same last level
_TAPER = {5: (1.0, 0.75, 0.5, 0.25, 0.1), 4: (1.0, 0.75, 0.5, 0.1), 3: (1.0, 0.75, 0.1), 2: (1.0, 0.1)}


def step_grid(cfg: Config, chunk: int, start: float = 1.0) -> tuple[float, ...]:
    """Noise levels at which chunk number `chunk` is denoised, falling from `start`, warped by cfg.shift.

    uniform: the same for every chunk. 5432 and 432: that many steps for the first chunks, 2 for the rest.
    """
    grid = cfg.denoise if cfg.taper == "uniform" else _TAPER[max(int(cfg.taper[0]) - chunk, 2)]
    return start, *(t for t in (shift_time(u, cfg.shift) for u in grid) if t < start)


def exit_step(cfg: Config, *key: int | str) -> int:
    """Where a training rollout stops: one draw for all chunks, the same on every process."""
    longest = max(len(step_grid(cfg, k)) for k in range(cfg.chunks))
    return int(torch.randint(longest, (), generator=rng_for(cfg.seed, "exit", *key)))


def rollout_chunks(cfg: Config, *key: int | str) -> int:
    """Length of a training rollout in chunks: from the teacher's clip to `horizon` times that."""
    rng = rng_for(cfg.seed, "length", *key)
    return int(torch.randint(cfg.chunks, cfg.chunks * cfg.horizon + 1, (), generator=rng))


class Given:
    """A student with its prompt: what it makes of the text and of noise levels, once a stream, not once a
    pass. `given(xt, cache, level)` → velocity, keys and values of the chunk x_t (b f c h w); with two chunks
    and two levels, the first, finished one is remembered on the way, and the velocity is the second's."""

    def __init__(self, student: VideoDiT, text: Tensor):
        self.student, self.text = student, text
        # by whether gradient is recorded: a pass with gradient needs a reading with gradient
        self.words: dict[bool, KV] = {}
        self.times: dict[tuple, tuple] = {}

    def __call__(self, xt: Tensor, cache, *levels: float) -> tuple[Tensor, KV]:
        grad = torch.is_grad_enabled()
        if grad not in self.words:
            self.words[grad] = self.student.read_text(self.text)
        if (grad, levels) not in self.times:
            ts = [torch.full((1, 1), level, device=xt.device) for level in levels]
            read = zip(*(self.student.read_time(t) for t in ts), strict=True)
            self.times[grad, levels] = ts[-1], tuple(torch.cat(parts, 1) for parts in read)
        return self.student.run(xt, *self.times[grad, levels], self.words[grad], cache)

    @torch.no_grad()
    def switch(self, text: Tensor) -> None:
        """Another prompt, in the place of the old one: captured graphs read it there."""
        for old, new in zip(self.words[False], self.student.read_text(text), strict=True):
            old[0].copy_(new[0]), old[1].copy_(new[1])


class Ahead:
    """A pass over n chunks: each sees what `past` remembers, itself and those before it. `past` is a
    ListCache, or either cache while it is empty."""

    def __init__(self, past: Cache, n: int):
        self.past, self.chunk = past, n * past.cfg.chunk
        cfg, m, device = past.cfg, past.filled, past.places.device
        frames = torch.arange(m * cfg.chunk_tokens, (m + n) * cfg.chunk_tokens, device=device)
        chunk = torch.arange(m + n, device=device).repeat_interleave(cfg.tokens)
        mask = chunk[m * cfg.tokens :, None] >= chunk
        self.look = partial(look, turns=turns_at(frames, *cfg.grid, cfg.dim // cfg.heads), mask=mask)

    def looks(self, both: bool) -> list[Callable]:
        return [partial(self.look, join=self.past.filled and self.past.join(i)) for i in self.past.layers]


def denoise_chunk(given: Given, caches, grid, grad, behind, *inputs: Tensor) -> tuple[Tensor, KV]:
    """Noise of every step, (b f c h w) each → the chunk as predicted at the grid's last step, that pass' KV;
    with a cache for every step the KV of all steps, one after another.

    behind: the level at which the chunk before is yet to be remembered, which the first pass does on the way,
    or None. `inputs` then has that chunk and noise for it before the steps' noise. A function of tensors
    alone, without a random draw or a question to the device.
    """
    before = [] if behind is None else [noised(*inputs[:2], behind)]
    noise = inputs[2 * len(before) :]
    x, kvs = noise[0], []
    for i, level in enumerate(grid):
        with torch.set_grad_enabled(grad and i == len(grid) - 1):
            chunks, levels = ([*before, x], [behind, level]) if before and not i else ([x], [level])
            v, kv = given(torch.cat(chunks, 1), caches[i % len(caches)], *levels)
            x0 = x - level * v
        kvs = [*kvs, kv][-len(caches) :]
        if i < len(grid) - 1:
            x = (1 - grid[i + 1]) * x0 + grid[i + 1] * noise[i + 1]
    return x0, [*chain(*kvs)]


def context_level(cfg: Config, grid: tuple[float, ...], finished: bool = False) -> float | None:
    """The noise at which later chunks see one; None: a `finished` one as its last pass saw it."""
    own = None if finished else grid[-1]
    return {"clean": 0.0, "noisy": cfg.context_t, "none": own, "aligned": None}[cfg.context]


def noised(x0: Tensor, noise: Tensor, level: float) -> Tensor:
    return (1 - level) * x0 + level * noise if level else x0


@torch.no_grad()
def remember_chunk(given: Given, caches, level: float | None, x0, noise, *last: Tensor) -> None:
    """By a refresh pass at `level` (0 = clean); None: by the steps' own keys and values, in turn. A rollout
    that exits early leaves the caches of later steps alone."""
    if level is not None:
        return caches[0].commit(given(noised(x0, noise, level), caches[0], level)[1])
    own, layers = [*zip(last[::2], last[1::2], strict=True)], len(caches[0].layers)
    for i, cache in enumerate(caches[: len(own) // layers]):
        cache.commit(own[i * layers : (i + 1) * layers])


def directly(key: tuple, function: Callable, *inputs: Tensor):
    """How `stream` does its work; graphs.CudaGraphs is the other way."""
    return function(*inputs)


def stream(student, text, cfg, rngs, *, past=(), over=None, strength=1.0, cache=None, call=directly,
           exit=None, grad_from=None) -> Iterator[Tensor]:  # fmt: skip
    """Yield one clean chunk (b chunk c h w) after another, for ever: `islice` ends it. A chunk is remembered
    when the next one is asked for, in the next one's first pass unless that carries gradient. Memory does not
    grow: only the window is kept.

    text: (b l e), or {chunk index: (b l e)} for prompts that change on the way; the cache is then rebuilt
    with the new prompt (LongLive's recache) from the first `sink` chunks and the recent ones. rngs: one
    generator per sample. past: given clean chunks to go on from. over: video to video, an iterator of clean
    chunks, with which the stream ends; each is denoised from the noise level `strength` in (0, 1] on. cache:
    a ListCache unless given. call: as it is, or a graphs.CudaGraphs. exit, grad_from: for training, see
    `rollout`.

    simplified: at a switch an EMA sink starts anew from the first chunk, without what was folded into it.
    """
    texts = text if isinstance(text, dict) else {0: text}
    given, device = Given(student, texts[0]), texts[0].device
    seeds = [int(torch.randint(2**62, (), generator=g)) for g in rngs]
    caches = [ListCache(student, cfg) if cache is None else cache]
    caches += [copy.deepcopy(caches[0]) for _ in cfg.denoise[1:] if cfg.context == "aligned"]  # one a step
    first = list(past[: cfg.sink])
    recent = deque(past[cfg.sink :], maxlen=cfg.cached_chunks - cfg.sink)
    start = 1.0 if over is None else strength
    _rebuild(given, [*first, *recent], caches, cfg, step_grid(cfg, 1, start), seeds)
    plans = _plans(cfg, seeds, len(past), start, exit, device)
    behind, coming = None, next(plans)  # what there is to remember of the chunk before; the one to come
    for index, source in enumerate(repeat(None) if over is None else over):
        grid, steps, (context, *noise) = coming
        grad = grad_from is not None and index >= grad_from
        if source is not None:
            noise[0] = noised(source, noise[0], strength)
        how = call if caches[0].full else directly  # until then chunks differ in more than their values
        if index and index in texts:
            given.switch(texts[index])
            _rebuild(given, [*first, *recent], caches, cfg, grid, seeds, index)
            behind = None
        elif behind and (behind[1] is None or grad and len(steps) == 1):
            how(("remember", behind[0]), partial(remember_chunk, given, caches, behind[1]), *behind[2:])
            behind = None
        _, level, *before = behind or (None, None)
        denoise = partial(denoise_chunk, given, caches, steps, grad, level)
        x0, kv = how(("denoise", steps, level), denoise, *before[:2], *noise)
        x0 = x0.clone()  # the next replay of a graph writes where this one wrote
        coming = next(plans)  # a GPU is still at work: to draw Wan's noise takes 50 ms
        yield x0
        behind = steps, context_level(cfg, grid, steps == grid), x0.detach(), context, *chain(*kv)
        (first if len(first) < cfg.sink else recent).append(x0.detach())


def _plans(cfg: Config, seeds, past: int, start: float, exit: int | None, device) -> Iterator[tuple]:
    """Per chunk: its grid, the part of it that is gone through, noise for its context and for each step."""
    for index in count():
        grid = step_grid(cfg, index, start)
        steps = grid if exit is None else grid[: exit + 1]
        own = [rng_for(s, past + index) for s in seeds]
        yield grid, steps, [randn(own, cfg.chunk, *cfg.latent_shape, device=device) for _ in (0, *steps)]


@torch.no_grad()
def _rebuild(given, kept, caches, cfg: Config, grid: tuple[float, ...], seeds: list[int], *key: int) -> None:
    """Fill the caches anew, in one pass: from the stream's first `sink` clean chunks and recent ones."""
    rngs = [rng_for(seed, "rebuild", *key) for seed in seeds]
    levels = grid if cfg.context == "aligned" else [context_level(cfg, grid)]
    noise = [randn(rngs, *x0.shape[1:], device=x0.device) for x0 in kept]
    for cache, level in zip(caches, levels, strict=False):
        cache.reset()
        if kept:
            x = noised(torch.cat(kept, 1), torch.cat(noise, 1), level)
            cache.commit(given(x, Ahead(cache, len(kept)), level)[1])


def rollout(student, text, cfg: Config, rngs, chunks=None, exit: int | None = None, grad=False) -> Tensor:
    """The last cfg.frames latent frames (b f c h w) of a rollout of `chunks` chunks (None: just those).

    With `grad`, the exit forward of every chunk that is returned carries gradient; keys and values do not:
    each chunk's loss reaches the student through that chunk's forward pass alone.
    """
    chunks = chunks or cfg.chunks
    first = chunks - cfg.chunks
    parts = stream(student, text, cfg, rngs, exit=exit, grad_from=first if grad else None)
    return torch.cat(list(islice(parts, first, chunks)), dim=1)


@torch.no_grad()
def sample_teacher(net: VideoDiT, text: Tensor, cfg: Config, rngs: list, steps: int = 25) -> Tensor:
    """The teacher's way, for comparison: Euler steps along the guided velocity, the whole clip at once."""
    x = randn(rngs, cfg.frames, *cfg.latent_shape, device=text.device)
    grid = shift_time(torch.linspace(1, 0, steps + 1), cfg.shift).tolist()
    for now, then in zip(grid, grid[1:], strict=False):
        t = torch.full(x.shape[:2], now, device=x.device)
        x0 = guided_x0(net, x, t, text, torch.zeros_like(text[:1]), cfg.guidance)
        x = x + (then - now) * (x - x0) / now
    return x
