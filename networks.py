"""The networks a run is made of: this project's own from a folder, or Wan2.1's with VideoAlign's reward.

Whatever they are, train.py sees the same few things: a codec, a frozen teacher, a student with its running
average, a critic that starts as the teacher, a reward, and something that reads words.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from codec import Codec
from config import BadInput, Config
from engine.checkpoint import fingerprint, load_weights
from model import VideoDiT
from reward import RewardModel
from world.words import embed


@dataclass
class Networks:
    origin: dict[str, str]  # where they came from: a resumed run has to have begun from the same
    codec: nn.Module
    teacher: VideoDiT  # frozen
    student: VideoDiT
    ema: VideoDiT  # the student's running average
    critic: VideoDiT
    reward: nn.Module | None
    read: Callable[[list[list[str]]], Tensor]  # captions as words → (b l e)
    null: Tensor  # (1 l e): the text that guidance leads away from
    folder: str = ""  # they were read from here; "" for Wan's
    weights: Callable = nn.Module.parameters  # of the student, as the average has them


def own_networks(cfg: Config, nets: Path, start: str) -> Networks:
    """Those pretrain.py left in the folder `nets`. Raises BadInput."""
    kinds = ("codec", "teacher", *["causal"] * (not start), *["reward"] * cfg.weighted)
    if missing := [kind for kind in kinds if not (nets / f"{kind}.safetensors").exists()]:
        first = f"python pretrain.py {cfg.preset} --out={nets}"
        raise BadInput(f"{nets} holds no {missing[0]}.safetensors; '{first}' makes what is needed there")
    origin = {"nets": fingerprint(nets, kinds), "start": start}

    def made(kind: str, path: str = "") -> nn.Module:
        return load_net(Path(path or nets / f"{kind}.safetensors"), cfg, kind)

    codec, teacher = (made(kind).requires_grad_(False) for kind in ("codec", "teacher"))
    student, critic = made("causal", start), made("teacher")
    pair = student, copy.deepcopy(student)
    reward = made("reward").requires_grad_(False) if cfg.weighted else None
    read = partial(embed, cfg=cfg)
    null = torch.zeros(1, cfg.text_length, cfg.text_width, device=cfg.device)
    return Networks(origin, codec, teacher, *pair, critic, reward, read, null, str(nets))


def load_net(path: Path, cfg: Config, kind: str) -> nn.Module:
    """The network a file of that kind holds, on cfg.device."""
    net = {"codec": Codec, "reward": RewardModel}.get(kind, VideoDiT)(cfg)
    return load_weights(path, net, cfg, kind).to(cfg.device)


def for_sampling(net: VideoDiT, cfg: Config) -> VideoDiT:
    """On cfg.device; with cfg.bf16 in bf16, but what tells times apart, and so the residual sum, in fp32."""
    for name, p in net.named_parameters():
        high = not cfg.bf16 or "time_" in name or "modulation" in name
        p.data = p.data.to(cfg.device, torch.float32 if high else torch.bfloat16)
    return net


def find_codec(given: str, student: Path, header: dict) -> Path:
    """--codec, or beside the student, or among the nets that its training began from. Raises BadInput."""
    folders = dict.fromkeys((student.parent, student.parent.resolve() / header.get("nets", ".")))
    paths = [Path(given)] if given else [folder / "codec.safetensors" for folder in folders]
    for path in paths:
        if path.exists():
            return path
    raise BadInput(f"no codec at {' or '.join(map(str, paths))}; name the student's: --codec=FILE")
