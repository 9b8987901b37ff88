"""Pictures: contact sheets, curves of a run, and the saliency overlay, drawn with Pillow.

python -m study.figures curves --run=out/train   metrics.jsonl → out/train/curves.png
python -m study.figures saliency --prompt "a red circle moving left slowly"   → out/saliency.png
python -m study.figures weights --clips=512   do weights go where errors are? → out/weights.png
python -m study.figures table --results=results   what study.evaluate table has measured → out/table.png
python -m study.figures methods --runs=out/table   what its students draw, early and late → out/methods.png
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from data import understand
from engine.checkpoint import read_header, read_metrics, writable_folder, write_atomically
from engine.rng import rng_for
from engine.sheet import contact_sheet
from networks import load_net
from reward import AXES, RewardModel
from rollout import rollout, stream
from saliency import factorise, fuse_axes, reward_saliency, to_latent_grid
from study import compare
from study.weights import GROUPS, by_weight, weights_and_errors
from world.words import tokenize

# -- curves ----------------------------------------
CURVES = ("dmd", "critic", *AXES, "ess", "held_out_shape", "held_out_speed", "held_out_jitter")


def curves(run: Path) -> None:
    """One small panel per quantity of metrics.jsonl, step on the x axis, its range written at the left."""
    if not (rows := read_metrics(run)):
        raise BadInput(f"no {run}/metrics.jsonl with a step in it; a run of train.py writes it")
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
    write_atomically(run / "curves.png", lambda name: image.save(name))


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


# -- weights against errors ----------------------------------------
def weights_sheet(path: Path, found: dict[str, tuple[Tensor, Tensor]]) -> None:
    """A panel per weight and error: bars of mean error, the lightest eighth at the left, 95 % intervals over
    rows; the line is the mean of all. Prints ρ, and what it is with the weights of another row."""
    w, h, columns = 260, 150, 3
    image = Image.new("RGB", (w * columns, h * -(-len(found) // columns)), "white")
    draw = ImageDraw.Draw(image)
    for i, (what, (weight, error)) in enumerate(found.items()):
        pairs = zip(*map(by_weight, weight, error), strict=True)
        rho, bars = (torch.stack(part) for part in pairs)
        foreign = [by_weight(*pair)[0] for pair in zip(weight.roll(1, 0), error, strict=True)]
        said = "{:+.2f} ± {:.2f}".format(*compare.interval(rho))
        other = "{:+.2f} ± {:.2f}".format(*compare.interval(foreign))
        print(f"{what:34} rho {said}, with another's weights {other} (n = {int(rho.isfinite().sum())})")
        left, top, bottom = i % columns * w + 8, i // columns * h, (i // columns + 1) * h - 12
        draw.text((left, top + 2), what, "black")
        draw.text((left, top + 14), f"rho {said}", "grey")
        ends = [compare.interval(bar) for bar in bars.unbind(1)]
        scale = (h - 50) / max((m + wide for m, wide in ends if wide == wide), default=1.0)
        for g, (mean, wide) in enumerate((m, wide) for m, wide in ends if wide == wide):
            x = left + g * (w - 24) / GROUPS
            draw.rectangle((x, bottom - mean * scale, x + 20, bottom), (150, 175, 220))
            whisker = [(x + 10, bottom - y * scale) for y in (max(0, mean - wide), mean + wide)]
            draw.line(whisker, "black")
        draw.line((left, bottom - scale, left + w - 24, bottom - scale), "grey")
    write_atomically(path, lambda name: image.save(name))


# -- the comparison ----------------------------------------
PANELS = [(axis, view) for view in ("within", "beyond") for axis in ("looks", "motion", "text")]


def forest(path: Path, table: dict[str, dict[int, dict]]) -> None:
    """Per row and measure: every seed's difference from the row's control (ticks), their mean and its 95 %
    interval; the grey line is no difference, the numbers are the panel's ends."""
    rows = {row: compare.gains(table, row, PANELS) for row in table if row != compare.reference(row)}
    rows = {row: found for row, found in rows.items() if found}
    label, w, h, top = 190, 130, 18, 34
    image = Image.new("RGB", (label + w * len(PANELS), top + h * len(rows) + 4), "white")
    draw = ImageDraw.Draw(image)
    for p, (axis, view) in enumerate(PANELS):
        reach = max(abs(gain) for found in rows.values() for gain in found[axis, view]) * 1.2 or 1.0
        middle, half = label + p * w + w / 2, w / 2 - 8
        draw.text((middle - half, 2), axis if view == "within" else f"{axis}, {compare.FAR}x length", "black")
        draw.text((middle - half, 16), f"-{reach:.3f}", "grey")
        draw.text((middle + half - 38, 16), f"+{reach:.3f}", "grey")
        draw.line((middle, top, middle, image.height), "lightgrey")
        for r, found in enumerate(rows.values()):
            y, gains = top + r * h + h / 2, found[axis, view]
            mean, wide = compare.interval(gains)
            colour = "grey" if not abs(mean) > wide else (200, 40, 30) if mean < 0 else (20, 110, 60)
            for gain in gains:
                x = middle + gain / reach * half
                draw.line((x, y - 5, x, y + 5), "lightgrey")
            ends = [middle + max(-1, min(1, z / reach)) * half for z in (mean - wide, mean + wide) if z == z]
            draw.line([(x, y) for x in ends], colour, 2)
            x = middle + mean / reach * half
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    for r, (row, found) in enumerate(rows.items()):
        draw.text((2, top + r * h + 3), f"{row} (n={len(found[PANELS[0]])})", "black")
    write_atomically(path, lambda name: image.save(name))


@torch.no_grad()
def methods_sheet(path: Path, students: list[Path], nets: Path, prompt: str, seed: int) -> None:
    """A row a student: every second frame of the first clip's worth of a stream, and of the last, on the same
    prompt and noise."""
    rows = {}
    for student in students:
        cfg = from_words(read_header(student)["config"], {"device": "cpu"})
        text = tokenize([understand(prompt, cfg, [])], cfg.text_length, cfg.text_width)
        rngs, codec = [rng_for(seed, "methods")], load_net(nets / "codec.safetensors", cfg, "codec")
        parts = stream(load_net(student, cfg, "student"), text, cfg, rngs)
        chunks = list(islice(parts, compare.FAR * cfg.chunks))
        ends = torch.cat([*chunks[: cfg.chunks], *chunks[-cfg.chunks :]], dim=1)
        when = f"the first {cfg.frames} frames, and the last of {compare.FAR * cfg.frames}"
        rows[f"{student.parent.name}: {when}"] = codec.decode(ends)[0]
    contact_sheet(path, rows, every=2)


@dataclass(frozen=True)
class Flags:
    run: str = "out/train"
    prompt: str = "a red circle moving left slowly on a black background"
    nets: str = str(ROOT / "assets/tiny")
    seed: int = 0
    out: str = "out"
    results: str = "results"
    runs: str = "out/table"
    student: str = ""  # of saliency and weights; default <nets>/stream_r1.safetensors
    clips: int = 512  # of `study.figures weights`
    methods: str = ""  # rows of study/compare.py, comma-separated; default all there are


def about_a_student(what: str, out: Path, typed: dict, flags: Flags) -> None:
    """The saliency of one clip of the student, or its weights against its errors. Raises BadInput."""
    nets = Path(flags.nets)
    student = Path(flags.student or nets / "stream_r1.safetensors")
    header = read_header(student)
    cfg = from_words(header["config"], typed | {"device": "cpu"})
    net, codec = load_net(student, cfg, "student"), load_net(nets / "codec.safetensors", cfg, "codec")
    reward = load_net(nets / "reward.safetensors", cfg, "reward")
    if what == "saliency":
        words = understand(flags.prompt, cfg, header.get("vocabulary", "").split())
        text = tokenize([words], cfg.text_length, cfg.text_width)
        with torch.no_grad():
            video01 = codec.decode(rollout(net, text, cfg, [rng_for(flags.seed, "saliency")]))
        return saliency_sheet(out, video01, text, reward, cfg)
    if cfg.data:
        raise BadInput(f"{student} learnt from clips; only the procedural world can be measured")
    if not (cfg.beta or cfg.space or cfg.time):
        raise BadInput(f"{student} learnt without weights; allowed: with --beta=0.5, --space or --time")
    if cfg.batch < GROUPS:
        raise BadInput(f"batch={cfg.batch} is not possible; allowed: {GROUPS} or more")
    if flags.clips < 2 * cfg.batch or flags.clips % cfg.batch:
        allowed = f"{2 * cfg.batch}, {3 * cfg.batch} and so on"
        raise BadInput(f"clips={flags.clips} is not possible; allowed: {allowed}")
    teacher = load_net(nets / "teacher.safetensors", cfg, "teacher")
    given = {"student": net, "codec": codec, "reward": reward, "teacher": teacher}
    weights_sheet(out, weights_and_errors(given, cfg, flags.clips, flags.seed))


def main() -> None:
    what, typed, flags = read_cli(None, Flags, __doc__)
    if typed and what not in ("saliency", "weights"):
        raise BadInput(f"study.figures {what} does not depend on --{min(typed)}; leave it out")
    if what == "curves":
        curves(Path(flags.run))
        print(f"{flags.run}/curves.png")
    elif what in ("saliency", "weights"):
        out = writable_folder(flags.out) / f"{what}.png"
        about_a_student(what, out, typed, flags)
        print(out)
    elif what == "table":
        out = writable_folder(flags.out) / "table.png"
        table = compare.load_results(Path(flags.results), compare.rows_named(flags.methods, {}))
        if not any(compare.gains(table, row, PANELS) for row in table if row != compare.reference(row)):
            raise BadInput(f"--results={flags.results} holds no row together with its control")
        forest(out, table)
        print(out)
    elif what == "methods":
        names = compare.rows_named(flags.methods, {})
        students = [Path(flags.runs) / f"{name}-{flags.seed}" / "student.safetensors" for name in names]
        students = [path for path in students if path.is_file() or flags.methods]
        if not students:
            raise BadInput(f"--runs={flags.runs} has no student of seed {flags.seed}; see study.evaluate")
        out = writable_folder(flags.out) / "methods.png"
        methods_sheet(out, students, Path(flags.nets), flags.prompt, flags.seed)
        print(out)
    else:
        known = "curves | saliency | weights | table | methods"
        raise BadInput(f"study.figures {what} is not possible; allowed: {known}")


if __name__ == "__main__":
    cli(main)
