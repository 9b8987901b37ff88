"""The student as ONNX files, and as the page that runs them: equal to what sample.py makes."""

import base64
import copy
import functools
import http.server
import io
import shutil
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL, in_process
from torch.nn.attention import SDPBackend, sdpa_kernel

from codec import Codec
from config import ROOT, build
from engine.checkpoint import save_weights
from engine.rng import rng_for
from engine.sheet import to_uint8
from model import ListCache, VideoDiT
from rollout import Ahead, stream
from sample import Flags, open_networks

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
RED, BLUE = "a red circle moving left slowly", "a blue ring moving up"


class Session:
    """The exported pass in the student's place, as far as `stream` uses one. `apart`: of every pass, how far
    the student is from it on the same inputs; a velocity is used above noise level 0, keys and values
    always, those as a share of the layer's largest."""

    def __init__(self, file, student, cfg):
        self.run_it, self.student, self.cfg = onnxruntime.InferenceSession(file).run, student, cfg
        self.apart = []

    def read_text(self, text):
        return [(text.clone(), text.clone())]

    def read_time(self, t):
        return t, t

    def run(self, xt, t, time, words, cache):
        """Of several chunks those before the last are finished, and remembered. `Ahead` wants all of them."""
        ahead, kvs = isinstance(cache, Ahead), []
        cache = copy.deepcopy(cache.past) if ahead else cache
        for i, x in enumerate(xt.split(self.cfg.chunk, 1)):
            if i:
                cache.commit(kvs[-1])
            given = {"xt": x, "t": time[0][:, :1] if ahead else time[0][:, i : i + 1], "text": words[0][0]}
            given |= {"keys": self.past(cache, 0), "values": self.past(cache, 1)}
            out = self.run_it(None, {name: z.numpy() for name, z in given.items()})
            v, keys, values = map(torch.from_numpy, out)
            wanted, own = self.student(x, given["t"], words[0][0], cache)
            layers = zip(own, keys, values, strict=True)
            pairs = [pair for kv, *ours in layers for pair in zip(kv, ours, strict=True)]
            kept = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
            self.apart.append((float((v - wanted).abs().max()) if given["t"] else 0.0, kept))
            kvs.append(list(zip(keys, values, strict=True)))
        together = [[torch.cat(z, 1) for z in zip(*layer, strict=True)] for layer in zip(*kvs, strict=True)]
        return v, together if ahead else kvs[-1]

    def past(self, cache, part):
        none = torch.zeros(1, 0, self.cfg.heads, self.cfg.dim // self.cfg.heads)
        layers = [[chunk[i][part] for chunk in cache.chunks] for i in range(self.cfg.layers)]
        return torch.stack([torch.cat([none, *chunks], 1) for chunks in layers])


@pytest.fixture(scope="module")
def vivid(tmp_path_factory):
    """Random nets of large weights: every frame depends on all that is remembered. Two layers: what the first
    one remembers does not depend on the prompt."""
    folder, cfg = tmp_path_factory.mktemp("vivid"), build("tiny", SMALL | {"layers": 2})
    torch.manual_seed(0)
    for kind, net in (("codec", Codec(cfg)), ("student", VideoDiT(cfg))):
        for p in net.parameters():
            p.data += (0.12 if kind == "student" else 0.06) * torch.randn_like(p)
        name = "stream_r1" if kind == "student" else kind
        save_weights(folder / f"{name}.safetensors", net, cfg, kind)
    return folder


@pytest.fixture(scope="module")
def own(vivid):
    return open_networks("tiny", {"device": "cpu"}, Flags(student=f"{vivid}/stream_r1.safetensors"))


@pytest.fixture(scope="module")
def dist(vivid, tmp_path_factory):
    if not shutil.which("npm"):
        pytest.skip("no npm, which onnxruntime-web is fetched with")
    from web import export

    out = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, export, f"--student={vivid}/stream_r1.safetensors", f"--out={out}")
    return out


def compared(file, cfg, student, read):
    """Twenty chunks with evictions and a prompt switch → by how much ONNX is off: a pass on the student's own
    inputs (velocity; keys and values as a share of the largest), the whole stream, and the same stream by
    PyTorch with its other kernel for attention; the largest value; the student's last chunk."""
    onnx, texts = Session(file, student, cfg), {0: read(RED), 11: read(BLUE)}

    def chunks(net):
        with torch.no_grad():
            parts = stream(net, texts, cfg, [rng_for(0)], cache=ListCache(student, cfg))
            return torch.cat(list(islice(parts, 20)))

    own, same = chunks(student), chunks(onnx)
    with sdpa_kernel(SDPBackend.MATH):
        other = chunks(student)
    off = [float((x - own).abs().max()) for x in (same, other)]
    return *np.array(onnx.apart).max(0).tolist(), *off, float(own.abs().max()), own[-1:]


@pytest.mark.slow
def test_onnx_is_the_student(own):
    """A pass on the same inputs, and a stream, are within 1e-5. Catches positions, the order in the window,
    what is remembered, a weight that fp16 does not hold."""
    from web.export import networks

    cfg, student, codec, read = own
    files = networks(cfg, student, codec)
    velocity, memory, whole, _, _, x = compared(files["pass.onnx"], cfg, student, read)
    assert max(velocity, memory, whole) <= 1e-5
    (frames,) = onnxruntime.InferenceSession(files["decoder.onnx"]).run(None, {"x": x.numpy()})
    wanted = to_uint8(codec.decode(x)[0]).numpy()
    assert abs(frames[..., :3].astype(int) - wanted).max() <= 1 and (frames[..., 3] == 255).all()


COLLECT = """async ([first, second, seed, compared, all]) => {
  const { connect } = await import("./source.js");
  const frames = [], prompts = [], memory = [], refused = [];
  let engine;
  return new Promise((done) => {
    const send = connect({
      lost() {}, line() {},
      refused(why) { refused.push(why); },
      hello(message) {
        engine = message.engine;
        send({ type: "rate", fps: 60 });
        send({ type: "start", prompt: first, seed });
      },
      frame(head, image) {
        if (head.chunk !== undefined) prompts.push(head.prompt);
        if (head.chunk === 2) send({ type: "prompt", prompt: second });
        if (head.chunk === 6) send({ type: "prompt", prompt: "a bleu ring" });
        if (head.chunk !== undefined) memory.push(performance.memory.usedJSHeapSize);
        if (prompts.length > all) done({ frames, prompts, memory, refused, engine });
        if (prompts.length > compared) return;
        const ink = new OffscreenCanvas(image.width, image.height).getContext("2d");
        ink.drawImage(image, 0, 0);
        frames.push([...ink.getImageData(0, 0, image.width, image.height).data]);
      },
    });
  });
}"""


@pytest.fixture(scope="module")
def static(dist):
    """A server of plain files: its address."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Silent, directory=dist)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.browser
@pytest.mark.parametrize("engine, count", [("wasm", 60), ("webgpu", 2)])
def test_the_page_shows_what_sample_makes(static, own, browser, engine, count):
    """The frames of sample.py for that seed, within 2 of 255; in WebAssembly, which is quick here, through a
    prompt switch; memory is flat over 60 chunks, and an unknown word is answered with the near miss."""
    cfg, student, codec, read = own
    page = browser.new_page()
    page.goto(f"{static}words.js?engine={engine}")
    found = page.evaluate(COLLECT, [RED, BLUE, 5, min(count, 12), count])
    page.close()
    assert found["engine"].startswith("WebGPU" if engine == "webgpu" else "WebAssembly,")
    texts = {0: read(RED)}
    if count > 2:
        texts[switch := found["prompts"].index(BLUE)] = read(BLUE)
        assert 3 <= switch <= 5 and "did you mean 'blue'?" in found["refused"][0]
        assert max(found["memory"][40:]) - max(found["memory"][15:30]) < 2**22
    with torch.no_grad():
        chunks = islice(stream(student, texts, cfg, [rng_for(5, "sample", 0)]), min(count, 12))
        wanted = torch.cat([to_uint8(codec.decode(x)[0]) for x in chunks]).numpy()
    frames = np.array(found["frames"]).reshape(-1, cfg.height, cfg.width, 4)[..., :3]
    assert abs(frames - wanted).max() <= 2


@pytest.mark.browser
def test_without_webgpu_the_page_says_so_and_its_controls_work(static, browser):
    """WebGPU is there and its runtime does not load. Saved frames are those that the page has shown."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(60000)
    page.route("**/*asyncify.wasm", lambda route: route.abort())
    page.goto(f"{static}?engine=webgpu")
    wait = page.wait_for_function
    wait("document.getElementById('chunk').textContent > 1")
    assert page.inner_text("#engine").startswith("WebAssembly, as WebGPU failed, a download of ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#words button").count() > 10
    page.click("#pause")
    page.wait_for_timeout(300)
    shown = page.evaluate("document.getElementById('video').toDataURL()")
    with page.expect_download() as download:
        page.click("text=Save the last")
    with Image.open(download.value.path()) as film:
        assert film.format == "PNG" and film.n_frames >= 8 and film.info["duration"] == 125
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))[::8, ::8].astype(int)
    picture = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).convert("RGB")
    assert abs(np.asarray(picture)[::16, ::16] - last).max() <= 1
    page.click("#pause")
    page.fill("#seed", "3")
    page.click("#restart")
    wait("document.getElementById('chunk').textContent === '0'")
    page.locator("#rate").fill("4")
    assert page.inner_text("#speed") == "32 frames/s"
    wait("document.getElementById('fps').textContent.endsWith('of 32')")
    page.close()


if __name__ == "__main__":  # the shipped student, as web.export has written it
    cfg, student, codec, read = open_networks("tiny", {"device": "cpu"}, Flags())
    *found, _ = compared(ROOT / "web/dist/pass.onnx", cfg, student, read)
    print("off by, a pass: velocity {:.1e}, keys and values {:.1e} of the largest".format(*found))
    print("a stream: {2:.1e}; PyTorch's other kernel: {3:.1e}; largest value {4:.1f}".format(*found))
