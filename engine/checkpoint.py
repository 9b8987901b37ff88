"""Files that survive a crash: written under another name, flushed, renamed. Tensors only, no pickled code."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from config import BadInput, Config
from engine import processes

# fields that a network's numbers depend on: weights made under other values are refused
_NETWORK = "height width channels stride patch patch_time heads predict text_length text_width chunk"
_DEPENDS = {"codec": "channels stride", "reward": "height width text_length text_width"}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Run `write` on a temporary name beside `path`, flush, rename: a reader sees all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors leaves files that only their owner can read
        with open(temporary, "rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def save_weights(path: Path, net: nn.Module, cfg: Config, kind: str, **facts) -> None:
    """Weights to exchange: fp16 safetensors, the config and any `facts` (step, scores) in the header. All
    processes call it, the first one writes."""
    tensors = {}
    for k, x in net.state_dict().items():
        x = x.full_tensor() if processes.is_share(x) else x
        tensors[k] = (x.half() if x.is_floating_point() else x).contiguous().cpu()
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
        raise BadInput(f"{path} is not a readable safetensors file: {error}") from error
    if "kind" not in header or "config" not in header:
        raise BadInput(f"{path} was not written by this project: its header names no kind and no config")
    return header


def is_ours(path: Path) -> bool:
    """Whether `save_weights` wrote a file."""
    try:
        return bool(read_header(path))
    except BadInput:
        return False


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
    made = json.loads(header["config"])
    for name in _DEPENDS.get(kind, _NETWORK).split():
        if made.get(name) != getattr(cfg, name):
            now = f"this run has {name}={getattr(cfg, name)}"
            raise BadInput(f"{path} was made with {name}={made.get(name)}, {now}")
    return fit(net, load_file(path), path)


def fit(net: nn.Module, tensors: dict, path: Path, assign: bool = False) -> nn.Module:
    """Every tensor finds its place and every place its tensor: else BadInput names the first few."""
    try:
        net.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        what = str(error).splitlines()[1].strip()[:300]
        raise BadInput(f"{path} does not fit the network: {what}") from error
    return net.eval()


def save_state(folder: Path, step: int, state: dict) -> Path:
    """Everything a run needs to go on, as folder/step_%06d.pt; only this one and one more stay."""
    path = Path(folder) / f"step_{step:06d}.pt"
    write_atomically(path, lambda name: torch.save(state | {"step": step}, name))
    for old in sorted(p for p in Path(folder).glob("step_*.pt") if p != path)[:-1]:
        old.unlink()
    return path


def load_state(folder: Path, cfg: Config, free: tuple[str, ...] = (), resume: bool = True) -> dict | None:
    """The newest state in `folder`, or None; of one that wan/shards.py wrote the facts, and its path under
    "shards". Raises BadInput if it is unreadable or of another config, or if there is one and a new run was
    to start.

    `free` names fields that may change between a run and its continuation (how long, how often to save).
    """
    paths = sorted(Path(folder).glob("step_*"))
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
            made = f"{paths[-1]} was made with {f.name}={then}"
            raise BadInput(f"--resume: {made}, this run has {f.name}={now}")
    return state


def read_metrics(folder: Path) -> list[dict]:
    """What a run has logged, a dict a step; of a last line that a kill has cut short nothing."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def stop_on_signal() -> list[int]:
    """A list that stays empty until SIGTERM or SIGINT arrives: the loop then saves and ends."""
    caught: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: caught.append(number))
    return caught


def die_on_signal() -> None:
    """Undo `stop_on_signal`: between two loops there is nothing to save."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
