import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, two cores; torch and every subprocess read it

import torch
from runs import random_nets

from config import PRESETS, Config
from model import VideoDiT


@pytest.fixture
def tiny() -> Config:
    """A pass takes milliseconds. Rows and columns, channels and layers differ, so that swapped axes do not
    fit."""
    return replace(
        PRESETS["tiny"], dim=48, heads=2, ffn=96, layers=2, height=32, width=48, channels=5, frames=8,
        chunk=2, patch=2, patch_time=1, text_length=7, text_width=16, time_freqs=32, batch=2,
    )  # fmt: skip


@pytest.fixture
def build() -> Callable[[Config], VideoDiT]:
    """Config → a network whose parameters are all random: a fresh one has a zero head, which would hide
    everything."""

    def build(cfg: Config) -> VideoDiT:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = VideoDiT(cfg).eval()
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def model(tiny, build) -> VideoDiT:
    return build(tiny)


def block_causal(frames: int, chunk: int, window: int = 0, sink: int = 0) -> torch.Tensor:
    """(f f) bool, row sees column: own chunk and the past, of it the first `sink` chunks and the latest ones,
    `window` chunks in all."""
    block = torch.arange(frames) // chunk
    query, key = block[:, None], block[None, :]
    near = key > query - window + sink if window else torch.ones(frames, frames, dtype=torch.bool)
    return (key <= query) & (near | (key < sink))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, for tests marked `browser`; with a WebGPU and a camera that are imitated."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        args = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
        args += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        chromium = driver.chromium.launch(executable_path=path, args=args)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> Path:
    """Random nets of one tiny config, saved as pretrain.py would."""
    return random_nets(tmp_path_factory.mktemp("nets"))
