"""The student as a page with no server: networks as ONNX, tables as JSON, and the files that run them.

    python -m web.export                 # web/dist: any server of files can give it out, GitHub Pages too
    python -m http.server -d web/dist    # http://127.0.0.1:8000

A pass of the student is one network: a noised chunk, its noise level, the prompt, and what is remembered,
keys before RoPE, go in; the velocity and the chunk's own keys and values come out. What is around it (noise,
steps, the cache, the prompt's words) is web/student.js. onnxruntime-web runs it, on WebGPU or, where a
browser has none, in WebAssembly.

A pass is within 1e-5 of PyTorch's. A stream feeds its chunks back and makes more of that: up to 2e-5 in 20
chunks with values up to 6, as much as PyTorch's kernels for attention make of each other; after an export
`PYTHONPATH=. python tests/test_web.py` prints it. It needs the extra "web" and npm, which fetches
onnxruntime-web. For students with the learned codec and the world's words.
"""

from engine import openmp  # isort: skip  # noqa: F401  (before torch loads)

import io
import json
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ROOT, BadInput, Config, cli, from_words, read_cli
from engine.checkpoint import read_header, writable_folder, write_atomically
from model import ListCache, VideoDiT, look, rotate
from networks import load_net
from rollout import context_level, step_grid
from world.words import KINDS, VOCABULARY, vector

PAGE = ("index.html", "style.css", "live.js", "camera.js", "apng.js", "student.js", "noise.js", "words.js")
_SIMD = "ort-wasm-simd-threaded"
RUNTIME = {  # by the engine that a browser has
    "wasm": ("ort.wasm.min.mjs", f"{_SIMD}.mjs", f"{_SIMD}.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", f"{_SIMD}.asyncify.mjs", f"{_SIMD}.asyncify.wasm"),
}


@dataclass(frozen=True)
class Flags:
    student: str = ""  # default assets/<preset>/stream_r1.safetensors; a codec lies beside it
    out: str = "web/dist"  # a folder


class Seen:
    """A cache for one pass: what is remembered is given, nothing is kept."""

    def __init__(self, cfg: Config, looks: list):
        self.chunk, self.looks = cfg.chunk, lambda both: looks


class Pass(nn.Module):
    def __init__(self, student: VideoDiT, cfg: Config):
        super().__init__()
        self.student, self.cfg = student, cfg
        places = ListCache(student, cfg).places.flatten(0, 1)  # the turns of all tokens in the window
        self.register_buffer("places", places)

    def forward(self, xt: Tensor, t: Tensor, text: Tensor, keys: Tensor, values: Tensor):
        """xt (1 f c h w), t (1 1), text (1 l e); keys and values (layers 1 m a d) of what is remembered, the
        sink first, then oldest to newest → velocity (1 f c h w), own keys and values (layers 1 n a d)."""
        m = keys.shape[2]
        past, own = self.places[:m], self.places[m : m + self.cfg.tokens]

        def join(layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
            return [torch.cat([rotate(keys[layer], past), k], 1), torch.cat([values[layer], v], 1)]

        looks = [partial(look, turns=own, join=partial(join, i)) for i in range(self.cfg.layers)]
        student = self.student
        v, kv = student.run(xt, t, student.read_time(t), student.read_text(text), Seen(self.cfg, looks))
        return v, *(torch.stack(part) for part in zip(*kv, strict=True))


class Pictures(nn.Module):
    def __init__(self, codec: nn.Module):
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> Tensor:
        """Latents (1 f c h w) → bytes (f H W 4), red, green, blue and no transparency."""
        rgb = (self.codec.decode(x)[0] * 255).round().permute(0, 2, 3, 1)
        return torch.cat([rgb, torch.full_like(rgb[..., :1], 255)], -1).to(torch.uint8)


def as_onnx(net: nn.Module, inputs: dict[str, Tensor], outputs: list[str], free: dict) -> bytes:
    """fp16 weights, as the safetensors have them, and fp32 arithmetic. Raises BadInput without the extra."""
    try:
        import onnx
    except ImportError as error:
        raise BadInput("web.export needs onnx: pip install -e '.[web]'") from error
    with torch.no_grad():
        program = torch.onnx.export(
            net.eval(), tuple(inputs.values()), input_names=[*inputs], output_names=outputs, dynamo=True,
            dynamic_shapes=free, verbose=False, external_data=False, opset_version=18,
        )  # fmt: skip
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    casts = []
    for x in model.graph.initializer:
        if x.data_type == onnx.TensorProto.FLOAT and len(x.raw_data) > 1024:
            wide = onnx.numpy_helper.to_array(x)
            half = wide.astype("float16")
            if (half == wide).all():
                name = x.name
                x.CopyFrom(onnx.numpy_helper.from_array(half, name + "_half"))
                casts.append(onnx.helper.make_node("Cast", [x.name], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def networks(cfg: Config, student: VideoDiT, codec: nn.Module) -> dict[str, bytes]:
    text = torch.zeros(1, cfg.text_length, cfg.text_width)
    xt, t = torch.zeros(1, cfg.chunk, *cfg.latent_shape), torch.full((1, 1), 0.5)
    shape = cfg.layers, 1, cfg.cached_chunks * cfg.tokens, cfg.heads, cfg.dim // cfg.heads
    m = torch.export.Dim("m", min=0, max=shape[2])
    inputs = {"xt": xt, "t": t, "text": text, "keys": torch.zeros(shape), "values": torch.zeros(shape)}
    free = dict.fromkeys(("xt", "t", "text")) | {"keys": {2: m}, "values": {2: m}}
    one = as_onnx(Pass(student, cfg), inputs, ["v", "own_keys", "own_values"], free)
    return {"pass.onnx": one, "decoder.onnx": as_onnx(Pictures(codec), {"x": xt}, ["frames"], {"x": None})}


def tables(cfg: Config) -> dict:
    """What the page has to know: sizes, noise levels, and the vectors of words and of their places."""
    return {
        "preset": cfg.preset, "size": [cfg.height, cfg.width], "fps": cfg.fps, "chunk": cfg.chunk,
        "latent": cfg.latent_shape, "layers": cfg.layers, "tokens": cfg.tokens, "heads": cfg.heads,
        "width": cfg.dim // cfg.heads, "cached": cfg.cached_chunks, "sink": cfg.sink, "mode": cfg.sink_mode,
        "decay": cfg.sink_decay, "grid": step_grid(cfg, 0), "objects": cfg.objects, "words": KINDS,
        "vocabulary": {word: vector(word, cfg.text_width).tolist() for word in VOCABULARY},
        "places": [vector(f"#{i}", cfg.text_width).tolist() for i in range(cfg.text_length)],
        "prompt": "a red circle moving left slowly on a black background",
    }  # fmt: skip


def runtime() -> Path:
    """onnxruntime-web as web/package-lock.json pins it. Raises BadInput."""
    folder = ROOT / "web"
    try:
        subprocess.run(["npm", "ci", "--silent", "--no-audit"], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError as error:
        raise BadInput("web.export needs npm, which fetches onnxruntime-web") from error
    except subprocess.CalledProcessError as error:
        raise BadInput(f"npm ci failed in {folder}: {error.stderr.decode()[-300:].strip()!r}") from error
    return folder / "node_modules" / "onnxruntime-web" / "dist"


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    path = Path(flags.student or ROOT / "assets" / preset / "stream_r1.safetensors")
    header = read_header(path)
    cfg = from_words(header["config"], {"device": "cpu", "bf16": False})
    if cfg.data or cfg.time_stride > 1 or cfg.taper != "uniform" or context_level(cfg, (1.0,)) != 0:
        raise BadInput(f"{path} is not possible; allowed: the world's words, uniform steps, a clean context")
    out, dist = writable_folder(flags.out), runtime()
    codec = load_net(path.with_name("codec.safetensors"), cfg, "codec")
    files = networks(cfg, load_net(path, cfg, header["kind"]), codec)
    files |= {name: (ROOT / "web" / name).read_bytes() for name in PAGE}
    files["source.js"] = (ROOT / "web" / "local.js").read_bytes()
    own, megabytes = sum(map(len, files.values())), {}  # of a visit: its engine's runtime alone is loaded
    for engine, names in RUNTIME.items():
        files |= {name: (dist / name).read_bytes() for name in names}
        megabytes[engine] = round((own + sum(len(files[name]) for name in names)) / 2**20)
    files["tables.json"] = json.dumps(tables(cfg) | {"megabytes": megabytes}).encode()
    for name, content in files.items():
        write_atomically(out / name, lambda file, content=content: file.write_bytes(content))
    sizes = "{wasm} MB for WebAssembly, {webgpu} MB for WebGPU".format(**megabytes)
    print(f"{out}: a download of {sizes}; 'python -m http.server -d {out}' shows it")


if __name__ == "__main__":
    cli(main)
