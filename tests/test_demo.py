"""demo.py as viewers meet it: a server process with tiny random nets, and clients that behave or do not."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from runs import in_process
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import demo
from config import BadInput, cli
from config import build as build_config
from engine.rng import rng_for
from engine.sheet import to_uint8
from live import overlay, pace, server
from live.show import Chunk, Show, Wish, jpeg
from model import ListCache, RingCache
from reward import RewardModel
from rollout import stream
from saliency import intra_weight, reward_saliency, to_latent_grid
from sample import Flags, open_networks

RED, BLUE = "a red circle moving left slowly", "a blue ring moving up"


@contextmanager
def serving(nets, *argv, port=0):
    """A process of its own, forked: (its port, the process)."""
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]

    def main():
        torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork
        sys.argv = [
            "demo.py",
            f"--student={nets}/stream_r1.safetensors",
            "--device=cpu",
            f"--port={port}",
            *argv,
        ]
        cli(demo.main)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    for _ in range(200):
        with socket.socket() as there:
            if not there.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.05)
    try:
        yield port, process
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def port(nets):
    with serving(nets, "--deadline=60", "--streams=2") as (port, _):
        yield port


class Client:
    """A viewer that may start, read frames, and acknowledge them."""

    def __init__(self, port, prompt=RED, seed=0, host="", **how):
        host, to = host or f"127.0.0.1:{port}", socket.create_connection(("127.0.0.1", port))
        self.socket = connect(f"ws://{host}/stream", sock=to, close_timeout=0.1, **how).__enter__()
        self.heard = []
        if prompt:
            self.say("start", prompt=prompt, seed=seed)

    def say(self, type, **fields):
        self.socket.send(json.dumps({"type": type} | fields))

    def next(self, timeout=5.0):
        """The next frame as (head, JPEG, map), or another message as (head, b"", b"")."""
        got = self.socket.recv(timeout)
        if isinstance(got, str):
            return json.loads(got), b"", b""
        size = 4 + struct.unpack("<I", got[:4])[0]
        head = json.loads(got[4:size])
        body = size + head.get("jpeg", 0)
        return head, got[size:body], got[body:]

    def until(self, kind, timeout=5.0):
        for _ in range(300):
            if (got := self.next(timeout))[0]["type"] == kind:
                return got
            if got[0]["type"] == "frame":
                self.say("ack", frame=got[0]["frame"])
        raise AssertionError(f"no {kind} came")

    def frames(self, count, timeout=5.0):
        found = []
        while len(found) < count:
            found.append(self.until("frame", timeout))
            self.say("ack", frame=found[-1][0]["frame"])
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


@pytest.fixture
def own(nets):
    """The same networks in this process."""
    return open_networks("tiny", {"device": "cpu"}, Flags(student=f"{nets}/stream_r1.safetensors"))


# -- streams ----------------------------------------
def test_streams_what_sample_would_and_switches_without_a_cut(port, own):
    """The frames of sample.py for that seed, byte for byte, and from a chunk on those of the other prompt in
    the same stream. Catches a restart in place of a recache, a prompt that waits, other noise."""
    cfg, student, codec, read = own
    with Client(port, RED, seed=3) as viewer:
        got = viewer.frames(4)
        viewer.say("prompt", prompt=BLUE)
        got += viewer.frames(16)
    heads = [head for head, *_ in got[::4]]
    assert [head["chunk"] for head in heads] == [0, 1, 2, 3, 4] and heads[0]["prompt"] == RED
    switch = next(head["chunk"] for head in heads if head["prompt"] == BLUE)
    assert 1 <= switch <= 3, "the prompt came chunks later"
    texts, cache = {0: read(RED), switch: read(BLUE)}, RingCache(student, cfg, 1)
    with torch.inference_mode():
        chunks = list(islice(stream(student, texts, cfg, [rng_for(3, "sample", 0)], cache=cache), 5))
        wanted = [jpeg(frame) for x in chunks for frame in to_uint8(codec.decode(x)[0]).numpy()]
    assert [picture for _, picture, _ in got] == wanted


def test_the_page_and_its_files(port):
    """Nothing is asked of third parties, and a path is a key: none leads to the disk."""
    for path in ("/", "/style.css", "/live.js", "/camera.js", "/source.js"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            text = answer.read().decode()
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    for path in ("/../demo.py", "/%2e%2e/demo.py", "/web/live.js", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}")


def test_unknown_word_is_answered_and_the_stream_goes_on(port):
    with Client(port) as viewer:
        viewer.frames(1)
        viewer.say("prompt", prompt="a red circl")
        assert "did you mean 'circle'?" in viewer.until("refused")[0]["why"]
        assert viewer.frames(8)[-1][0].get("prompt", RED) == RED


def test_pause_restart_and_clip(port):
    with Client(port, seed=1) as viewer:
        first = viewer.frames(4)
        viewer.say("clip", seconds=1)
        assert viewer.until("clip")[0] == {"type": "clip"}
        viewer.say("pause", on=True)
        with pytest.raises(TimeoutError):
            viewer.frames(20, timeout=0.4)
        viewer.say("pause", on=False)
        viewer.frames(4)
        viewer.say("start", prompt=RED, seed=1)
        again = next(got for got in viewer.frames(30) if got[0].get("chunk") == 0)
        assert again[1] == first[0][1], "the same seed gave another video"


def test_look_inside(port, nets):
    """A map of the size that it says, scores, W_time of mean 1 over the clip, once there is a clip."""
    with Client(port) as viewer:
        viewer.say("look", map="MQ")
        heads = [(head, picture) for head, _, picture in viewer.frames(28) if "chunk" in head]
        assert "scores" not in heads[0][0], "half a clip was judged"
        head, picture = heads[-1]
        assert head["map"] == [32, 32] and len(picture) == 1024 and len(head["scores"]) == 3
        assert len(head["time"]) == 16 and sum(head["time"]) == pytest.approx(16)
        assert head["sink"] == [0] and head["ring"] == [head["chunk"] - 1]
        viewer.say("look", map="TX")
        assert "fused" in viewer.until("refused")[0]["why"]


# -- limits ----------------------------------------
def test_a_line_with_places_and_a_dropped_connection(port):
    """Catches a seat that is never given back, places that stand still, a line that is not first come, first
    served."""
    with Client(port) as one, Client(port) as two, Client(port) as three, Client(port) as four:
        one.frames(2), two.frames(2)
        assert three.until("line")[0]["place"] == 1 and four.until("line")[0]["place"] == 2
        one.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
        begin = time.monotonic()
        assert three.until("line")[0]["place"] == 0 and three.frames(1)
        assert four.until("line")[0]["place"] == 1 and time.monotonic() - begin < 2
        three.socket.close()
        with Client(port) as reload:  # behind who waited
            assert four.until("line")[0]["place"] == 0 and four.frames(1)
            two.socket.close()
            assert reload.frames(1)


def test_a_slow_reader_loses_frames_and_nothing_piles_up(port):
    with Client(port) as viewer:
        heads = []
        with pytest.raises(TimeoutError):
            while len(heads) < 100:
                head = viewer.next(timeout=0.5)[0]
                heads += [head] if head["type"] == "frame" else []
        assert len(heads) == server.IN_FLIGHT
        viewer.say("ack", frame=heads[-1]["frame"])
        later = [head for head, *_ in viewer.frames(12)]
        assert later[0]["frame"] == heads[-1]["frame"] + 1
        assert max(head.get("dropped", 0) for head in later) > 10


def malformed():
    """Messages that mean nothing: not JSON, not an object, unknown, incomplete, too much, out of range."""
    start, wrong = (
        {"type": "start", "prompt": RED, "seed": 0},
        (None, [], {}, -1, 2**80, 1e999, "\ud800", "x" * 201),
    )
    yield from (
        b"\x00\xff",
        b"",
        bytes(4095),
        bytes(2**17),
        "",
        "{",
        "[" * 4000,
        "null",
        "3",
        '"start"',
        "[]",
        "{}",
        '{"type": []}',
        "NaN",
    )
    yield from (json.dumps(start | {key: value}) for key in ("type", "prompt", "seed") for value in wrong)
    yield from (json.dumps({k: v for k, v in start.items() if k != key} | {"x": 1}) for key in start)
    for kind, form in server.MESSAGES.items():
        for value in (*wrong, "", True, 0.5, float("nan"), "\n", "../../etc/passwd"):
            yield json.dumps({"type": kind} | dict.fromkeys(form, value) | {"type": kind})
            yield json.dumps({"type": kind, "path": value})


def test_malformed_messages_are_answered_while_another_streams(port):
    """Of each form the valid ones of the list are rare; all others are refused, and nobody is disturbed."""
    messages = list(malformed())
    assert len(messages) >= 200
    with Client(port) as good, Client(port, prompt="") as bad:
        good.frames(2)
        bad.until("line")
        for i, message in enumerate(messages):
            bad.socket.send(message)
            if i % 20 == 0:
                good.frames(1)
        refused = sum(1 for _ in range(len(messages) - 20) if bad.until("refused"))
        assert refused == len(messages) - 20
        assert good.frames(8)[-1][0]["frame"] > 15
    for prompt in ("\ud800", "a\0", "a\nb"):  # a tokenizer may fall over them
        with pytest.raises(BadInput, match="prompt is str"):
            server.understood(json.dumps({"type": "prompt", "prompt": prompt}))


def test_a_large_message_ends_its_connection_alone(port):
    with Client(port) as good, Client(port) as bad:
        good.frames(1)
        with pytest.raises(ConnectionClosed) as closed:
            bad.say("prompt", prompt="x" * 2**20)
            bad.frames(100)
        # what is still unread when the server closes can cost the client the close frame
        assert (closed.value.rcvd is None or closed.value.rcvd.code == 1009) and good.frames(8)


@pytest.mark.parametrize(
    "origin, host", [("http://evil.example", ""), ("http://evil.example", "evil.example")]
)
def test_a_strangers_page_is_refused(port, origin, host):
    """Also one whose name was made to lead to this machine."""
    with pytest.raises(InvalidStatus, match="403"):
        Client(port, origin=origin, host=host)
    with Client(port, origin=f"http://127.0.0.1:{port}") as viewer:
        assert viewer.frames(1)


@pytest.mark.slow
def test_hundreds_of_connects(port):
    """From this machine, each gone as soon as it is answered; then it streams as before."""
    ask = f"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    ask += f"Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    for _ in range(500):
        with socket.create_connection(("127.0.0.1", port)) as caller:
            caller.sendall(ask.encode())
            assert caller.recv(12) == b"HTTP/1.1 101"
    with Client(port) as viewer:
        assert viewer.frames(8)[-1][0]["frame"] == 8


# -- ends and faults ----------------------------------------
def test_sigterm_tells_viewers_and_exits_with_0(nets):
    with serving(nets) as (port, process), Client(port) as viewer, Client(port) as another:
        viewer.frames(2)
        os.kill(process.pid, signal.SIGTERM)
        for each in (viewer, another):
            with pytest.raises(ConnectionClosed) as closed:
                each.frames(100)
            told = closed.value.rcvd  # None: an acknowledgement crossed the end
            assert told is None or told.code == 1012
        process.join(10)
        assert process.exitcode == 0


def test_bad_input_is_one_line(nets, monkeypatch, capsys):
    student = f"--student={nets}/stream_r1.safetensors"

    def fails(*argv):
        with pytest.raises(SystemExit) as stopped:
            in_process(monkeypatch, demo, *argv)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1
        return err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "already in use" in fails(student, f"--port={taken.getsockname()[1]}")
    assert "port must be 0-65535" in fails(student, "--port=99999")
    assert "--host=nowhere.invalid" in fails(student, "--host=nowhere.invalid", "--port=0")
    assert "allowed: 1 to 64 streams" in fails(student, "--streams=0")
    assert "no student at gone" in fails("--student=gone.safetensors", "--port=0")
    assert "is of preset 'tiny'" in fails("small", student, "--port=0")
    monkeypatch.setitem(sys.modules, "live.server", None)
    assert "pip install -e '.[demo]'" in fails(student)


# -- keeping time ----------------------------------------
def test_figures():
    """By hand: chunks of 2 frames, due at 1, 2, ... s; the second comes 1.5 s late, the third is in time
    again but for what the second held up. Catches deadlines that move with a late frame."""
    found = pace.played([1.0, 3.5, 0.1, 0.1], [2, 2, 2, 2], rate=1.0)
    # ready 1 1 4.5 4.5 4.6 4.6 4.7 4.7, due 1 ... 8, shown 1 2 4.5 5.3 6.1 6.9 7.7 8.5
    assert found["late"] == 2 and found["behind"] == pytest.approx(0.5)
    assert found["p50"] == pytest.approx(0.2) and 1.4 < found["p99"] <= 1.5
    even = pace.played([5.0] + [1.0] * 9, [4] * 10, rate=4.0)
    assert even == {"late": 0, "behind": 0.0, "p50": 0.0, "p99": 0.0, "first": 5.0}


def test_frames_that_come_live():
    """Closed forms of video to video: the first frame waits for its chunk to arrive and for its work, T / f +
    L; chunks of 1.5 periods are late for ever; one of 2.4 periods makes late what its backlog makes late,
    and no more. Catches input that is there before it is."""
    found = pace.played([0.1] * 9, [4] * 9, rate=16.0, live=True)
    assert found["first"] == pytest.approx(4 / 16 + 0.1) and found["late"] == 0
    assert pace.played([0.1] * 9, [4] * 9, rate=16.0)["first"] == pytest.approx(0.1)
    slow = pace.played([0.1] + [0.375] * 9, [4] * 10, rate=16.0, live=True)
    assert slow["late"] == 36 and slow["first"] == pytest.approx(0.35)
    backlog = pace.played([0.1, 0.6, 0.1, 0.1, 0.1], [4] * 5, rate=16.0, live=True)
    assert backlog["late"] == 13  # ready at 1.1, 1.2, 1.3, 1.4 s, first frames due at .6, .85, 1.1, 1.35


def test_steps_in_time():
    """Four steps and the pass for the cache in .1 s: .02 s a pass. Catches the last pass left out, means."""
    assert [pace.steps_in_time(4, [0.1] * 50, period, "clean") for period in (0.03, 0.041, 0.1, 0.25)] == [
        0,
        1,
        4,
        11,
    ]
    assert pace.steps_in_time(4, [0.1] * 80 + [0.2] * 20, 0.1, "noisy") == 1
    assert (
        pace.steps_in_time(4, [0.1] * 50, 0.1001, "none") == 4
        and pace.steps_in_time(2, [0.1], 1.0, "aligned") == 20
    )


class Slow:
    """A socket's server side, whose viewer says what is in `said`, and a stream that takes `a_pass` seconds a
    step and one more."""

    def __init__(self, **hello):
        self.said, self.heard, self.a_pass, self.closed = asyncio.Queue(), [], 0.001, None
        sizes = {"size": [2, 2], "fps": 160, "rate": 160, "steps": 4, "camera": 4, "maps": [], "adapt": True}
        self.studio = server.Studio(sizes | hello, lambda prompt: prompt, lambda: self.chunk)
        self.say({"type": "start", "prompt": RED, "seed": 0})

    def say(self, message, kind="text"):
        raw = json.dumps(message) if kind == "text" else message
        self.said.put_nowait({"type": "websocket.receive", kind: raw})

    async def receive(self):
        return await self.said.get()

    async def send_text(self, text):
        self.heard.append(json.loads(text))

    async def send_bytes(self, data):
        size = 4 + struct.unpack("<I", data[:4])[0]
        self.heard.append(json.loads(data[4:size]))
        self.say({"type": "ack", "frame": self.heard[-1]["frame"]})

    async def close(self, code, why):
        self.closed = code, why

    def chunk(self, wish):
        time.sleep(seconds := (wish.steps + 1) * self.a_pass)
        return Chunk(wish, [b""] * 4, [], seconds, {"over": len(wish.over)})

    async def until(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.heard[-1]
            await asyncio.sleep(0.005)

    def news(self, key):
        return [head[key] for head in self.heard if key in head]


def test_steps_fall_while_the_machine_is_slow_and_come_back():
    """A chunk of 4 frames has 25 ms and takes (steps + 1) passes: its messages say 4 steps, then 2, then 4
    again. Catches steps that never fall, never return, or swing to and fro."""

    async def watch():
        there = Slow()
        line = server.Line(1)
        job = asyncio.create_task(server.Viewer(there, there.studio, line).serve())
        await there.until(lambda: len(there.news("steps")) > 8)
        assert set(there.news("steps")) == {4}
        there.a_pass = 0.0075
        await there.until(lambda: there.news("steps")[-1:] == [2])
        count = len(there.news("steps"))
        await there.until(lambda: len(there.news("steps")) > count + 9)
        assert set(there.news("steps")[count:]) == {2} and there.news("late")[-1] > 0
        there.a_pass = 0.001
        await there.until(lambda: there.news("steps")[-1:] == [4])
        job.cancel()

    asyncio.run(watch())


def test_a_paused_stream_gives_its_seat_to_who_waits(monkeypatch):
    """And keeps it while nobody does. Catches a seat that is held for ever, or lost for nothing."""
    monkeypatch.setattr(server, "PATIENCE", 0.1)

    async def watch():
        one, two, line = Slow(), Slow(), server.Line(1)
        jobs = [asyncio.create_task(server.Viewer(one, one.studio, line).serve())]
        await one.until(lambda: one.news("late"))
        one.say({"type": "pause", "on": True})
        await asyncio.sleep(0.5)
        assert one.closed is None and not jobs[0].done()
        jobs.append(asyncio.create_task(server.Viewer(two, two.studio, line).serve()))
        await two.until(lambda: two.news("late"))
        assert two.news("place")[:2] == [1, 0] and one.closed == (
            1008,
            "the stream was paused while others wait",
        )
        jobs[1].cancel()

    asyncio.run(watch())


def test_a_cameras_pictures_are_bounded():
    """A chunk gets the latest four of them, of one size. Catches a queue that grows, pictures of another
    size, pictures that nobody asked for."""

    async def watch():
        there = Slow()
        viewer = server.Viewer(there, there.studio, server.Line(1))
        job = asyncio.create_task(viewer.serve())
        picture, refused = bytes(16), lambda: len(there.news("why"))
        there.say(picture, "bytes")
        await there.until(lambda: refused() == 1)
        there.say({"type": "camera", "strength": 0.5})
        for wrong in (b"", bytes(15), bytes(17), bytes(2**17)):
            there.say(wrong, "bytes")
        await there.until(lambda: refused() == 5)
        assert set(there.news("over")) <= {0}
        for number in range(1000):
            there.say(bytes([number % 256] * 16), "bytes")
        await there.until(lambda: there.news("over")[-1:] == [4])
        assert list(viewer.camera) == [bytes([n % 256] * 16) for n in range(996, 1000)]
        there.say({"type": "camera", "strength": 0.6})  # another strength takes the same pictures
        await there.until(lambda: viewer.strength == 0.6)
        assert len(viewer.camera) == 4
        there.say({"type": "camera", "strength": 0})
        await there.until(lambda: there.news("over")[-1:] == [0])
        assert refused() == 5 and not viewer.camera
        job.cancel()

    asyncio.run(watch())


def test_a_camera_is_made_over(own):
    """Chunks of `stream(over=...)` for the camera's pictures, and from noise again after them. Catches
    channels or rows that change places, a strength that is not heeded, a past that is lost."""
    cfg, student, codec, read = own
    torch.manual_seed(0)
    show, wish = Show(cfg, student, codec, None), Wish(RED, read(RED), seed=0, steps=4)
    pictures = torch.randint(256, (cfg.chunk, cfg.height, cfg.width, 4), dtype=torch.uint8)
    over, latents = tuple(x.numpy().tobytes() for x in pictures), []
    for given, strength in ((), 0.0), (over, 0.5), ((), 0.0):
        assert show(replace(wish, over=given, strength=strength)).about["chunk"] == len(latents)
        latents.append((show.recent or show.first)[-1])
    with torch.inference_mode():
        source = codec.encode(pictures[None, ..., :3].movedim(4, 2) / 255)
        how = {"past": latents[:1], "over": iter([source]), "strength": 0.5}
        wanted = next(stream(student, wish.text, cfg, [rng_for(0, "sample", 1)], **how))
        after = next(stream(student, wish.text, cfg, [rng_for(0, "sample", 2)], past=latents[:2]))
    assert torch.allclose(latents[1], wanted, atol=1e-4) and torch.allclose(latents[2], after, atol=1e-4)


def test_fewer_steps_go_on_from_the_same_picture(own):
    """Catches a restart from noise, a chunk number that starts anew, noise that repeats."""
    cfg, student, codec, read = own
    show, latents = Show(cfg, student, codec, None), []
    wish = Wish(RED, read(RED), seed=0, steps=4)
    for i, steps in enumerate((4, 4, 4, 2, 4)):
        assert show(replace(wish, steps=steps)).about["chunk"] == i
        latents.append(show.recent[-1] if i else show.first[0])
    fewer, past = replace(cfg, denoise=(1.0, 0.5)), (latents[0], latents[2])
    with torch.inference_mode():
        wanted = next(stream(student, wish.text, fewer, [rng_for(0, "sample", 1)], past=past))
    assert torch.allclose(latents[3], wanted, atol=1e-4) and show.restarts == 2


# -- looking inside ----------------------------------------
@pytest.mark.parametrize("sink, mode", [(1, "ema"), (2, "static"), (0, "none")])
def test_remembered_is_what_the_cache_holds(tiny, build, sink, mode):
    """Values carry no position: those that were a chunk's when it was the newest are found again."""
    cfg = replace(tiny, window=5, sink=sink, sink_mode=mode, sink_decay=1.0, frames=20)
    model = build(cfg)

    cache, text, newest = ListCache(model, cfg), torch.randn(1, cfg.text_length, cfg.text_width), []
    with torch.no_grad():
        for chunk, _ in enumerate(islice(stream(model, text, cfg, [rng_for(0)], cache=cache), 9)):
            held = cache.values[0].split(cfg.tokens, dim=1) if chunk else []
            newest += held[-1:]
            found = [next(i for i, own in enumerate(newest) if torch.allclose(own, v)) for v in held]
            about = overlay.remembered(cfg, chunk)
            assert about["sink"] + about["ring"] == found
            assert about["averaged"] == (max(chunk - cfg.cached_chunks, 0) if mode == "ema" else 0)
    # rebuilt at chunk 6 from chunk 0 and chunks 3 to 5; since then 3, 4 and 5 have left the ring
    assert overlay.remembered(replace(cfg, sink=1, sink_mode="ema"), 9, 6)["averaged"] == 3


def test_maps_are_what_training_weighs(tiny):
    cfg = build_config("tiny", {})
    torch.manual_seed(0)
    reward, clip = RewardModel(cfg), torch.rand(1, 16, 3, 32, 32)
    text = torch.randn(1, cfg.text_length, cfg.text_width)
    found = overlay.judged(reward, clip, text, cfg)
    scores, saliency = reward_saliency(reward, clip, text)
    weight = intra_weight(to_latent_grid(saliency, 4, 4), scores, cfg)[0, :, 0]  # W_time W_space
    space = weight / torch.tensor(found["time"])[:, None, None]
    space = (space - space.amin((1, 2), True)) / (space.amax((1, 2), True) - space.amin((1, 2), True))
    assert (torch.from_numpy(found["maps"]["fused"]) - 255 * space).abs().max() <= 1.01
    assert found["maps"]["VQ"].shape == (16, 32, 32) and found["maps"]["VQ"].max() == 255
