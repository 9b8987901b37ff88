"""Contact sheets, video files and the program that makes them."""

import subprocess
from collections.abc import Iterable, Iterator
from os import R_OK, access
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from config import BadInput
from engine.checkpoint import writable_folder, write_atomically


def to_uint8(video01: Tensor) -> Tensor:
    """(... 3 H W) in [0, 1] → (... H W 3) bytes."""
    return (video01.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu()


def contact_sheet(path: Path, rows: Iterable[tuple[str, Tensor]], scale: int = 2, every: int = 1) -> Path:
    """One row of frames per (caption, video01 (F 3 H W)); captions may be the same. Writes a PNG → its path:
    another one than asked for where somebody else's picture is."""
    gap, label, ours, rows = 2, 20, b"Software\0stream-r1", list(rows)
    strips = [to_uint8(video[::every]) for _, video in rows]
    frames, h, w, _ = max((s.shape for s in strips), key=lambda shape: shape[0])
    sheet = Image.new("RGB", (frames * (w * scale + gap), len(rows) * (h * scale + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, ((words, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = r * (h * scale + label + gap)
        draw.text((2, top + 1), words, fill="black", font_size=14)
        for f, frame in enumerate(strip.numpy()):
            image = Image.fromarray(frame).resize((w * scale, h * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (f * (w * scale + gap), top + label))
    mark = PngInfo()
    mark.add_text("Software", "stream-r1")  # comes first in the file
    while path.exists() and not (path.is_file() and access(path, R_OK) and ours in path.read_bytes()[:99]):
        path = path.with_stem(f"{path.stem}_sheet")
    write_atomically(path, lambda name: sheet.save(name, pnginfo=mark))
    return path


def video_path(path: str) -> Path:
    """A file that `write_video` can write: known before the work, not after it. Raises BadInput."""
    out, allowed = Path(path), ".mp4 .gif .webp"
    if out.suffix not in allowed.split():
        raise BadInput(f"--out={path} is not possible; allowed endings: {allowed}")
    if out.is_dir():
        raise BadInput(f"--out={path} is a folder; name a file")
    if out.suffix == ".mp4":
        ffmpeg("-version")
    writable_folder(str(out.parent))
    return out


def write_video(path: Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """H.264 in yuv420p as browsers play it, or gif, or webp, by the name's ending. Raises BadInput if the
    encoder fails; its exit code is nowhere to be seen, so the frames are counted."""
    if path.suffix == ".mp4":
        count = 0
        with imageio.get_writer(path, fps=fps, macro_block_size=2, quality=8) as writer:
            for count, frame in enumerate(frames, 1):  # noqa: B007
                writer.append_data(frame)
        table, _ = ffmpeg("-i", f"file:{path}", *"-map 0:V:0 -c copy -f framecrc -".split())
        if (written := sum(not line.startswith(b"#") for line in table.splitlines())) != count:
            raise OSError(f"the encoder left {written} of {count} frames")
    else:
        head, *rest = [Image.fromarray(frame) for frame in frames]
        head.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0, lossless=True)


def ffmpeg(*words: str) -> tuple[bytes, str]:
    """Run it → what it writes, and its complaints. Raises BadInput if there is none."""
    try:
        import imageio_ffmpeg  # not every machine has it

        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    except (ImportError, RuntimeError, OSError) as error:
        cure = "pip install imageio[ffmpeg], or name one in IMAGEIO_FFMPEG_EXE"
        raise BadInput(f"there is no ffmpeg program for films: {cure}") from error
    except subprocess.TimeoutExpired:
        return b"", "it takes more than ten minutes"
    return done.stdout, done.stderr.decode("utf-8", "replace")
