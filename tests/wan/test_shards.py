"""FSDP2: sharded over two gloo processes = one process; saved by two, continued by one, and the other way."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401  (once here, not in every process that is forked)
from runs import call, command, in_process, metrics
from safetensors.torch import load_file, save_file
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from config import BadInput, build
from engine import processes
from engine.checkpoint import read_header
from reward import AXES
from train import Flags, prepare
from wan.memory import Tally
from wan.networks import lowered
from wan.shards import load_shards, shard
from wan.weights import open_wan


def weights(path) -> torch.Tensor:
    return torch.cat(
        [x.float().flatten() for _, x in sorted(load_file(path / "student.safetensors").items())]
    )


SHARD = ("--shard", "--horizon=1", "--save_every=1", "--group=2", "--balance_window=2", "--checkpointing",
         "--ema=0.5")  # fmt: skip


@pytest.fixture(scope="module")
def pair(nets, tmp_path_factory):
    """Two steps by two processes that share every parameter."""
    out = tmp_path_factory.mktemp("pair")
    call(command(nets, out, "--steps=2", *SHARD), processes=2)
    return out


def alike(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in ("dmd", "critic", *AXES, "w_inter", "penalty", "ess", "grad_norm", "critic_grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), key
    assert (weights(one) - weights(two)).abs().mean() < 5e-6


def test_two_shards_equal_one_process(nets, pair, tmp_path):
    """Rollouts, text read apart from the passes, checkpointed blocks, clipping, both updates, the average;
    and the student that is saved is whole, not a share."""
    call(command(nets, tmp_path, "--steps=2", *[flag for flag in SHARD if flag != "--shard"]))
    alike(pair, tmp_path)
    assert read_header(pair / "student.safetensors")["kind"] == "student"
    assert (pair / "before.png").exists() and (pair / "after.png").exists()


@pytest.mark.slow
def test_two_machines_of_two_equal_one_process(nets, tmp_path):
    """A copy on each machine (HSDP): gradients and their norm are of all, what is saved is whole."""
    words = ("--steps=1", "--batch=8", "--horizon=1")
    call(command(nets, tmp_path / "four", *words, "--shard"), processes=4, machines=2)
    call(command(nets, tmp_path / "one", *words))
    alike(tmp_path / "four", tmp_path / "one")
    assert len(metrics(tmp_path / "four")) == 1 and weights(tmp_path / "four").isfinite().all()
    assert read_header(tmp_path / "four" / "student.safetensors")["kind"] == "student"


def test_nothing_is_copied_whole_in_main_memory(tiny, build, tmp_path):
    """A file in bf16, whose network learns in fp32: a process that keeps a quarter never holds much more, and
    one alone has nothing left beside the device's. Catches a conversion before the way there."""

    class Main(Tally):
        def add(self, storage):
            if storage.device.type == "cpu":
                super().add(storage)

    cfg, path = replace(tiny, layers=6, bf16=True, shard=True, device="cpu"), tmp_path / "x.safetensors"
    save_file({k: x.bfloat16() for k, x in build(cfg).state_dict().items()}, path)
    size = 2 * path.stat().st_size  # in fp32
    away, nets = (
        SimpleNamespace(bf16=True, shard=False, device="meta"),
        [open_wan(path, cfg), open_wan(path, cfg)],
    )
    with Main() as tally:
        kinds = [lowered(net, away, i > 0).blocks[0].ffn[0].weight.dtype for i, net in enumerate(nets)]
    assert kinds == [torch.float32, torch.bfloat16] and tally.peak < size / 10
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        for frozen, most in ((False, 0.5), (True, 0.3)):
            net = lowered(open_wan(path, cfg).requires_grad_(not frozen), cfg, frozen)
            with Main() as tally:
                shard(net, cfg)
            assert tally.peak < most * size
            kept = net.blocks[0].ffn[0].weight.dtype, net.time_embedding[0].weight.dtype
            assert kept == (torch.bfloat16 if frozen else torch.float32, torch.float32)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("machines", [1, 2])
def test_every_unit_travels_once_a_pass(tiny, build, machines, monkeypatch):
    """A pass fetches blocks, cross-attentions and what is outside of them once each; their gradients leave
    once, and between machines, which hold a copy each, only those travel. The processes are pretended."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{4 // machines}")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        cfg, found = replace(tiny, device="cpu", checkpointing=True), []
        net = shard(build(cfg), cfg)
        x, text = torch.ones(1, 2, *cfg.latent_shape), torch.ones(1, cfg.text_length, cfg.text_width)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), CommDebugMode() as counted:
                v, _ = net(x, torch.full((1, 2), 0.5), text)
                v.square().mean().backward() if grad else None
            found.append({f"{k}": n for k, n in counted.get_comm_counts().items()})
    finally:
        dist.destroy_process_group()
    units = 2 * cfg.layers + 1
    fetched, left, copied = "c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.allreduce_"
    between = {copied: units} if machines > 1 else {}
    assert found == [{fetched: units}, {fetched: 2 * units, left: units} | between]


def test_machines_with_different_numbers_of_processes(tiny, build, monkeypatch):
    """Catches meshes of different shapes, whose processes wait for each other for ever."""
    monkeypatch.setattr(processes, "gather", lambda x: torch.cat([x, torch.tensor([4])]))
    with pytest.raises(BadInput, match="one --nproc_per_node"):
        shard(build(tiny), replace(tiny, device="cpu"))


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_resumed_on_another_world_size(nets, pair, tmp_path, first, then):
    """Both optimizers, the average and the balancer come along."""
    call(command(nets, tmp_path, "--steps=1", *SHARD), processes=first)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000001"]
    call(command(nets, tmp_path, "--steps=2", "--resume", *SHARD), processes=then)
    alike(pair, tmp_path)


def test_a_broken_rollout_leaves_nobody_waiting(nets, tmp_path, monkeypatch):
    """One process has one of its two rollouts broken in the first step, both in the second: the other one
    must run every network as often as it does, and no weight may suffer."""

    def poisoned(run, *key, micro, real=train.draw):
        rngs, text, about = real(run, *key, micro=micro)
        if run.rank == 1 and key[0] != "warm-up":
            text[: 1 + key[1]] = float("nan")
        return rngs, text, about

    monkeypatch.setattr(train, "draw", poisoned)  # in the processes too, which are forked
    call(command(nets, tmp_path, "--steps=2", "--shard", "--balance_window=2"), processes=2)
    first, second = metrics(tmp_path)
    assert first["dropped"] == 2 and first["grad_norm"] > 0 and first["critic_grad_norm"] > 0
    assert second["dropped"] >= 4 and second["grad_norm"] == second["critic_grad_norm"] == 0
    assert weights(tmp_path).isfinite().all()


def test_a_missing_share_is_one_line(nets, pair, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(pair, tmp_path / "run")
    shares = sorted((out / "step_000002").glob("*.distcp"))
    assert len(shares) == 2
    shares[1].unlink()
    with pytest.raises(SystemExit) as stopped:
        in_process(monkeypatch, train, *command(nets, out, "--steps=4", "--resume", *SHARD)[1:])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "step_000002 cannot be read" in error
    assert len(error.splitlines()) == 1, error


def test_shares_of_other_networks(nets, pair, tmp_path):
    cfg = build("tiny", dict(dim=32, heads=2, ffn=32, layers=1, batch=4, device="cpu"))
    run = prepare(cfg, Flags(out=str(tmp_path), nets=str(nets)), 0, 1)
    with pytest.raises(BadInput, match="cannot be read"):
        load_shards(run, ("teacher",), {"shards": pair / "step_000002"})
