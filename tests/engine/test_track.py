"""What a run shows: metrics.jsonl, and the same numbers and pictures in TensorBoard and Weights & Biases."""

import builtins
import importlib.util
import io
import json
import struct
import sys
import time

import numpy as np
import pytest
from PIL import Image
from runs import KEYS, in_process, metrics

import train
from config import BadInput
from run import Track


@pytest.fixture
def picture(tmp_path):
    path, pixels = tmp_path / "before.png", np.zeros((6, 9, 3), np.uint8)
    pixels[2, 3] = (10, 200, 30)
    Image.fromarray(pixels).save(path)
    return path


def needs(package: str):
    there = importlib.util.find_spec(package)
    return pytest.mark.skipif(not there, reason=f"{package} of the extra `track` is missing")


def events(folder):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    return reader.EventAccumulator(str(folder / "tensorboard")).Reload()


@needs("tensorboard")
def test_tensorboard_reads_what_was_tracked(tmp_path, picture):
    """Catches a number at another step, a picture that is turned or changed, and steps that were undone."""
    track = Track("tensorboard", tmp_path, {}, 0)
    track.image(0, "before", picture)
    for step in (1, 2, 3, 4):
        track.scalars(step, {"dmd": 0.5 * step, "ess": 1.0})
    track.close()
    resumed = Track("tensorboard", tmp_path, {}, 2)
    resumed.scalars(3, {"dmd": 9.0, "ess": 1.0})
    resumed.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("dmd")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    (image,) = found.Images("before")
    assert np.array_equal(Image.open(io.BytesIO(image.encoded_image_string)), Image.open(picture))
    assert [(row["step"], row["dmd"]) for row in metrics(tmp_path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def records(path):
    """A .wandb file: 7 bytes, then LevelDB's log: blocks of 32 KiB, records of crc, length, kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block, too short for a header
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def told(path) -> tuple[list[dict], dict]:
    """Rows of numbers, and settings, that a .wandb file holds."""
    rows, settings = [], {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        for item in (*record.run.config.update, *record.config.update):
            settings[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return [row for row in rows if "dmd" in row], settings


@needs("wandb")
def test_weights_and_biases_reads_what_was_tracked(tmp_path, picture, monkeypatch):
    """The same, offline: the file that `wandb sync` sends holds the numbers, the settings and the picture."""
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb-home"))
    track = Track("wandb", tmp_path, {"beta": 0.5}, 0)
    track.image(0, "before", picture)
    track.scalars(1, {"dmd": 0.5})
    track.scalars(2, {"dmd": 1.0})
    track.close()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for _ in range(120):  # wandb's own process writes the file, on a busy machine after the run has ended
        rows, settings = told(path)
        if len(rows) == 2:
            break
        time.sleep(0.5)
    assert [(row["_step"], row["dmd"]) for row in rows] == [(1, 0.5), (2, 1.0)]
    assert settings["beta"] == 0.5
    (kept,) = tmp_path.glob("wandb/offline-run-*/files/media/images/before*.png")
    assert kept.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("tool, package", [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line(tool, package, tmp_path, monkeypatch):
    """Catches a traceback, and a run that has begun before it says so."""
    for name in [n for n in sys.modules if n.partition(".")[0] == package or "utils.tensorboard" in n]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"--track={tool} .* pip install {package}$"):
        Track(tool, tmp_path, {}, 0)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tool_is_refused(tmp_path):
    with pytest.raises(BadInput, match="none . tensorboard . wandb"):
        Track("mlflow", tmp_path, {}, 0)


def test_off_imports_nothing(tmp_path, monkeypatch):
    """Catches a package that everybody has to have."""
    asked, real = [], builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: asked.append(name) or real(name, *a, **k)
    )
    track = Track("none", tmp_path, {}, 0)
    track.scalars(1, {"dmd": 0.25})
    track.close()
    assert not {"wandb", "tensorboard", "torch.utils.tensorboard"} & set(asked)
    assert metrics(tmp_path) == [{"step": 1, "dmd": 0.25}]


@needs("tensorboard")
def test_a_run_is_tracked(nets, tmp_path, monkeypatch):
    """Catches numbers of metrics.jsonl or contact sheets that train.py does not hand on."""
    out = tmp_path / "run"
    in_process(
        monkeypatch, train, f"--nets={nets}", f"--out={out}", *KEYS, "--steps=2", "--track=tensorboard"
    )
    found, rows = events(out), metrics(out)
    assert len(rows) == 2
    for name in set(rows[-1]) - {"step"}:
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [(e.step, pytest.approx(e.value)) for e in found.Scalars(name)] == expected
    assert {name: found.Images(name)[0].step for name in ("before", "after")} == {"before": 0, "after": 2}
