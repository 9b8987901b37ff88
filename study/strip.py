"""The moving strip at the top of README: teacher, causal start and student on the same prompts and noise.

python -m study.strip                            # → assets/strip.webp, from the shipped nets
python -m study.strip --student=out/train/student.safetensors --out=out/strip.webp
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from config import ROOT, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder, write_atomically
from engine.rng import rng_for
from engine.sheet import to_uint8
from networks import load_net
from rollout import rollout, sample_teacher
from world.words import parse, tokenize

PROMPTS = (
    "a red circle moving left slowly on a black background",
    "a yellow square moving down slowly on a grey background",
    "a cyan cross moving up slowly on a white background",
    "a green triangle moving right quickly on a black background",
    "a magenta ring moving right slowly on a grey background",
)
ROWS = {
    "teacher": "teacher: sees the whole clip, 25 steps",
    "causal": "start: sees the past alone, 4 steps, before distillation",
    "stream_r1": "student: the same 4 steps, after it",
}


@dataclass(frozen=True)
class Flags:
    nets: str = str(ROOT / "assets/tiny")  # folder with codec, teacher, causal and student
    student: str = ""  # default: stream_r1.safetensors among the nets
    seed: int = 1  # of the noise
    zoom: int = 3  # screen pixels per pixel
    out: str = str(ROOT / "assets/strip.webp")


@torch.no_grad()
def clips(path: Path, codec_path: Path, seed: int) -> Tensor:
    """A net's clips for PROMPTS → video01 (b F 3 H W)."""
    header = read_header(path)
    cfg = from_words(header["config"], {"device": "cpu"})
    net, codec = load_net(path, cfg, header["kind"]), load_net(codec_path, cfg, "codec")
    text = tokenize([parse(p, cfg.objects) for p in PROMPTS], cfg.text_length, cfg.text_width)
    rngs = [rng_for(seed, "strip", i) for i in range(len(PROMPTS))]
    return codec.decode((sample_teacher if header["kind"] == "teacher" else rollout)(net, text, cfg, rngs))


def picture(rows: np.ndarray, gap: int = 4, label: int = 20) -> Image.Image:
    """One frame of all clips, (rows H b W 3) bytes → the prompts, then each row under its caption."""
    count, high, clips, wide, _ = rows.shape
    top = 2 * label
    sheet = Image.new("RGB", (clips * (wide + gap) - gap, top + count * (high + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for b, prompt in enumerate(PROMPTS):
        colour, shape, motion, speed, _ = parse(prompt, 1)
        draw.text(
            (b * (wide + gap) + 2, 4), f"{colour} {shape}\n{motion} {speed}", fill="black", font_size=13
        )
    for r, (row, words) in enumerate(zip(rows, ROWS.values(), strict=True)):
        draw.text((2, top + r * (high + label) + 4), words, fill="dimgrey", font_size=13)
        for b in range(clips):
            clip = Image.fromarray(np.ascontiguousarray(row[:, b]))
            sheet.paste(clip, (b * (wide + gap), top + r * (high + label) + label))
    return sheet


def main() -> None:
    openmp.use_threads(1)
    _, _, flags = read_cli(None, Flags, __doc__)
    nets, out = Path(flags.nets), Path(flags.out)
    writable_folder(str(out.parent))
    paths = {kind: nets / f"{kind}.safetensors" for kind in ROWS}
    paths["stream_r1"] = Path(flags.student or paths["stream_r1"])
    rows = [clips(path, nets / "codec.safetensors", flags.seed) for path in paths.values()]
    video = rearrange(to_uint8(torch.stack(rows)), "r b f h w c -> f r h b w c").numpy()
    video = video.repeat(flags.zoom, axis=2).repeat(flags.zoom, axis=4)  # (F rows H b W 3)
    pictures = [picture(frame) for frame in video]
    how = dict(save_all=True, append_images=pictures[1:], duration=1000 / 8, loop=0, quality=75, method=6)
    write_atomically(out, lambda name: pictures[0].save(name, **how))
    print(f"{out}: {len(pictures)} frames, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    cli(main)
