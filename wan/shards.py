"""Networks spread over processes (FSDP2), and their checkpoints: --shard, for networks as large as Wan's.

run.py imports this when it is asked for: loading it takes a second.
"""

import json
import os
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from config import BadInput, Config
from engine import processes
from engine.checkpoint import states, write_atomically


def shard(net: nn.Module, cfg: Config) -> nn.Module:
    """FSDP2, in place: a process keeps its share of every parameter and fetches the others' block by block.

    Blocks travel and compute in bf16 if cfg.bf16; what is outside of them, the time embedding too, stays
    in fp32. The text is read once a rollout, apart from the passes: cross-attention is a unit of its own.
    """
    low = MixedPrecisionPolicy(torch.bfloat16 if cfg.bf16 else None, torch.float32, cast_forward_inputs=False)
    how = dict(mesh=init_device_mesh(cfg.device, (processes.world(),)), reshard_after_forward=True)
    for block in net.blocks:
        fully_shard(block.cross_attn, mp_policy=low, **how)
        register_fsdp_forward_method(block.cross_attn, "read")
        fully_shard(block, mp_policy=low, **how)
    fully_shard(net, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)
    for method in ("run", "read_time", "read_text"):
        register_fsdp_forward_method(net, method)
    return net


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
    for name in names:
        set_model_state_dict(getattr(run, name), state[name])
    for name, (net, opt) in _optimizers(run).items():
        set_optimizer_state_dict(net, opt, state[name])
    run.balancer.load_state_dict(facts["balancer"])


def _optimizers(run) -> dict:
    return {"student_opt": (run.student, run.student_opt), "critic_opt": (run.critic, run.critic_opt)}


def _shards(run, names: tuple[str, ...]) -> dict:
    # one process alone is nothing to be warned of, here or by what reads and writes the shards
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    state = {name: get_model_state_dict(getattr(run, name)) for name in names}
    opts = _optimizers(run).items()
    return state | {name: get_optimizer_state_dict(net, opt) for name, (net, opt) in opts}
