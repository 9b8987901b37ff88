"""What the models learn from: an endless captioned world drawn from a seed, or a folder of real clips.

The world is stationary by construction: an object lives on a torus (what leaves on the right comes back on
the left), starts anywhere, keeps its kind of motion for ever and weaves from side to side at random. Any
window of the process looks like any other, so a model can be streamed past the length it was trained on; and
because the weaving is random the future is not determined by the past.
"""

import csv
import difflib
import json
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import BadInput, Config

COLOURS = {
    "red": (0.90, 0.12, 0.12), "green": (0.10, 0.75, 0.15), "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10), "cyan": (0.10, 0.85, 0.90), "magenta": (0.90, 0.15, 0.85),
    "orange": (1.00, 0.50, 0.05), "purple": (0.45, 0.10, 0.70),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SPEEDS = {"slowly": 0.8, "quickly": 2.0}  # pixels per frame on a 32-pixel canvas
BACKGROUNDS = {"black": 0.05, "grey": 0.25, "white": 0.95}
_FILLER = ("a", "an", "the", "on", "background", "moving", "standing")
_CLASSES = (tuple(COLOURS), SHAPES, tuple(MOTIONS), tuple(SPEEDS))
VOCABULARY = (*_FILLER, "and", *(word for words in _CLASSES for word in words), *BACKGROUNDS)

RADIUS = (6.0, 7.5)  # pixels on a 32-pixel canvas
WEAVE, TURN = 0.35, 0.125  # sideways speed as a share of forward speed; chance of a turn in each frame


# -- randomness: every draw is a function of what it is for ----------------------------------------
def rng_for(*key: int | str) -> torch.Generator:
    """A generator that depends on (seed, purpose, step, sample, ...) alone: resume needs no RNG state."""
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def randn(rngs: list[torch.Generator], *shape: int, device=None) -> Tensor:
    """Standard normal noise (b *shape), sample i from generator i, whatever batch it is in."""
    x = torch.stack([torch.randn(shape, generator=g) for g in rngs])
    if torch.device(device or "cpu").type == "cuda":
        x = x.pin_memory()  # so that nobody waits for the copy
    return x.to(device, non_blocking=True)


# -- language ----------------------------------------
@lru_cache(maxsize=4096)
def _vector(word: str, width: int) -> Tensor:
    return torch.randn(width, generator=rng_for("word", word))


def tokenize(captions: list[list[str]], length: int, width: int) -> Tensor:
    """Words → (b l e): a fixed pseudo-random vector per word plus one per place; zero where none is.

    Nothing is learned here: the transformer's own text embedding (Wan's two linear layers) does that.
    """
    text = torch.zeros(len(captions), length, width)
    for row, words in zip(text, captions, strict=True):
        for place, word in enumerate(words[:length]):
            if word:
                row[place] = (_vector(word, width) + _vector(f"#{place}", width)) / 2**0.5
    return text


def parse(prompt: str, objects: int) -> list[str]:
    """A prompt in any order → its meaning in fixed order: (colour shape motion speed) per object, background.

    What the prompt leaves open is "". Raises BadInput for unknown words (with the nearest known one), for an
    empty prompt, for an object described twice over, and for more objects than the model was trained on.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    if not words:
        raise BadInput("the prompt is empty; try 'a red circle moving left slowly on a black background'")
    _check_words(words, VOCABULARY)
    meaning, background = [[""] * 4], ""
    for word in words:
        if word == "and":
            meaning.append([""] * 4)
        elif word in BACKGROUNDS:
            background = _once(background, word, prompt)
        elif word not in _FILLER:
            kind = next(i for i, known in enumerate(_CLASSES) if word in known)
            meaning[-1][kind] = _once(meaning[-1][kind], word, prompt)
    if not background and not any(word for thing in meaning for word in thing):
        raise BadInput(f"the prompt {prompt!r} says nothing; known words: {' '.join(VOCABULARY)}")
    if len(meaning) > objects:
        raise BadInput(f"the prompt names {len(meaning)} objects; this model knows at most {objects}")
    meaning += [[""] * 4] * (objects - len(meaning))
    return [*(word for thing in meaning for word in thing), background]


def _check_words(words: list[str], vocabulary) -> None:
    for word in words:
        if word not in vocabulary:
            near = difflib.get_close_matches(word, vocabulary, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"unknown word {word!r}; {hint}known words: {' '.join(vocabulary)}")


def _once(old: str, new: str, prompt: str) -> str:
    if old and old != new:
        raise BadInput(f"{old!r} and {new!r} contradict each other in {prompt!r}; 'and' joins two objects")
    return new


def caption(meaning: list[str]) -> str:
    """The inverse of `parse`: a sentence."""
    *things, background = meaning
    parts = []
    for colour, shape, motion, speed in zip(*[iter(things)] * 4, strict=True):
        if colour or shape or motion:
            how = {"": "", "still": "standing still"}.get(motion, f"moving {motion} {speed}".strip())
            what = " ".join(filter(None, (colour, shape, how)))
            parts.append(f"an {what}" if what[0] in "aeio" else f"a {what}")
    return (" and ".join(parts) + (f" on a {background} background" if background else "")).strip()


# -- the world ----------------------------------------
@dataclass
class Batch:
    video01: Tensor  # (b F 3 H W) in [0, 1]
    prompts: list[str]
    words: list[list[str]]  # what `tokenize` takes
    position: Tensor | None = None  # (b objects F 2) centres in pixels (x, y)


def shape_alpha(shape: int, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Coverage in [0, 1] of shape number `shape` at offsets (dx, dy) in pixels from its centre."""
    far = (dx.square() + dy.square() + 1e-9).sqrt()
    ax, ay = dx.abs(), dy.abs()
    if SHAPES[shape] == "circle":
        inside = 0.9 * radius - far
    elif SHAPES[shape] == "square":
        inside = 0.9 * radius - torch.maximum(ax, ay)
    elif SHAPES[shape] == "triangle":
        inside = torch.minimum(0.55 * radius - dy, 0.55 * radius + dy / 2 - ax * 0.8660254)
    elif SHAPES[shape] == "cross":
        arm, long = 0.32 * radius, radius
        inside = torch.maximum(torch.minimum(arm - ax, long - ay), torch.minimum(arm - ay, long - ax))
    else:
        inside = 0.26 * radius - (far - 0.76 * radius).abs()
    return (inside + 0.5).clamp(0, 1)


class World:
    """`World(cfg).batch(keys)` draws clips. `split`: train | select | test have disjoint captions."""

    vocabulary = VOCABULARY

    def __init__(self, cfg: Config, split: str = "train", drop_words: float = 0.0):
        self.cfg, self.split, self.drop_words = cfg, split, drop_words
        self.scale = min(cfg.height, cfg.width) / 32

    def batch(self, keys: list[tuple], times: Tensor | None = None) -> Batch:
        """One clip per key (a tuple of ints and words). `times` (F,) or (b F): frames to show, from 0."""
        if times is None:
            times = torch.arange(self.cfg.pixel_frames)
        rngs = [rng_for("world", self.split, *key) for key in keys]
        meanings = [self.meaning(g) for g in rngs]
        shown = [self._forget(m, g) for m, g in zip(meanings, rngs, strict=True)]
        radius = torch.stack([torch.rand(self.cfg.objects, generator=g) for g in rngs])
        last = int(times.max())
        paths = [self._move(m, g, last + 1) for m, g in zip(meanings, rngs, strict=True)]
        position = torch.stack(paths)
        radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * radius) * self.scale
        times = times.expand(len(keys), -1)
        position = position.gather(2, times[:, None, :, None].expand(-1, self.cfg.objects, -1, 2))
        return Batch(self.render(meanings, position, radius), [caption(m) for m in shown], shown, position)

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        """Words for `tokenize`, one caption per key: those `batch` would draw."""
        return [self.meaning(rng_for("world", self.split, *key)) for key in keys]

    def meaning(self, rng: torch.Generator) -> list[str]:
        """Draw a scene of this split. The split is a hash of the caption, the same for ever."""
        while True:
            colours = torch.randperm(len(COLOURS), generator=rng)
            words = []
            for i in range(self.cfg.objects):
                motion = tuple(MOTIONS)[pick(rng, len(MOTIONS))]
                speed = "" if motion == "still" else tuple(SPEEDS)[pick(rng, len(SPEEDS))]
                words += [tuple(COLOURS)[colours[i]], SHAPES[pick(rng, len(SHAPES))], motion, speed]
            words.append(tuple(BACKGROUNDS)[pick(rng, len(BACKGROUNDS))])
            if split_of(words) == self.split:
                return words

    def _forget(self, meaning: list[str], rng: torch.Generator) -> list[str]:
        """Leave out speed and background now and then, so that shorter prompts are understood as well."""
        keep = torch.rand(len(meaning), generator=rng) >= self.drop_words
        return [w if k or i % 4 in (0, 1, 2) and i < 4 * self.cfg.objects else ""
                for i, (w, k) in enumerate(zip(meaning, keep, strict=True))]  # fmt: skip

    def _move(self, meaning: list[str], rng: torch.Generator, frames: int) -> Tensor:
        """(objects frames 2): uniform start, constant forward speed, sideways a random telegraph."""
        canvas = torch.tensor([self.cfg.width, self.cfg.height])
        start = torch.rand(self.cfg.objects, 2, generator=rng)
        draws = torch.rand(frames + 1, self.cfg.objects, 2, generator=rng)
        paths = []
        for i in range(self.cfg.objects):
            _, _, motion, speed = meaning[4 * i : 4 * i + 4]
            ahead = torch.tensor(MOTIONS[motion]) * SPEEDS.get(speed, 0.0) * self.scale
            turns = draws[1:, i, 0] < TURN
            side = (3 * draws[:, i, 1]).long() - 1
            since = torch.where(turns, torch.arange(1, frames + 1), 0).cummax(0).values
            velocity = ahead + WEAVE * side[since][:, None] * ahead.flip(0)
            paths.append(start[i] * canvas + velocity.cumsum(0) - velocity[:1])
        return torch.stack(paths) % canvas

    def render(self, meanings: list[list[str]], position: Tensor, radius: Tensor) -> Tensor:
        """(b objects F 2), (b objects) → video01 (b F 3 H W); later objects hide earlier ones."""
        h, w = self.cfg.height, self.cfg.width
        ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
        video = torch.stack([torch.full((position.shape[2], 3, h, w), BACKGROUNDS[m[-1]]) for m in meanings])
        for b, meaning in enumerate(meanings):
            for i in range(self.cfg.objects):
                colour, shape = meaning[4 * i : 4 * i + 2]
                # (F W), (F H): the shorter way round the torus
                dx = (xs - position[b, i, :, :1] + w / 2) % w - w / 2
                dy = (ys - position[b, i, :, 1:] + h / 2) % h - h / 2
                alpha = shape_alpha(SHAPES.index(shape), dx[:, None, :], dy[:, :, None], radius[b, i])
                paint = torch.tensor(COLOURS[colour])[:, None, None]
                video[b] += alpha[:, None] * (paint - video[b])
        return video


def pick(rng: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (), generator=rng))


def split_of(meaning: list[str]) -> str:
    """train (80 %), select (10 %) or test (10 % of all captions), by a hash of the caption."""
    bucket = int(np.random.SeedSequence(list(" ".join(meaning).encode())).generate_state(1)[0]) % 10
    return "test" if bucket == 0 else "select" if bucket == 1 else "train"


# -- real clips ----------------------------------------
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
    _check_words(words, vocabulary)
    return words
