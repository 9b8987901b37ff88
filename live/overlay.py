"""What a viewer may look at while a stream runs: where and when the reward looks, what the cache holds."""

import numpy as np
from torch import Tensor

from config import Config
from reward import AXES
from saliency import factorise, fuse_axes, reward_saliency, to_latent_grid

MAPS = ("fused", *AXES)


def judged(reward, video01: Tensor, text: Tensor, cfg: Config) -> dict:
    """A clip (1 F 3 H W) and its prompt → the axes' scores, W_time of the clip's frames (mean 1), and bytes
    (F h w) that say where: |∂r/∂pixel| of every axis, and "fused", training's W_space on latent cells."""
    scores, saliency = reward_saliency(reward, video01, text)
    cells = to_latent_grid(saliency, *cfg.latent_shape[1:], cfg.time_stride)
    time, space = factorise(fuse_axes(cells, scores, cfg.fuse_temperature), cfg.floor_time, cfg.floor_space)
    maps = {name: _bytes(x) for name, x in zip(MAPS, (space[0], *saliency[0]), strict=True)}
    return {"scores": scores[0].tolist(), "time": time[0].tolist(), "maps": maps}


def _bytes(x: Tensor) -> np.ndarray:
    """(F h w) → from the smallest, 0, to the largest, 255, of every frame."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (255 * (x - low) / (high - low).clamp(min=1e-12)).byte().cpu().numpy()


def remembered(cfg: Config, chunk: int, rebuilt: int = 0) -> dict:
    """What the passes of chunk number `chunk` attend to besides the chunk itself: numbers of the chunks in
    the sink and in the ring, and how many more an EMA sink has averaged since the cache was `rebuilt`."""
    ring = cfg.cached_chunks - cfg.sink
    recent = range(max(cfg.sink, chunk - ring), max(cfg.sink, chunk))
    evicted = range(max(cfg.sink, rebuilt - ring), recent.start) if cfg.sink_mode == "ema" else ()
    return {"sink": list(range(min(cfg.sink, chunk))), "ring": list(recent), "averaged": len(evicted)}
