"""Flow identities, the causal video transformer, and what it remembers.

Axes everywhere: b batch · f latent frames · c h w latent channels, height, width · F H W pixels · n tokens ·
a heads · d head width · l e text length, width · s reward axes. Latent video is (b f c h w); pixel video in
[0, 1] is video01.

Time t is a float in [0, 1], 1 = noise, one per latent frame (b f):

    x_t = (1 - t) x + t ε        v = dx_t/dt = ε - x        x = x_t - t v

exactly, in fp32; the factor 1000 of other code exists only inside the sinusoidal embedding.

The transformer is Wan2.1's, parameter names included, so that one class serves a toy and the real 1.3B
weights. It is used in three ways: bidirectional (teacher, critic), under a block-causal mask (causal start),
and chunk by chunk with a cache (student). A forward pass changes nothing that is remembered: it returns its
own keys and values, and whoever runs it commits them; but of two chunks it commits the first on the way.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import Config

KV = list[tuple[Tensor, Tensor]]  # per layer: keys before RoPE and values, each (b n a d)
T_MIN = 0.05  # an x-predicting net's velocity is (x_t - x) / max(t, T_MIN)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x, noise (b f c h w), t (b f) in [0, 1] → x_t = (1 - t) x + t ε."""
    t = rearrange(t, "b f -> b f 1 1 1")
    return (1 - t) * x + t * noise


def to_x0(v: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """v, x_t (b f c h w), t (b f) → x = x_t - t v."""
    return xt - rearrange(t, "b f -> b f 1 1 1") * v


def shift_time(u: Tensor | float, shift: float) -> Tensor | float:
    """Warp time in [0, 1] towards noise: s u / (1 + (s - 1) u). 1 is the identity."""
    return shift * u / (1 + (shift - 1) * u)


def guided_x0(net, xt: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
    """The teacher's clean estimate (b f c h w), u + guidance (c - u), fp32; `null`: no prompt's text."""
    if guidance == 1:
        return to_x0(net(xt, t, text)[0].float(), xt, t)
    both = net(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([text, null.expand_as(text)]))[0].float()
    c, u = both.chunk(2)
    return to_x0(u + guidance * (c - u), xt, t)


# -- positions ----------------------------------------
def turns_at(frames: Tensor, h: int, w: int, width: int) -> Tensor:
    """Frame positions (f,), a token grid, a head's width d → every token's cos θ and sin θ (f*h*w 1 d/2 2).

    3-D rotary positions; a head is split over time, rows, columns as in Wan (44, 42, 42 of 128). Computed
    where they are used: as buffers they would follow a network into bf16.
    """
    device, space = frames.device, 2 * (width // 6)
    places = torch.cartesian_prod(frames, *(torch.arange(n, device=device) for n in (h, w)))  # (f*h*w, 3)
    steps = [torch.arange(0, n, 2, device=device) / n for n in (width - 2 * space, space, space)]
    angle = torch.cat([places[:, i, None] * 10000.0**-step for i, step in enumerate(steps)], dim=1)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (... n a d) by the tokens' turns (... n 1 d/2 2), in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # real numbers fuse with what stands around them
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # one kernel instead of five or six
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return pairs.flatten(-2).to(x.dtype)


# -- what a chunk may see ----------------------------------------
def teacher_forcing(frames: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Mask (2f 2f), positions (2f) for [clean | noisy]: a noisy chunk sees itself and the clean past."""
    block = torch.arange(frames) // chunk
    own, past = block[:, None] == block, block[:, None] > block
    mask = torch.cat([torch.cat([own | past, torch.zeros_like(own)], 1), torch.cat([past, own], 1)])
    return mask, torch.arange(frames).repeat(2)


class Cache:
    """What both caches share: the window [sink | recent chunks | the chunk in hand], of which `filled` chunks
    are remembered. Positions are relative to it, its first chunk is always at 0: a stream may run for ever.
    """

    def __init__(self, model: "VideoDiT", cfg: Config):
        frames = torch.arange((1 + cfg.cached_chunks) * cfg.chunk_tokens)
        turns = turns_at(frames.to(model.patch_embedding.weight.device), *cfg.grid, cfg.dim // cfg.heads)
        self.places = turns.unflatten(0, (-1, cfg.tokens))  # of every chunk in the window, (m n 1 d/2 2)
        self.cfg, self.chunk, self.layers = cfg, cfg.chunk, range(len(model.blocks))
        self.reset()

    @property
    def full(self) -> bool:
        return self.filled == self.cfg.cached_chunks

    def looks(self, both: bool) -> list[Callable]:
        """Per layer the attention of the chunk in hand to what is remembered and to itself. Of `both` chunks
        in a pass, the first is remembered on the way, layer by layer, before the second looks at it."""
        turns = self.places[self.filled]
        looks = [partial(look, turns=turns, join=self.join(i)) for i in self.layers]
        if both:
            self.advance()
            looks = [partial(self._look_twice, i, looks[i]) for i in self.layers]
        return looks

    def _look_twice(self, layer: int, first: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, q2), (k, k2), (v, v2) = (z.chunk(2, dim=1) for z in (q, k, v))
        out = first(q, k, v)
        self.keep(layer, k, v)
        return torch.cat([out, look(q2, k2, v2, self.places[self.filled], self.join(layer))], dim=1)

    def commit(self, kv: KV) -> None:
        """Remember a chunk, or several. The oldest leaves a full window, into the sink if that is an EMA."""
        tokens = self.cfg.tokens
        for start in range(0, kv[0][0].shape[1], tokens):
            self.advance()
            for layer, own in enumerate(kv):
                self.keep(layer, *(z[:, start : start + tokens] for z in own))

    def advance(self) -> None:
        """The part of `commit` that all layers share; `keep` is the one of a layer."""
        self.evicts, self.filled = self.full, min(self.filled + 1, self.cfg.cached_chunks)


class ListCache(Cache):
    """The readable cache, for training: a list of chunks, sink first, then oldest to newest. Nothing is
    overwritten in place, so a backward pass that recomputes activations sees what the forward pass saw.
    """

    def join(self, layer: int) -> Callable:
        """(rotated keys, values) of the chunk in hand → the same of the whole window, (b m a d)."""
        if not self.filled:
            return lambda *own: own
        past = self.keys[layer], self.values[layer]
        return lambda *own: [torch.cat([a.to(b.dtype), b], 1) for a, b in zip(past, own, strict=True)]

    def advance(self) -> None:
        super().advance()
        self.chunks.append([])
        self.oldest = self.chunks.pop(self.cfg.sink) if self.evicts else []

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        like = k.dtype
        self.chunks[-1].append((k.detach(), v.detach()))
        if self.evicts and self.cfg.sink_mode == "ema":  # in fp32: in bf16 a decay of .999 stands still
            pairs = zip(self.chunks[0][layer], self.oldest[layer], strict=True)
            share = 1 - self.cfg.sink_decay
            self.chunks[0][layer] = tuple(old.float().lerp(new.float(), share) for old, new in pairs)
        ks, vs = zip(*(chunk[layer] for chunk in self.chunks), strict=True)
        turns = self.places[: self.filled].flatten(0, 1)
        # joined and rotated once a chunk, not once a pass
        self.keys[layer] = rotate(torch.cat([k.to(like) for k in ks], dim=1), turns)
        self.values[layer] = torch.cat([v.to(like) for v in vs], dim=1)

    def reset(self) -> None:
        self.filled, self.chunks = 0, []
        self.keys, self.values = ([None for _ in self.layers] for _ in "kv")


class RingCache(Cache):
    """The fast cache: one static buffer a layer, slots [sink | ring | the chunk in hand]. A pass writes the
    chunk in hand behind what is remembered, and attention reads the buffer up to there: no mask, no copy of
    the window. A full ring's oldest slot is overwritten in place.

    Which slot that is, is a tensor: a full window asks the device nothing, which is what a CUDA graph needs.
    No gradient; streaming only.
    """

    def __init__(self, model: "VideoDiT", cfg: Config, batch: int, dtype=torch.float32):
        shape = batch, 1 + cfg.cached_chunks, cfg.tokens, cfg.heads, cfg.dim // cfg.heads
        zeros = partial(torch.zeros, device=model.patch_embedding.weight.device)
        self.keys, self.values = ([zeros(shape, dtype=dtype) for _ in model.blocks] for _ in "kv")
        # of what is remembered: keys before RoPE; and the sink's keys and values
        self.raw = [zeros(batch, shape[1] - 1, *shape[2:], dtype=dtype) for _ in model.blocks]
        self.sink = [zeros(2, batch, *shape[2:]) for _ in model.blocks if cfg.sink_mode == "ema"]
        self.slot = zeros(1, dtype=torch.long)  # of the newest chunk
        super().__init__(model, cfg)

    def join(self, layer: int) -> Callable:
        buffers, slot = (self.keys[layer], self.values[layer]), self.filled

        def join(*own: Tensor) -> list[Tensor]:
            for buffer, new in zip(buffers, own, strict=True):
                buffer[:, slot] = new
            return [buffer[:, : slot + 1].flatten(1, 2) for buffer in buffers]

        return join

    def advance(self) -> None:
        super().advance()
        slots, sink = self.cfg.cached_chunks, self.cfg.sink
        if self.evicts:
            self.slot.add_(1 - sink).remainder_(slots - sink).add_(sink)
        else:
            self.slot.fill_(self.filled - 1)
        slot = torch.arange(self.filled, device=self.slot.device)
        age = sink + (slot - self.slot - 1) % (slots - sink)  # in the ring: the newest is the last
        self.turns = self.places[torch.where((slot < sink) | (self.filled < slots), slot, age)]

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        for i, (buffer, new) in enumerate(((self.raw[layer], k), (self.values[layer], v))):
            if self.sink and self.evicts:
                oldest, sink = buffer.index_select(1, self.slot)[:, 0], self.sink[layer][i]
                buffer[:, 0] = sink.lerp_(oldest.to(sink.dtype), 1 - self.cfg.sink_decay)
            elif self.sink and self.filled == 1:
                self.sink[layer][i] = new
            buffer.index_copy_(1, self.slot, new[:, None].to(buffer.dtype))
        self.keys[layer][:, : self.filled] = rotate(self.raw[layer][:, : self.filled], self.turns)

    def reset(self) -> None:
        self.filled = 0


# -- the transformer ----------------------------------------
def sinusoid(t: Tensor, width: int) -> Tensor:
    """Time (b f) in [0, 1] → (b f width): cosines, then sines, of 1000 t."""
    half = width // 2
    freqs = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = 1000 * t[..., None].float() * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Attention(nn.Module):
    """The projections that both kinds of attention have, under Wan's names."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def queries(self, x: Tensor) -> Tensor:
        """(b n a*d) → (b n a d), cast back after the norm, which CUDA's autocast computes in fp32."""
        return rearrange(self.norm_q(q := self.q(x)).to(q.dtype), "b n (a d) -> b n a d", a=self.heads)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b n a*d) → keys, without positions, and values (b n a d)."""
        k, v = self.norm_k(k := self.k(x)).to(k.dtype), self.v(x)
        return tuple(rearrange(z, "b n (a d) -> b n a d", a=self.heads) for z in (k, v))


class SelfAttention(Attention):
    def forward(self, x, look):
        """x (b n a*d); look: see there → output (b n a*d), own keys before RoPE and values."""
        own = self.read(x)
        return self.o(look(self.queries(x), *own)), own


class CrossAttention(Attention):
    def forward(self, x, words):
        """x (b n a*d), the text (b l a*d), padding too, or its keys and values (b l a d) → (b n a*d)."""
        words = self.read(words) if isinstance(words, Tensor) else words
        return self.o(_attend(self.queries(x), *words, None))


def look(q: Tensor, k: Tensor, v: Tensor, turns: Tensor, join=None, mask=None) -> Tensor:
    """Self-attention of tokens (b n a d) that stand where `turns` says → (b n a*d). join: puts own rotated
    keys and values behind those that are remembered; mask (n n): what may be seen."""
    k = rotate(k, turns)
    k, v = join(k, v) if join else (k, v)
    return _attend(rotate(q, turns), k, v, mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(z, "b n a d -> b a n d") for z in (q, k.to(q.dtype), v.to(q.dtype)))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b a n d -> b n (a d)")


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Layer norm, then a shift and a scale (one is added) per frame: x (b n d), shift and scale (b f 1 d)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (shift.shape[1], -1))  # (b f n d)
    return torch.addcmul(shift, x, 1 + scale).flatten(1, 2).to(dtype)


def _gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y with one gate per frame: x, y (b n d), gate (b f 1 d)."""
    x, y = (z.unflatten(1, (gate.shape[1], -1)) for z in (x, y))  # (b f n d)
    return torch.addcmul(x, y, gate).flatten(1, 2)


class Block(nn.Module):
    def __init__(self, dim: int, ffn: int, heads: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn, self.cross_attn = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)  # Wan's name; before the cross-attention
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))

    def forward(self, x, e, words, look):
        """x (b n d), e (b f 6 d): the time's shifts, scales and gates → x, own keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).unsqueeze(3).unbind(2)
        y, kv = self.self_attn(_modulate(x, shift1, scale1, low := self.norm3.weight.dtype), look)
        x = _gate(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x.to(low)), words)
        return _gate(x, self.ffn(_modulate(x, shift2, scale2, low)), gate2), kv


class Head(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out)

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(_modulate(x, shift, scale, self.head.weight.dtype))


class VideoDiT(nn.Module):
    """`model(xt, t, text)`: x_t (b f c h w), t (b f), text (b l e) → velocity v (b f c h w), and the KV for a
    cache; a pass without one keeps nothing: 30 layers of it are gigabytes."""

    def __init__(self, cfg: Config):
        super().__init__()
        dim, size = cfg.dim, (cfg.patch_time, cfg.patch, cfg.patch)
        self.size, self.predict, self.time_freqs = size, cfg.predict, cfg.time_freqs
        self.head_dim, self.checkpointing = dim // cfg.heads, cfg.checkpointing
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, size, stride=size)
        words = nn.Linear(cfg.text_width, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        self.text_embedding = nn.Sequential(*words)
        self.time_embedding = nn.Sequential(nn.Linear(cfg.time_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.ffn, cfg.heads) for _ in range(cfg.layers))
        self.head = Head(dim, math.prod(size) * cfg.channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    def forward(self, xt, t, text, cache=None, mask=None, positions=None) -> tuple[Tensor, KV]:
        """`cache`: remembered chunks come before this one. For a pass without one, `mask` (f f) and
        `positions` (f,) of latent frames; frames that share a token share their time, position and mask."""
        context = self.text_embedding(text.to(self.patch_embedding.weight.dtype))  # (b l d), read in blocks
        return self.run(xt, t, self.read_time(t), [context] * len(self.blocks), cache, mask, positions)

    def read_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (b f) → what the head and the blocks see of it, (b f' d) and (b f' 6 d), f' tokens along time."""
        with torch.autocast(t.device.type, enabled=False):  # bf16 cannot tell neighbouring times apart
            waves = sinusoid(t[:, :: self.size[0]], self.time_freqs).to(self.head.modulation.dtype)
            e = self.time_embedding(waves)
            return e, rearrange(self.time_projection(e), "b f (six d) -> b f six d", six=6)

    def read_text(self, text: Tensor) -> KV:
        """(b l e) → per block the keys and values (b l a d) that its cross-attention looks at."""
        context = self.text_embedding(text.to(self.patch_embedding.weight.dtype))  # (b l d)
        return [block.cross_attn.read(context) for block in self.blocks]

    def run(self, xt, t, time, words, cache=None, mask=None, positions=None) -> tuple[Tensor, KV]:
        """`forward` on times and texts already read, which a stream does once and not once a pass. A time
        that all samples and frames share may be (1 1).

        With a cache xt may hold two chunks, `time` two times: a finished one, whose keys and values go into
        the cache and nowhere else, and the next one, at t, whose velocity is returned."""
        if cache is not None and mask is not None:
            raise ValueError("a mask is for a pass without a cache: what is remembered is always seen")
        r, p, q = self.size
        f, h, w = xt.shape[1] // r, xt.shape[3] // p, xt.shape[4] // q  # the token grid
        x = rearrange(xt, "b (f r) c (h p) (w q) -> b (f h w) (c r p q)", r=r, p=p, q=q)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(x.to(weight.dtype), weight, self.patch_embedding.bias)  # (b n d)
        if cache is None:
            positions = torch.arange(f * r) if positions is None else positions
            turns = turns_at(positions[::r].to(xt.device) // r, h, w, self.head_dim)
            if mask is not None:
                mask = mask[::r, ::r].to(xt.device).repeat_interleave(h * w, 0).repeat_interleave(h * w, 1)
            looks = [partial(look, turns=turns, mask=mask)] * len(self.blocks)
        else:
            looks = cache.looks(both := xt.shape[1] > cache.chunk)
        kv = []
        for block, *args in zip(self.blocks, words, looks, strict=True):
            recompute = self.checkpointing and torch.is_grad_enabled()
            args = x, time[1], *args
            x, own = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            kv += [own] if cache is not None else []
        if cache is not None and both:
            kv, f, (x, xt, *time) = [], f // 2, (z.chunk(2, dim=1)[1] for z in (x, xt, *time))
        out = self.head(x, time[0]).float()
        out = rearrange(out, "b (f h w) (r p q c) -> b (f r) c (h p) (w q)", f=f, h=h, r=r, p=p, q=q)
        if self.predict == "x":
            out = (xt - out) / rearrange(t.clamp(min=T_MIN), "b f -> b f 1 1 1")
        return out, kv
