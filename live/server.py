"""A page that streams: one WebSocket a viewer, one thread a stream, and nothing that can grow.

Text messages are JSON, `MESSAGES` says which a viewer may send. A frame is a binary message: the length of
its head (4 bytes, little-endian), the head (JSON), a JPEG, and the map that was asked for. A viewer
acknowledges frames; while it owes `IN_FLIGHT` of them, others are dropped. A viewer's binary message is a
frame of its camera, pixels of the stream's size. Who finds no stream waits in line.
"""

import asyncio
import json
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from config import ROOT, BadInput
from live.pace import figures, fitting_steps, shown_at
from live.show import Chunk, Studio, Wish, memory, mp4

IN_FLIGHT = 8  # frames that a viewer may owe
LARGEST = 2**18  # bytes of a viewer's message: a picture of 256 x 256 pixels
WAITING = 100  # viewers in line
CLIP = 10  # seconds of video kept for saving
PATIENCE = 60.0  # seconds that a viewer may keep a seat without a stream while others wait
LOST = 2.0  # seconds behind at which deadlines start anew
PAGE = {"/": "index.html", "/source.js": "socket.js"}
PAGE |= {f"/{name}": name for name in ("style.css", "live.js", "camera.js")}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
_POLICY = "default-src 'self'; img-src 'self' blob: data:; media-src blob:; frame-ancestors 'none'"
_HEADERS["Content-Security-Policy"] = _POLICY

# what a viewer may send: a message's fields, each with its type and its bounds (of a text's length)
_PROMPT, _SEED = (str, 1, 200), (int, 0, 2**31 - 1)
MESSAGES = {
    "start": {"prompt": _PROMPT, "seed": _SEED},
    "prompt": {"prompt": _PROMPT},
    "rate": {"fps": (float, 1, 60)},
    "pause": {"on": (bool, 0, 1)},
    "look": {"map": (str, 0, 5)},
    "ack": {"frame": (int, 0, 2**53)},
    "clip": {"seconds": (int, 1, CLIP)},
    "camera": {"strength": (float, 0, 1)},
}


def understood(raw: str | None) -> dict:
    """A viewer's message, of the form that MESSAGES tells. Raises BadInput."""
    try:
        message = json.loads(raw or "")
    except (ValueError, RecursionError) as error:
        raise BadInput("a message is JSON text, or a camera's picture of the stream's size") from error
    if not isinstance(message, dict) or message.get("type") not in list(MESSAGES):
        raise BadInput(f"a message's type is one of: {' '.join(MESSAGES)}")
    form = MESSAGES[message["type"]]
    if message.keys() != {"type", *form}:
        raise BadInput(f"{message['type']} has the fields: {' '.join(form)}")
    for name, (kind, low, high) in form.items():
        value = message[name]
        fine = type(value) is kind or kind is float and type(value) is int
        size = len(value) if fine and kind is str else value
        if not fine or not low <= size <= high or kind is str and not value.isprintable():
            raise BadInput(f"{name} is {kind.__name__}, from {low} to {high}")
    return message


def is_own(origin: str | None, host: str, bound: str) -> bool:
    """Whether a page that this server gave out asks. Other programs than browsers send no origin. On
    loopback, the host's name has to be loopback's: a stranger's name may lead here too."""
    if origin is None:
        return True
    name = re.sub(r":\d+$", "", host).strip("[]")
    local = ("localhost", "127.0.0.1", "::1")
    return origin.partition("//")[2] == host and (bound not in local or name in local)


class Line:
    """Threads for streams. Who finds none waits, in order, and is told its place."""

    def __init__(self, streams: int):
        self.free = [ThreadPoolExecutor(1) for _ in range(streams)]
        self.waiting: list[asyncio.Event] = []

    async def take(self, tell: Callable[[int], Awaitable]) -> ThreadPoolExecutor:
        turn, told = asyncio.Event(), 0
        self.waiting.append(turn)
        try:
            while not self.free or self.waiting[0] is not turn:
                turn.clear()
                place = self.waiting.index(turn) + 1
                await (turn.wait() if place == told else tell(place))
                told = place
            return self.free.pop()
        finally:
            self.waiting.remove(turn)
            self.wake()

    def wake(self) -> None:
        for turn in self.waiting:
            turn.set()


class Viewer:
    """One connection: what it wishes, what it is shown, and when."""

    def __init__(self, socket: WebSocket, studio: Studio, line: Line):
        self.socket, self.studio, self.line, self.rate = socket, studio, line, studio.hello["rate"]
        self.wish = Wish("", None, 0, studio.hello["steps"])
        self.started, self.running = asyncio.Event(), asyncio.Event()
        self.running.set()
        self.strength, self.camera = 0.0, deque(maxlen=studio.hello["camera"])  # its latest frames
        self.sent = self.acknowledged = self.dropped = 0
        self.kept: deque[bytes] = deque(maxlen=CLIP * studio.hello["fps"])
        self.clips: asyncio.Queue[int] = asyncio.Queue(1)
        self.took: deque[float] = deque(maxlen=8)
        self.news, self.last, self.first, self.answered = {}, 0.0, 0.0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """The next frame is due as soon as it can be shown."""
        self.due: float | None = None
        self.times: deque[tuple[float, float, float]] = deque(maxlen=240)  # due, ready, shown

    async def serve(self) -> None:
        """Until it leaves, or says nothing at all."""
        jobs = [asyncio.create_task(job) for job in (self.listen(), self.stream(), self.save())]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        if jobs[0] in done or isinstance(end := done.pop().exception(), WebSocketDisconnect):
            return
        if not isinstance(end, TimeoutError):
            raise end
        await self.socket.close(1008, str(end))

    async def tell(self, kind: str, *parts: bytes, **fields) -> None:
        text = json.dumps({"type": kind} | fields)
        if not parts:
            return await self.socket.send_text(text)
        head = text.encode()
        await self.socket.send_bytes(len(head).to_bytes(4, "little") + head + b"".join(parts))

    # -- what it says ----------------------------------------
    async def listen(self) -> None:
        height, width = self.studio.hello["size"]
        while (message := await self.socket.receive())["type"] == "websocket.receive":
            try:
                if self.strength and len(message.get("bytes") or b"") == 4 * height * width:
                    self.camera.append(message["bytes"])
                else:
                    await self.hear(**understood(message.get("text")))
            except BadInput as error:
                await self.tell("refused", why=str(error))

    async def hear(self, type: str, **said) -> None:
        if type in ("start", "prompt"):
            asked = time.monotonic()
            text = await asyncio.to_thread(self.studio.read, said["prompt"])
            run = self.wish.run + (type == "start")
            self.wish = replace(self.wish, **said, text=text, run=run, asked=asked)
            self.started.set()
        elif type == "ack":
            self.acknowledged = max(self.acknowledged, min(said["frame"], self.sent))
        elif type == "look":
            if said["map"] not in ("", *self.studio.hello["maps"]):
                raise BadInput(f"map is one of: {' '.join(self.studio.hello['maps'])}")
            self.wish = replace(self.wish, map=said["map"])
        elif type == "camera":
            if not (strength := said["strength"]):
                self.camera.clear()
            self.strength = strength
        elif type == "clip":
            if self.clips.full() or not self.kept:
                raise BadInput("one clip at a time, once there are frames")
            self.clips.put_nowait(said["seconds"])
        else:
            self.rate = said.get("fps", self.rate)
            if "on" in said:
                self.running.clear() if said["on"] else self.running.set()
            self.took.clear()
            self.restart_clock()

    # -- what it is shown ----------------------------------------
    async def stream(self) -> None:
        await self.tell("hello", **self.studio.hello)
        thread = await self.line.take(lambda place: self.tell("line", place=place))
        try:
            await self.tell("line", place=0)
            await self.hold(self.started, "no start was asked for")
            await self.play(thread)
        finally:
            self.line.free.append(thread)  # what it still computes, a chunk at most, comes first
            self.line.wake()

    async def hold(self, event: asyncio.Event, why: str) -> None:
        """Keep the seat until the event, but not for longer than PATIENCE while others wait."""
        while not event.is_set():
            try:
                await asyncio.wait_for(event.wait(), PATIENCE)
            except TimeoutError:
                if self.line.waiting:
                    raise TimeoutError(f"{why} while others wait") from None

    async def play(self, thread: ThreadPoolExecutor) -> None:
        """Chunk after chunk; the next one is begun as late as its deadline allows, so that it can heed what
        is asked for meanwhile."""
        next_chunk, loop = self.studio.open(), asyncio.get_running_loop()

        async def make(start: float) -> tuple[Chunk, float]:
            await asyncio.sleep(start - time.monotonic())
            over = tuple(self.camera) if len(self.camera) == self.camera.maxlen else ()
            wish = replace(self.wish, over=over, strength=self.strength if over else 0.0)
            return await loop.run_in_executor(thread, next_chunk, wish), time.monotonic()

        coming = asyncio.create_task(make(0))
        try:
            while True:
                chunk, ready = await coming
                self.adapt(chunk)
                end = (self.due or ready) + len(chunk.frames) / self.rate
                coming = asyncio.create_task(make(end - 2 * max(self.took, default=1) - 0.05))
                if chunk.wish.run == self.wish.run:
                    await self.show(chunk, ready)
        finally:
            coming.cancel()

    def adapt(self, chunk: Chunk) -> None:
        """To fewer steps or to more, if that is wanted."""
        if chunk.wish.steps != self.wish.steps:
            return
        self.took.append(chunk.seconds)
        most, period = self.studio.hello["steps"], len(chunk.frames) / self.rate
        steps = fitting_steps(chunk.wish.steps, most, self.took, period)
        if self.studio.hello["adapt"] and steps != self.wish.steps:
            self.wish = replace(self.wish, steps=steps)
            self.took.clear()

    async def show(self, chunk: Chunk, ready: float) -> None:
        """Its frames, each at its time."""
        self.news = chunk.about | {"prompt": chunk.wish.prompt, "steps": chunk.wish.steps}
        for i, jpeg in enumerate(chunk.frames):
            await self.hold(self.running, "the stream was paused")
            due, gap = self.due or max(time.monotonic(), ready), 1 / self.rate
            await asyncio.sleep(shown_at(due, ready, self.last, gap) - time.monotonic())
            self.last = time.monotonic()
            self.due = due + gap if self.last - due < LOST else None
            self.times.append((due, ready, self.last))
            self.kept.append(jpeg)
            if i == 0:
                self.news |= self.timing(chunk)
            await self.send(jpeg, chunk.maps[i] if chunk.maps else b"", i)

    def timing(self, chunk: Chunk) -> dict:
        if chunk.wish.asked != self.answered:  # the first frame since a prompt was given
            self.first, self.answered = self.last - chunk.wish.asked, chunk.wish.asked
        due, ready, shown = zip(*self.times, strict=True)
        rate = (len(shown) - 1) / (shown[-1] - shown[0]) if len(shown) > 1 else self.rate
        facts = {"first": self.first, "rate": rate, "of": len(due), "dropped": self.dropped}
        facts |= {"can": len(chunk.frames) / chunk.seconds, "memory": memory()}
        return facts | figures(due, ready, shown, 1 / self.rate)

    async def send(self, jpeg: bytes, map: bytes, i: int) -> None:
        if self.sent - self.acknowledged >= IN_FLIGHT:
            self.dropped += 1
            return
        self.sent += 1
        await self.tell("frame", jpeg, map, frame=self.sent, place=i, jpeg=len(jpeg), **self.news)
        self.news = {}

    async def save(self) -> None:
        """The last seconds of video, whenever they are asked for."""
        while True:
            seconds = await self.clips.get()
            frames = list(self.kept)[-seconds * self.studio.hello["fps"] :]
            zoom = max(1, 256 // min(self.studio.hello["size"]))
            await self.tell("clip", await asyncio.to_thread(mp4, frames, self.studio.hello["fps"], zoom))


def application(studio: Studio, streams: int, bound: str) -> Starlette:
    line = Line(streams)

    async def page(request) -> FileResponse:
        file = ROOT / "web" / PAGE[request.url.path]
        return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)

    async def talk(socket: WebSocket) -> None:
        if not is_own(socket.headers.get("origin"), socket.headers.get("host", ""), bound):
            return await socket.close()  # before it is accepted: HTTP 403
        await socket.accept()
        if len(line.waiting) >= WAITING:
            return await socket.close(1013, "too many are waiting; try again later")
        await Viewer(socket, studio, line).serve()

    return Starlette(routes=[*(Route(path, page) for path in PAGE), WebSocketRoute("/stream", talk)])


def listen(host: str, port: int) -> socket.socket:
    """Raises BadInput: before the networks are opened."""
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family)
    except (OSError, OverflowError) as error:
        where = f"--host={host} --port={port} is not possible"
        raise BadInput(f"{where}: {error}; allowed: a free port") from error


def serve(app: Starlette, listening: socket.socket) -> None:
    """Prints where; until SIGTERM or Ctrl-C. Viewers' connections end, then this returns. They are
    told why (1012), unless an answer of theirs crosses the end: TCP then drops what was not read."""
    host, port = listening.getsockname()[:2]
    print(f"open http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    # a viewer that answers no ping for that long has left
    limits = dict(ws_max_size=LARGEST, ws_per_message_deflate=False, ws_ping_interval=15, ws_ping_timeout=15)
    for ends in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them once more when all is closed
        signal.signal(ends, lambda *_: None)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", **limits)
    uvicorn.Server(config).run(sockets=[listening])
