"""Wan2.1's networks and VideoAlign's reward, as train.py's Networks."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from config import METHODS, BadInput, Config, build
from data import read_text
from engine import processes
from engine.checkpoint import not_finite, read_header
from engine.rng import pick, rng_for
from model import VideoDiT
from networks import Networks, for_sampling, load_net
from wan import memory
from wan.hub import WAN, local
from wan.lora import adapt, merged
from wan.videoalign import load_videoalign, refuse_marks
from wan.weights import load_text, load_vae, open_wan, sized


class PromptFile:
    """Prompts alone, one a line: what distilling Wan needs. A caption is one "word", the whole prompt."""

    vocabulary = ()

    def __init__(self, path: str):
        lines = read_text(Path(path)).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts:
            raise BadInput(f"--data={path} holds no prompt; expected is one a line")

    def captions(self, keys: list[tuple]) -> list[list[str]]:
        return [[self.prompts[pick(rng_for("prompt", *key), len(self.prompts))]] for key in keys]


def wan_networks(cfg: Config, prompts: list[str], flags) -> Networks:
    """Wan2.1 from the folder flags.wan, in diffusers' format. flags.teacher: another, larger teacher's;
    flags.start: where the student starts, such as Self-Forcing's ode_init.pt; flags.videoalign: the reward.

    The teacher is kept in bf16 if cfg.bf16, what is trained in fp32. Every prompt is encoded once, by one
    process or another, and kept on disk; then the text encoder, 11 GB, leaves memory. Raises BadInput.
    """
    fetched = {"teacher": local(flags.teacher, WAN[:1]), "start": local(flags.start, WAN[:1])}
    flags = replace(flags, wan=local(flags.wan), **fetched)
    if cfg.weighted and not flags.videoalign:
        raise BadInput(f"method={cfg.method} needs a reward: --videoalign=FOLDER (or --method=self_forcing)")
    if cfg.weighted:
        refuse_marks(prompts)
    teacher = open_wan(flags.teacher or flags.wan, cfg, exact=False).requires_grad_(False)
    start = flags.start or flags.wan  # opened twice: what is mapped, all processes of a machine share
    student, ema, critic = (open_wan(path, cfg) for path in (start, start, flags.wan))
    if cfg.device == "cuda":
        size = sized(cfg, teacher.state_dict(), flags.teacher or flags.wan)
        memory.check(cfg, size, processes.world(), torch.cuda.mem_get_info()[0] / memory.GB)
    traced = [x for net in (teacher, student, critic) for x in net.state_dict().values()]
    origin = {"weights": trace(traced), "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
    codec = load_vae(flags.wan).requires_grad_(False).to(cfg.device)
    reward = load_videoalign(flags.videoalign, cfg.fps).to(cfg.device) if cfg.weighted else None
    text = load_text(flags.wan, cfg.text_length, Path(flags.out) / "text", cfg.device, cfg.bf16)
    text.keep([*prompts, cfg.negative][processes.rank() :: processes.world()])
    processes.wait()

    def read(captions: list[list[str]]) -> Tensor:
        return text([" ".join(words) for words in captions])

    null = text([cfg.negative]).to(cfg.device)
    arriving = (teacher, True), (student, cfg.lora > 0), (ema, False), (critic, cfg.lora > 0)
    teacher, student, ema, critic = (lowered(net, cfg, frozen) for net, frozen in arriving)
    if cfg.lora:
        student, critic = (adapt(net, cfg) for net in (student, critic))
    return Networks(origin, codec, teacher, student, ema, critic, reward, read, null, weights=merged)


def lowered(net: VideoDiT, cfg: Config, frozen: bool = True) -> VideoDiT:
    """Of what is frozen, if cfg.bf16, the blocks in bf16; all else, above all for time, in fp32. Tensor by
    tensor on its way to cfg.device, so that main memory holds what is mapped and no copy of it; what will be
    spread stays there as the file has it, until wan/shards.py does the same. In place."""
    for name, part in net.named_children() if not (cfg.shard and processes.world() > 1) else ():
        low = frozen and cfg.bf16 and name == "blocks"
        part.to(cfg.device, torch.bfloat16 if low else torch.float32)
    return net


def open_student(path: Path, preset: str, typed: dict, flags, student_config):
    """What sample.py opens with --wan: config, student, codec, and what turns a prompt into text (1 l e). The
    student may be another trainer's. flags: sample.py's. Raises BadInput."""
    path = Path(local(path.as_posix(), WAN[:1]))
    if not path.exists():
        raise BadInput(f"no student at {path}; 'python train.py {preset}' makes one, then --student=FILE")
    try:
        header, foreign = read_header(path), False
    except BadInput:  # `save_weights` did not write it
        if "method" not in typed:
            raise BadInput(f"{path} does not name the method: --method={' | '.join(METHODS)}") from None
        header, foreign = {"kind": "student", "config": json.dumps(asdict(build(preset, typed)))}, True
    cfg = student_config(header, preset, typed, flags.steps)
    student = for_sampling(open_wan(path, cfg) if foreign else load_net(path, cfg, header["kind"]), cfg)
    if foreign and (what := not_finite(student.state_dict())):
        raise BadInput(f"{path} cannot be used: {what}")
    folder = local(flags.wan, WAN[1:])
    text = load_text(folder, cfg.text_length, "", cfg.device, cfg.bf16)
    codec = load_vae(folder)
    codec.vae.to(torch.bfloat16 if cfg.bf16 else torch.float32)
    return cfg, student, codec, lambda prompt: text([prompt])


def trace(tensors: list[Tensor]) -> str:
    """Tells weights apart by the first numbers of every tensor: reading all of Wan's takes minutes."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.flatten()[:64].float().numpy().tobytes())
    return digest.hexdigest()[:12]
