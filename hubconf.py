"""The student from Python, in any folder, without installing anything.

student = torch.hub.load("path/to/this/folder", "student", source="local")
for video01 in student.stream("a red circle moving left slowly", seed=1):
    ...                                                # (F 3 H W) in [0, 1], a chunk at a time, for ever
"""

from collections.abc import Iterator

from torch import Tensor

from config import BadInput
from engine.graphs import allow
from sample import Flags, decoded, open_networks

dependencies = ["torch", "numpy", "einops", "filelock", "imageio", "safetensors", "tqdm"]


def student(preset: str = "tiny", path: str = "", device: str = "auto"):
    """A few-step student: the shipped one, or the student.safetensors at `path`, with a codec beside it.

    Its method `stream` yields what sample.py writes into a file. Raises BadInput, a ValueError.
    """
    opened = open_networks(preset, {"device": device}, Flags(student=path))
    allow("cudnn", "flash", "mem_efficient", "math")  # whoever calls has networks of their own
    return Student(*opened)


class Student:
    def __init__(self, cfg, net, codec, read):
        self.cfg, self.net, self.codec, self.read = cfg, net, codec.to(cfg.device), read

    def stream(self, prompt: str, seed: int = 0, frames: int | None = None) -> Iterator[Tensor]:
        """Yield video01 (F 3 H W) in [0, 1] chunk by chunk: `frames` in all, or for ever. Raises BadInput."""
        if frames is not None and frames < 1:
            raise BadInput(f"frames={frames} is not possible; allowed: 1 or more, or None")
        for part in decoded(self.net, self.codec, {0: self.read(prompt).to(self.cfg.device)}, self.cfg, seed):
            yield part[:frames] / 255
            if frames is not None and (frames := frames - len(part)) <= 0:
                return
