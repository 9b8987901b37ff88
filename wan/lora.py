"""LoRA (Hu et al. 2021): the network is frozen, low-rank updates of its blocks' matrices learn; by peft."""

from collections.abc import Iterator

import torch
from torch import Tensor

from config import Config
from model import VideoDiT
from wan.hub import extra


def adapt(net: VideoDiT, cfg: Config) -> VideoDiT:
    """Updates of rank cfg.lora, which are zero at first, in place: attention and feed-forward. The frozen
    rest may be in bf16, they are in fp32. Raises BadInput."""
    peft = extra("peft")
    torch.manual_seed(cfg.seed)  # every process draws the same
    where = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])"
    how = peft.LoraConfig(r=cfg.lora, lora_alpha=cfg.lora, target_modules=where)
    peft.inject_adapter_in_model(how, net)
    for name, p in net.named_parameters():
        p.data = p.data.float() if ".lora_" in name else p.data
    return net


def merged(net: VideoDiT) -> Iterator[Tensor]:
    """What the parameters of the network are with its updates added, in the order of the plain one's."""
    for name, p in net.named_parameters():
        if name.endswith(".base_layer.weight"):
            yield p + net.get_submodule(name.removesuffix(".base_layer.weight")).get_delta_weight("default")
        elif ".lora_" not in name:
            yield p.float()
