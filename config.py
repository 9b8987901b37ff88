"""One frozen dataclass, three presets, the methods of the family, and the command line.

script.py [preset] [--key=value ...]        unknown key, wrong type or impossible value: exit code 2, one line
"""

import argparse
import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent  # shipped weights are found from any working folder


class BadInput(ValueError):
    """What a person typed or handed over cannot be used. Scripts turn it into one line and exit code 2."""


@dataclass(frozen=True)
class Config:
    # world -----------------------------------------------------------------------------------------------
    preset: str = "tiny"  # the name of the settings below that a run starts from
    height: int = 32  # pixels
    width: int = 32  # pixels
    objects: int = 1  # moving things in a clip of the procedural world
    fps: int = 8  # frames a second
    data: str = ""  # a folder of captioned clips instead of the procedural world; a file of prompts for Wan
    negative: str = ""  # the prompt that guidance leads Wan away from; published: a fixed Chinese one
    # latent video ----------------------------------------------------------------------------------------
    frames: int = 16  # latent frames the teacher knows, and that DMD compares
    chunk: int = 4  # latent frames generated together
    channels: int = 12  # latent channels
    stride: int = 8  # pixels per latent cell
    time_stride: int = 1  # pixel frames per latent frame (4 for Wan's causal codec)
    codec_noise: float = 0.25  # std of the noise on the unit-variance latent while the codec learns
    codec_straight: float = 0.0007  # weight of the straightness of latent paths
    # transformer -----------------------------------------------------------------------------------------
    patch: int = 1  # latent cells per token and side
    patch_time: int = 4  # latent frames per token: what moves within a token shows its velocity
    dim: int = 128  # width of the transformer
    ffn: int = 512  # width between the two layers of a feed-forward part
    layers: int = 6  # blocks
    heads: int = 4  # attention heads
    time_freqs: int = 64  # width of the sinusoidal time embedding
    text_length: int = 5  # words a prompt may have, with Wan tokens
    text_width: int = 64  # numbers per word or token
    text: Literal["words", "minilm"] = "words"  # minilm: with data, a sentence encoder's states of any words
    predict: Literal["x", "v"] = "x"  # clean latents (patches wider than the model) or velocity
    # what a chunk may look at ----------------------------------------------------------------------------
    window: int = 3  # chunks attended to in all: sink + recent + the current one; 0 = the whole clip
    sink: int = 1  # chunks of it that are never evicted; diagonal's is published as 3 static frames
    sink_mode: Literal["none", "static", "ema"] = "ema"  # ema: Reward Forcing's EMA-Sink
    sink_decay: float = 0.99  # EMA-Sink: share of the old sink kept at each eviction
    # flow and rollout ------------------------------------------------------------------------------------
    shift: float = 3.0  # warps uniform time towards noise
    guidance: float = 1.5  # u + guidance * (c - u); the papers' "3.0" is 4.0; 3 makes objects shake more
    denoise: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)  # student's time grid before the shift
    taper: Literal["uniform", "5432", "432"] = "uniform"  # steps per chunk; noise levels are ours
    context: Literal["clean", "noisy", "none", "aligned"] = "clean"  # what later chunks see: docs/method.md
    context_t: float = 0.0  # noise level of a noisy context, in [0, 1)
    horizon: int = 2  # rollouts last up to horizon * frames; DMD looks at the last `frames`
    # method ----------------------------------------------------------------------------------------------
    method: str = "stream_r1"  # whose settings: it decides some of what follows; a field that is typed wins
    beta: float = 2.0  # rollout weight exp(beta * reward); 0 = plain DMD
    weight: Literal["exp", "softmax"] = "exp"  # ours: softmax(beta * reward) within a group, mean 1
    axes: tuple[str, ...] = ("VQ", "MQ", "TA")  # reward axes in use
    group: int = 1  # rollouts per prompt; above 1 the reward is relative to the prompt's mean
    balance: Literal["none", "penalty"] = "penalty"  # penalty: on unequal improvement of the axes
    balance_strength: float = 0.5  # lambda of the penalty
    balance_window: int = 6  # judged micro-batches of history, unused until full; published: 50, 6 updates
    space: bool = True  # weight the loss by spatial saliency, |dr| summed; published: its L2 norm
    time: bool = True  # weight the loss by temporal saliency
    saliency_range: Literal["minmax", "percentile"] = "minmax"  # ours: 5th to 95th, between floor and 1
    floor_space: float = 0.15  # smallest spatial weight before the mean becomes 1
    floor_time: float = 0.2  # smallest temporal weight before the mean becomes 1
    fuse_temperature: float = 1.0  # softmax(-reward / T) over axes: the weakest axis speaks loudest
    motion: float = 0.0  # weight of the DMD term on temporal differences (Diagonal Distillation)
    # training --------------------------------------------------------------------------------------------
    seed: int = 0  # another one gives other clips and other noise
    steps: int = 25  # student updates of every method; published: 200; 120 for Self and Reward Forcing
    batch: int = 16  # clips per step over all processes
    accumulate: int = 1  # micro-batches per update and process; one exit step for all, published: one each
    critic_steps: int = 2  # critic updates per student update; published: 5
    critic_warmup: int = 20  # critic-only updates before the first step; published: none
    lr: float = 2e-4  # learning rate of the student
    critic_lr: float = 4e-4  # learning rate of the critic
    beta1: float = 0.0  # Adam's first decay, for student and critic
    beta2: float = 0.99  # Adam's second decay; published: .999
    ema: float = 0.98  # decay of the student's average, kept from update 1; published: from a later one
    clip: float = 1.0  # largest gradient norm; published: 10
    t_min: float = 0.02  # lowest noise level at which scores are compared
    t_max: float = 0.98  # highest noise level at which scores are compared
    bf16: bool = False  # autocast; pays on GPUs and on CPUs with bf16 dot products
    lora: int = 0  # with Wan: rank of the updates that student and critic learn; 0: all weights learn
    checkpointing: bool = False  # recompute blocks in the backward pass
    shard: bool = False  # FSDP2: spread parameters, gradients, optimizers and averages over the processes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one
    attention: Literal["auto", "cudnn", "flash", "mem_efficient"] = "auto"  # of sampling, on CUDA
    threads: int = 0  # CPU threads to compute with; 0: one a core, sample.py takes one for tiny
    save_every: int = 25  # steps between checkpoints, of which two are kept
    eval_every: int = 25  # steps between held-out measurements; the best EMA student is kept
    eval_clips: int = 64  # held-out prompts that are measured
    max_bad: int = 8  # steps in a row with a non-finite sample before the run stops

    def __post_init__(self):
        def check(name: str, fine: bool, allowed: str):
            if not fine:
                raise BadInput(f"{name}={getattr(self, name)} is not possible; allowed: {allowed}")

        for f in fields(self):
            value, zero = getattr(self, f.name), " or zero" * (f.name in _MAY_BE_ZERO)
            if get_origin(f.type) is Literal:
                check(f.name, value in get_args(f.type), " | ".join(get_args(f.type)))
            elif f.type in (int, float):
                check(f.name, 0 < value < math.inf or value == 0 and zero, f"a positive number{zero}")
        cell = self.stride * self.patch
        check("height", self.height % cell == 0, f"a multiple of {cell} (stride x patch)")
        check("width", self.width % cell == 0, f"a multiple of {cell} (stride x patch)")
        check("frames", self.frames % self.chunk == 0, f"a multiple of chunk={self.chunk}")
        check("chunk", self.chunk % self.patch_time == 0, f"a multiple of patch_time={self.patch_time}")
        check("dim", self.dim % self.heads == 0 and self.dim // self.heads % 2 == 0, "an even width per head")
        check("window", (self.window or self.chunks) > self.sink + 1, "0, or more than sink + 1 chunks")
        check("sink", (self.sink == 0) == (self.sink_mode == "none"), "0 exactly when sink_mode=none")
        check("sink", self.sink_mode != "ema" or self.sink == 1, "1 when sink_mode=ema")
        check("sink_decay", self.sink_decay <= 1, "within [0, 1]")
        for name in ("beta1", "beta2", "context_t", "ema"):
            check(name, getattr(self, name) < 1, "within [0, 1)")
        check("time_freqs", self.time_freqs % 2 == 0, "an even number")
        check("objects", bool(self.data) or self.objects <= 8, "1 to 8, one a colour")
        grid = self.denoise
        falling = all(a > b for a, b in zip(grid, grid[1:], strict=False))
        falling &= bool(grid) and grid[0] == 1 and grid[-1] > 0
        check("denoise", falling, "1.0, ... falling, above 0")
        own = self.taper != "uniform" and grid != Config.denoise
        check("denoise", not own, f"none with taper={self.taper}, which has noise levels of its own")
        check("context", self.context != "aligned" or self.taper == "uniform", "aligned with taper=uniform")
        check("horizon", self.horizon == 1 or self.time_stride == 1, "1 with a codec that is causal in time")
        check("t_min", self.t_min < self.t_max <= 1, "0 <= t_min < t_max <= 1")
        check("axes", bool(self.axes) and set(self.axes) <= {"VQ", "MQ", "TA"}, "some of VQ, MQ, TA")
        check("text_length", bool(self.data) or self.text_length > 4 * self.objects, "above 4 x objects")
        own = bool(self.data) and self.time_stride == 1 and self.text_width == 384
        check("text", self.text == "words" or own, "words; minilm with --data, not Wan's, and text_width=384")
        check("balance_window", self.balance_window > 1, "2 or more")
        check("weight", self.weight == "exp" or self.group > 1, "exp with group=1")
        check("batch", self.batch % (self.group * self.accumulate) == 0, "a multiple of group x accumulate")

    @property
    def weighted(self) -> bool:
        """Whether a reward takes part."""
        return bool(self.beta or self.space or self.time)

    @property
    def example(self) -> str:
        """A prompt for this preset; with --data there is none to offer."""
        second = " and a blue square moving up slowly" * (self.objects > 1)
        prompt = f"a red circle moving left slowly{second} on a black background"
        return "..." if self.data and self.time_stride == 1 else prompt

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent frame, as (rows, columns)."""
        return self.height // (self.stride * self.patch), self.width // (self.stride * self.patch)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent frame."""
        return self.channels, self.height // self.stride, self.width // self.stride

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk along time."""
        return self.chunk // self.patch_time

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_tokens * self.grid[0] * self.grid[1]

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk

    @property
    def cached_chunks(self) -> int:
        """Chunks a cache holds: the attention window without the chunk that is being generated."""
        return (self.window or self.chunks) - 1

    @property
    def pixel_frames(self) -> int:
        """Frames of a decoded training clip."""
        return self.pixels(self.chunks)

    def pixels(self, chunks: int) -> int:
        """Frames that many chunks decode to; a causal codec's first latent becomes one frame."""
        return 1 + (chunks * self.chunk - 1) * self.time_stride if chunks else 0


_MAY_BE_ZERO = (
    "codec_noise codec_straight window sink sink_decay context_t beta balance_strength "
    "threads lora floor_space floor_time motion seed beta1 beta2 ema t_min critic_warmup"
).split()


PRESETS: dict[str, Config] = {
    "tiny": Config(),
    "small": Config(
        preset="small", height=64, width=64, objects=2, frames=24, dim=192, ffn=768, layers=8, heads=6,
        text_length=9, batch=64, steps=1000, critic_steps=5, bf16=True, window=4, eval_every=25,
    ),
    "wan-1.3b": Config(
        preset="wan-1.3b", height=480, width=832, fps=16, frames=21, chunk=3, channels=16, time_stride=4,
        patch=2, patch_time=1, dim=1536, ffn=8960, layers=30, heads=12, time_freqs=256, text_length=512,
        text_width=4096, predict="v", shift=5.0, guidance=4.0, batch=64, accumulate=8, steps=200,
        critic_steps=5, lr=2e-6, critic_lr=4e-7, beta2=0.999, ema=0.99, clip=10.0, bf16=True,
        checkpointing=True, shard=True, horizon=1, save_every=10, eval_every=25, sink_decay=0.999,
        balance_window=50,
    ),
}  # fmt: skip

_PLAIN = dict(beta=0.0, space=False, time=False, balance="none")
METHODS: dict[str, dict] = {
    "windowed": dict(_PLAIN),  # plain DMD with the same cache and no extra technique
    "self_forcing": dict(_PLAIN, window=0, sink=0, sink_mode="none"),
    "reward_forcing": dict(space=False, time=False, balance="none", axes=("MQ",)),
    "stream_r1": {},
    "diagonal": dict(_PLAIN, taper="5432", context="none", motion=4.0),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(message)


def _add_field(parser: argparse.ArgumentParser, f) -> None:
    kind, parts, how = get_origin(f.type) or f.type, get_args(f.type), {"type": f.type}

    def comma_separated(word: str) -> tuple:
        return tuple(parts[0](w) for w in word.split(",") if w)

    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif kind is Literal:
        how = {}
    elif kind is list:
        how = {"action": "append", "type": parts[0]}
    elif kind is tuple:
        comma_separated.__name__ = f"comma-separated {parts[0].__name__}"
        how = {"type": comma_separated}
    parser.add_argument(f"--{f.name}", **how)


def read_cli(argv: list[str] | None, flags: type | None, doc: str) -> tuple[str, dict, object]:
    """Read `[preset] [--key=value ...]` → preset, what was typed of Config, flags. Raises BadInput.

    `flags` is a dataclass with a script's own options; where it shares a name with Config, it wins.
    """
    own = {f.name: f for f in fields(flags)} if flags else {}
    shared = {f.name: f for f in fields(Config) if f.name not in own and f.name != "preset"}
    parser = _Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    parser.add_argument("preset", nargs="?", default="")
    parser.add_argument("--config", default="")
    parser.add_argument("--help", "-h", action="store_true", default=False)
    parser.add_argument("--help-all", action="store_true", default=False)
    for f in (*own.values(), *shared.values()):
        _add_field(parser, f)
    known, unknown = parser.parse_known_args(argv)
    typed = vars(known)
    asked, path, some, everything = (typed.pop(k) for k in ("preset", "config", "help", "help_all"))
    if some or everything:
        print(help_text(doc, flags, asked if asked in PRESETS else "tiny", typed, everything))
        sys.exit()
    if unknown:
        word = unknown[0].lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(word, [*own, *shared, "config", "help-all"], 1)
        hint = f"did you mean --{near[0]}?" if near else "--help-all lists what is allowed"
        raise BadInput(f"unknown argument {unknown[0]}; {hint}")
    ours = {k: v for k, v in typed.items() if k in own}
    theirs = {k: v for k, v in typed.items() if k in shared}
    for name, value in ours.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise BadInput(f"{name}={value} is not possible; allowed: 0 or more")
    made, saved = saved_settings(path) if path else (asked or "tiny", {})
    if asked not in ("", made):
        raise BadInput(f"--config={path} is of preset {made!r}, asked for was {asked!r}")
    return made, saved | theirs, flags(**ours) if flags else None


def saved_settings(path: str) -> tuple[str, dict]:
    """A run's config.json → its preset, its method and where it departs from both. Raises BadInput."""
    try:
        text = Path(path).read_text()
        # what a machine decides is chosen anew on another one
        made = replace(from_words(text), preset=json.loads(text)["preset"], device="auto", threads=0)
        plain = build(made.preset, {"method": made.method})
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"--config={path} is no config.json of a run: {error}") from error
    return made.preset, {k: v for k, v in vars(made).items() if k == "method" or v != vars(plain)[k]}


def options(values) -> dict[str, tuple[str, str]]:
    """Fields of a dataclass → (group, help line): how it is typed, its comment, [choices; default]."""
    group, notes, found = "", {}, {}
    for line in inspect.getsource(type(values)).splitlines():
        if title := re.match(r"    # (.+?) -{5,}$", line):
            group = title[1]
        elif note := re.match(r"    (\w+): .*?  # (.+)", line):
            notes[note[1]] = group, note[2]
    for f in fields(values):
        group, note = notes.get(f.name, ("", ""))
        value, choices = vars(values)[f.name], METHODS if f.name == "method" else ()
        choices = get_args(f.type) if get_origin(f.type) is Literal else choices
        flag = f"--[no-]{f.name}" if f.type is bool else f"--{f.name}={_TYPED.get(f.type, 'WORD')}"
        value = ("off", "on")[value] if f.type is bool else value
        shown = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        about = [" | ".join(choices)] * bool(choices) + [f"default {shown}"] * bool(shown)
        found[f.name] = group, f"  {flag:<26} {note}" + f" [{'; '.join(about)}]" * bool(about)
    return found


_TYPED = {int: "N", float: "X", Path: "PATH", tuple[str, ...]: "A,B", tuple[float, ...]: "X,Y"}
_CONFIG = f"  {'--config=PATH':<26} start from the config.json of a run; what is typed wins"
_HELP = f"  {'--help, --help-all':<26} show some settings, or all of them"
# settings that --help shows; --help-all shows the rest
COMMON = "method steps batch seed beta guidance data device bf16 threads".split()


def help_text(doc: str, flags: type | None, preset: str, typed: dict, everything: bool) -> str:
    """A script's docstring, its own options, then settings with the defaults of preset and method."""
    cfg = build(preset, {k: v for k, v in typed.items() if k == "method"})
    own = options(flags()) if flags else {}
    head = f"  {'[preset]':<26} {' | '.join(PRESETS)}", _CONFIG, _HELP
    groups = {"this script": [*head, *(line for _, line in own.values())]}
    for name, (group, line) in options(cfg).items():
        if name not in own and name != "preset" and (everything or name in COMMON):
            groups.setdefault(group if everything else f"settings, as in {cfg.preset}", []).append(line)
    return "\n".join([doc.strip(), *("\n".join(["", title, *lines]) for title, lines in groups.items())])


def build(preset: str, typed: dict) -> Config:
    """Preset, then the method's fields, then what was typed → Config. Raises BadInput."""
    if preset not in PRESETS:
        raise BadInput(f"unknown preset {preset!r}; allowed: {' | '.join(PRESETS)}")
    method = typed.get("method", PRESETS[preset].method)
    if method not in METHODS:
        raise BadInput(f"method={method} is not possible; allowed: {' | '.join(METHODS)}")
    width = {"text_width": 384} if typed.get("text") == "minilm" else {}
    return replace(PRESETS[preset], **(width | METHODS[method] | typed))


def from_words(text: str, typed: dict | None = None) -> Config:
    """json.dumps(asdict(config)) from a checkpoint's header, then what was typed → Config. Raises BadInput.

    Fields that were added since keep their defaults; a method is what the weights were trained with.
    """
    known = {f.name for f in fields(Config)}
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items() if k in known}
    typed = typed or {}
    method = made.get("method", Config.method)
    if typed.get("method", method) != method:
        what = f"method={typed['method']} is not possible with weights of {method}"
        raise BadInput(f"{what}; type the fields it stands for (config.py), such as --taper or --context")
    try:
        return Config(**(made | typed))
    except TypeError as error:  # a word where a number should be
        raise BadInput(f"the config of these weights cannot be used: {error}") from error


def cli(main: Callable[[], None]) -> None:
    """Call a script's main; bad input ends it with one line on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # an arrow where a terminal or a file knows none
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after the loop, which saves
        sys.exit(130)
