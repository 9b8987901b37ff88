"""The bridge to the real thing: checkpoints of Wan2.1 and of what others have distilled from it.

`VideoDiT` has Wan's block and Wan's original parameter names, so that a checkpoint is a matter of finding the
tensors and agreeing on names. Read are, by what a file holds rather than by what it is called:

original Wan: diffusion_pytorch_model*.safetensors or *.pth, with names as in model.py
diffusers: the same in transformer/, sharded or not, with names such as attn1.to_q
Self-Forcing, Reward-Forcing, LongLive, CausVid: *.pt with "generator_ema" or "generator" inside and names
behind "model." and "_fsdp_wrapped_module."

Every tensor has to find its place and every place its tensor. Only tensors are read: no pickled code runs.
"""

import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import PRESETS, BadInput, Config
from engine.checkpoint import fit, writable_folder, write_atomically
from model import VideoDiT
from wan.hub import extra

_INSIDE = ("generator_ema", "generator", "model", "state_dict")  # where training code keeps the network
_WRAPPERS = (
    r"^((model|diffusion_model|module|pipe|dit|_orig_mod|_fsdp_wrapped_module)\.)+"
    r"|\b_(fsdp|checkpoint)_wrapped_module\.|\b_orig_mod\."
)


def names_in_diffusers(layers: int) -> dict[str, str]:
    """{name as in model.py: diffusers' name} of a transformer with that many blocks. Raises BadInput."""
    convert = extra("diffusers.loaders.single_file_utils").convert_wan_transformer_to_diffusers
    with torch.device("meta"):
        names = VideoDiT(replace(PRESETS["wan-1.3b"], layers=layers)).state_dict()
    return {ours: theirs for theirs, ours in convert({name: name for name in names}).items()}


def open_wan(path: str | Path, cfg: Config, exact: bool = True) -> VideoDiT:
    """The transformer a checkpoint holds, in cfg's size or, if not `exact`, in its own: 1.3B, 14B, ...; its
    tensors are the file's, dtype included. Raises BadInput: what is missing, unreadable or does not fit."""
    tensors = read_transformer(path)
    with torch.device("meta"):
        net = VideoDiT(cfg if exact else sized(cfg, tensors, path))
    return fit(net, tensors, path, assign=True)


def sized(cfg: Config, tensors: dict[str, Tensor], path: str | Path) -> Config:
    """cfg with the size of a checkpoint's transformer, heads as wide as cfg's. Raises BadInput."""
    try:
        dim, ffn = len(tensors["patch_embedding.weight"]), len(tensors["blocks.0.ffn.0.weight"])
    except KeyError as error:
        raise BadInput(f"{path} is no Wan2.1 text-to-video transformer: it lacks {error}") from error
    return replace(cfg, dim=dim, ffn=ffn, layers=count_blocks(tensors), heads=dim // (cfg.dim // cfg.heads))


def read_transformer(path: str | Path) -> dict[str, Tensor]:
    """{name as in model.py: tensor}, whatever names the checkpoint has. Raises BadInput."""
    tensors = read_tensors(Path(path))
    if lora := [name for name in tensors if re.search(r"lora_(A|B|down|up|alpha)\b|\.alpha$", name)]:
        what = f"{path} holds LoRA factors ({lora[0]}), not a network"
        raise BadInput(f"{what}; merge them into their base first, such as with peft's merge_and_unload")
    if any(name.startswith("condition_embedder.") for name in tensors):
        ours = {theirs: name for name, theirs in names_in_diffusers(count_blocks(tensors)).items()}
        tensors = {ours.get(name, name): x for name, x in tensors.items()}
    return tensors


def count_blocks(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A file, or the transformer in a folder → {name: tensor}, names without wrappers. Raises BadInput."""
    if path.is_dir():
        inner = path / "transformer" if (path / "transformer").is_dir() else path
        parts = sorted(inner.glob("diffusion_pytorch_model*.safetensors"))
        if index := sorted(inner.glob("diffusion_pytorch_model*.safetensors.index.json")):
            parts = listed(index[0])  # an older save may lie beside
        if not parts:
            raise BadInput(f"{inner} lacks weights; expected: diffusion_pytorch_model*.safetensors")
        tensors = {}
        for part in parts:
            new = read_tensors(part)
            if twice := sorted(new.keys() & tensors.keys()):
                raise BadInput(f"{inner} holds {twice[0]} twice, also in {part.name}: which is newer?")
            tensors |= new
        return tensors
    if not path.is_file():
        raise BadInput(f"no weights at {path}")
    try:
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and safetensors raise half a dozen kinds for a file that is not theirs
        raise BadInput(f"{path} cannot be read as tensors ({type(error).__name__})") from error
    for name in _INSIDE:
        if isinstance(tensors, dict) and isinstance(tensors.get(name), dict):
            tensors = tensors[name]
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise BadInput(f"{path} holds no network; looked for tensors, also inside {' '.join(_INSIDE)}")
    return {re.sub(_WRAPPERS, "", name): x for name, x in tensors.items()}


def listed(index: Path) -> list[Path]:
    """The files that an index of shards names. Raises BadInput."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is no index of shards: {error}") from error
    return sorted(index.parent / Path(name).name for name in names)


# -- the video codec ----------------------------------------
class WanCodec(nn.Module):
    """Wan2.1's causal VAE behind `Codec`'s interface: pixels (b F 3 H W) in [0, 1], F = 1 + 4 k, ↔ latents
    (b f 16 H/8 W/8), f = 1 + k, standardised per channel with Wan's own means and deviations.

    Latent 0 is frame 0 alone, latent k is frames 4k-3 ... 4k. `vae`: diffusers' AutoencoderKLWan, any dtype.
    """

    time_stride = 4

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.eval()
        shape = (1, 1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape), persistent=False)

    def encode(self, video01: Tensor) -> Tensor:
        """The posterior's mode, as Wan takes it. Raises ValueError unless F = 1 + 4 k and within [0, 1]."""
        low, high = video01.aminmax()
        if low < -1e-3 or high > 1 + 1e-3 or video01.shape[1] % 4 != 1:
            what = f"{video01.shape[1]} frames within [{low:.3f}, {high:.3f}]"
            raise ValueError(f"{what}; needed: 1 + 4 k in [0, 1]")
        pixels = rearrange(video01, "b f c h w -> b c f h w") * 2 - 1
        z = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        return (rearrange(z, "b c f h w -> b f c h w") - self.mean) / self.std

    def decode(self, x: Tensor) -> Tensor:
        """A whole clip at once; differentiable, every latent decoded a second time on the way back. At 81
        frames of 480 x 832 that alone takes 112 GB by count (docs/log.md): no training asks for it."""
        return self.stream()(x)

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder with a memory: called with a clip's latents part after part, it gives their frames, the
        same as all at once."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        memory: list = [None] * sum(isinstance(m, WanCausalConv3d) for m in self.vae.decoder.modules())
        seen = 0

        def decode_next(x: Tensor) -> Tensor:
            nonlocal seen
            z = rearrange(x * self.std + self.mean, "b f c h w -> b c f h w")
            z = self.vae.post_quant_conv(z.to(self.vae.dtype))
            frames = []
            for latent in z.split(1, dim=2):
                args = (latent, seen == 0, list(memory))
                again = z.requires_grad and torch.is_grad_enabled()
                one = checkpoint(self._one, *args, use_reentrant=False) if again else self._one(*args)
                frames.append(one[0])
                memory[:] = one[1]
                seen += 1
            return (rearrange(torch.cat(frames, 2), "b c f h w -> b f c h w").float() / 2 + 0.5).clamp(0, 1)

        return decode_next

    def _one(self, latent: Tensor, first: bool, memory: list) -> tuple[Tensor, list]:
        """One latent's frames, and what the next one needs to know of it."""
        memory = list(memory)
        more = {"first_chunk": True} if first else {}
        return self.vae.decoder(latent, feat_cache=memory, feat_idx=[0], **more), memory


def load_vae(path: str | Path) -> WanCodec:
    """Wan2.1_VAE.pth, or a folder in diffusers' format (with vae/ inside or not). Raises BadInput."""
    kind, convert = extra("diffusers").AutoencoderKLWan, extra("diffusers.loaders.single_file_utils")
    path = Path(path)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        try:
            found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            return WanCodec(complete(*found, folder))
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(f"{folder} holds no Wan VAE: {str(error).splitlines()[0]}") from error
    return WanCodec(fit(kind(), convert.convert_wan_vae_to_diffusers(read_tensors(path)), path))


def complete(net: nn.Module, info: dict, path: Path, given: tuple[str, ...] = ()) -> nn.Module:
    """What a file lacks diffusers and transformers leave at random, with a notice: here it is BadInput."""
    if lost := sorted(set(info["missing_keys"]) - set(given)):
        raise BadInput(f"{path} lacks {len(lost)} tensors: {' '.join(lost[:3])}")
    return net


# -- text ----------------------------------------
class WanText:
    """Prompts → (b 512 4096): umT5's states, zero after the prompt's end, as Wan was trained on them.

    Wan attends to all 512 places, so zeros are part of its input. With a `folder`, the states of every prompt
    are kept there and the encoder (11 GB in bf16) is asked once a prompt, loaded when it first is; another
    encoder needs another folder.
    """

    def __init__(self, make_encoder: Callable[[], nn.Module], tokenizer, folder: str | Path = "", length=512):
        self.make_encoder, self.tokenizer, self.length = make_encoder, tokenizer, length
        self.folder = writable_folder(str(folder)) if folder else None

    @cached_property
    def encoder(self) -> nn.Module:
        return self.make_encoder().eval()

    def keep(self, prompts: list[str]) -> None:
        """Encode prompts ahead, onto the disk, so that the encoder is not asked again; it leaves memory."""
        for prompt in tqdm(prompts, desc="prompts"):
            self._states(prompt)
        self.__dict__.pop("encoder", None)

    def __call__(self, prompts: list[str]) -> Tensor:
        return torch.stack([F.pad(x, (0, 0, 0, self.length - len(x))) for x in map(self._states, prompts)])

    @torch.no_grad()
    def _states(self, prompt: str) -> Tensor:
        """(l 4096) for the prompt's own tokens, the end mark included; cleaned as Wan cleans prompts."""
        import ftfy

        words = " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
        name = hashlib.sha256(f"{self.length} {words}".encode()).hexdigest()[:24]
        path = self.folder / f"{name}.safetensors" if self.folder else None
        if path and path.is_file():
            return load_file(path)["states"]
        tokens = self.tokenizer(words, truncation=True, max_length=self.length, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        given = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}
        states = self.encoder(**given).last_hidden_state[0].cpu()
        if path:
            write_atomically(path, lambda temporary: save_file({"states": states}, temporary))
        return states


def load_text(path: str | Path, length=512, cache: str | Path = "", device="cpu", bf16=False) -> WanText:
    """A folder in diffusers' format, text_encoder/ and tokenizer/ inside. Raises BadInput, for the encoder
    when it is first asked."""
    extra("ftfy")
    transformers, folder = extra("transformers"), Path(path)

    def make_encoder() -> nn.Module:
        how = dict(dtype=torch.bfloat16 if bf16 else torch.float32, output_loading_info=True)
        encoder, info = _readable(transformers.UMT5EncoderModel, folder / "text_encoder", **how)
        encoder.encoder.embed_tokens = encoder.shared  # files have one of the two, whatever their config says
        return complete(encoder, info, folder, ("encoder.embed_tokens.weight",)).to(device)

    return WanText(make_encoder, _readable(transformers.AutoTokenizer, folder / "tokenizer"), cache, length)


def _readable(kind, folder: Path, **how):
    try:
        return kind.from_pretrained(folder, local_files_only=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{folder} cannot be read: {(str(error) or 'empty').splitlines()[0]}") from error
