"""Flow identities, the causal video transformer, and what it remembers.

Axes everywhere: b batch · f latent frames · c h w latent channels, height, width · F H W pixels · n tokens ·
a heads · d head width · l e text length, width · s reward axes. Latent video is (b f c h w); pixel video in
[0, 1] is video01.

Time t is a float in [0, 1], 1 = noise, one per latent frame (b f):

    x_t = (1 - t) x + t ε        v = dx_t/dt = ε - x        x = x_t - t v

exactly, in fp32; the factor 1000 of other code exists only inside the sinusoidal embedding.

The transformer is Wan2.1's, parameter names included, so that one class serves a toy and the real 1.3B
weights. It is used in three ways: bidirectional (teacher, critic), under a block-causal mask (causal start),
and chunk by chunk with a cache (student). A forward pass never writes: it returns its own keys and values,
and whoever runs it commits them.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import Config

KV = list[tuple[Tensor, Tensor]]  # per layer: keys before RoPE and values, each (b n a d)
SINK_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
class Rope:
    """3-D rotary positions; a head is split over time, rows, columns as in Wan (44, 42, 42 of 128).

    Frequencies are computed where they are used: as buffers they would follow a network into bf16.
    """

    def __init__(self, head_dim: int):
        space = 2 * (head_dim // 6)
        self.widths = (head_dim - 2 * space, space, space)

    def turns(self, frames: Tensor, h: int, w: int) -> Tensor:
        """Frame positions (f,) and a token grid → (f*h*w, 1, d/2, 2): cos θ and sin θ for every token."""
        device = frames.device
        places = torch.cartesian_prod(frames, *(torch.arange(n, device=device) for n in (h, w)))  # (f*h*w, 3)
        freqs = [10000.0 ** (-torch.arange(0, n, 2, device=device) / n) for n in self.widths]
        angle = torch.cat([places[:, i, None] * f for i, f in enumerate(freqs)], dim=1)[:, None]
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (... n a d) by the tokens' turns (... n 1 d/2 2), in fp32.

    A compiler fuses real numbers into what stands around them; without one a complex product is the only
    way that takes one kernel. The two agree to rounding.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return pairs.flatten(-2).to(x.dtype)


# -- what a chunk may see ----------------------------------------
def teacher_forcing(frames: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Mask (2f 2f), positions (2f) for [clean | noisy]: a noisy chunk sees itself and the clean past."""
    block = torch.arange(frames) // chunk
    own, past = block[:, None] == block, block[:, None] > block
    mask = torch.cat([torch.cat([own | past, torch.zeros_like(own)], 1), torch.cat([past, own], 1)])
    return mask, torch.arange(frames).repeat(2)


class ListCache:
    """The readable cache, for training: a list of chunks, sink first, then oldest to newest.

    Nothing is overwritten in place, so a backward pass that recomputes activations sees what the forward pass
    saw. Positions are relative to the window: the oldest chunk is always at 0, and a stream may run for ever.
    """

    def __init__(self, model: "VideoDiT", cfg: Config):
        self.rope, self.cfg, self.device = model.rope, cfg, model.patch_embedding.weight.device
        self.reset()

    mask = None  # everything remembered is seen

    def read(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Rotated keys and values (b m a d) of everything remembered, or None when nothing is."""
        return (self.keys[layer], self.values[layer]) if self.chunks else None

    def commit(self, kv: KV) -> None:
        """Remember a chunk. When the window is full the oldest leaves, into the sink if that is an EMA."""
        cfg = self.cfg
        self.chunks.append(kv if cfg.kv_grad else [(k.detach(), v.detach()) for k, v in kv])
        if len(self.chunks) > cfg.cached_chunks:
            oldest = self.chunks.pop(cfg.sink)
            if cfg.sink_mode == "ema":
                dtype, share = SINK_DTYPES[cfg.sink_dtype], 1 - cfg.sink_decay
                self.chunks[0] = [
                    (k.to(dtype).lerp(new_k.to(dtype), share), v.to(dtype).lerp(new_v.to(dtype), share))
                    for (k, v), (new_k, new_v) in zip(self.chunks[0], oldest, strict=True)
                ]
        turns = self._place()
        layers = [list(zip(*chunks, strict=True)) for chunks in zip(*self.chunks, strict=True)]
        like = kv[0][0].dtype
        self.keys = [rotate(torch.cat([k.to(like) for k in ks], dim=1), turns) for ks, _ in layers]
        self.values = [torch.cat([v.to(like) for v in vs], dim=1) for _, vs in layers]

    def _place(self) -> Tensor:
        """Turns of what is remembered; those of the chunk that comes next are kept in `turns`."""
        places = torch.arange((1 + len(self.chunks)) * self.cfg.chunk_tokens, device=self.device)
        turns = self.rope.turns(places, *self.cfg.grid)
        past, self.turns = turns.split([len(turns) - self.cfg.tokens, self.cfg.tokens])
        return past

    def reset(self) -> None:
        self.chunks: list[KV] = []
        # per layer, all chunks joined and rotated: once a chunk, not once a pass
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._place()


class RingCache:
    """The fast cache: one static buffer a layer, slots [sink | ring], the evicted slot is overwritten in
    place.

    How full it is and where slots stand are tensors, and empty slots are masked: every chunk runs the same
    operations on the same shapes without asking the device anything, which is what a CUDA graph needs. No
    gradient; streaming only.
    """

    def __init__(self, model: "VideoDiT", cfg: Config, batch: int, dtype=torch.float32):
        device = model.patch_embedding.weight.device
        shape = (cfg.layers, batch, cfg.cached_chunks, cfg.tokens, cfg.heads, cfg.dim // cfg.heads)
        self.rope, self.cfg = model.rope, cfg
        self.raw, self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
        self.sink = torch.zeros(2, *shape[:2], *shape[3:], dtype=SINK_DTYPES[cfg.sink_dtype], device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)  # chunks committed so far
        # which of what `read` gives and of the current chunk counts; its own tokens, at the end, always do
        self.mask = torch.ones(1, 1, 1, (1 + shape[2]) * cfg.tokens, dtype=torch.bool, device=device)
        own = self.rope.turns(torch.arange(cfg.chunk_tokens, device=device), *cfg.grid)
        self.turns = torch.empty_like(own)
        self.reset()

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (b m a d) of all slots; `mask` (1 1 1 m+n): which of them are filled."""
        kv = (self.keys[layer], self.values[layer])
        return tuple(rearrange(z, "b m n a d -> b (m n) a d") for z in kv)

    @torch.no_grad()
    def commit(self, kv: KV) -> None:
        cfg, slots = self.cfg, self.cfg.cached_chunks
        ring = slots - cfg.sink
        new = [torch.stack(parts) for parts in zip(*kv, strict=True)]  # keys, values: (layers b n a d)
        slot = torch.where(self.count < slots, self.count, cfg.sink + (self.count - cfg.sink) % ring)[None]
        if cfg.sink_mode == "ema":
            evicted = torch.stack([z.index_select(2, slot)[:, :, 0] for z in (self.raw, self.values)])
            ema = self.sink.lerp(evicted.to(self.sink.dtype), 1 - cfg.sink_decay)
            first = torch.stack(new).to(self.sink.dtype)
            kept = torch.where(self.count >= slots, ema, self.sink)
            self.sink.copy_(torch.where(self.count == 0, first, kept))
        self.raw.index_copy_(2, slot, new[0].unsqueeze(2).to(self.raw.dtype))
        self.values.index_copy_(2, slot, new[1].unsqueeze(2).to(self.values.dtype))
        if cfg.sink_mode == "ema":
            self.raw[:, :, 0], self.values[:, :, 0] = self.sink[0], self.sink[1]
        self.count += 1
        self._place(slots, ring)

    def _place(self, slots: int, ring: int) -> None:
        """Rotate every slot's keys to where it now stands in the window, and place the next chunk behind."""
        cfg = self.cfg
        slot = torch.arange(slots + 1, device=self.count.device)
        age = (slot - self.count) % ring + cfg.sink  # of the ring's slots, once it is full
        order = torch.where((slot < cfg.sink) | (self.count <= slots), slot, age)
        order[-1] = self.count.clamp(max=slots)
        within = torch.arange(cfg.chunk_tokens, device=slot.device)
        frames = (order[:, None] * cfg.chunk_tokens + within).flatten()
        turns = self.rope.turns(frames, *cfg.grid).unflatten(0, (slots + 1, -1))
        self.keys.copy_(rotate(self.raw, turns[:-1]))
        self.turns.copy_(turns[-1])
        self.mask[..., : -cfg.tokens] = (slot[:-1] < self.count).repeat_interleave(cfg.tokens)

    @torch.no_grad()
    def reset(self) -> None:
        self.count.zero_()
        self.sink.zero_()
        self._place(self.cfg.cached_chunks, self.cfg.cached_chunks - self.cfg.sink)


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
        """(b n a*d) → (b n a d)."""
        return rearrange(self.norm_q(self.q(x)), "b n (a d) -> b n a d", a=self.heads)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b n a*d) → keys, without positions, and values (b n a d)."""
        k, v = self.norm_k(self.k(x)), self.v(x)
        return tuple(rearrange(z, "b n (a d) -> b n a d", a=self.heads) for z in (k, v))


class SelfAttention(Attention):
    def forward(self, x, turns, past=None, mask=None):
        """x (b n a*d); past: keys and values before it; mask: what may be seen of past and own tokens
        → output (b n a*d), own keys before RoPE and values."""
        q, own = self.queries(x), self.read(x)
        k, v = rotate(own[0], turns), own[1]
        if past is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=1) for old, new in zip(past, (k, v), strict=True))
        return self.o(_attend(rotate(q, turns), k, v, mask)), own


class CrossAttention(Attention):
    def forward(self, x, words):
        """x (b n a*d), keys and values (b l a d) of the text, padding too, as in Wan → (b n a*d)."""
        return self.o(_attend(self.queries(x), *words, None))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (rearrange(z, "b n a d -> b a n d") for z in (q, k.to(q.dtype), v.to(q.dtype)))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b a n d -> b n (a d)")


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm, then a shift and a scale (one is added) per frame: x (b n d), shift and scale (b f 1 d)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (shift.shape[1], -1))  # (b f n d)
    return torch.addcmul(shift, x, 1 + scale).flatten(1, 2)


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

    def forward(self, x, e, words, turns, past=None, mask=None):
        """x (b n d), e (b f 6 d): the time's shifts, scales and gates → x, own keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).unsqueeze(3).unbind(2)
        y, kv = self.self_attn(_modulate(x, shift1, scale1), turns, past, mask)
        x = _gate(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x.to(self.norm3.weight.dtype)), words)
        return _gate(x, self.ffn(_modulate(x, shift2, scale2)), gate2), kv


class Head(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out)

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(_modulate(x, shift, scale))


class VideoDiT(nn.Module):
    """`model(xt, t, text)`: x_t (b f c h w), t (b f), text (b l e) → velocity v (b f c h w), and the KV for a
    cache; a pass without one keeps nothing: 30 layers of it are gigabytes."""

    def __init__(self, cfg: Config):
        super().__init__()
        dim, size = cfg.dim, (cfg.patch_time, cfg.patch, cfg.patch)
        self.size, self.predict, self.time_freqs = size, cfg.predict, cfg.time_freqs
        self.checkpointing = cfg.checkpointing
        self.patch_embedding = nn.Conv3d(cfg.channels, dim, size, stride=size)
        words = nn.Linear(cfg.text_width, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        self.text_embedding = nn.Sequential(*words)
        self.time_embedding = nn.Sequential(nn.Linear(cfg.time_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, cfg.ffn, cfg.heads) for _ in range(cfg.layers))
        self.head = Head(dim, math.prod(size) * cfg.channels)
        self.rope = Rope(dim // cfg.heads)
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
        return self.run(xt, t, self.read_time(t), self.read_text(text), cache, mask, positions)

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
        that all samples and frames share may be (1 1)."""
        if cache is not None and mask is not None:
            raise ValueError("a mask is for a pass without a cache: what is remembered is always seen")
        r, p, q = self.size
        f, h, w = xt.shape[1] // r, xt.shape[3] // p, xt.shape[4] // q  # the token grid
        x = rearrange(xt, "b (f r) c (h p) (w q) -> b (f h w) (c r p q)", r=r, p=p, q=q)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(x.to(weight.dtype), weight, self.patch_embedding.bias)  # (b n d)
        if cache is None:
            positions = torch.arange(f * r) if positions is None else positions
            turns = self.rope.turns(positions[::r].to(xt.device) // r, h, w)
        else:
            turns = cache.turns
        if mask is not None:
            mask = mask[::r, ::r].to(xt.device).repeat_interleave(h * w, 0).repeat_interleave(h * w, 1)
        seen = cache.mask if cache else mask
        kv = []
        for i, block in enumerate(self.blocks):
            args = (x, time[1], words[i], turns, cache.read(i) if cache else None, seen)
            recompute = self.checkpointing and torch.is_grad_enabled()
            x, own = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            kv += [own] if cache is not None else []
        out = self.head(x, time[0]).float()
        out = rearrange(out, "b (f h w) (r p q c) -> b (f r) c (h p) (w q)", f=f, h=h, r=r, p=p, q=q)
        if self.predict == "x":
            out = (xt - out) / rearrange(t.clamp(min=T_MIN), "b f -> b f 1 1 1")
        return out, kv
