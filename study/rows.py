"""Which trainings are compared: a row is a name for a few Config fields, with a row to compare it with.

A row differs from its `reference` in the technique it is about and in nothing else, so that a difference
between the two says what this technique does.
"""

from config import METHODS, BadInput, build

BASE, WINDOWED = "self_forcing", "windowed"  # plain DMD: the whole clip in view; with window and EMA sink
_RF, _SR1, _DIAGONAL = ({"method": name} for name in ("reward_forcing", "stream_r1", "diagonal"))
_PLAIN = {"method": WINDOWED}
_HALF = _SR1 | {"beta": 0.5, "balance_window": 50}
_TWO_STEPS = {"denoise": (1.0, 0.5)}
ROWS: dict[str, dict] = {name: {"method": name} for name in METHODS} | {
    # Reward Forcing's parts: the sink, its decay
    "reward_forcing-no_sink": _RF | {"sink": 0, "sink_mode": "none"},
    "reward_forcing-static_sink": _RF | {"sink_mode": "static"},
    "reward_forcing-ema.9": _RF | {"sink_decay": 0.9},
    "reward_forcing-ema.999": _RF | {"sink_decay": 0.999},
    # Stream-R1's parts; the rollout's weight alone at other strengths
    "stream_r1-inter": _PLAIN | {"beta": 2.0},
    "stream_r1-inter-beta.5": _PLAIN | {"beta": 0.5},
    "stream_r1-inter-beta8": _PLAIN | {"beta": 8.0},
    "stream_r1-space": _PLAIN | {"space": True},
    "stream_r1-time": _PLAIN | {"time": True},
    "stream_r1-time_space": _PLAIN | {"time": True, "space": True},
    "stream_r1-unbalanced": _SR1 | {"balance": "none"},
    "windowed-group4": _PLAIN | {"group": 4},
    "stream_r1-group4": _SR1 | {"group": 4},
    "stream_r1-softmax4": _SR1 | {"group": 4, "weight": "softmax"},
    "stream_r1-percentile": _SR1 | {"saliency_range": "percentile"},
    # a quarter of the published strength, and a balance that hardly acts: runs of before
    "reward_forcing-beta.5": _RF | {"beta": 0.5},
    "reward_forcing-beta.5-no_sink": _RF | {"beta": 0.5, "sink": 0, "sink_mode": "none"},
    "reward_forcing-beta.5-static_sink": _RF | {"beta": 0.5, "sink_mode": "static"},
    "stream_r1-beta.5": _HALF,
    "stream_r1-beta.5-2steps": _HALF | _TWO_STEPS,
    "stream_r1-beta.5-guidance3-ema.95": _HALF | {"guidance": 3.0, "ema": 0.95},
    # Diagonal Distillation's parts
    "diagonal-432": _DIAGONAL | {"taper": "432", "motion": 0.2},
    "diagonal-taper": _DIAGONAL | {"motion": 0.0, "context": "clean"},
    "diagonal-no_refresh": _DIAGONAL | {"motion": 0.0, "taper": "uniform"},
    "diagonal-motion": _DIAGONAL | {"motion": 0.2, "taper": "uniform", "context": "clean"},
    "diagonal-motion0": _DIAGONAL | {"motion": 0.0},
    "diagonal-motion.2": _DIAGONAL | {"motion": 0.2},
    "diagonal-motion1": _DIAGONAL | {"motion": 1.0},
    # two denoising steps, where there is more to gain
    "windowed-2steps": _PLAIN | _TWO_STEPS,
    "stream_r1-2steps": _SR1 | _TWO_STEPS,
    "windowed-2steps-guidance3": _PLAIN | _TWO_STEPS | {"guidance": 3.0},
    # the teacher's guidance; with half the learning rate; with an average that follows faster
    "windowed-guidance3": _PLAIN | {"guidance": 3.0},
    "windowed-guidance3-slow": _PLAIN | {"guidance": 3.0, "lr": 1e-4},
    "windowed-guidance3-ema.95": _PLAIN | {"guidance": 3.0, "ema": 0.95},
    "stream_r1-guidance3-ema.95": _SR1 | {"guidance": 3.0, "ema": 0.95},
    # what later chunks see, in training and in sampling
    **{f"context-{t}": {"method": BASE, "context": "noisy", "context_t": t} for t in (0.1, 0.2, 0.357, 0.6)},
}
# objects in a clip: what makes it so, and the nets of this world
WORLDS = {"one": ({}, "assets/tiny"), "two": ({"objects": 2, "text_length": 9}, "assets/two")}
STEPS, EVERY = 100, 25  # of every row: updates, and those between measurements that choose a checkpoint


def as_flag(name: str, value) -> str:
    """A field as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


def fields_of(name: str, world: str, typed: dict) -> dict:
    """Everything of a row's Config that is not the default."""
    return ROWS[name] | {"steps": STEPS, "eval_every": EVERY} | WORLDS[world][0] | typed


def reference(row: str) -> str:
    """The row to compare with: the same cache, guidance and prompts without the row's own technique; for
    other guidance the usual one, for other sinks the EMA sink, for motion weights beside a taper none."""
    cfg = build("tiny", ROWS[row])
    if row.startswith("reward_forcing-") and row != "reward_forcing-beta.5":
        return "reward_forcing-beta.5" if "beta.5" in row else "reward_forcing"
    if row in ("diagonal-motion.2", "diagonal-motion1"):
        return "diagonal-motion0"
    if not cfg.window:
        return BASE
    plain = build("tiny", _PLAIN | {"denoise": cfg.denoise, "guidance": cfg.guidance, "group": cfg.group})
    plain = build("tiny", _PLAIN | {"denoise": cfg.denoise}) if cfg == plain else plain
    return next(name for name in ROWS if build("tiny", ROWS[name]) == plain)


def rows_named(names: str, typed: dict) -> list[str]:
    """Comma-separated names (empty: all rows) → row names, each after the row it is compared with. Raises
    BadInput, also for a typed field that a row is made of."""
    wanted = [name for name in names.split(",") if name] or list(ROWS)
    for name in wanted:
        if name not in ROWS:
            raise BadInput(f"--methods: {name!r} is not possible; allowed: {' '.join(ROWS)}")
    wanted = list(dict.fromkeys([BASE, WINDOWED, *map(reference, wanted), *wanted]))
    for name in wanted:
        own = {"seed"} | ROWS[name].keys() | METHODS[ROWS[name]["method"]].keys()
        if clash := own & typed.keys():
            raise BadInput(f"--{min(clash)} is part of what the row {name!r} stands for; leave it out")
    return wanted
