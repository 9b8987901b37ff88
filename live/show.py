"""A stream that can be asked for something else before every chunk: another prompt, seed, number of steps."""

import io
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import ROOT, Config
from engine.checkpoint import read_header
from engine.graphs import CudaGraphs
from engine.processes import largest_process
from engine.rng import rng_for
from engine.sheet import to_uint8, write_video
from live.overlay import MAPS, judged, remembered
from model import RingCache
from networks import find_codec, load_net
from rollout import directly, step_grid, stream
from world.words import KINDS

_GPU = threading.Lock()  # while a graph is captured nobody else may use it


@dataclass(frozen=True)
class Wish:
    """What a viewer wants its next chunk to be."""

    prompt: str
    text: object  # the prompt as the student reads it
    seed: int
    steps: int  # of denoising
    run: int = 0  # counts its starts
    asked: float = 0.0  # seconds, when it gave the prompt
    map: str = ""  # of overlay.MAPS, or none
    strength: float = 0.0  # video to video: how much of the camera's pictures turns into noise; 0: no camera
    over: tuple[bytes, ...] = ()  # its pictures for a chunk, H W 4 bytes each: red, green, blue, anything


@dataclass(frozen=True)
class Chunk:
    wish: Wish  # that it was made for
    frames: list[bytes]  # JPEGs
    maps: list[bytes]  # one a frame, or none
    seconds: float  # that it took
    about: dict  # for the page: its number, what it attends to, scores


class Show:
    """One stream. `show(wish)` → its next chunk; what has changed in the wish takes effect there."""

    def __init__(self, cfg, student, codec, reward):
        self.cfg, self.student, self.codec, self.reward = cfg, student, codec, reward
        self.wish: Wish | None = None

    def start(self, wish: Wish) -> None:
        self.decode, self.number, self.rebuilt, self.restarts = self.codec.stream(), 0, 0, 0
        self.first, self.recent = [], deque(maxlen=self.cfg.cached_chunks - self.cfg.sink)  # as `stream` does
        self.clip = deque(maxlen=self.cfg.chunks)
        self.open(wish)

    def open(self, wish: Wish) -> None:
        """The student's stream from here on: the chunks so far, if any, are its past."""
        cfg, self.rebuilt = self.cfg, self.number
        if wish.steps != len(step_grid(cfg, cfg.frames)):
            cfg = replace(cfg, denoise=tuple(1 - i / wish.steps for i in range(wish.steps)), taper="uniform")
        self.texts, self.index = {0: wish.text}, 0
        with torch.inference_mode():
            cache = RingCache(self.student, cfg, 1, self.student.patch_embedding.weight.dtype)
        call = CudaGraphs() if cfg.device == "cuda" else directly
        rngs, past = [rng_for(wish.seed, "sample", self.restarts)], (*self.first, *self.recent)
        over = (self.source for _ in repeat(None)) if wish.strength else None
        how = {"past": past, "cache": cache, "call": call, "over": over, "strength": wish.strength}
        self.parts = stream(self.student, self.texts, cfg, rngs, **how)

    def __call__(self, wish: Wish) -> Chunk:
        begin = time.monotonic()
        with _GPU if self.cfg.device == "cuda" else nullcontext():
            if self.wish is None or wish.run != self.wish.run:
                self.start(wish)
            elif (wish.steps, wish.strength) != (self.wish.steps, self.wish.strength):
                self.restarts += 1
                self.open(wish)
            elif wish.text is not self.wish.text:
                self.texts[self.index], self.rebuilt = wish.text, self.number
            self.wish, about = wish, remembered(self.cfg, self.number, self.rebuilt)
            with torch.inference_mode():
                if wish.over:
                    self.source = self.codec.encode(video_of(wish.over, self.cfg))
                x = next(self.parts)
                video01 = self.decode(x)[0].float().cpu()
            self.texts.clear()  # they have been read
            (self.first if len(self.first) < self.cfg.sink else self.recent).append(x)
            self.clip.append(video01)
            maps = []
            if wish.map and len(self.clip) == self.cfg.chunks:
                clip = torch.cat(list(self.clip))[None].to(self.cfg.device)
                found = judged(self.reward, clip, wish.text, self.cfg)
                maps = found.pop("maps")[wish.map][-len(video01) :]
                about |= found | {"map": maps.shape[1:]}
        frames = [jpeg(frame) for frame in to_uint8(video01).numpy()]
        about["chunk"], self.number, self.index = self.number, self.number + 1, self.index + 1
        return Chunk(wish, frames, [m.tobytes() for m in maps], time.monotonic() - begin, about)


def video_of(pictures: tuple[bytes, ...], cfg: Config) -> torch.Tensor:
    """A camera's pictures → video01 (1 F 3 H W)."""
    pixels = torch.tensor(np.frombuffer(b"".join(pictures), np.uint8), device=cfg.device)
    return pixels.view(1, -1, cfg.height, cfg.width, 4)[..., :3].permute(0, 1, 4, 2, 3).float() / 255


@dataclass(frozen=True)
class Studio:
    """Where streams come from. These functions are called in threads."""

    hello: dict  # for the page: sizes, rates, words
    read: Callable[[str], object]  # a prompt → text; raises BadInput
    open: Callable[[], Callable[[Wish], Chunk]]  # a new stream: a wish → its next chunk


def studio_of(cfg: Config, student, codec, read, flags) -> Studio:
    """Streams of this student, shown as demo.py's flags say; with the reward beside the codec, if there is
    one."""
    codec, reward, words = codec.to(cfg.device), None, {}
    if not flags.wan:
        path = Path(flags.student or ROOT / "assets" / cfg.preset / "stream_r1.safetensors")
        header = read_header(path)
        words = {"word": header.get("vocabulary", "").split()} if cfg.data else KINDS
        beside = find_codec(flags.codec, path, header).with_name("reward.safetensors")
        reward = load_net(beside, cfg, "reward").requires_grad_(False) if beside.exists() else None
    hello = {
        "size": [cfg.height, cfg.width], "fps": cfg.fps, "rate": flags.deadline or cfg.fps, "words": words,
        "chunk": cfg.chunk * cfg.time_stride, "steps": len(step_grid(cfg, cfg.frames)), "adapt": flags.adapt,
        "streams": flags.streams, "maps": [*MAPS] if reward else [], "file": "stream.mp4",
        "engine": f"the server: {cfg.preset}, {cfg.device}", "camera": cfg.chunk * (cfg.time_stride == 1),
        "prompt": cfg.example if words is KINDS else "",
    }  # fmt: skip
    return Studio(
        hello, lambda prompt: read(prompt).to(cfg.device), partial(Show, cfg, student, codec, reward)
    )


def jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def mp4(frames: list[bytes], fps: int, zoom: int) -> bytes:
    """JPEGs → a video file, every pixel `zoom` pixels wide and high."""
    with tempfile.TemporaryDirectory() as folder:
        images = (np.asarray(Image.open(io.BytesIO(frame))) for frame in frames)
        grown = (np.kron(image, np.ones((zoom, zoom, 1), np.uint8)) for image in images)
        write_video(Path(folder) / "clip.mp4", grown, fps)
        return (Path(folder) / "clip.mp4").read_bytes()


def memory() -> float:
    """The most MiB that were in use: of the device with CUDA, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 or largest_process("RUSAGE_SELF")
