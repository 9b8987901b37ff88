"""A trained student in diffusers' format, with a model card: a folder for other people's code.

    python -m examples.export --student=out/train/student.safetensors --out=out/export

transformer/ is diffusers' WanTransformer3DModel. It is read back and asked for one velocity beside our own
network; what the two differ by is printed and stands in the card. VAE and text encoder stay Wan's.
"""

from engine import openmp  # isort: skip  (before torch loads)

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from config import BadInput, Config, cli, from_words, read_cli
from engine import checkpoint
from engine.rng import rng_for
from model import VideoDiT
from networks import load_net
from rollout import step_grid
from wan.weights import names_in_diffusers

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
base_model: Wan-AI/Wan2.1-T2V-1.3B
---
# A streaming student of Wan2.1, trained with --method={cfg.method}

It makes {cfg.chunk} latent frames at a time, at {cfg.height} x {cfg.width}, and looks back at the ones before
through a cache. Trained for {step} steps by:

    {command}

**Data**: the prompts in `{cfg.data}`, and the student's own videos; no others.

**Use**: `transformer/` loads in diffusers' `WanTransformer3DModel`; for the same noise, time and text it
gives the student's velocities to {apart:.1e} of the largest one, in fp32. VAE and text encoder are Wan2.1's.

    python sample.py --config=FOLDER/settings.json --wan=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --student=FOLDER

**Limits**: it is causal and needs the noise levels {levels} and no guidance. A pipeline that denoises
all frames at once does not use it as it was trained. What Wan2.1 cannot show, or shows wrongly, it does not
learn here. Nobody has measured it for safety or for bias.

**Licence**: Apache-2.0, as that of the weights it began from. The prompts may have their own.

**Config**:

```json
{words}
```
"""


@dataclass(frozen=True)
class Flags:
    student: str = "out/train/student.safetensors"  # of train.py --wan
    out: str = "out/export"  # the folder that is made


def in_diffusers(net: VideoDiT, cfg: Config) -> torch.nn.Module:
    """The same network in diffusers' class."""
    from diffusers import WanTransformer3DModel

    names = names_in_diffusers(cfg.layers)
    theirs = WanTransformer3DModel(
        patch_size=net.size, num_attention_heads=cfg.heads, attention_head_dim=net.head_dim,
        in_channels=cfg.channels, out_channels=cfg.channels, text_dim=cfg.text_width, freq_dim=cfg.time_freqs,
        ffn_dim=cfg.ffn, num_layers=cfg.layers,
    )  # fmt: skip
    theirs.load_state_dict({names[name]: x for name, x in net.state_dict().items()})
    return theirs.eval()


@torch.no_grad()
def apart(net: VideoDiT, theirs: torch.nn.Module, cfg: Config) -> float:
    """Largest difference of the two velocities of one noisy frame, over the largest velocity."""
    rng = rng_for("export")
    x = torch.randn(1, 1, *cfg.latent_shape, generator=rng)
    text = torch.randn(1, cfg.text_length, cfg.text_width, generator=rng)
    ours, _ = net(x, torch.full((1, 1), 0.5), text)
    other = theirs(x.transpose(1, 2), torch.tensor([500.0]), text).sample.transpose(1, 2)
    return ((ours - other).abs().max() / ours.abs().max()).item()


def export(student: Path, out: Path) -> float:
    """Write the folder → what `apart` finds between the file and the folder, which was read back. Raises
    BadInput, also where they differ: then there is no card."""
    from diffusers import WanTransformer3DModel

    header = checkpoint.read_header(student)
    cfg = from_words(header["config"], {"device": "cpu"})
    if cfg.predict != "v" or cfg.time_stride == 1:
        raise BadInput(f"{student} holds a student of preset {cfg.preset!r}; allowed: one of train.py --wan")
    net = load_net(student, cfg, "student")
    checkpoint.writable_folder(str(out))
    in_diffusers(net, cfg).half().save_pretrained(out / "transformer")
    back = WanTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.float32)
    if not (found := apart(net, back.eval(), cfg)) <= 1e-3:  # nan as well
        raise BadInput(f"{out}/transformer is not the student: velocities differ by {found:.1e}")
    given = dict(step=header.get("step", "?"), command=header.get("command", "?"), apart=found, cfg=cfg)
    given["levels"] = " then ".join(f"{t:.3g}" for t in step_grid(cfg, cfg.chunks))
    words = json.dumps(json.loads(header["config"]), indent=1)
    checkpoint.write_atomically(out / "settings.json", lambda name: name.write_text(words, encoding="utf-8"))
    card = CARD.format(**given, words=words)
    checkpoint.write_atomically(out / "README.md", lambda name: name.write_text(card, encoding="utf-8"))
    return found


def main() -> None:
    _, typed, flags = read_cli(None, Flags, __doc__)
    openmp.use_threads(typed.get("threads", 0))
    found = export(Path(flags.student), Path(flags.out))
    print(f"{flags.out}: transformer/ differs from the student by {found:.1e}; README.md is its card")


if __name__ == "__main__":
    cli(main)
