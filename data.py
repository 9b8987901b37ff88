"""What the models learn from, behind one interface: the world, or a folder of clips.

A clip's frame k is what is on the screen k / fps seconds after its beginning, whatever rate it was made at.
Pillow reads pictures and animations, all else the ffmpeg program that imageio brings: a process of its own,
which a broken file may crash and which turns, cuts and shrinks what it decodes.
"""

import csv
import hashlib
import io
import json
import math
import os
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from config import BadInput, Config
from engine.checkpoint import fingerprint, writable_folder, write_atomically
from engine.rng import pick, rng_for
from engine.sheet import ffmpeg
from world.scene import Batch, World
from world.words import embed, free_words

READABLE = "mp4, mov, mkv, webm, avi, gif, webp, png, jpeg, tiff, avif"
SLACK = 0.001  # seconds: files round the times of their frames to milliseconds
NO_TIME = -(2**63)  # of a packet whose file says only when to decode it
CACHE = 128 * 2**20  # bytes of decoded frames that a process keeps


# -- files ----------------------------------------
class Clip(NamedTuple):
    path: Path
    start: float | None  # seconds, of a film's first frame; None: a picture or an animation
    seconds: float  # how long it lasts; 0: one picture

    def frames(self, cfg: Config) -> int:
        return max(1, math.ceil((self.seconds - SLACK) * cfg.fps))


def unreadable(path: Path, reason: str) -> BadInput:
    reason = reason.strip().partition("\n")[0].rpartition("] ")[2] or "it holds no frame"
    if not path.exists() or "matches no streams" in reason:
        reason = "it holds no moving picture" if path.exists() else "no such file"
    return BadInput(f"clip {path} cannot be read: {reason}; what can be: {READABLE}")


def probe(path: Path) -> Clip:
    """Reads the times of all frames; of a film it decodes none. Raises BadInput."""
    try:
        ends = [end for end, _ in _pictures(path)]
        return Clip(path, None, ends[-1] if len(ends) > 1 else 0.0)
    except UnidentifiedImageError:
        pass  # a film, then
    except Exception as error:  # Pillow's decoders raise errors of their own
        raise unreadable(path, str(error)) from error
    table, complaint = ffmpeg("-copyts", "-i", f"file:{path}", *"-map 0:V:0 -c copy -f framecrc -".split())
    lines = [line.replace(",", " ").split() for line in table.decode().splitlines()]
    unit = [Fraction(line[2]) for line in lines if line[0] == "#tb"]
    packets = [[int(word) for word in line[1:4]] for line in lines if line[0] == "0"]
    shown = [(pts if pts != NO_TIME else dts, length) for dts, pts, length in packets]
    if not unit or not shown:
        raise unreadable(path, complaint)
    (start, _), (last, length) = min(shown), max(shown)
    seconds = float((last + length - start) * unit[0])
    if seconds > 60 * len(shown):
        raise unreadable(path, f"{len(shown)} frames cannot last {seconds:.0f} seconds")
    return Clip(path, float(start * unit[0]), seconds)


def read_clip(path: Path, cfg: Config, most: int = 2**62) -> Tensor:
    """The last frames of a clip, or a picture → bytes (F 3 H W) at cfg.fps. Raises BadInput."""
    clip = probe(path)
    return decode(clip, cfg, max(0, clip.frames(cfg) - most), min(most, clip.frames(cfg)))


def decode(clip: Clip, cfg: Config, first: int, count: int) -> Tensor:
    """Frames first, first + 1, ... → bytes (count 3 H W). Raises BadInput if there is none; where the file
    breaks off its last frame is repeated, with a warning."""
    video, complaint = (_pictured if clip.start is None else _filmed)(clip, cfg, first, count)
    if not len(video):
        raise unreadable(clip.path, complaint)
    if len(video) < count - 1:
        warnings.warn(f"clip {clip.path} breaks off: it ends at frame {first + len(video)}", stacklevel=2)
    video = torch.from_numpy(video).permute(0, 3, 1, 2)
    return torch.cat([video, video[-1:].expand(count - len(video), -1, -1, -1)])


def _filmed(clip: Clip, cfg: Config, first: int, count: int) -> tuple[np.ndarray, str]:
    """From the key frame a second before: some files can only be entered to the nearest frame."""
    at, shape = first / cfg.fps, f"{cfg.width}/{cfg.height}"
    chain = (
        f"settb=AVTB,setpts=PTS-({clip.start + SLACK})/TB,"  # AVTB: microseconds
        f"fps={cfg.fps}:round=up:start_time={at},setpts=PTS-STARTPTS,"
        f"crop='min(iw,ih*{shape}/sar)':'min(ih,iw*sar/({shape}))':exact=1,"
        f"scale={cfg.width}:{cfg.height}:flags=bilinear+accurate_rnd+full_chroma_int"
    )
    seek = f"-noaccurate_seek -seek_timestamp 1 -ss {clip.start + at - 1}".split() if at > 1 else []
    out = f"-map 0:V:0 -vf {chain} -frames:v {count} -f rawvideo -pix_fmt rgba -".split()
    raw, complaint = ffmpeg("-copyts", *seek, "-i", f"file:{clip.path}", *out)
    size = cfg.height * cfg.width * 4
    rgba = np.frombuffer(raw[: len(raw) // size * size], np.uint8).reshape(-1, cfg.height, cfg.width, 4)
    return (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] // 255).astype(np.uint8), complaint


def _pictured(clip: Clip, cfg: Config, first: int, count: int) -> tuple[np.ndarray, str]:
    video, complaint = [], ""
    try:
        for end, picture in _pictures(clip.path):
            while len(video) < count and (first + len(video)) / cfg.fps + SLACK < end:
                video.append(_fit(picture, cfg))
    except Exception as error:  # as in probe
        complaint = str(error)
    return np.array(video), complaint


def _pictures(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """(the second until which it is shown, picture) for each one that a file holds."""
    with Image.open(path) as file:
        if file.format == "MPEG":  # Pillow knows the name alone
            raise UnidentifiedImageError
        if file.width * file.height > Image.MAX_IMAGE_PIXELS:  # a bomb, or a broken header
            raise BadInput(f"{file.width} x {file.height} pixels are too many")
        end = 0.0
        for picture in ImageSequence.Iterator(file):
            picture.load()  # only now is its duration known
            end += (picture.info.get("duration") or 100) / 1000  # 0 means 100 ms, as in browsers
            yield end, picture
            if file.format == "MPO":  # a photograph; what follows is its preview or its other eye
                return


def _fit(picture: Image.Image, cfg: Config) -> np.ndarray:
    """The centre of a picture, upright, on black where it is transparent → bytes (H W 3)."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    size = (cfg.width, cfg.height)
    return np.asarray(ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BILINEAR))


# -- a folder of clips ----------------------------------------
class ClipFolder:
    """Real clips and metadata.jsonl or .csv (file_name, text), as Hugging Face has it.

    Same interface as World; a clip is a random window, decoded when it is asked for. Past its end a clip
    runs backwards. Raises BadInput when there is no metadata, a row of it is wrong, or no clip is usable; a
    broken or too short one is left out with a warning that names it.
    """

    def __init__(self, cfg: Config, folder: str):
        self.cfg, self.clips = cfg, []
        rows, need = _metadata(Path(folder)), cfg.pixel_frames
        self.length = 2 * need  # of a stretch, which is decoded as a whole
        self.stretch = lru_cache(max(1, CACHE // (self.length * 3 * cfg.height * cfg.width)))(self._stretch)
        index = _index(Path(folder), [name for name, _ in rows])
        for name, text in rows:
            clip = index[name]
            if isinstance(clip, Clip) and (has := clip.frames(cfg)) < need:
                clip = f"{name} has {has} frames at {cfg.fps} a second, {need} are needed"
            if isinstance(clip, str):
                warnings.warn(f"left out: {clip}", stacklevel=2)
            else:
                self.clips.append((clip, text))
        if not self.clips:
            raise BadInput(f"--data={folder} holds no usable clip of at least {need} frames")
        captions = [free_words(text) for _, text in self.clips]
        if (longest := max(map(len, captions))) > cfg.text_length:
            cut = f"captions have up to {longest} words; --text_length={cfg.text_length} keeps the first"
            warnings.warn(cut, stacklevel=2)
        embed(captions[:1], cfg)  # before the work: a package may be missing
        self.vocabulary = sorted({word for words in captions for word in words})
        facts = json.dumps([(clip.path.name, clip.start, clip.seconds, text) for clip, text in self.clips])
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:12]  # a resumed run needs the same

    def _choose(self, key: tuple) -> tuple[int, torch.Generator]:
        rng = rng_for("clip", *key)
        return pick(rng, len(self.clips)), rng

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        return [free_words(self.clips[self._choose(key)[0]][1]) for key in keys]

    def _windows(self, keys: list[tuple], times: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A clip's number, and which of its frames (F,)."""
        for key, shown in zip(keys, times.expand(len(keys), -1), strict=True):
            number, rng = self._choose(key)
            frames = self.clips[number][0].frames(self.cfg)
            at = (pick(rng, frames - self.cfg.pixel_frames + 1) + shown) % (2 * frames)
            yield number, torch.minimum(at, 2 * frames - 1 - at)

    def batch(self, keys: list[tuple], times: Tensor | None = None) -> Batch:
        times = torch.arange(self.cfg.pixel_frames) if times is None else times
        video = torch.stack([self._frames(number, at) for number, at in self._windows(keys, times)])
        prompts = [self.clips[self._choose(key)[0]][1] for key in keys]
        return Batch(video.float() / 255, prompts, self.captions(keys))

    draw = batch  # there is nothing to render

    def pixels(self, drawn: Batch, device: str) -> Tensor:
        return drawn.video01.to(device)

    @torch.no_grad()
    def encode(self, codec, nets: Path) -> None:
        """For `latents`: every frame through the codec of the folder `nets`, unless nets/latents holds what
        came of the same codec, canvas and file. Raises BadInput."""
        cfg, folder, self.encoded = self.cfg, writable_folder(f"{nets}/latents"), []
        own = fingerprint(nets, ("codec",)), cfg.height, cfg.width, cfg.fps
        for number, (clip, _) in enumerate(tqdm(self.clips, "encoding clips", delay=2)):
            facts = repr((own, clip, clip.path.stat().st_size, clip.path.stat().st_mtime_ns)).encode()
            self.encoded.append(folder / f"{hashlib.sha256(facts).hexdigest()[:24]}.safetensors")
            if not self.encoded[-1].exists():
                parts = self._frames(number, range(clip.frames(cfg))).split(64)
                x = [codec.encode(part[None].to(cfg.device).float() / 255)[0].cpu() for part in parts]
                write_atomically(self.encoded[-1], lambda name, x=x: save_file({"x": torch.cat(x)}, name))

    def latents(self, keys: list[tuple], times: Tensor) -> Batch:
        """What `draw` draws, as the codec's latents."""
        x = [load_file(self.encoded[number])["x"][at] for number, at in self._windows(keys, times)]
        return Batch(None, [], self.captions(keys), latents=torch.stack(x))

    def _frames(self, number: int, at) -> Tensor:
        """Frames `at` (F,) of a clip → bytes (F 3 H W)."""
        return torch.stack([self.stretch(number, i // self.length)[i % self.length] for i in map(int, at)])

    def _stretch(self, number: int, part: int) -> Tensor:
        (clip, _), first = self.clips[number], part * self.length
        return decode(clip, self.cfg, first, min(self.length, clip.frames(self.cfg) - first))


def _index(folder: Path, names: list[str]) -> dict[str, Clip | str]:
    """Every clip, or what is wrong with it. clips.index.json keeps what was found of unchanged files; a
    folder that cannot be written does without. Raises BadInput if there is no ffmpeg."""
    file, names = folder / "clips.index.json", list(dict.fromkeys(names))
    try:
        known = {name: (*facts,) for name, facts in json.loads(file.read_text()).items() if len(facts) == 4}
    except (OSError, ValueError, AttributeError, TypeError):  # none, or not ours
        known = {}
    ffmpeg("-version")

    def look(name: str) -> tuple[tuple, Clip | str]:
        path = _find(folder, name)
        try:
            stamp = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)
            clip = Clip(path, *known[name][2:]) if known.get(name, ())[:2] == stamp else probe(path)
            return (*stamp, *clip[1:]), clip
        except BadInput as error:
            return (), str(error)

    with ThreadPoolExecutor(8) as pool:
        looked = tqdm(pool.map(look, names), "looking at clips", len(names), delay=2)
        found = dict(zip(names, looked, strict=True))
    fresh = {name: facts for name, (facts, _) in found.items() if facts}
    if fresh != known:
        with suppress(BadInput):
            write_atomically(file, lambda name: name.write_text(json.dumps(fresh, indent=0)))
    return {name: clip for name, (_, clip) in found.items()}


def _find(folder: Path, name: str) -> Path:
    """A clip's file; systems differ in how they write accented letters."""
    paths = [folder / form for form in (name, *(unicodedata.normalize(f, name) for f in ("NFC", "NFD")))]
    return next((path for path in paths if path.exists()), paths[0])


def _metadata(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption) of every clip. Raises BadInput."""
    paths = [path for path in (folder / "metadata.jsonl", folder / "metadata.csv") if path.is_file()]
    if not paths:
        raise BadInput(f"--data={folder} holds no metadata.jsonl or metadata.csv (file_name, text)")
    path, text, rows = paths[0], read_text(paths[0]), []
    found = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    if path.suffix == ".jsonl":
        found = (json.loads(line) for line in text.split("\n") if line.strip())
    try:
        rows.extend(found)  # those before a broken one stay
    except (csv.Error, ValueError, RecursionError) as error:
        raise BadInput(f"{path}, row {len(rows) + 1} cannot be read: {error}") from error
    return [_row(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _row(where: str, row) -> tuple[str, str]:
    """A row as it was read → file name and caption. Raises BadInput."""
    if not isinstance(row, dict) or None in row:
        why = "has more values than the header" if isinstance(row, dict) else "is no {...}"
        raise BadInput(f'{where} {why}; allowed: file_name and text, a caption with a comma in "quotes"')
    for column in ("file_name", "text"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            given = f"is {row[column]!r}" if column in row else f"is not among {', '.join(row)[:200]}"
            raise BadInput(f"{where}: {column} {given}; every row needs file_name and text")
    name, text = (row[column].encode(errors="replace").decode() for column in ("file_name", "text"))
    if "\0" in name or not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == "..":
        raise BadInput(f"{where}: {name!r} leaves the folder; allowed: a file below it, or a full path")
    if not free_words(text):
        raise BadInput(f"{where}: the caption {text[:80]!r} holds no word")
    return name, " ".join(text.split())


def read_text(path: Path) -> str:
    """UTF-8 whatever the machine's own is, with or without a mark at its start. Raises BadInput."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path} is not UTF-8 text (see line {line}); save it as UTF-8") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def source_of(cfg: Config, split: str = "train", drop_words: float = 0.0) -> World | ClipFolder:
    """The world, or the folder of clips that cfg.data names. Raises BadInput."""
    if not cfg.data:
        return World(cfg, split, drop_words)
    if not Path(cfg.data).is_dir():
        what = "is a file, such as of prompts for --wan" if Path(cfg.data).exists() else "is not there"
        raise BadInput(f"--data={cfg.data} {what}; allowed here: a folder of clips")
    return ClipFolder(cfg, cfg.data)
