"""What only a GPU can show: `pytest -m gpu`. Skipped where there is none."""

import sys
from dataclasses import replace
from functools import partial
from itertools import islice, product

import pytest
import torch
import torch.distributed as dist
from runs import SMALL
from test_model import SINKS
from test_rollout import one_by_one
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import config
import pretrain
import sample
import train
from codec import Codec
from engine import graphs, processes
from engine.graphs import CudaGraphs
from engine.rng import rng_for
from model import RingCache, VideoDiT, _attend
from networks import for_sampling
from rollout import directly, rollout, stream
from wan.shards import shard
from world.scene import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def streamed(model, cfg, texts, call, dtype=torch.float32, chunks=12):
    cache = RingCache(model, cfg, 1, dtype)
    with torch.inference_mode():
        parts = islice(stream(model, texts, cfg, [rng_for(0)], cache=cache, call=call), chunks)
        return torch.cat(list(parts), dim=1)


def prompt(cfg, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, cfg.text_length, cfg.text_width, generator=g).cuda()


@pytest.mark.parametrize(
    "context, taper", [*product(("clean", "noisy", "none"), ("uniform", "5432")), ("aligned", "uniform")]
)
@pytest.mark.parametrize("sink", SINKS)
def test_graphs_equal_eager(tiny, build, sink, taper, context):
    """Catches what a captured chunk keeps from its capture: a prompt, a count, noise. The window fills and
    turns over, and the prompt changes on the way."""
    cfg = replace(tiny, context=context, context_t=0.2, taper=taper, **SINKS[sink])
    model, texts = build(cfg).cuda(), {0: prompt(cfg, 0), 8: prompt(cfg, 1)}
    graphs = CudaGraphs()
    eager, replayed = streamed(model, cfg, texts, directly), streamed(model, cfg, texts, graphs)
    assert len(graphs.captured) >= 1 + (context in ("none", "aligned"))
    assert torch.equal(eager, replayed)
    model.run = partial(one_by_one, model.run)  # what is remembered has its own pass
    apart = streamed(model, cfg, texts, directly)
    assert_close(eager, apart, rtol=1e-3, atol=1e-4)


def test_bf16_stays_close(tiny, build):
    model, texts = build(tiny).cuda(), {0: prompt(tiny, 0)}
    exact = streamed(model, tiny, texts, directly, chunks=3)
    model = for_sampling(model, replace(tiny, bf16=True, device="cuda"))
    rough = streamed(model, tiny, texts, CudaGraphs(), torch.bfloat16, chunks=3)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.98


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_every_attention_is_exact(backend):
    """A chunk that looks at a filled window, in the strides the cache has; against fp64."""
    q, k, v = torch.randn(3, 1, 4, 60, 2, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    q, k, v = q[:, 0], k.flatten(1, 2), v.flatten(1, 2)
    exact = _attend(q.double(), k.double(), v.double(), None)
    with sdpa_kernel(SDPBackend.__members__[backend]):
        assert_close(_attend(q, k, v, None).double(), exact, rtol=2e-2, atol=2e-2)


def test_a_chunk_asks_the_device_nothing(tiny, build):
    """Catches a synchronisation inside a chunk; the first ones, which read text and times, may have some."""
    model = build(tiny).cuda()
    cache, seen = RingCache(model, tiny, 1), []
    with torch.inference_mode():
        for i, x in enumerate(islice(stream(model, prompt(tiny, 0), tiny, [rng_for(0)], cache=cache), 8)):
            torch.cuda.set_sync_debug_mode("error" if 2 <= i < 7 else "default")
            seen.append(x)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(seen).isfinite().all()


# The bodies of the following run on a CPU as well: by hand, with "cpu" for "cuda".
def flat(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).cpu()


def distilled(device, nets, out):
    """One step of Stream-R1 → what it logs, and how the student moves."""
    cfg = config.build("tiny", SMALL | {"device": device})
    run = train.prepare(cfg, train.Flags(nets=str(nets), out=str(out)), 0, 1)
    before = flat(run.student)
    stats = train.update_student(run, 0) | {"critic": train.update_critic(run, "critic", 0, 0)["critic"]}
    return {k: torch.tensor(float(v)) for k, v in stats.items()}, flat(run.student) - before


def test_a_distillation_step_is_the_cpus(nets, tmp_path):
    """The same noise, times, exit and weights. Adam's first step is a sign: small gradients may turn."""
    (stats, moved), (exact, wanted) = (distilled(d, nets, tmp_path / d) for d in ("cuda", "cpu"))
    assert_close(stats, exact, rtol=2e-2, atol=2e-3)
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.95


def without_gradient(device, model, cfg, exit) -> list[str]:
    cfg, model = replace(cfg, bf16=True, device=device), model.to(device)
    text = torch.randn(2, cfg.text_length, cfg.text_width, device=device)
    with processes.autocast(cfg):
        x = rollout(model, text, cfg, [rng_for(i) for i in range(2)], cfg.chunks, exit, grad=True)
    x.square().mean().backward()
    return [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("exit", range(4))
def test_every_parameter_learns_in_bf16(tiny, build, exit, checkpointing):
    """Catches weights that autocast has cast in a pass without gradient and hands on to the one with it."""
    model = build(replace(tiny, checkpointing=checkpointing))
    assert without_gradient("cuda", model, tiny, exit) == []


def sharded_gradients(device, build, cfg, rendezvous):
    """One process, its network sharded and not → flat gradients, and numbers that went through `mean`."""
    dist.init_process_group(
        {"cuda": "nccl", "cpu": "gloo"}[device], f"file://{rendezvous}", rank=0, world_size=1
    )
    try:
        cfg, found = replace(cfg, device=device), []
        for spread in (shard, lambda net, cfg: net):
            net = spread(build(cfg).to(device), cfg)
            text = torch.ones(1, cfg.text_length, cfg.text_width, device=device)
            x = torch.ones(1, cfg.frames, *cfg.latent_shape, device=device)
            net(x, torch.full((1, cfg.frames), 0.5, device=device), text)[0].square().mean().backward()
            grads = [p.grad.full_tensor() if processes.is_share(p.grad) else p.grad for p in net.parameters()]
            found.append(torch.cat([g.flatten() for g in grads]).cpu())
        assert processes.gather(torch.arange(3.0, device=device)).tolist() == [0, 1, 2]
        return *found, processes.mean({"a": 1.5}, device)
    finally:
        dist.destroy_process_group()


def test_one_process_talks_to_itself(tiny, build, tmp_path):
    one, other, mean = sharded_gradients("cuda", build, tiny, tmp_path / "rendezvous")
    assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert mean == {"a": 1.5}


def rendered(device, cfg) -> torch.Tensor:
    world = World(cfg)
    return world.pixels(world.draw([("gpu", i) for i in range(20)]), device).cpu()


def test_a_world_rendered_here_is_the_cpus():
    cfg = config.build("small", {})
    assert_close(rendered("cuda", cfg), rendered("cpu", cfg), rtol=0, atol=1e-3)


def pretrained(device, nets, out, monkeypatch) -> torch.Tensor:
    """How two steps move the teacher, on clips that two processes draw."""
    typed = {k: SMALL[k] for k in ("dim", "heads", "ffn", "layers", "batch")} | {"device": device}
    flags = ("--stage=teacher", "--steps=2", "--workers=2", f"--out={out}")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *(f"--{k}={v}" for k, v in typed.items()), *flags])
    out.mkdir()
    (out / "codec.safetensors").write_bytes((nets / "codec.safetensors").read_bytes())
    config.cli(pretrain.main)
    cfg = config.build("tiny", typed)
    torch.manual_seed(cfg.seed)
    after = torch.load(out / "teacher-state" / "step_000002.pt", weights_only=True)["net"]
    return torch.cat([(after[k].cpu() - p.detach()).flatten() for k, p in VideoDiT(cfg).named_parameters()])


def test_pretraining_is_the_cpus(nets, tmp_path, monkeypatch):
    """Catches processes that do not survive beside a GPU; clips, noise or text that went elsewhere."""
    one, other = (pretrained(d, nets, tmp_path / d, monkeypatch) for d in ("cuda", "cpu"))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9


def test_the_kernel_that_is_chosen_streams(tiny, build):
    """In the type a network samples in; and what is typed is refused only if this GPU cannot do it."""
    for bf16 in (False, True):
        cfg = replace(tiny, bf16=bf16)
        dtype = torch.bfloat16 if bf16 else torch.float32
        model, texts = for_sampling(build(cfg), replace(cfg, device="cuda")), {0: prompt(cfg, 0)}
        try:
            graphs.allow("math")
            plain = streamed(model, cfg, texts, directly, dtype, chunks=5)
            for kernel in ("auto", *graphs.kernel_times(replace(cfg, device="cuda"))):
                chosen = graphs.settled(replace(cfg, attention=kernel)).attention
                assert kernel in ("auto", chosen)
                made = streamed(model, cfg, texts, CudaGraphs(), dtype, chunks=5)
                assert torch.nn.functional.cosine_similarity(made.flatten(), plain.flatten(), dim=0) > 0.98
        finally:
            graphs.allow("cudnn", "flash", "mem_efficient", "math")


def test_decoding_beside_the_next_chunk_changes_no_frame(tiny, build):
    """Catches a chunk that is decoded before it is made, or copied before it is decoded."""
    cfg = replace(tiny, device="cuda", stride=8)
    model, codec, texts = build(cfg).cuda(), Codec(cfg).eval().cuda(), {0: prompt(cfg, 0)}
    found = [*sample.decoded(model, codec, texts, cfg, 0, chunks=8)]
    cache = RingCache(model, cfg, 1)
    with torch.inference_mode():
        parts = islice(stream(model, texts, cfg, [rng_for(0, "sample", 0)], cache=cache), 8)
        wanted = [(codec.decode(x)[0].clamp(0, 1) * 255).round().byte().cpu() for x in parts]
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.int(), b.int(), rtol=0, atol=1)
