"""Faults by the hundred, by hand: `python tests/campaign.py kill --seed=0` prints a line of a table.

Each part, a function below, runs alone, on the random nets of the tests; --count: how often, or how many.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import imageio.v3 as iio
import torch
from runs import ROOT, SMALL, command, random_nets
from safetensors.torch import load_file, save_file

import pretrain
import sample
import train
from config import BadInput, build, cli
from data import ClipFolder
from engine import checkpoint
from engine.checkpoint import fingerprint
from run import FREE, read_metrics

FORK = multiprocessing.get_context("fork")


def begin(main, words, **env):
    """A script in a process of its own, without its output."""

    def run():
        os.environ |= env
        torch.set_num_threads(1)
        sys.argv = [str(word) for word in words]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        cli(main)

    process = FORK.Process(target=run)
    process.start()
    return process


def end(main, words, **env) -> int:
    process = begin(main, words, **env)
    process.join()
    return process.exitcode


def torn(folder: Path) -> list[str]:
    """Files under their final name that cannot be read to the end."""
    readers, found = {".pt": torch.load, ".safetensors": load_file, ".png": iio.imread}, []
    for path in (p for p in folder.rglob("*") if p.suffix in readers and not p.name.startswith(".")):
        try:
            readers[path.suffix](path)
        except Exception as error:
            found.append(f"{path.name}: {error!r}")
    return found


def outcome(look) -> str:
    """What a function does in a process of its own, and whether it takes more than 64 MiB beside."""
    here, there = FORK.Pipe(duplex=False)

    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            look()
            said = "read"
        except BadInput as error:
            said = "one line" if "\n" not in str(error) else "many lines"
        except BaseException as error:  # what else there is, is what is looked for
            said = f"TRACEBACK {type(error).__name__} {str(error)[:60]!r}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 64 * 1024
        there.send(said + ", MORE THAN 64 MiB" * grown)

    process = FORK.Process(target=run)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(60) else "HANGS"
    except EOFError:
        return "DIED"
    finally:
        process.kill()
        process.join()


# -- runs that are ended ----------------------------------------
def kill(nets: Path, rng, count: int = 50, numbers=(signal.SIGKILL,)) -> list[str]:
    """train.py and pretrain.py ended by a signal at random moments and resumed → what came of each."""
    stage = ["pretrain.py", "--device=cpu", "--stage=codec", "--batch=2", "--steps=6"]
    jobs = [(train.main, "student", lambda out: command(nets, out, "--steps=6", "--save_every=2"), count),
            (pretrain.main, "codec", lambda out: [*stage, f"--out={out}"], 2 * count // 5)]  # fmt: skip
    rows = []
    for main, name, words, times in jobs:
        whole, start = nets / f"{name}-whole", time.perf_counter()
        end(main, words(whole))
        seconds = time.perf_counter() - start
        for number in [number for number in numbers for _ in range(times)]:
            out = nets / f"{name}-ended"
            process = begin(main, words(out))
            time.sleep(rng.uniform(0, seconds))
            os.kill(process.pid, number)
            process.join()
            broken, saved = torn(out), checkpoint.states(out) + checkpoint.states(out / f"{name}-state")
            lost = len(read_metrics(out)) - (int(saved[-1].stem[5:]) if saved else 0)
            code = end(main, [*words(out), *["--resume"] * bool(saved)])
            equal = not code and fingerprint(out, (name,)) == fingerprint(whole, (name,))
            said = f"{number.name} exit {process.exitcode}, lost {'up to 2' if lost < 3 else lost} steps"
            said += f", resumed {code}, weights {'equal' if equal else 'DIFFER'}, torn {broken}"
            rows.append(f"{main.__module__}: {said}")
            shutil.rmtree(out)
    return rows


def ranks(nets: Path, rng, count: int = 3) -> list[str]:
    """torchrun with two ranks, of which one is killed after the first save."""
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    quiet, rows = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), []
    for i in range(count + 1):
        words = command(nets, nets / f"{i}", "--steps=12", "--save_every=2")
        run = subprocess.Popen([*head, "--max-restarts=3", *words], **quiet)
        while i and run.poll() is None and not checkpoint.states(nets / f"{i}"):
            time.sleep(0.1)
        if i:  # the first is the one that nobody kills
            os.kill(int(rng.choice(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())), 9)
        code = run.wait()
        equal = fingerprint(nets / f"{i}", ("student",)) == fingerprint(nets / "0", ("student",))
        rows.append(f"exit {code}, weights {'equal' if equal else 'DIFFER'}, torn {torn(nets / f'{i}')}")
    return rows[1:]


def disk(nets: Path, rng, count: int = 12) -> list[str]:
    """A tmpfs that is too small, without inodes, read-only. Needs root."""
    hows = [f"size={rng.randint(4, 60) * 64}k" for _ in range(count)]
    small, rows = nets / "small", []
    small.mkdir()
    for how in [*hows, *(f"size=64m,nr_inodes={n}" for n in range(2, 9)), "size=64m,ro"]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", small], check=True)
        learnt = end(train.main, command(nets, small / "run", "--steps=3", "--save_every=1"))
        words = [f"--student={nets}/stream_r1.safetensors", f"--out={small}/clip.mp4", "--frames=64"]
        shown = end(sample.main, ["sample.py", *words])
        rows.append(f"train.py exits {learnt}, sample.py {shown}, torn {torn(small)}")
        subprocess.run(["umount", small], check=True)
    return rows


# -- input that is broken ----------------------------------------
def mutated(data: bytes, rng) -> bytes:
    """A cut, a piece lost, twice or zero, a flipped bit; half of them near the beginning."""
    at, size = rng.randrange(min(len(data), rng.choice((2000, 10**9)))), rng.randrange(1, 200)
    head, piece, tail = data[:at], data[at : at + size], data[at + size :]
    flipped = bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return head + rng.choice((b"", tail, piece * 2 + tail, bytes(len(piece)) + tail, flipped))


def checkpoints(nets: Path, rng, count: int = 300) -> list[str]:
    end(train.main, command(nets, nets / "run", "--steps=1"))
    student, state = nets / "run/student.safetensors", nets / "run/step_000001.pt"
    header, flags = checkpoint.read_header(student), sample.Flags(student=str(student))
    rows, whole, cfg = (
        [],
        {path: path.read_bytes() for path in (student, state)},
        build("tiny", SMALL | {"device": "cpu", "steps": 1}),
    )
    looks = {student: lambda: sample.open_networks("tiny", {}, flags),
             state: lambda: checkpoint.load_state(nets / "run", cfg, FREE)}  # fmt: skip
    for i in range(count):
        path = (student, state)[i % 2]
        path.write_bytes(mutated(whole[path], rng))
        if i % 10 == 0:  # another shape, another type, swapped names
            x = load_file(nets / "stream_r1.safetensors")
            one, two = rng.sample(sorted(x), 2)
            x[one] = rng.choice((x[one].flatten()[:-1], x[one].double(), x[two])).contiguous().clone()
            save_file(x, student, header)
        rows.append(f"{path.suffix}: {outcome(looks[path])}")
        path.write_bytes(whole[path])
    return rows


def clips(nets: Path, rng, count: int = 300) -> list[str]:
    video, rows, cfg = torch.rand(24, 32, 32, 3).mul(255).byte().numpy(), [], build("tiny", {})
    for name in ("a.mp4", "a.gif", "a.webp"):
        sample.write_video(nets / name, iter(video), 8)
    (nets / "metadata.jsonl").write_text(
        '{"file_name": "b", "text": "a"}\n{"file_name": "a.gif", "text": "b"}\n'
    )
    for i in range(count):
        kind = ("a.mp4", "a.gif", "a.webp", "metadata.jsonl")[i % 4]
        path = nets / (kind if kind == "metadata.jsonl" else "b")
        whole = (nets / kind).read_bytes()
        path.write_bytes(mutated(whole, rng))
        rows.append(f"{kind}: {outcome(lambda: ClipFolder(cfg, str(nets)).batch([(0, 1), (0, 2)]))}")
        path.write_bytes(whole)
    return rows


def prompts(nets: Path, rng, count: int = 500) -> list[str]:
    parts = "a red circle|moving left|@8|@|圆|🔴|\u202e|\x00|\x1b[31m|<b>|é|12|\n|\u2028|\ud800|{}|ＲＥＤ|and"
    parts, rows = [*parts.split("|"), "x" * 2**20], []
    flags = sample.Flags(student=str(nets / "stream_r1.safetensors"))
    cfg, _, _, read = sample.open_networks("tiny", {"device": "cpu"}, flags)

    def look(typed: list[str]) -> None:
        for prompt, *_ in sample.schedule(sample.Flags(prompt=typed), cfg, 0):
            read(prompt)

    for _ in range(count):
        typed = [" ".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 2))]
        rows.append(outcome(partial(look, typed)))
    return rows


signals = partial(kill, count=5, numbers=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
PARTS = {"kill": kill, "signals": signals, "ranks": ranks, "disk": disk,
         "checkpoints": checkpoints, "clips": clips, "prompts": prompts}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    typed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = {"count": typed.count} if typed.count else {}
        rows = PARTS[typed.part](random_nets(Path(folder)), random.Random(typed.seed), **count)
    told = "<br>".join(f"{n} x {row}" for row, n in Counter(rows).most_common())
    print(f"| {typed.part} | seed {typed.seed} | {len(rows)} | {told} |")


if __name__ == "__main__":
    main()
