"""Networks spread over processes (FSDP2), and their checkpoints: --shard, for networks as large as Wan's.

run.py imports this when it is asked for: loading it takes a second.
"""

import copy
import functools
import json
import os
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from config import BadInput, Config
from engine import processes
from engine.checkpoint import states, write_atomically


def shard(net: nn.Module, cfg: Config) -> nn.Module:
    """FSDP2, in place: a process keeps its share of every parameter and fetches the others' block by block,
    each once a pass. Machines with several processes each hold a copy a machine, and share within it (HSDP).

    Blocks travel and compute in bf16 if cfg.bf16; what is outside of them, the time embedding too, in fp32.
    A stream reads its text once, apart from the passes: cross-attention is its own unit. Raises BadInput.
    """
    if processes.gather(torch.tensor([processes.sharing()], device=cfg.device)).unique().numel() > 1:
        raise BadInput("--shard: machines differ in processes; allowed: one --nproc_per_node for all of them")
    mesh = _mesh(cfg.device, processes.world() // processes.sharing(), dist.group.WORLD)
    for block in net.blocks:
        _fetched(block.cross_attn, mesh, cfg.bf16, "read")
        _fetched(block, mesh, cfg.bf16)
    return _fetched(net, mesh, False, "run", "read_time", "read_text")


@functools.cache  # one for all networks: each has communicators of its own
def _mesh(device: str, machines: int, group: dist.ProcessGroup) -> DeviceMesh:
    shape = (group.size(),) if machines == 1 else (machines, group.size() // machines)
    return init_device_mesh(device, shape, mesh_dim_names=("copy", "share")[-len(shape) :])


def _fetched(unit: nn.Module, mesh: DeviceMesh, bf16: bool, *methods: str) -> nn.Module:
    """What `forward` or one of the methods needs is fetched before it, and dropped after it."""
    for p in (p for p in unit.parameters() if not processes.is_share(p)):  # one by one, off a mapped file
        low = bf16 and not p.requires_grad
        p.data = p.data.to(mesh.device_type, torch.bfloat16 if low else torch.float32)
    unit.forward = copy.copy(unit).forward  # calls the methods as they are: all is there already
    how = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    fully_shard(unit, mesh=mesh, mp_policy=how, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(unit, method)
    return unit


def save_shards(run, names: tuple[str, ...], facts: dict) -> None:
    """All that a run needs to go on, as the folder step_%06d: each process writes its share. Two such stay.

    names: of its networks; facts: what JSON can hold. The index that torch.distributed.checkpoint adds is a
    pickle: open only what you have written yourself.
    """
    folder, name = run.out, f"step_{run.step:06d}"
    path, temporary = folder / name, folder / f".{name}"
    dcp.save(_shards(run, names), checkpoint_id=temporary)
    if processes.rank() == 0:
        text = json.dumps(facts | {"step": run.step, "balancer": run.balancer.state_dict()})
        write_atomically(temporary / "facts.json", lambda name: name.write_text(text))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        for old in [p for p in states(folder) if p != path and p.is_dir()][:-1]:
            shutil.rmtree(old)
    processes.wait()


def load_shards(run, names: tuple[str, ...], facts: dict) -> None:
    """Into a run, spread over any number of processes. Raises BadInput."""
    state, path = _shards(run, names), facts["shards"]
    try:
        dcp.load(state, checkpoint_id=path)
    except (Exception, dcp.CheckpointException) as error:  # a share is missing, cut short, of another network
        what = f"{path} cannot be read ({type(error).__name__})"
        raise BadInput(f"{what}; delete it to go on from the one before") from error
    for name, (net, opt) in _parts(run, names):
        set_state_dict(net, opt, model_state_dict=state[name]["net"], optim_state_dict=state[name]["opt"])
    run.balancer.load_state_dict(facts["balancer"])


def _shards(run, names: tuple[str, ...]) -> dict:
    # one process alone is nothing to be warned of, here or by what reads and writes the shards
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    return {k: dict(zip(("net", "opt"), get_state_dict(*v), strict=True)) for k, v in _parts(run, names)}


def _parts(run, names: tuple[str, ...]) -> list[tuple]:
    return [(name, (getattr(run, name), vars(run).get(f"{name}_opt", ()))) for name in names]
