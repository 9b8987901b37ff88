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
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import imageio.v3 as iio
import torch
from runs import ROOT, SMALL, command, random_nets
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

import hubconf
import pretrain
import sample
import train
from config import BadInput, build, cli
from data import ClipFolder
from engine import checkpoint
from run import FREE, read_metrics
from world.measure import measure

FORK = multiprocessing.get_context("fork")


def begin(main, words, log=os.devnull):
    """A script in a process of its own, its output in a file."""

    def run():
        torch.set_num_threads(1)
        sys.argv = [str(word) for word in words]
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        cli(main)

    (process := FORK.Process(target=run)).start()
    return process


def end(main, words, log=os.devnull) -> int:
    (process := begin(main, words, log)).join()
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


def newest(out: Path) -> Path | None:
    """The last state of a run, or of a stage of pretraining."""
    return next(iter((checkpoint.states(out) + checkpoint.states(out / "codec-state"))[::-1]), None)


def bits(out: Path, name: str) -> list:
    """All numbers that a run leaves: of its weights and of its last state."""
    state = torch.load(newest(out), weights_only=True)
    tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    return [checkpoint.fingerprint(out, (name,)), *(x.numpy().tobytes() for x in tensors)]


def outcome(look) -> str:
    """What a function does in a process of its own, and whether it takes more than 64 MiB beside."""
    here, there = FORK.Pipe(duplex=False)

    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            look()
            said = "read"
        except BadInput as error:
            said = "one line" if str(error).isprintable() and len(str(error)) < 1500 else "MORE THAN A LINE"
        except BaseException as error:  # what else there is, is what is looked for
            said = f"TRACEBACK {type(error).__name__} {str(error)[:60]!r}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 64 * 1024
        there.send(said + ", MORE THAN 64 MiB" * grown)

    (process := FORK.Process(target=run)).start()
    there.close()
    try:
        return here.recv() if here.poll(60) else "HANGS"
    except EOFError:
        return "DIED"
    finally:
        process.kill()
        process.join()


def kill(nets: Path, rng, count: int = 50, numbers=(signal.SIGKILL,)) -> list[str]:
    """train.py and pretrain.py ended by a signal at random moments and resumed → what came of each. As a
    stage of pretraining saves every 500 steps, it is ended in the few that follow its first save."""
    codec = ["pretrain.py", "--device=cpu", "--stage=codec", "--batch=1", "--steps=506"]
    student = command(nets, "", "--steps=6", "--save_every=2")
    jobs = [(train.main, "student", student, count), (pretrain.main, "codec", codec, count * 2 // 5)]
    rows = []
    for main, name, words, times in jobs:
        whole, out = nets / f"{name}-whole", nets / f"{name}-ended"
        end(main, [*words, f"--out={whole}"])
        wanted, given = bits(whole, name), list(whole.glob("*/step_000500.pt"))
        for number in [None, *(number for number in numbers for _ in range(times))]:
            shutil.rmtree(out, ignore_errors=True)
            (out / "codec-state").mkdir(parents=True)
            for path in given:
                shutil.copy(path, out / "codec-state")
            start = time.perf_counter()
            process = begin(main, [*words, f"--out={out}", *["--resume"] * bool(given)])
            if number is None:  # how long it takes when it is not ended
                process.join()
                seconds = time.perf_counter() - start
                continue
            time.sleep(rng.uniform(0, seconds))
            os.kill(process.pid, number)
            process.join()
            broken, last, logged = torn(out), newest(out), len(read_metrics(out))
            step = int(last.stem[5:]) if last else 0
            code = end(main, [*words, f"--out={out}", *["--resume"] * bool(last)])
            equal = "equal" if not code and bits(out, name) == wanted else "DIFFER"
            said = f"{number.name} exit {process.exitcode}, {max(0, logged - step)} steps lost, torn {broken}"
            rows.append(f"{main.__module__}: {said}, from step {step} exit {code}, bits {equal}")
    return rows


def ranks(nets: Path, rng, count: int = 3) -> list[str]:
    """torchrun with two ranks, of which one is killed after the first save."""
    head = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else the next try meets the last one's
    quiet, rows = dict(cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), []
    for i in range(count + 1):
        words = command(nets, nets / f"{i}", "--steps=12", "--save_every=2")
        run = subprocess.Popen([*head, "--max-restarts=3", *words], **quiet)
        while i and run.poll() is None and not checkpoint.states(nets / f"{i}"):
            time.sleep(0.1)
        if i:  # the first is the one that nobody kills
            os.kill(int(rng.choice(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())), 9)
        try:
            code = run.wait(120)
        except subprocess.TimeoutExpired:
            run.terminate()
            code = f"HANGS {run.wait()}"
        equal = code == 0 and bits(nets / f"{i}", "student") == bits(nets / "0", "student")
        rows.append(f"exit {code}, bits {'equal' if equal else 'DIFFER'}, torn {torn(nets / f'{i}')}")
    return rows[1:]


def disk(nets: Path, rng, count: int = 12) -> list[str]:
    """A tmpfs that is too small, without inodes, read-only; then there is room again. Needs root."""
    small, log, rows = nets / "small", nets / "log", []
    small.mkdir()

    def told(main, words) -> str:
        code = end(main, words, log)
        text = log.read_text().replace(str(nets), "")
        lines = [line[:60] for line in text.splitlines() if line.startswith(f"{words[0]}: ")]
        return f"{code} {lines if code else ''}{' TRACEBACK' * ('Traceback' in text)}"

    words = command(nets, small / "run", "--steps=3", "--save_every=1")
    hows = [("small", f"size={rng.randint(4, 60) * 64}k") for _ in range(count)]
    hows += [("inodes", f"size=64m,nr_inodes={n}") for n in range(2, 9)] + [("read-only", "size=64m,ro")]
    for kind, how in hows:
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", small], check=True)
        try:
            learnt = told(train.main, words)
            shown = [f"--student={nets}/stream_r1.safetensors", f"--out={small}/clip.mp4", "--frames=64"]
            shown, broken = told(sample.main, ["sample.py", *shown]), torn(small)
            subprocess.run(["mount", "-o", "remount,rw,size=64m,nr_inodes=999", small], check=True)
            again = end(train.main, [*words, *["--resume"] * bool(newest(small / "run"))])
        finally:
            subprocess.run(["umount", small], check=True)
        rows.append(f"{kind}: train.py {learnt}, sample.py {shown}, torn {broken}, with room {again}")
    return rows


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
    whole = {path: path.read_bytes() for path in (student, state)}
    rows, ran, cfg = [], nets / "ran", build("tiny", SMALL | {"device": "cpu"})
    payload = type("Payload", (), {"__reduce__": lambda self: (Path.touch, (ran,))})
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
        if i % 30 == 5:  # code in place of a part
            state.write_bytes(whole[state])
            torch.save(torch.load(state) | {rng.choice(("best", "config", "student")): payload()}, state)
        if i % 30 == 10:  # a header that says it is huge
            path.write_bytes(rng.choice((2**27, 2**40, 2**63)).to_bytes(8, "little") + whole[path][8:])
        rows.append(f"{path.suffix}: {outcome(looks[path])}{', CODE WAS RUN' * ran.exists()}")
        path.write_bytes(whole[path])
    return rows


def clips(nets: Path, rng, count: int = 300) -> list[str]:
    video, rows, cfg = torch.rand(24, 32, 32, 3).mul(255).byte().numpy(), [], build("tiny", {})
    for name in ("a.mp4", "a.gif", "a.webp"):
        sample.write_video(nets / name, iter(video), 8)
    keys, row = [(0, i) for i in range(6)], '{"file_name": "%s", "text": "a"}\n'
    (nets / "metadata.jsonl").write_text(row % "b" + row % "a.gif")
    for i in range(count):
        kind = ("a.mp4", "a.gif", "a.webp", "metadata.jsonl")[i % 4]
        path = nets / (kind if kind == "metadata.jsonl" else "b")
        whole = (nets / kind).read_bytes()
        path.write_bytes(mutated(whole, rng))
        rows.append(f"{kind}: {outcome(lambda: ClipFolder(cfg, str(nets)).batch(keys))}")
        path.write_bytes(whole)
    return rows


def prompts(nets: Path, rng, count: int = 500) -> list[str]:
    parts = "a red circle|moving left|@8|@|圆|🔴|\u202e|\x00|\x1b[31m|<b>|é|12|\n|\u2028|\ud800|{}|ＲＥＤ|and"
    parts, rows = [*parts.split("|"), "x" * 2**20], []
    flags = sample.Flags(student=str(nets / "stream_r1.safetensors"))
    cfg, _, _, read = sample.open_networks("tiny", {"device": "cpu"}, flags)

    def look(typed: list[str]) -> None:
        for prompt, *_ in sample.schedule(sample.Flags(prompt=typed, frames=64), cfg, 0):
            read(prompt)

    for _ in range(count):
        typed = [" ".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 2))]
        rows.append(outcome(partial(look, typed)))
    return rows


def drift(nets: Path, rng, count: int = 100_000) -> list[str]:
    """The shipped student for `count` chunks, or until Ctrl-C: memory, told every 1,000 chunks with the
    seconds so far, and the last 100 chunks against the first 100. Nothing is measured before: that takes
    memory of its own."""
    prompt, memory, parts = "a red circle moving left slowly on a black background", [], deque(maxlen=100)
    made, start = hubconf.student().stream(prompt, seed=rng.randrange(99)), time.monotonic()
    with suppress(KeyboardInterrupt):
        for i, part in enumerate(islice(made, count), 1):
            parts.append(part)
            if i % 100 == 0:
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) / 256)  # pages of 4 KiB
            if i == 100:
                first = torch.cat(list(parts))
            if i % 1000 == 0:
                so_far = f"{i} chunks, {memory[-1]:.1f} MiB, {time.monotonic() - start:.0f} s"
                print(so_far, file=sys.stderr, flush=True)
    last = torch.cat(list(parts))
    early, late, both = (measure(clip[None], [prompt]) for clip in (first, last, torch.cat([first, last])))
    told = [f"{k} {early[k].item():.2f}, {late[k].item():.2f}" for k in ("colour", "shape", "paint")]
    told += [f"{k} changes by {both[k].item():+.3f}" for k in ("saturation", "contrast")]
    mib = [f"{memory[int(at * (len(memory) - 1))]:.1f}" for at in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 1)]
    return [f"{100 * len(memory)} chunks: {', '.join(told)}, MiB {' '.join(mib)}"]


signals = partial(kill, count=5, numbers=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
PARTS = {"kill": kill, "signals": signals, "ranks": ranks, "disk": disk,
         "checkpoints": checkpoints, "clips": clips, "prompts": prompts, "stream": drift}  # fmt: skip


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
