"""Stream a video from a prompt, chunk by chunk; frames leave as soon as their chunk is clean.

    python sample.py --prompt "a red circle moving left slowly on a black background"
    python sample.py --prompt "a red ring moving up" --prompt "a blue ring moving down@48" --frames=96
    python sample.py --prompt "a green square moving right quickly" --init=clip.mp4 --out=out/more.gif
    python sample.py --prompt "a green circle moving left" --video=clip.mp4 --strength=.65
    python sample.py wan-1.3b --wan=Wan2.1-T2V-1.3B-Diffusers --student=student.safetensors --prompt "..."
    (and --method=self_forcing or another one if the student is not this project's)

--frames may be any number: mp4 is written as it is made and memory does not grow (gif and webp hold their
frames). A prompt "...@48" takes over at frame 48: the cache is rebuilt with it, so the picture goes on and
the meaning changes.
"""

from engine import openmp  # isort: skip  (before torch loads)

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from codec import Codec
from config import ROOT, BadInput, Config, build, cli, from_words, read_cli
from data import decode, probe, read_clip
from engine.checkpoint import read_header, write_atomically
from engine.graphs import CudaGraphs, settled
from engine.rng import rng_for
from engine.sheet import contact_sheet, video_path, write_video
from live.pace import in_words, played, steps_in_time
from model import RingCache
from networks import find_codec, for_sampling, load_net
from rollout import directly, step_grid, stream
from world.words import embed, left_open, understand


@dataclass(frozen=True)
class Flags:
    prompt: list[str] = field(default_factory=list)  # may be repeated; default: one that the preset knows
    frames: int = 0  # of the video, any number; 0: 64, or all of --video
    seed: int = 0  # another one gives another video
    steps: int = 0  # denoising steps per chunk; 0: as trained
    out: str = "out/sample.mp4"  # or .gif or .webp; a contact sheet lies beside it
    student: str = ""  # default assets/<preset>/stream_r1.safetensors
    codec: str = ""  # default: beside the student
    wan: str = ""  # Wan2.1 in diffusers' format: codec and text; --student may then be another trainer's
    init: str = ""  # a clip or a picture to go on from
    video: str = ""  # a clip to make over, chunk by chunk as it arrives; the video is as long, or shorter
    strength: float = 0.65  # of it: how much of the clip turns into noise; 1: all, only the prompt counts


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    out = video_path(flags.out)
    if out.resolve() in {Path(given).resolve() for given in (flags.init, flags.video) if given}:
        raise BadInput(f"--out={out} would replace --init or --video; name another file")
    if flags.video and (flags.init or flags.wan) or not 0 < flags.strength <= 1:
        what = f"--video={flags.video} --strength={flags.strength} is not possible"
        raise BadInput(f"{what}; allowed: --video without --init and --wan, strength above 0 and at most 1")
    cfg, student, codec, read = open_networks(preset, typed, flags)
    openmp.use_threads(cfg.threads or int(cfg.preset == "tiny"))  # one alone is as fast there, and no burden
    past = start_from(flags.init, codec.to(cfg.device), cfg)
    over, most = arriving(flags.video, codec, cfg) if flags.video else (None, flags.frames or 64)
    flags = replace(flags, frames=min(flags.frames or most, most), prompt=flags.prompt or [cfg.example])
    plan = schedule(flags, cfg, len(past))
    texts = {chunk: read(prompt).to(cfg.device) for prompt, _, chunk in plan}
    del read  # and with it a text encoder that is larger than all else
    rows, made = stretches(plan, flags.frames), []
    zoom = max(1, 256 // min(cfg.height, cfg.width))  # so that a person can see small videos
    kept = {i: torch.empty(0) for shown in rows.values() for i in shown}
    latents = 1 + math.ceil((flags.frames - 1) / cfg.time_stride)

    def frames() -> Iterator[np.ndarray]:
        """Frames as they come, enlarged by nearest neighbour."""
        count, i = math.ceil(latents / cfg.chunk), 0
        given = student, codec, texts, cfg, flags.seed, past, max(count - len(past), 0)
        parts = decoded(*given, over, flags.strength)
        for chunk in tqdm(range(count), unit="chunk"):
            start = time.perf_counter()
            part = next(parts)
            made.extend([(time.perf_counter() - start, len(part))] * (chunk >= len(past)))
            for frame in part[: flags.frames - i]:
                if i in kept:
                    kept[i] = frame / 255
                yield np.kron(rearrange(frame, "c h w -> h w c"), np.ones((zoom, zoom, 1), np.uint8))
                i += 1

    write_atomically(out, lambda name: write_video(name, frames(), cfg.fps))
    sheet = [(caption, torch.stack([kept[i] for i in shown])) for caption, shown in rows.items()]
    shown = contact_sheet(out.with_suffix(".png"), sheet, scale=zoom // 2 or 1)
    report(made, cfg, f"{out} and {shown}", flags)


@torch.inference_mode()
def decoded(student, codec, texts, cfg, seed, past=(), chunks=None, over=None, strength=1.0):
    """Frames as bytes (F 3 H W) on the CPU: the given chunks, then `chunks` new ones, or None: for ever.
    over, strength: as in `stream`. With CUDA, but not with `over`, a chunk after the first is decoded, copied
    and handed out while the next one is denoised."""
    decode, rngs, waiting = codec.stream(), [rng_for(seed, "sample", 0)], []
    cache = RingCache(student, cfg, batch=1, dtype=student.patch_embedding.weight.dtype)
    call = CudaGraphs() if cfg.device == "cuda" else directly
    made = stream(student, texts, cfg, rngs, past=past, cache=cache, call=call, over=over, strength=strength)
    side = torch.cuda.Stream() if cfg.device == "cuda" and over is None else None  # over: without delay
    for i, x in enumerate(chain(past, islice(made, chunks), [None] * bool(side))):
        if x is not None:
            waiting.append(_copied(decode, x, side))
        while len(waiting) > bool(side and i and x is not None):
            frames, done = waiting.pop(0)
            if done:
                done.synchronize()
            yield frames


def _copied(decode, x: Tensor, side: torch.cuda.Stream | None) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to decode and to copy a chunk, beside all else on a stream of its own → bytes, and when."""
    if side:
        side.wait_stream(torch.cuda.current_stream())
        x.record_stream(side)
    with torch.cuda.stream(side):  # None: where we are
        frames = (decode(x)[0].float().clamp(0, 1) * 255).round().byte()
        host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=bool(side))
        return host.copy_(frames, non_blocking=bool(side)), side and side.record_event()


def open_networks(preset: str, typed: dict, flags: Flags):
    """→ config, student, codec, and what turns a prompt into text (1 l e). Raises BadInput."""
    path = Path(flags.student or ROOT / "assets" / preset / "stream_r1.safetensors")
    if bool(flags.wan) != (build(preset, typed).time_stride > 1) or flags.wan and flags.codec:
        raise BadInput("the preset wan-1.3b and --wan=FOLDER go together, without --codec")
    if not path.exists() and not flags.wan:
        raise BadInput(f"no student at {path}; 'python train.py {preset}' makes one, then --student=FILE")
    if flags.wan:
        from wan.networks import open_student  # diffusers and transformers take seconds

        return open_student(path, preset, typed, flags, student_config)
    header = read_header(path)
    cfg = student_config(header, preset, typed, flags.steps)
    student = for_sampling(load_net(path, cfg, header["kind"]), cfg)
    codec = load_net(find_codec(flags.codec, path, header), cfg, "codec")
    vocabulary = header.get("vocabulary", "").split()

    def read(prompt: str) -> Tensor:
        words = understand(prompt, cfg, vocabulary)
        if not cfg.data and (silent := left_open(words)):
            print(f"note: {prompt!r} leaves open {' and '.join(silent)}, which every training caption names")
        return embed([words], cfg)

    print(f"student {path}, trained with --method={cfg.method}")
    return cfg, student, codec, read


def student_config(header: dict, preset: str, typed: dict, steps: int) -> Config:
    """The config the student was trained with, then what was typed; bf16 on CUDA alone, or Wan's or typed."""
    if steps:
        typed = typed | {"denoise": tuple(1 - i / steps for i in range(steps)), "taper": "uniform"}
    cfg = settled(from_words(header["config"], {"device": "auto", "threads": 0, "attention": "auto"} | typed))
    if cfg.preset != preset:
        raise BadInput(f"the student is of preset {cfg.preset!r}, asked for was {preset!r}")
    return replace(cfg, bf16=cfg.bf16 and ("bf16" in typed or preset == "wan-1.3b" or cfg.device == "cuda"))


def schedule(flags: Flags, cfg: Config, given: int) -> list[tuple[str, int, int]]:
    """["A", "B@48"] → (prompt, its first frame, its first chunk of those that are made), after `given`
    chunks. Only digits after the last @ are a frame; the first prompt may say its own, for a text that ends
    so. Raises BadInput."""
    plan, last = [], cfg.pixels(given)
    starts = {cfg.pixels(k): k for k in range(given, given + flags.frames // cfg.chunk + 1)}
    for i, typed in enumerate(flags.prompt):
        found = re.fullmatch(r"(.*)@\s*([0-9]{1,12})\s*", typed, re.DOTALL)
        prompt, frame = (found[1], int(found[2])) if found else (typed, last)
        if not (found and frame in starts and last < frame < flags.frames if i else frame == last):
            where = ", ".join(str(cfg.pixels(k)) for k in (1, 2, 3))
            allowed = f"the first has no @FRAME, the others end in one, where a chunk begins ({where}, ...)"
            between = f"after {last} and before frame {flags.frames}, the end"
            raise BadInput(f"--prompt {typed[:200]!r} is not possible; allowed: {allowed} {between}")
        last = frame
        plan.append((prompt, last, starts[last] - given))
    return plan


def stretches(plan: list[tuple[str, int, int]], frames: int, most: int = 16) -> dict[str, list[int]]:
    """A caption for every prompt's stretch of the video → the frames of it that the contact sheet shows."""
    starts, shown = [0, *(frame for _, frame, _ in plan[1:])], {}
    for (prompt, _, _), start, end in zip(plan, starts, [*starts[1:], frames], strict=True):
        count = min(most, end - start)
        which = [start + i * (end - start) // count for i in range(count)]
        shown[f"{prompt}   (frames {start} to {end - 1})"] = which
    return shown


@torch.no_grad()
def start_from(path: str, codec: Codec, cfg: Config) -> tuple[Tensor, ...]:
    """A clip's last frames, or a picture held for a chunk → latents (1 chunk c h w), chunk after chunk."""
    if not path:
        return ()
    video = read_clip(Path(path), cfg, cfg.pixels(cfg.cached_chunks))
    if len(video) < cfg.pixels(1):
        video = torch.cat([video, video[-1:].expand(cfg.pixels(1) - len(video), -1, -1, -1)])
    count = max(n for n in map(cfg.pixels, range(1, cfg.cached_chunks + 1)) if n <= len(video))
    return codec.encode(video[None, -count:].to(cfg.device).float() / 255).split(cfg.chunk, dim=1)


def arriving(path: str, codec: Codec, cfg: Config) -> tuple[Iterator[Tensor], int]:
    """A clip as it arrives: latents (1 chunk c h w), each chunk decoded and encoded when it is asked for →
    them, and how many frames they have. Raises BadInput."""
    clip = probe(Path(path))
    if (chunks := clip.frames(cfg) // cfg.chunk) < 1:
        raise BadInput(f"--video={path} has {clip.frames(cfg)} frames; allowed: {cfg.chunk} or more")
    parts = (decode(clip, cfg, k * cfg.chunk, cfg.chunk) for k in range(chunks))
    return (codec.encode(x[None].to(cfg.device).float() / 255) for x in parts), chunks * cfg.chunk


def report(made: list[tuple[float, int]], cfg: Config, files: str, flags: Flags) -> None:
    """`made`: of every chunk the seconds that it took, and its frames."""
    if not made:
        return print(f"{files}: only the given frames were asked for")
    seconds, counts = zip(*made, strict=True)
    p50, p99 = (1000 * torch.tensor(seconds[1:] or seconds).quantile(q) for q in (0.5, 0.99))
    found, frames = played(seconds, counts, cfg.fps, bool(flags.video)), cfg.chunk * cfg.time_stride
    print(f"first frame after {1e3 * found['first']:.0f} ms; {1e3 * frames / p50:.0f} frames/s")
    print(f"per chunk of {frames} frames, with decoding: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({cfg.device})")
    grid = step_grid(cfg, cfg.chunks, flags.strength if flags.video else 1.0)
    fit = steps_in_time(len(grid), seconds[1:] or seconds, frames / cfg.fps, cfg.context)
    print(in_words(found, sum(counts), cfg.fps), f"up to {fit} steps a chunk would keep up", sep="; ")
    print(files)


if __name__ == "__main__":
    cli(main)
