"""The table: what teacher, causal start and student are worth on held-out prompts, with 95 % intervals.

    python evaluate.py                                   # the shipped nets
    python evaluate.py --student=out/train/student.safetensors --clips=64
    python evaluate.py --nets=out/pretrain --stamp       # and write what was measured into the nets' headers
    python evaluate.py table --methods=self_forcing,stream_r1 --seeds=5      # train, measure, compare

The table adds VQ, MQ and TA, the learned reward's scores: not a measure of quality, but a student above the
real clips of the first row would have fooled the reward that trained it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import compare
from checkpoint import annotate, load_weights, read_header, writable_folder, write_atomically
from codec import Codec
from config import BadInput, Config, build, cli, from_words, read_cli
from data import World, caption, rng_for, tokenize
from measure import measure, three_axes
from model import VideoDiT
from processes import pick_device
from reward import AXES, RewardModel
from rollout import rollout, sample_teacher


@dataclass(frozen=True)
class Flags:
    nets: str = ""  # folder with codec, teacher, causal, stream_r1; default assets/<preset>
    student: str = ""  # one student instead of the shipped nets
    clips: int = 128  # held-out prompts
    noises: int = 3  # noise seeds
    stamp: bool = False  # write what was measured into the headers of the nets
    out: str = "out/evaluation.json"
    # of `evaluate.py table`
    methods: str = ""  # rows of compare.py, comma-separated; default all
    seeds: int = 5  # 0: only print what has been measured
    results: str = "results"  # one JSON file a run
    runs: str = "out/table"  # what training leaves


@torch.no_grad()
def score(net, codec: Codec, reward: RewardModel, cfg: Config, flags: Flags, how: str) -> dict[str, Tensor]:
    """Measures of `clips` x `noises` samples for prompts of the test split → {measure: (noises clips)}.

    how: real (clips of the world, through the codec; no net) | teacher (25 steps, the whole clip at once) |
    within (a rollout of the training length) | beyond (the last clip's worth of frames of a rollout four
    times that long).
    """
    rows = []
    for noise in range(1 if how == "real" else flags.noises):
        parts = []
        for first in range(0, flags.clips, 32):
            keys = [("evaluate", i) for i in range(first, min(first + 32, flags.clips))]
            words = World(cfg, "test").captions(keys)
            text = tokenize(words, cfg.text_length, cfg.text_width).to(cfg.device)
            rngs = [rng_for("evaluate", noise, i) for _, i in keys]
            if how == "real":
                x = codec.encode(World(cfg, "test").batch(keys).video01.to(cfg.device))
            elif how == "teacher":
                x = sample_teacher(net, text, cfg, rngs)
            else:
                x = rollout(net, text, cfg, rngs, cfg.chunks * (4 if how == "beyond" else 1))
            video01 = codec.decode(x).float()
            judged = dict(zip(AXES, reward(video01, text).cpu().unbind(1), strict=True))
            found = measure(video01, [caption(w) for w in words])
            parts.append(found | three_axes(found) | judged)
        rows.append({k: torch.cat([part[k] for part in parts]) for k in parts[0]})
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def interval(values: Tensor) -> tuple[float, float]:
    """(noises clips) → mean, half a 95 % interval over prompts: one prompt's noises are not independent."""
    per_prompt = values.nanmean(0)
    per_prompt = per_prompt[per_prompt.isfinite()]
    spread = per_prompt.std() if len(per_prompt) > 1 else torch.tensor(float("nan"))
    return float(per_prompt.mean()), float(1.96 * spread / len(per_prompt) ** 0.5)


def table_of_methods(typed: dict, flags: Flags) -> None:
    """Train and measure what is missing, then print the table (compare.py)."""
    if not 0 <= flags.seeds <= 10 or flags.clips < 2:
        raise BadInput(f"seeds={flags.seeds} clips={flags.clips} is not possible; allowed: 0 to 10, from 2")
    results, runs = Path(flags.results), Path(flags.runs)
    names = compare.rows_named(flags.methods, typed)
    how = compare.Protocol(Path(flags.nets or "assets/tiny"), results, runs, flags.seeds, flags.clips)
    if flags.seeds:
        compare.compare(names, typed, how)
    table = compare.load_results(results, names)
    if not table:
        raise BadInput(f"{results} holds no runs of these rows; --seeds=1 or more makes some")
    print(compare.markdown(table), compare.crossed(table), sep="\n\n")


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    if preset == "table":
        return table_of_methods(typed, flags)
    device = pick_device(build(preset, typed))
    nets = Path(flags.nets or f"assets/{preset}")
    jobs = [("real, through the codec", "codec", "real")]
    jobs += [("teacher", "teacher", "teacher"), ("causal start", "causal", "within")]
    jobs += [("stream_r1", "stream_r1", "within"), ("stream_r1, 4x length", "stream_r1", "beyond")]
    paths = {kind: nets / f"{kind}.safetensors" for _, kind, _ in jobs}
    if flags.student:
        paths = {"student": Path(flags.student)}
        jobs = [("student", "student", "within"), ("student, 4x length", "student", "beyond")]
    if flags.clips < 2 or flags.noises < 1:
        raise BadInput(f"clips={flags.clips} noises={flags.noises} is not possible; allowed: from 2, from 1")
    if flags.stamp and set(typed) - {"device"}:
        raise BadInput(f"--stamp notes what the nets do as trained; leave out --{' --'.join(typed)}")
    out, table = Path(flags.out), {}
    writable_folder(str(out.parent))
    headers = {name: read_header(path) for name, path in paths.items()}
    for label, name, how in jobs:
        header = headers[name]
        made = from_words(header["config"], typed | {"device": device})
        if how == "teacher":  # guidance is nothing that it was trained with
            made = replace(made, guidance=build(preset, typed).guidance)
        codec = load_weights(nets / "codec.safetensors", Codec(made), made, "codec").to(device)
        reward = load_weights(nets / "reward.safetensors", RewardModel(made), made, "reward").to(device)
        net = codec
        if how != "real":
            net = load_weights(paths[name], VideoDiT(made), made, header["kind"]).to(device)
        measured = score(net, codec, reward, made, flags, how)
        table[label] = {k: interval(v) for k, v in measured.items()}
        cells = " ".join(f"{k} {m:.3f}±{h:.3f}" for k, (m, h) in table[label].items())
        print(f"{label:24} {cells}", flush=True)
        if flags.stamp:
            annotate(paths[name], **{f"measured, {how}": f"{cells} ({flags.clips} prompts x {flags.noises})"})
    text = json.dumps({"clips": flags.clips, "noises": flags.noises, "rows": table}, indent=1)
    write_atomically(out, lambda name: name.write_text(text))
    print(out)


if __name__ == "__main__":
    cli(main)
