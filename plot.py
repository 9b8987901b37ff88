"""Pictures: contact sheets, curves of a run, and the saliency overlay, drawn with Pillow.

python plot.py curves --run=out/train              metrics.jsonl → out/train/curves.png
python plot.py saliency --prompt "a red circle moving left slowly"      → out/saliency.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from checkpoint import load_net, read_header, writable_folder, write_atomically
from config import BadInput, Config, cli, from_words, read_cli
from data import rng_for, tokenize, understand
from reward import AXES, RewardModel
from rollout import rollout
from saliency import factorise, fuse_axes, reward_saliency, to_latent_grid


def to_uint8(video01: Tensor) -> Tensor:
    """(... 3 H W) in [0, 1] → (... H W 3) bytes."""
    return rearrange((video01.clamp(0, 1) * 255).round().byte(), "... c h w -> ... h w c").cpu()


def contact_sheet(path: Path, rows: dict[str, Tensor], scale: int = 2, every: int = 1) -> None:
    """One captioned row of frames per clip: rows maps a caption to video01 (F 3 H W). Writes a PNG."""
    gap, label = 2, 14
    strips = [to_uint8(video[::every]) for video in rows.values()]
    frames, h, w, _ = max((s.shape for s in strips), key=lambda shape: shape[0])
    sheet = Image.new("RGB", (frames * (w * scale + gap), len(rows) * (h * scale + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (caption, strip) in enumerate(zip(rows, strips, strict=True)):
        top = r * (h * scale + label + gap)
        draw.text((2, top + 1), caption, fill="black")
        for f, frame in enumerate(strip.numpy()):
            image = Image.fromarray(frame).resize((w * scale, h * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (f * (w * scale + gap), top + label))
    write_atomically(path, lambda name: sheet.save(name))


# -- curves ----------------------------------------

CURVES = ("dmd", "critic", *AXES, "ess", "held_out_shape", "held_out_direction", "held_out_speed")


def curves(path: Path, metrics: Path) -> None:
    """One small panel per quantity of metrics.jsonl, step on the x axis, its range written at the left."""
    if not metrics.is_file():
        raise BadInput(f"no {metrics}; a run of train.py writes it")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = [k for k in CURVES if sum(k in row for row in rows) > 1]
    w, h, columns = 260, 120, 3
    image = Image.new("RGB", (w * columns, h * -(-len(panels) // columns) or h), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(panels):
        points = [(row["step"], row[name]) for row in rows if name in row]
        left, top = i % columns * w, i // columns * h
        low, high = min(y for _, y in points), max(y for _, y in points)
        draw.text((left + 40, top + 2), f"{name}  {points[-1][1]:.3g}", fill="black")
        draw.text((left + 2, top + 16), f"{high:.3g}", fill="grey")
        draw.text((left + 2, top + h - 20), f"{low:.3g}", fill="grey")
        draw.rectangle((left + 38, top + 16, left + w - 8, top + h - 8), outline="lightgrey")
        across, span = points[-1][0] - points[0][0] or 1, high - low or 1
        xs = [left + 40 + (x - points[0][0]) / across * (w - 52) for x, _ in points]
        ys = [top + h - 10 - (y - low) / span * (h - 30) for _, y in points]
        draw.line(list(zip(xs, ys, strict=True)), fill=(30, 90, 200), width=2)
    write_atomically(path, lambda name: image.save(name))


# -- saliency ----------------------------------------
def heat(x: Tensor) -> Tensor:
    """(f h w), scaled by its maximum → black-red-yellow-white pictures (f 3 h w) in [0, 1]."""
    x = x / x.max().clamp(min=1e-12)
    return torch.stack([(3 * x).clamp(0, 1), (3 * x - 1).clamp(0, 1), (3 * x - 2).clamp(0, 1)], dim=1)


def saliency_sheet(path: Path, video01: Tensor, text: Tensor, reward: RewardModel, cfg: Config) -> None:
    """One clip (1 F 3 H W): frames, |∂r/∂pixel| per axis, the fused latent map, its two factors."""
    scores, pixels = reward_saliency(reward, video01, text)
    cells = to_latent_grid(pixels, *cfg.latent_shape[1:], cfg.time_stride)
    fused = fuse_axes(cells, scores, cfg.fuse_temperature)
    time, space = factorise(fused, cfg.floor_time, cfg.floor_space)

    def enlarge(x):
        return x.repeat_interleave(cfg.stride, -2).repeat_interleave(cfg.stride, -1)

    height = (torch.arange(cfg.height, 0, -1) / cfg.height)[None, :, None]
    bars = (height <= (time[0] / time.max())[:, None, None]).float().expand(-1, -1, cfg.width)
    rows = {"frames": video01[0]}
    for axis, r, gradient in zip(AXES, scores[0], pixels[0], strict=True):
        rows[f"|dr/dpixel| {axis}  (score {r:+.2f})"] = heat(gradient)
    rows |= {
        "fused on the latent grid": heat(enlarge(fused[0])),
        "W_space (per frame)": heat(enlarge(space[0])),
        f"W_time (bars, {time.min():.2f} to {time.max():.2f})": bars[:, None].expand(-1, 3, -1, -1),
    }
    contact_sheet(path, rows)


@dataclass(frozen=True)
class Flags:
    run: str = "out/train"
    prompt: str = "a red circle moving left slowly on a black background"
    nets: str = "assets/tiny"
    seed: int = 0
    out: str = "out"


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    if what == "curves":
        curves(Path(flags.run) / "curves.png", Path(flags.run) / "metrics.jsonl")
        print(f"{flags.run}/curves.png")
    elif what == "saliency":
        nets, out = Path(flags.nets), writable_folder(flags.out)
        header = read_header(nets / "stream_r1.safetensors")
        cfg = from_words(header["config"], typed | {"device": "cpu"})
        words = understand(flags.prompt, cfg, header.get("vocabulary", "").split())
        text = tokenize([words], cfg.text_length, cfg.text_width)
        student = load_net(nets / "stream_r1.safetensors", cfg, "student")
        codec, reward = (load_net(nets / f"{kind}.safetensors", cfg, kind) for kind in ("codec", "reward"))
        with torch.no_grad():
            video01 = codec.decode(rollout(student, text, cfg, [rng_for(flags.seed, "saliency")]))
        saliency_sheet(out / "saliency.png", video01, text, reward, cfg)
        print(out / "saliency.png")
    else:
        raise BadInput(f"plot.py {what} is not possible; allowed: curves | saliency")


if __name__ == "__main__":
    cli(main)
