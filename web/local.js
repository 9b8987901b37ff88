// Where frames come from when the student runs in this page: a worker makes chunks, they are shown at an even
// rate. What live/server.py does for many viewers, for one.
import { animated } from "./apng.js";
import { meaning } from "./words.js";

const LOST = 2, CATCH_UP = 0.8, CLIP = 10; // live/server.py, live/pace.py

export function connect(on) {
  const worker = new Worker("student.js" + location.search, { type: "module" });
  let tables, rate, wish = null, asked = 0, answered = 0, first = 0, frames = 0, paused = null, loaded = false;
  let due = null, last = 0, times = [], took = [], coming = null;
  const kept = [];
  const now = () => performance.now() / 1000;
  const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * Math.max(seconds, 0)));

  worker.onerror = (event) => on.lost(`this browser cannot run the student: ${event.message}`);
  worker.onmessage = ({ data }) => {
    if (data.hello) {
      tables = data.hello;
      rate = tables.fps;
      on.lost(`loading the student for ${data.engine}: ${data.megabytes} MB`);
    } else if (data.loaded) {
      loaded = true;
      const engine = `${data.loaded.engine}, a download of ${data.loaded.megabytes} MB`;
      on.hello({ ...tables, rate, streams: 1, steps: tables.grid.length, maps: [], engine, file: "stream.png" });
      on.line(0);
    } else if (data.failed) on.lost(`this browser cannot run the student: ${data.failed}`);
    else coming({ ...data, ready: now() });
  };

  const restart = () => {
    due = null;
    times = [];
  };

  async function make(start) {
    await sleep(start - now());
    const answer = new Promise((done) => (coming = done));
    worker.postMessage(wish);
    return answer;
  }

  async function play() {
    for (let next = make(0); ; ) {
      const chunk = await next, count = chunk.images.length;
      took = [...took.slice(-7), chunk.seconds];
      next = make((due ?? chunk.ready) + count / rate - 2 * Math.max(...took) - 0.05);
      if (chunk.wish.run === wish.run) for (let i = 0; i < count; i++) await show(chunk, i);
    }
  }

  async function show(chunk, i) {
    if (paused) await paused.over;
    const gap = 1 / rate, wanted = due ?? Math.max(now(), chunk.ready);
    await sleep(Math.max(wanted, chunk.ready, last + CATCH_UP * gap) - now());
    last = now();
    due = last - wanted < LOST ? wanted + gap : null;
    times = [...times.slice(-239), [wanted, chunk.ready, last]];
    if (kept.push(chunk.images[i]) > CLIP * tables.fps) kept.shift().close();
    const head = { type: "frame", frame: ++frames, place: i };
    on.frame(i ? head : { ...head, ...chunk.about, prompt: chunk.wish.prompt, steps: tables.grid.length, ...timing(chunk) }, chunk.images[i], []);
  }

  function timing(chunk) {
    if (chunk.wish.asked !== answered) [first, answered] = [last - chunk.wish.asked, chunk.wish.asked];
    const jitter = times.slice(1).map((row, i) => Math.abs(row[2] - times[i][2] - 1 / rate)).sort((a, b) => a - b);
    const at = (share) => jitter[Math.round(share * (jitter.length - 1))] ?? 0;
    const span = last - times[0][2];
    return {
      first, rate: span ? (times.length - 1) / span : rate, late: times.filter((row) => row[1] > row[0] + 1e-9).length,
      of: times.length, dropped: 0, p50: at(0.5), p99: at(0.99), can: chunk.images.length / chunk.seconds,
    };
  }

  return ({ type, ...said }) => {
    if (!loaded) return;
    if (type === "start" || type === "prompt") {
      try {
        meaning(said.prompt, tables);
      } catch (error) {
        return on.refused(error.message);
      }
      const begun = wish !== null;
      wish = { run: 0, seed: 0, ...wish, ...said, asked: now() };
      if (type === "start") wish.run++;
      if (!begun) play();
    } else if (type === "clip") {
      animated(kept.slice(-said.seconds * tables.fps), tables.fps, 256).then(on.clip, (error) => on.refused(error.message));
    } else if (type === "rate") {
      rate = said.fps;
      restart();
    } else if (type === "pause") {
      restart();
      if (said.on && !paused) {
        paused = {};
        paused.over = new Promise((done) => (paused.end = done));
      } else if (!said.on && paused) {
        paused.end();
        paused = null;
      }
    }
  };
}
