"""Files that survive a crash: written under another name, flushed, renamed. Tensors only, no pickled code."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves

from config import BadInput, Config
from engine import processes

# fields that a network's numbers depend on: weights made under other values are refused
_NETWORK = "height width channels stride patch patch_time heads predict text text_length text_width chunk"
_DEPENDS = {"codec": "channels stride", "reward": "height width text text_length text_width"}


def write_atomically(path: Path, write: Callable[[Path], None], size: int = 0) -> None:
    """Run `write` on a temporary name beside `path`, flush, rename: a reader sees all or nothing. size: in
    bytes, to be named where there is no space. Raises BadInput; what `path` held before is then intact."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.touch()  # where no inode is left this says so; torch's error does not
        write(temporary)
        temporary.chmod(0o644)  # safetensors leaves files that only their owner can read
        with open(temporary, "rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        left = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 2**20
        if full or left < 2**20 or "os error 28" in str(error):  # torch's errors do not say so
            needs = f", needs {size / 2**20:.0f} MB" if size else ""
            raise BadInput(f"no space left in {path.parent}{needs}; {path.name} was not written") from error
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{path} cannot be written: {why}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: str, mine: bool = True) -> Iterator[None]:
    """One run a folder at a time. A process that ends, however it ends, keeps no lock. mine: whether this
    process is the one to ask. Raises BadInput."""
    try:
        held = FileLock(writable_folder(folder) / ".lock", timeout=0).acquire() if mine else nullcontext()
    except Timeout as error:
        raise BadInput(f"another run is writing to {folder}; another --out starts one beside it") from error
    with held:
        yield


def writable_folder(path: str, flag: str = "--out") -> Path:
    """Make a folder and make sure that files can be written there. Raises BadInput."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{flag}={path} cannot be written: {error.strerror}") from error
    return folder


def not_finite(tensors: dict[str, torch.Tensor]) -> str:
    """How many tensors hold NaN or infinity; "" if none does."""
    bad = [k for k, x in tensors.items() if not x.isfinite().all()]
    return f"{len(bad)} of {len(tensors)} tensors are not finite, the first is {bad[0]}" if bad else ""


def save_weights(path: Path, net: nn.Module, cfg: Config, kind: str, **facts) -> None:
    """Weights to exchange: fp16 safetensors, the config and any `facts` (step, scores) in the header. All
    processes call it, the first one writes. Raises BadInput for numbers that are not finite."""
    tensors = {}
    for k, x in net.state_dict().items():
        x = x.full_tensor() if processes.is_share(x) else x
        tensors[k] = (x.half() if x.is_floating_point() else x).contiguous().cpu()
    if what := not_finite(tensors):
        raise BadInput(f"{path} is not written: in fp16 {what}")
    if processes.rank():
        return
    header = {"kind": kind, "config": json.dumps(asdict(cfg)), **{k: str(v) for k, v in facts.items()}}
    write_atomically(path, lambda name: save_file(tensors, name, header))


def annotate(path: Path, **facts) -> None:
    """Add facts (measured scores) to the header of weights that `save_weights` wrote."""
    header = read_header(path) | {k: str(v) for k, v in facts.items()}
    tensors = load_file(path)
    write_atomically(path, lambda name: save_file(tensors, name, header))


def read_header(path: Path) -> dict[str, str]:
    """The metadata `save_weights` wrote. Raises BadInput for a missing, corrupt or foreign file."""
    if not Path(path).is_file():
        raise BadInput(f"no weights at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if re.fullmatch(r"step_\d+\.pt", Path(path).name):
            student = Path(path).with_name("student.safetensors")
            raise BadInput(f"{path} is a run's state, to be resumed; its student is {student}") from error
        raise BadInput(f"{path} is not a readable safetensors file: {error}") from error
    ours = False
    with suppress(KeyError, ValueError):
        ours = "kind" in header and isinstance(json.loads(header["config"]), dict)
    if not ours:
        raise BadInput(f"{path} was not written by this project: its header names no kind and no config")
    return header


def fingerprint(nets: Path, kinds: tuple[str, ...] = ("codec", "teacher", "causal", "reward")) -> str:
    """Of the tensors a run starts from; headers, which may be annotated, do not count."""
    digest = hashlib.sha256()
    for kind in kinds:
        read_header(nets / f"{kind}.safetensors")
        for _, tensor in sorted(load_file(nets / f"{kind}.safetensors").items()):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def load_weights(path: Path, net: nn.Module, cfg: Config, kind: str) -> nn.Module:
    """fp16 safetensors → net, in evaluation mode. Raises BadInput when the file does not belong to it."""
    header = read_header(path)
    if header["kind"] != kind:
        raise BadInput(f"{path} holds a {header['kind']}; a {kind} is needed here")
    made = vars(Config()) | json.loads(header["config"])  # it may lack what was added since
    for name in _DEPENDS.get(kind, _NETWORK).split():
        if made[name] != getattr(cfg, name):
            now = f"this run has {name}={getattr(cfg, name)}"
            raise BadInput(f"{path} was made with {name}={made[name]}, {now}")
    tensors = load_file(path)
    if what := not_finite(tensors):
        raise BadInput(f"{path} cannot be used: {what}")
    return fit(net, tensors, path)


def fit(net: nn.Module, tensors: dict, path: Path, assign: bool = False) -> nn.Module:
    """Every tensor finds its place and every place its tensor: else BadInput names the first few."""
    try:
        net.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        what = "; ".join(line.strip()[:300] for line in str(error).splitlines()[1:3])  # missing, unexpected
        raise BadInput(f"{path} does not fit the network: {what}") from error
    return net.eval()


def states(folder: Path) -> list[Path]:
    """Those that a run saved there, oldest first. Names that only begin alike are somebody's copies."""
    found = [p for p in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{6,}(\.pt)?", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def can_resume(out: str) -> None:
    """Raises BadInput if --resume is asked for where no run has saved anything; names the runs beside."""
    folders = Path(out), *sorted(Path(out).parent.glob("*"))
    runs = [p for p in folders if any(states(q) for q in (p, *p.glob("*-state")))]
    if folders[0] not in runs:
        there = f"; there is {' '.join(map(str, runs[:6]))}" * bool(runs)
        raise BadInput(f"--resume: {out} holds no saved step{there}; without --resume a run begins")


def save_state(folder: Path, step: int, state: dict) -> Path:
    """Everything a run needs to go on, as folder/step_%06d.pt; only this one and one more stay."""
    path = Path(folder) / f"step_{step:06d}.pt"
    size = sum(x.nbytes for x in tree_leaves(state) if isinstance(x, torch.Tensor))
    write_atomically(path, lambda name: torch.save(state | {"step": step}, name), size)
    for old in [p for p in states(folder) if p != path and p.suffix == ".pt"][:-1]:
        old.unlink()
    return path


def load_state(folder: Path, cfg: Config, free: tuple[str, ...] = (), resume: bool = True) -> dict | None:
    """The newest state in `folder`, or None; of one that wan/shards.py wrote the facts, and its path under
    "shards". Raises BadInput if it is unreadable or of another config, or if there is one and a new run was
    to start.

    `free` names fields that may change between a run and its continuation (how long, how often to save).
    """
    paths = states(folder)
    if paths and not resume:
        raise BadInput(f"{folder} holds a run; --resume goes on with it, another --out starts a new one")
    if not paths:
        return None
    try:
        if paths[-1].is_dir():
            state = json.loads((paths[-1] / "facts.json").read_text()) | {"shards": paths[-1]}
        else:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is cut short or not its own
        what = f"{paths[-1]} cannot be read ({type(error).__name__})"
        raise BadInput(f"{what}; delete it to go on from the one before") from error
    if not isinstance(state, dict) or "config" not in state:
        raise BadInput(f"{paths[-1]} is no state of this project: it holds no config")
    for f in fields(Config):
        then, now = state["config"].get(f.name, f.default), getattr(cfg, f.name)
        then = tuple(then) if isinstance(then, list) else then
        if f.name not in free and then != now:
            raise BadInput(f"--resume: {paths[-1]} has {f.name}={then}, this run has {f.name}={now}")
    return state


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What goes wrong inside is the newest state's fault. Raises BadInput."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:200]
        raise BadInput(f"{states(folder)[-1]} does not fit this run: {why}") from error


def stop_on_signal() -> list[int]:
    """A list that stays empty until SIGTERM or SIGINT arrives: the loop then saves and ends. A second one
    ends the process at once, unless it is torchrun that hands on the first."""
    caught, times = [], []

    def catch(number: int, frame) -> None:
        caught.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > 1:
            os._exit(128 + number)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, catch)
    return caught


def die_on_signal() -> None:
    """Undo `stop_on_signal`: between two loops there is nothing to save."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
