"""What the models learn from, behind one interface: the world, a folder of clips, a file of prompts."""

import csv
import json
import re
import warnings
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import BadInput, Config
from engine.rng import pick, rng_for
from world.scene import Batch, World
from world.words import check_words, parse


def read_clip(path: Path, cfg: Config) -> Tensor:
    """A clip or a picture → bytes (F 3 H W) at cfg.fps, cut around the centre. Raises BadInput."""
    path = Path(path)
    still = path.suffix.lower() in (".gif", ".webp", ".png", ".jpg", ".jpeg", ".bmp")
    try:
        if still:
            frames = iio.imread(path, index=..., plugin="pillow", mode="RGB")
            duration = iio.immeta(path, plugin="pillow").get("duration")  # milliseconds; pictures have none
            rate = 1000 / duration if duration else cfg.fps
        else:
            frames = iio.imread(path, index=..., plugin="FFMPEG")
            rate = iio.immeta(path, plugin="FFMPEG")["fps"]
        skip = max(1, round(rate / cfg.fps))
    except Exception as error:  # every decoder behind imageio raises errors of its own
        reason = (str(error) or "unreadable").splitlines()[0] if path.exists() else "no such file"
        raise BadInput(f"clip {path} cannot be read: {reason}") from error
    video = torch.from_numpy(np.ascontiguousarray(frames[::skip, ..., :3])).permute(0, 3, 1, 2).float()
    h, w = video.shape[-2:]
    side = min(h / cfg.height, w / cfg.width)
    cut_h, cut_w = round(cfg.height * side), round(cfg.width * side)
    top, left = (h - cut_h) // 2, (w - cut_w) // 2
    video = video[:, :, top : top + cut_h, left : left + cut_w]
    video = F.interpolate(video, (cfg.height, cfg.width), mode="bilinear", antialias=True)
    return video.round().clamp(0, 255).byte()


class ClipFolder:
    """Real clips: mp4, gif or webp, and metadata.jsonl or .csv (file_name, text), as Hugging Face has it.

    Same interface as World; a clip is a random window. Past its end a clip runs backwards. Raises BadInput
    when there is no metadata or no usable clip; a broken or too short one is left out with a warning that
    names it.
    """

    def __init__(self, cfg: Config, folder: str):
        self.cfg = cfg
        self.clips: list[tuple[Tensor, str]] = []
        for name, text in _metadata(Path(folder)):
            try:
                video = read_clip(Path(folder) / name, cfg)
            except BadInput as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            if len(video) < cfg.pixel_frames:
                short = f"{name} has {len(video)} frames at {cfg.fps} a second, {cfg.pixel_frames} are needed"
                warnings.warn(f"left out: {short}", stacklevel=2)
                continue
            self.clips.append((video, text))
        if not self.clips:
            raise BadInput(f"--data={folder} holds no usable clip of at least {cfg.pixel_frames} frames")
        longest = max(len(free_words(text)) for _, text in self.clips)
        if longest > cfg.text_length:
            cut = f"captions have up to {longest} words; --text_length={cfg.text_length} keeps the first"
            warnings.warn(cut, stacklevel=2)
        self.vocabulary = sorted({word for _, text in self.clips for word in free_words(text)})

    def _choose(self, key: tuple) -> tuple[Tensor, str, torch.Generator]:
        rng = rng_for("clip", *key)
        return *self.clips[pick(rng, len(self.clips))], rng

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        return [free_words(self._choose(key)[1]) for key in keys]

    def batch(self, keys: list[tuple], times: Tensor | None = None) -> Batch:
        times = torch.arange(self.cfg.pixel_frames) if times is None else times
        videos, prompts = [], []
        for key, shown in zip(keys, times.expand(len(keys), -1), strict=True):
            video, text, rng = self._choose(key)
            at = (pick(rng, len(video) - self.cfg.pixel_frames + 1) + shown) % (2 * len(video))
            videos.append(video[torch.minimum(at, 2 * len(video) - 1 - at)].float() / 255)
            prompts.append(text)
        return Batch(torch.stack(videos), prompts, [free_words(p) for p in prompts])

    draw = batch  # there is nothing to render

    def pixels(self, drawn: Batch, device: str) -> Tensor:
        return drawn.video01.to(device)


class PromptFile:
    """Prompts alone, one a line: what distilling Wan needs. A caption is one "word", the whole prompt."""

    vocabulary = ()

    def __init__(self, path: str):
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--data={path} cannot be read as text: {error}") from error
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts:
            raise BadInput(f"--data={path} holds no prompt; expected is one a line")

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        return [[self.prompts[pick(rng_for("prompt", *key), len(self.prompts))]] for key in keys]


def free_words(text: str) -> list[str]:
    """A caption in nobody's vocabulary → its words in order."""
    return re.findall(r"[\w']+", text.lower())


def _metadata(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption) of every clip. Raises BadInput."""
    if (folder / "metadata.jsonl").is_file():
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            raise BadInput(f"{folder}/metadata.jsonl is not JSON lines: {error}") from error
    elif (folder / "metadata.csv").is_file():
        with open(folder / "metadata.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        raise BadInput(f"--data={folder} holds no metadata.jsonl or metadata.csv (file_name, text)")
    if any("file_name" not in row or "text" not in row for row in rows):
        raise BadInput(f"--data={folder}: every row of the metadata needs file_name and text")
    return [(row["file_name"], row["text"]) for row in rows]


def source_of(cfg: Config, split: str = "train", drop_words: float = 0.0) -> World | ClipFolder | PromptFile:
    """The world, or what cfg.data names: a folder of clips, a file of prompts. Raises BadInput."""
    if cfg.data and not Path(cfg.data).exists():
        raise BadInput(f"--data={cfg.data}: there is no such folder of clips or file of prompts")
    if Path(cfg.data).is_file():
        return PromptFile(cfg.data)
    return ClipFolder(cfg, cfg.data) if cfg.data else World(cfg, split, drop_words)


def understand(prompt: str, cfg: Config, vocabulary: list[str]) -> list[str]:
    """A person's prompt → words for `tokenize`; `vocabulary` is a clip folder's. Raises BadInput."""
    if not cfg.data:
        return parse(prompt, cfg.objects)
    words = free_words(prompt)
    if not words:
        raise BadInput("the prompt is empty")
    if len(words) > cfg.text_length:
        raise BadInput(f"the prompt has {len(words)} words; this model reads at most {cfg.text_length}")
    check_words(words, vocabulary)
    return words
