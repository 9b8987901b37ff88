"""One process or many: the only lines in which processes talk to each other. All of it is a no-op for one."""

import os

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


def pick_device(cfg: Config) -> str:
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device != "cpu" and not torch.cuda.is_available():
        raise BadInput(f"device={cfg.device} is not possible: torch sees no CUDA device; allowed: auto | cpu")
    return cfg.device


def stop() -> None:
    if dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == "nccl":  # destroying gloo's threads can abort the interpreter at its exit
            dist.destroy_process_group()


def autocast(cfg: Config) -> torch.autocast:
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16)


def average_gradients(params: list[nn.Parameter]) -> None:
    """One flat all-reduce."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(g.view_as(p))


def gather(x: Tensor) -> Tensor:
    """(b ...) of every process, in rank order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean(stats: dict, device: str) -> dict[str, float]:
    values = torch.tensor([float(v) for v in stats.values()], device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(stats, values.tolist(), strict=True))


def any_of(flag: bool, device: str) -> bool:
    """Whether any process says so."""
    return gather(torch.tensor([flag], device=device)).any().item()
