"""What a run shows of itself: metrics.jsonl, and on demand TensorBoard or Weights & Biases beside it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from config import BadInput
from engine.checkpoint import read_metrics, write_atomically


class Track:
    """Numbers and contact sheets of a run, from the first process. Raises BadInput without the package.

    tool: none | tensorboard | wandb. settings: of the run. step: where it begins; what an interrupted run
    noted after that is left out.
    """

    def __init__(self, tool: str, folder: Path, settings: dict, step: int):
        self.path, self.board, self.wandb = folder / "metrics.jsonl", None, None
        try:
            if tool == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter  # optional, as wandb is: the extra `track`

                self.board = SummaryWriter(str(folder / tool), purge_step=step + 1 if step else None)
            elif tool == "wandb":
                import wandb

                self.wandb, how = wandb, {"name": folder.name, "dir": str(folder), "config": settings}
                self.run = wandb.init(project="stream-r1", **how)
            elif tool != "none":
                raise BadInput(f"track={tool} is not possible; allowed: none | tensorboard | wandb")
        except ImportError as error:
            raise BadInput(f"--track={tool} needs what is not installed: pip install {tool}") from error
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
        write_atomically(self.path, lambda name: name.write_text(kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.wandb:
            self.run.log(values, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        if self.board:
            self.board.add_image(name, np.array(Image.open(path)), step, dataformats="HWC")
        if self.wandb:
            self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.run.finish()
