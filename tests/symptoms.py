"""What does a defect look like? Defects of released code, made on purpose, each in a copy of this code.

    python -m tests.symptoms                      # train each of them, 50 steps, into out/symptoms
    python -m tests.symptoms --names=kv_grad      # one of them; `healthy` is the same run without a defect
    python -m tests.symptoms --steps=0            # draw again what there is: symptoms.png, strips.png
    python -m tests.symptoms --check              # does the test that docs/symptoms.md names fall?

One seed each: a curve says what can happen, not how often.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import ROOT, BadInput, build, cli, from_words, read_cli
from data import read_clip
from engine.checkpoint import read_header, save_weights, states, writable_folder, write_atomically
from engine.sheet import contact_sheet
from networks import load_net
from run import read_metrics
from study.figures import BLUE, CURVES, GREY, canvas, finish
from study.rows import as_flag
from world.scene import World
from world.words import caption

KEPT = ROOT / "assets/curves"
_REWARD = "video01 = run.codec.decode(x.nan_to_num()).float()  # a broken"
# name: (the test that falls, ((file, what stands there, what shall stand there), ...))
SICK: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "healthy": ("", ()),
    "kv_grad": ("test_rollout.py -k no_gradient_leaks", (
        ("rollout.py", "@torch.no_grad()\ndef remember_chunk", "def remember_chunk"),
        ("rollout.py", "return caches[0].commit(given(noised(x0, noise, level), caches[0], level)[1])",
         "fresh = chain(*given(noised(x0, noise, level), caches[0], level)[1])\n"
         "        last = [new.detach() + (old - old.detach()) for new, old in zip(fresh, last)]"),
        ("rollout.py", "if behind and (behind[1] is None or", "if behind and (True or"),
        ("model.py", "append((k.detach(), v.detach()))", "append((k, v))"),
    )),
    "scrambled": ("test_saliency.py -k argmax", (  # cells in 2 x 2 blocks, read as rows
        ("saliency.py", "    time, space = factorise(",
         '    fused = rearrange(fused, "b f (h p) (w q) -> b f (h w p q)", p=2, q=2).view_as(fused)\n'
         "    time, space = factorise("),
    )),
    "one_weight": ("test_train.py -k weights_of_rollouts", (
        ("train.py", "    inter = rollout_weight(r, cfg)\n",
         "    inter = rollout_weight(r, cfg)\n"
         "    inter = inter.view(-1, len(x))[:, :1].expand(-1, len(x)).flatten()  # the first one's for all\n"
         "    intra = intra[:1]\n"),
    )),
    "bf16_sink": ("test_model.py -k ema_sink", (
        ("model.py", "tuple(old.float().lerp(new.float(), share)",
         "tuple(old.bfloat16().lerp(new.bfloat16(), share)"),
        ("model.py", "zeros(2, batch, *shape[2:])", "zeros(2, batch, *shape[2:], dtype=torch.bfloat16)"),
        ("config.py", "sink_decay: float = 0.99 ", "sink_decay: float = 0.999 "),
    )),
    "no_motion_term": ("test_dmd.py -k motion_is_added", (("dmd.py", "if motion:", "if False:"),)),
    "reward_range": ("test_reward.py -k out_of_range", (
        ("train.py", _REWARD, _REWARD.replace("float()", "float() * 2 - 1")),
        ("reward.py", "if low < -1e-3 or high > 1 + 1e-3:", "if False:"),
    )),
    "idle_critic": ("test_train.py -k critic_learns", (
        ("train.py", "update(run.critic, run.critic_opt, cfg)", "1.0"),
    )),
    "papers_guidance": ("test_dmd.py -k guidance", (
        ("model.py", "u + guidance * (c - u)", "c + guidance * (c - u)"),
    )),
    "mask_top_left": ("test_model.py -k chunk_by_chunk", (
        ("model.py", "    k, v = join(k, v) if join else (k, v)\n",
         "    k, v = join(k, v) if join else (k, v)\n"
         "    mask = torch.ones(q.shape[1], k.shape[1]).tril().bool().to(q.device) if join else mask\n"),
    )),
    "other_context": ("test_rollout.py -k clean_context", (
        ("config.py", '"aligned"] = "clean"', '"aligned"] = "noisy"'),
        ("config.py", "context_t: float = 0.0", "context_t: float = 0.6"),
    )),
    "lost_average": ("test_train.py -k killed_and_resumed", (
        ("run.py", "getattr(run, name).load_state_dict(state[name])",
         'name == "ema" or getattr(run, name).load_state_dict(state[name])'),
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Flags:
    names: str = ""  # defects, comma-separated; default all
    steps: int = 50  # of every run; 0: only draw
    out: str = "out/symptoms"  # the folder of copies, runs and pictures
    keep: bool = False  # thinned metrics into assets/curves
    check: bool = False  # run the tests in place of trainings


def copied(name: str, out: Path, *extra: str) -> Path:
    """A copy of the code with the defect in it. Raises BadInput where its words are not there once."""
    code = out / "code" / name
    shutil.rmtree(code, ignore_errors=True)
    skipped = {".*", "out", "assets", "docs", "tests", "code", "__pycache__"} - set(extra)
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(*skipped))
    for file, old, new in SICK[name][1]:
        text = (code / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise BadInput(f"{name}: {file} holds {old!r} {text.count(old)} times; allowed: once")
        (code / file).write_text(text.replace(old, new), encoding="utf-8")
    return code


def train(name: str, steps: int, out: Path, typed: list[str]) -> None:
    """Train in the copy; `lost_average` is stopped half way and resumed."""
    code, run, nets = copied(name, out), out / name, f"--nets={ROOT / 'assets/tiny'}"
    for leg in (steps // 2, steps) if name == "lost_average" else (steps,):
        last = max((row["step"] for row in read_metrics(run)), default=0)
        if last < leg:
            command = [sys.executable, "train.py", *typed, nets, f"--steps={leg}"]
            command += ["--eval_every=5", f"--out={run}", *["--resume"] * (last > 0)]
            subprocess.run(command, cwd=code, check=True)


def caught(name: str, out: Path) -> bool:
    """Whether the test falls on the copy, and not on the code as it is."""
    results = []
    for code in (ROOT, copied(name, out, "assets", "tests")):
        file, *words = SICK[name][0].split()
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"tests/{file}", *words]
        results.append(subprocess.run(command, cwd=code, capture_output=True).returncode)
    return results == [0, 1]


def keep(run: Path, folder: Path) -> None:
    """Curves of every second step, to three digits, to compare runs of one's own with."""
    rows = [row for row in read_metrics(run) if row["step"] % 2 == 0 or "held_out_shape" in row]
    thin = [{k: float(f"{row[k]:.3g}") for k in ("step", *CURVES) if k in row} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in thin)
    path = writable_folder(str(folder / run.name)) / "metrics.jsonl"
    write_atomically(path, lambda name: name.write_text(text))


def curves(runs: dict[str, list[dict]], path: Path) -> None:
    """A panel per defect, healthy in grey: share of right shapes (line), jitter (dotted), over steps."""
    sick = [name for name in runs if name != "healthy"]
    figure, panels = canvas(-(-len(sick) // 3), 3, 2.2, squeeze=False, sharex=True, sharey=True)
    for name, panel in zip(sick, panels.flat, strict=False):
        for which, colour in (("healthy", GREY), (name, BLUE)):
            seen = [row for row in runs[which] if "held_out_shape" in row]
            for what, how in (("held_out_shape", "-"), ("held_out_jitter", ":")):
                panel.plot(
                    [r["step"] for r in seen], [r[what] for r in seen], how, color=colour, linewidth=2.5
                )
        panel.set(title=name, ylim=(0, 3))
        panel.grid(alpha=0.3)
    figure.supxlabel("step")
    figure.supylabel("share of right shapes (line), jitter in pixels (dotted)")
    for panel in panels.flat[len(sick) :]:
        panel.set_axis_off()
    finish(figure, path)


def strip(name: str, out: Path) -> Tensor:
    """The last frame of each chunk (4 3 H W) for one held-out prompt and one noise. The student is the last
    step's average, not the one that was chosen; the code that trained it samples it, with a clean context."""
    run, last = out / name, out / name / "last.safetensors"
    header = read_header(run / "student.safetensors")
    cfg = from_words(header["config"], {"device": "cpu"})
    net = load_net(run / "student.safetensors", cfg, "student")
    net.load_state_dict(torch.load(states(run)[-1], "cpu", weights_only=True)["ema"])
    save_weights(last, net, cfg, "student", nets=header["nets"])
    prompt = caption(World(build("tiny", {}), "test").captions([("symptoms", 1)])[0])
    how = ["--context=clean", "--context_t=0", "--frames=16", f"--student={last}", f"--out={run}/strip.webp"]
    command = [sys.executable, "sample.py", f"--prompt={prompt}", *how]
    subprocess.run(command, cwd=copied(name, out), check=True, capture_output=True)
    return read_clip(run / "strip.webp", cfg)[cfg.chunk - 1 :: cfg.chunk] / 255


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    names = [name for name in flags.names.split(",") if name] or list(SICK)
    for name in names:
        if name not in SICK:
            raise BadInput(f"--names={name} is not possible; allowed: {' '.join(SICK)}")
    if flags.steps < 0 or flags.steps % 10:
        raise BadInput(f"steps={flags.steps} is not possible; allowed: 0, 10, 20 and so on")
    out = writable_folder(flags.out).resolve()
    if flags.check:
        missed = [name for name in names if SICK[name][0] and not caught(name, out)]
        sys.exit(f"no test falls for: {' '.join(missed)}" if missed else 0)
    for name in names if flags.steps else ():
        train(name, flags.steps, out, [as_flag(k, v) for k, v in typed.items()])
        if flags.keep:
            keep(out / name, KEPT)
    runs = {name: found for name in SICK for folder in (out, KEPT) if (found := read_metrics(folder / name))}
    curves(runs, out / "symptoms.png")
    print(out / "symptoms.png")
    if strips := [(name, strip(name, out)) for name in SICK if states(out / name)]:
        print(contact_sheet(out / "strips.png", strips))


if __name__ == "__main__":
    cli(main)
