"""The world's vocabulary and its grammar: a prompt becomes a meaning, a meaning a caption or an embedding."""

import difflib
import unicodedata
from functools import lru_cache

import torch
from torch import Tensor

from config import BadInput, Config
from engine.rng import rng_for

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
KINDS = {
    "colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS), "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}  # fmt: skip
_CLASSES = tuple(KINDS.values())[:4]
VOCABULARY = (*_FILLER, "and", *(word for words in _CLASSES for word in words), *BACKGROUNDS)


@lru_cache(maxsize=4096)
def vector(word: str, width: int) -> Tensor:
    return torch.randn(width, generator=rng_for("word", word))


def tokenize(captions: list[list[str]], length: int, width: int) -> Tensor:
    """Words → (b l e): a fixed pseudo-random vector per word plus one per place; zero where none is.

    Nothing is learned here: the transformer's own text embedding (Wan's two linear layers) does that.
    """
    text = torch.zeros(len(captions), length, width)
    for row, words in zip(text, captions, strict=True):
        for place, word in enumerate(words[:length]):
            if word:
                row[place] = (vector(word, width) + vector(f"#{place}", width)) / 2**0.5
    return text


def split_words(text: str, also: str = "") -> list[str]:
    """Words of any script, full-width letters as plain ones, in lower case; digits and emoji are words too.
    Spaces and punctuation, but for the characters `also`, part them."""
    kinds = ((c, unicodedata.category(c)) for c in unicodedata.normalize("NFKC", text).lower())
    return "".join(c if k[0] in "LMN" or k == "So" or c in also else " " for c, k in kinds).split()


def parse(prompt: str, objects: int) -> list[str]:
    """A prompt in any order → its meaning in fixed order: (colour shape motion speed) per object, background.

    What the prompt leaves open is "". Raises BadInput for unknown words (with the nearest known one), for an
    empty prompt, for an object described twice over, and for more objects than the model was trained on.
    """
    words = split_words(prompt)
    if not words:
        raise BadInput("the prompt is empty; try 'a red circle moving left slowly on a black background'")
    check_words(words, VOCABULARY)
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
        raise BadInput(f"the prompt {prompt[:200]!r} says nothing; known words: {' '.join(VOCABULARY)}")
    if len(meaning) > objects:
        raise BadInput(f"the prompt names {len(meaning)} objects; this model knows at most {objects}")
    meaning += [[""] * 4] * (objects - len(meaning))
    return [*(word for thing in meaning for word in thing), background]


def free_words(text: str) -> list[str]:
    """A caption in nobody's vocabulary → its words in order."""
    return split_words(text, "_'")


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


def left_open(meaning: list[str]) -> list[str]:
    """Of the first object, what `parse` found no word for and every training caption names."""
    return [kind for kind, word in zip(("colour", "shape", "motion"), meaning, strict=False) if not word]


def check_words(words: list[str], vocabulary) -> None:
    for word in words:
        if word not in vocabulary:
            near = difflib.get_close_matches(word, vocabulary, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"unknown word {word[:40]!r}; {hint}known words: {' '.join(vocabulary)}")


def _once(old: str, new: str, prompt: str) -> str:
    if old and old != new:
        where = f"contradict each other in {prompt[:200]!r}"
        raise BadInput(f"{old!r} and {new!r} {where}; 'and' joins two objects")
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
