"""How fast does it stream? One table, and what it includes.

    python bench.py                      # tiny: eager, on a GPU CUDA graphs as well; --compile adds modes
    python bench.py wan-1.3b --bf16      # the real shapes on random weights: speed does not depend on them
    python bench.py tiny --data=clips    # how fast are --chunks windows of clips read, and read again?
    python bench.py wan-1.3b --bf16 --profile      # a chunk's time by kernel instead, of each mode

One stream (batch 1), text already embedded; "diffusion" is a chunk from noise to latents, with what is
remembered of it, "decoded" adds the codec where there is one; medians over --chunks chunks, window full.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from codec import Codec
from config import BadInput, Config, build, cli, read_cli
from data import source_of
from engine.graphs import CudaGraphs, compiled, settled
from engine.processes import largest_process
from engine.rng import rng_for
from live.pace import played, steps_in_time
from model import RingCache, VideoDiT
from networks import for_sampling
from rollout import directly, step_grid, stream


@dataclass(frozen=True)
class Flags:
    chunks: int = 100  # timed per mode
    fps: int = 16  # of playback: frames that come later are late
    compile: bool = False  # torch.compile as well
    profile: bool = False  # where a chunk's time goes, kernel by kernel, instead of how fast it is
    json: bool = False  # one line for machines, not a table


def matmul_peak(cfg: Config) -> float:
    """TFLOP/s of a large matrix product in the type the network runs in: the best of five."""
    size = 1024 if cfg.device == "cpu" else 8192
    a = torch.randn(size, size, device=cfg.device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32)
    return 2 * size**3 / min(seconds_of((a @ a for _ in range(5)), cfg, 5)) / 1e12


def seconds_of(parts, cfg: Config, count: int, then=lambda x: x) -> list[float]:
    """Wall seconds of each of the next `count` chunks, from asking for one to having it."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        then(next(parts))
        if cfg.device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def start_stream(student: VideoDiT, cfg: Config, how) -> tuple:
    """A stream whose window is full, and the seconds to its first chunk."""
    text = torch.randn(1, cfg.text_length, cfg.text_width, device=cfg.device)
    cache = RingCache(student, cfg, batch=1, dtype=student.patch_embedding.weight.dtype)
    parts = stream(student, text, cfg, [rng_for(0)], cache=cache, call=how)
    return parts, seconds_of(parts, cfg, cfg.cached_chunks + 5)[0]


def measure_mode(name: str, student, codec, cfg: Config, flags: Flags, flops: float, peak: float) -> dict:
    """One row of the table. Without CUDA the peak is the process', modes before this one included."""
    if cuda := cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    how = CudaGraphs if name.endswith("graph") else lambda: directly  # every stream has graphs of its own
    parts, first = start_stream(student, cfg, how())
    row = {"mode": name, "first chunk ms": 1e3 * first, "warm-up s": time.perf_counter() - start}
    if flags.profile:
        return profiled(name, parts, cfg)
    seconds, frames = torch.tensor(seconds_of(parts, cfg, flags.chunks)), cfg.chunk * cfg.time_stride
    row |= spread("diffusion", seconds, frames)
    if codec is not None:
        row |= spread("decoded", torch.tensor(seconds_of(parts, cfg, flags.chunks, codec.decode)), frames)
    even = played(seconds.tolist(), [frames] * flags.chunks, flags.fps)
    grid = step_grid(cfg, cfg.chunks)
    row["steps in time"] = steps_in_time(len(grid), seconds, frames / flags.fps, cfg.context)
    row |= {"late %": 100 * even["late"] / (frames * flags.chunks), "jitter ms p99": 1e3 * even["p99"]}
    row["TFLOP/s"] = flops / float(seconds.quantile(0.5)) / 1e12
    row["share of matmul %"] = 100 * row["TFLOP/s"] / peak
    row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else largest_process("RUSAGE_SELF")
    return row


def count_flops(parts) -> int:
    """Of a stream's next chunk, and of remembering the one before it."""
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with plain, FlopCounterMode(display=False) as counter:
        next(parts)
    return counter.get_total_flops()


def spread(name: str, seconds: Tensor, frames: int) -> dict[str, float]:
    p50, p99 = (1e3 * float(seconds.quantile(q)) for q in (0.5, 0.99))
    return {f"{name} frames/s": 1e3 * frames / p50, f"{name} ms p50": p50, f"{name} ms p99": p99}


def profiled(name: str, parts, cfg: Config, count: int = 3) -> dict:
    """The next chunks of a stream, printed as a table by kernel → a row."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (cfg.device == "cuda")
    with profile(activities=kinds) as found:
        seconds = seconds_of(parts, cfg, count)
    order = f"self_{cfg.device}_time_total"
    print(f"{name}, {count} chunks", found.key_averages().table(sort_by=order, row_limit=25), sep="\n")
    return {"mode": name, "profiled ms": 1e3 * sum(seconds) / count}


def sampling(cfg: Config, flags: Flags) -> list[dict]:
    """Every mode this machine has → rows."""
    torch.manual_seed(cfg.seed)
    with torch.device(cfg.device):
        student = for_sampling(VideoDiT(cfg).eval(), cfg)
        codec = Codec(cfg).eval() if cfg.stride == 8 and cfg.time_stride == 1 else None
    runs = {"eager": student.run} | ({"compiled": compiled(student.run, cfg.device)} if flags.compile else {})
    graphs = {f"{name} graph": run for name, run in runs.items()} if cfg.device == "cuda" else {}
    with torch.inference_mode():
        flops, peak = count_flops(start_stream(student, cfg, directly)[0]), matmul_peak(cfg)
        given = student, codec, cfg, flags, flops, peak
        return [measure_mode(mode, *given) for mode, student.run in (runs | graphs).items()]


def reading(cfg: Config, flags: Flags) -> list[dict]:
    """Windows of clips, each decoded when it is asked for, by this process alone → rows."""
    start, source, rows = time.perf_counter(), source_of(cfg), []
    opened = time.perf_counter() - start
    for mode in ("read", "read again"):
        start = time.perf_counter()
        for i in range(flags.chunks):
            source.draw([("bench", i)])
        found = {"clips/s": flags.chunks / (time.perf_counter() - start)}
        rows.append({"mode": mode, "opened s": opened} | found | {"peak MiB": largest_process("RUSAGE_SELF")})
    return rows


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    if min(flags.chunks, flags.fps) < 1:
        raise BadInput(f"chunks={flags.chunks} fps={flags.fps} is not possible; allowed: 1 or more")
    cfg = settled(build(preset, typed))
    openmp.use_threads(cfg.threads)
    rows = reading(cfg, flags) if cfg.data else sampling(cfg, flags)
    facts = {
        "preset": cfg.preset, "device": torch.cuda.get_device_name() if cfg.device == "cuda" else cfg.device,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "bf16": cfg.bf16, "seed": cfg.seed,
        "attention": cfg.attention, "frames per chunk": cfg.chunk * cfg.time_stride,
        "passes per chunk": len(step_grid(cfg, cfg.chunks)),
    }  # fmt: skip
    if flags.json:
        return print(json.dumps(facts | {"rows": rows}))
    print(*(f"{k}: {v}" for k, v in facts.items()), sep=" · ")
    for row in rows:
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), sep=" | ")


if __name__ == "__main__":
    cli(main)
