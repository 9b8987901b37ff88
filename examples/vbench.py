"""Videos of prompts, named and counted as VBench (Huang et al. 2024) wants them: PROMPT-0.mp4 to -4.mp4.

    python -m examples.vbench --prompts=prompts.txt --student=out/train/student.safetensors
    torchrun --nproc_per_node=8 -m examples.vbench wan-1.3b --prompts=all.txt --wan=... --student=...

Video i of every prompt is made with --seed + i. What is there stays: a stopped run goes on when it is started
again. Processes share the videos between them; --videoalign, afterwards and with one process, judges them:
scores.csv has a row a video, and the means are printed.
"""

from engine import openmp  # isort: skip  (before torch loads)

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import torch
from tqdm import tqdm

from config import BadInput, build, cli, read_cli
from data import read_text
from engine.checkpoint import writable_folder, write_atomically
from engine.processes import pick_device
from engine.sheet import write_video
from reward import AXES
from sample import Flags as SampleFlags
from sample import decoded, open_networks


@dataclass(frozen=True)
class Flags:
    prompts: str = ""  # a text file, one prompt a line, such as VBench's all_dimension.txt
    count: int = 5  # videos a prompt
    seed: int = 0  # of the first video of each prompt
    student: str = ""  # as in sample.py
    codec: str = ""  # as in sample.py
    wan: str = ""  # as in sample.py
    videoalign: str = ""  # as in train.py
    out: str = "out/vbench"  # the folder of the videos


def planned(flags: Flags) -> list[tuple[str, int, Path]]:
    """(prompt, number, file) of every video. Raises BadInput, also for a prompt that names no file."""
    lines = [line.strip() for line in read_text(Path(flags.prompts)).split("\n")]
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts or not flags.count:
        raise BadInput(f"--prompts={flags.prompts} --count={flags.count}: nothing to do; one prompt a line")
    for prompt in prompts:
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > 230:
            raise BadInput(f"{prompt[:80]!r} cannot be a file name; allowed: no '/', at most 230 bytes")
    return [(p, i, Path(flags.out) / f"{p}-{i}.mp4") for p in prompts for i in range(flags.count)]


def make(jobs: list, preset: str, typed: dict, flags: Flags) -> None:
    """Write the videos of `jobs` that are not there yet."""
    own = SampleFlags(student=flags.student, codec=flags.codec, wan=flags.wan)
    cfg, student, codec, read = open_networks(preset, typed, own)
    texts = {prompt: read(prompt) for prompt in dict.fromkeys(p for p, _, _ in jobs)}
    del read  # and a text encoder with it
    codec = codec.to(cfg.device)
    for prompt, i, path in tqdm(jobs, "videos"):
        parts = decoded(
            student, codec, {0: texts[prompt].to(cfg.device)}, cfg, flags.seed + i, chunks=cfg.chunks
        )
        frames = (frame.permute(1, 2, 0).numpy() for part in parts for frame in part)
        write_atomically(path, lambda name, frames=frames: write_video(name, frames, cfg.fps))


@torch.no_grad()
def judge(jobs: list, reward, out: Path, device: str) -> dict[str, float]:
    """VideoAlign's scores of the videos, as large as they are → the mean on each axis."""
    rows = []
    for prompt, i, path in tqdm(jobs, "scores"):
        video = torch.from_numpy(iio.imread(path, plugin="FFMPEG"))  # (F H W 3)
        video01 = video.permute(0, 3, 1, 2)[None].to(device).float() / 255
        rows.append([prompt, i, *(round(x, 4) for x in reward(video01, [prompt])[0].tolist())])

    def write(name: Path) -> None:
        with open(name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["prompt", "video", *AXES], *rows])

    write_atomically(out / "scores.csv", write)
    return {axis: sum(row[2 + k] for row in rows) / len(rows) for k, axis in enumerate(AXES)}


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    out, jobs = writable_folder(flags.out), planned(flags)
    openmp.use_threads(typed.get("threads", 0))
    rank, world, local = (int(os.environ.get(k, v)) for k, v in zip(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010", strict=True))  # fmt: skip
    if flags.videoalign and world > 1:
        raise BadInput("--videoalign is not possible with several processes; allowed: afterwards, with one")
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    if left := [job for job in jobs[rank::world] if not job[2].exists()]:
        make(left, preset, typed, flags)
    print(f"{out}: {len(jobs[rank::world])} of {len(jobs)} videos are this process' and there")
    if flags.videoalign:
        from wan.videoalign import load_videoalign

        device = pick_device(build(preset, typed))
        fps = round(iio.immeta(jobs[0][2], plugin="FFMPEG")["fps"])
        found = judge(jobs, load_videoalign(flags.videoalign, fps).to(device), out, device)
        print(f"{out}/scores.csv:", ", ".join(f"{axis} {x:.3f}" for axis, x in found.items()))


if __name__ == "__main__":
    cli(main)
