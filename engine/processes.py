"""One process or many: the only lines in which processes talk to each other. All of it is a no-op for one."""

import os
import sys
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import BadInput, Config


def start(cfg: Config) -> tuple[int, int, str]:
    """torchrun's environment, if any → rank, world size, device. gloo or NCCL. Raises BadInput."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % (world * cfg.accumulate * cfg.group):
        allowed = f"multiples of {world * cfg.accumulate * cfg.group} (processes x accumulate x group)"
        raise BadInput(f"batch={cfg.batch} is not possible with {world} processes; allowed: {allowed}")
    device = pick_device(cfg)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, world, device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sharing() -> int:
    """Processes that hold the shares of one copy of a network: a machine's, or all if each has but one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    return local if local > 1 and world() % local == 0 else world()


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def is_share(x: Tensor) -> bool:
    """Whether this is a DTensor, of which a process holds a part."""
    return hasattr(x, "full_tensor")


def pick_device(cfg: Config) -> str:
    """cfg.device, or for "auto" the first there is of cuda, mps and cpu. Raises BadInput."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # gloo, which talks between processes, knows no mps
    there = {"cuda": torch.cuda.is_available(), "mps": alone and torch.backends.mps.is_available()}
    found = [name for name, is_there in there.items() if is_there] + ["cpu"]
    if cfg.device not in ("auto", *found):
        raise BadInput(f"device={cfg.device} is not possible here; allowed: {' | '.join(('auto', *found))}")
    return found[0] if cfg.device == "auto" else cfg.device


def stop() -> None:
    wait()
    if dist.is_initialized() and dist.get_backend() == "nccl":  # gloo's threads can abort the interpreter
        dist.destroy_process_group()


def autocast(cfg: Config) -> torch.autocast:
    """bf16 if cfg.bf16. No cache of cast weights: before torch 2.11 those that a rollout's pass without
    gradient had cast left its later pass with gradient without any."""
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16, cache_enabled=False)


def average_gradients(params: list[nn.Parameter]) -> None:
    """One flat all-reduce; what is sharded has been averaged already."""
    if not dist.is_initialized() or is_share(params[0]):
        return
    grads = [p.grad for p in params]
    flat = nn.utils.parameters_to_vector(grads)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat.div_(dist.get_world_size()), grads)


def gather(x: Tensor) -> Tensor:
    """(b ...) of every process, in rank order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean(stats: dict, device: str) -> dict[str, float]:
    values = gather(torch.tensor([[float(v) for v in stats.values()]], device=device)).mean(0)
    return dict(zip(stats, values.tolist(), strict=True))


def clip_gradients(net: nn.Module, largest: float) -> Tensor:
    """Scale gradients to a norm of at most `largest` → the norm before, over all shards."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), largest)
    return norm.full_tensor() if is_share(norm) else norm


def any_of(flag: bool, device: str) -> bool:
    """Whether any process says so."""
    return gather(torch.tensor([flag], device=device)).any().item()


def may(flag: bool, cfg: Config) -> bool:
    """Whether to run a network. With shards that takes all processes, so all have to say so."""
    return not any_of(not flag, cfg.device) if cfg.shard else bool(flag)


def largest_process(who: str) -> float:
    """MiB of resident memory at its peak; nan on Windows, where Python does not know it."""
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
        return resource.getrusage(vars(resource)[who]).ru_maxrss * unit / 2**20
    return float("nan")
