"""Ours against diffusers: Wan for the bidirectional pass, SkyReels V2 (Wan's keys, a time per frame,
block-causal attention) for everything causal. Random weights of our shape go through diffusers' own
converter."""

from dataclasses import replace

import pytest
import torch
from conftest import block_causal

from model import ListCache, RingCache

pytest.importorskip("diffusers")
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # noqa: E402
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor  # noqa: E402

close = dict(atol=5e-5, rtol=5e-5)


@pytest.fixture
def cfg(tiny):
    """A head of 20 is split 8, 6, 6 over time, rows and columns: unequal, as the 44, 42, 42 of the real
    one."""
    return replace(tiny, predict="v", dim=40, frames=12, chunk=2, window=0, sink=0, sink_mode="none")


def theirs(kind, cfg, ours, **more):
    """diffusers' network with our weights; a missing or unknown name fails."""
    network = kind(
        patch_size=(cfg.patch_time, cfg.patch, cfg.patch), num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, in_channels=cfg.channels, out_channels=cfg.channels,
        text_dim=cfg.text_width, freq_dim=cfg.time_freqs, ffn_dim=cfg.ffn, num_layers=cfg.layers, **more,
    ).eval()  # fmt: skip
    network.load_state_dict(convert_wan_transformer_to_diffusers(dict(ours.state_dict())), strict=True)

    @torch.no_grad()
    def call(xt, t, text, **options):
        return network(xt.transpose(1, 2), 1000 * t, text, **options).sample.transpose(1, 2)

    return network, call


def inputs(cfg):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, cfg.frames, *cfg.latent_shape, generator=g)
    t = torch.rand(2, cfg.frames, generator=g)
    return x, t, torch.randn(2, cfg.text_length, cfg.text_width, generator=g)


@torch.no_grad()
def chunk_by_chunk(model, cfg, cache, xt, t, text):
    out = []
    for xk, tk in zip(xt.split(cfg.chunk, 1), t.split(cfg.chunk, 1), strict=True):
        v, kv = model(xk, tk, text, cache)
        cache.commit(kv)
        out.append(v)
    return torch.cat(out, 1)


@pytest.mark.parametrize("patch_time", [1, 2])
def test_bidirectional_equals_wan(cfg, build, patch_time):
    """Would catch any difference to Wan's block: names, order of norms, split of the rotary width, order of
    cosines and sines, order of a patch's numbers on the way in and out, or the factor 1000."""
    cfg = replace(cfg, patch_time=patch_time)
    ours = build(cfg)
    _, wan = theirs(WanTransformer3DModel, cfg, ours)
    xt, t, text = inputs(cfg)
    with torch.no_grad():
        v, _ = ours(xt, t[:, :1].expand(-1, cfg.frames), text)
    torch.testing.assert_close(v, wan(xt, t[:, 0], text), **close)


def test_times_per_frame_equal_skyreels(cfg, build):
    """Would catch a time that reaches the wrong frame's tokens, or only the first frame's time being used."""
    ours = build(cfg)
    _, skyreels = theirs(SkyReelsV2Transformer3DModel, cfg, ours)
    xt, t, text = inputs(cfg)
    with torch.no_grad():
        v, _ = ours(xt, t, text)
    torch.testing.assert_close(v, skyreels(xt, t, text, enable_diffusion_forcing=True), **close)


@pytest.mark.parametrize("chunk", [2, 3])
def test_block_causal_equals_skyreels(cfg, build, chunk):
    """Would catch blocks that begin in the wrong place, in the mask and in either cache."""
    cfg = replace(cfg, chunk=chunk)
    ours = build(cfg)
    network, skyreels = theirs(SkyReelsV2Transformer3DModel, cfg, ours)
    xt, t, text = inputs(cfg)
    bidirectional = skyreels(xt, t, text, enable_diffusion_forcing=True)
    network._set_ar_attention(chunk)
    expected = skyreels(xt, t, text, enable_diffusion_forcing=True)
    assert (expected - bidirectional).abs().max() > 0.1, "the mask does nothing"
    with torch.no_grad():
        v, _ = ours(xt, t, text, mask=block_causal(cfg.frames, chunk))
    torch.testing.assert_close(v, expected, **close)
    for cache in (ListCache(ours, cfg), RingCache(ours, cfg, 2)):
        torch.testing.assert_close(chunk_by_chunk(ours, cfg, cache, xt, t, text), expected, **close)


class MaskedProcessor(SkyReelsV2AttnProcessor):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, x, context=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, x, context, self.mask, rotary_emb)


@pytest.mark.parametrize("sink", [0, 1, 2])
def test_window_equals_skyreels(cfg, build, sink):
    """Would catch a window that counts the sink or the current chunk wrongly. The mask is written as the
    released code counts, in frames: everything up to the chunk's end that is in the sink or among the last
    (local - sink) frames."""
    cfg = replace(cfg, window=4, sink=sink, sink_mode="static" if sink else "none")
    ours, local = build(cfg), 4 * cfg.chunk
    network, skyreels = theirs(SkyReelsV2Transformer3DModel, cfg, ours)
    frame = torch.arange(cfg.frames)
    end = (frame // cfg.chunk + 1) * cfg.chunk
    kept = (frame < sink * cfg.chunk) | (frame >= end[:, None] - (local - sink * cfg.chunk))
    mask = (frame < end[:, None]) & kept
    n = cfg.grid[0] * cfg.grid[1]
    for block in network.blocks:
        block.attn1.set_processor(MaskedProcessor(mask.repeat_interleave(n, 0).repeat_interleave(n, 1)))
    xt, t, text = inputs(cfg)
    expected = skyreels(xt, t, text, enable_diffusion_forcing=True)
    with torch.no_grad():
        v, _ = ours(xt, t, text, mask=block_causal(cfg.frames, cfg.chunk, cfg.window, sink))
    torch.testing.assert_close(v, expected, **close)
    if not sink:  # the caches move a sink up to the window, which no mask can say
        for cache in (ListCache(ours, cfg), RingCache(ours, cfg, 2)):
            torch.testing.assert_close(chunk_by_chunk(ours, cfg, cache, xt, t, text), expected, **close)
