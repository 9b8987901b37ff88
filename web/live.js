// The page: what is typed and pressed goes to a source of frames, what comes back is drawn.
import { watch } from "./camera.js";
import { connect } from "./source.js";

const $ = (id) => document.getElementById(id);
const video = $("video"), ink = video.getContext("2d");
const AXES = ["VQ", "MQ", "TA"], COLOURS = ["#3f7de0", "#d9731a", "#1f9d77"];
const SPEEDS = [0.25, 0.5, 1, 2, 4];
const shown = { where: false, when: false, memory: false, rewards: false };
let hello = null, facts = {}, frame = null, paused = false, started = false;
let pictures = new Map(), scores = [], input = null;

const send = connect({
  hello(message) {
    hello = message;
    const [h, w] = hello.size, zoom = Math.max(1, Math.floor(512 / Math.min(h, w)));
    [video.width, video.height] = [w * zoom, h * zoom];
    ink.imageSmoothingEnabled = zoom === 1;
    $("map").replaceChildren(...hello.maps.map((name) => new Option(name === "fused" ? "all axes" : name, name)));
    for (const id of ["saliency", "when", "rewards"]) $(id).hidden = !hello.maps.length;
    $("engine").textContent = hello.engine;
    $("camera").hidden = !hello.camera;
    [$("given").width, $("given").height] = [w, h];
    strength();
    $("prompt").value ||= hello.prompt;
    offer(hello.words);
    begin();
  },
  line(place) {
    if (place) status(`place ${place} in line: all ${hello.streams} streams are taken`, false);
    else status(paused ? "paused" : "live", !paused);
  },
  lost(why) {
    status(why, false);
    started = false;
  },
  refused(why) {
    refuse(why);
  },
  clip(blob) {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: hello.file });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    $("save").disabled = false;
  },
  frame(head, image, map) {
    if (head.chunk !== undefined) news(head);
    frame = { image, map: map.length ? map : null, place: head.place };
    if (head.place === 0 || !pictures.has(facts.chunk)) remember(facts.chunk, image);
    draw();
  },
});

// -- what is asked for ----------------------------------------
function begin() {
  refuse("");
  pictures = new Map();
  scores = [];
  if (!$("prompt").value.trim()) return;
  send({ type: "start", prompt: $("prompt").value, seed: seed() });
  send({ type: "rate", fps: speed() });
  send({ type: "pause", on: paused });
  if (input) send({ type: "camera", strength: strength() });
  look();
  started = true;
}

function seed() {
  return Math.min(2 ** 31 - 1, Math.max(0, Math.floor($("seed").valueAsNumber || 0)));
}

function speed() {
  const fps = Math.min(60, Math.max(1, (hello?.rate ?? 8) * SPEEDS[$("rate").value]));
  $("speed").textContent = `${fps} frames/s`;
  return fps;
}

function look() {
  const wanted = shown.where || shown.when || shown.rewards;
  send({ type: "look", map: wanted && hello?.maps.length ? $("map").value || "fused" : "" });
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  refuse("");
  if (started) send({ type: "prompt", prompt: $("prompt").value });
  else begin();
};
$("pause").onclick = () => {
  paused = press("pause");
  $("pause").textContent = paused ? "Go on" : "Pause";
  status(paused ? "paused" : "live", !paused);
  send({ type: "pause", on: paused });
};
$("restart").onclick = begin;
$("rate").oninput = () => send({ type: "rate", fps: speed() });
$("map").onchange = look;
$("webcam").onclick = () => make("webcam", null);
$("clip").onclick = () => (input?.id === "clip" ? unmake() : $("file").click());
$("file").onchange = () => {
  if ($("file").files[0]) make("clip", $("file").files[0]);
  $("file").value = "";
};
$("strength").oninput = strength;
$("strength").onchange = () => {
  if (input) send({ type: "camera", strength: strength() });
};
$("save").onclick = () => {
  $("save").disabled = true;
  send({ type: "clip", seconds: 5 });
};
for (const id of Object.keys(shown)) {
  $(id).onclick = () => {
    shown[id] = press(id);
    $("curve").hidden = !shown.rewards;
    explain();
    look();
    draw();
  };
}

function press(id) {
  const on = $(id).getAttribute("aria-pressed") !== "true";
  $(id).setAttribute("aria-pressed", on);
  return on;
}

// -- a video to make over ----------------------------------------
async function make(id, file) {
  const again = input?.id === id && !file;
  unmake();
  if (again) return;
  const mine = (input = { id, stop: () => {} });
  label(true);
  send({ type: "camera", strength: strength() });
  try {
    const stop = await watch(file, $("given"), (pixels) => send(pixels), speed, unmake);
    if (input !== mine) return stop();
    mine.stop = stop;
    $("given").hidden = false;
    $("source").textContent = `${hello.size[1]} × ${hello.size[0]} pixels of ${file ? file.name : "the webcam"} go to the server, which keeps none.`;
  } catch (error) {
    if (input === mine) unmake();
    $("source").textContent = `No picture: ${error.message}`;
  }
}

function unmake() {
  if (!input) return;
  input.stop();
  label(false);
  input = null;
  $("given").hidden = true;
  $("source").textContent = "";
  send({ type: "camera", strength: 0 });
}

function label(on) {
  $(input.id).setAttribute("aria-pressed", on);
  $(input.id).textContent = on ? "Stop" : { webcam: "Webcam", clip: "A clip" }[input.id];
}

function strength() {
  const value = $("strength").valueAsNumber;
  $("noise").textContent = value.toFixed(2);
  return value;
}

function status(words, on) {
  $("status").textContent = words;
  $("status").className = on ? "on" : "off";
}

function refuse(why) {
  $("refused").textContent = why;
  $("save").disabled = false;
}

// -- words to choose from ----------------------------------------
function offer(kinds) {
  const all = Object.values(kinds).flat();
  $("prompt").oninput = () => {
    const typed = $("prompt").value, last = typed.split(/\s/).pop().toLowerCase();
    const near = last ? all.filter((word) => word.startsWith(last) && word !== last).slice(0, 8) : [];
    $("known").replaceChildren(...near.map((word) => new Option("", typed.slice(0, typed.length - last.length) + word)));
    mark();
  };
  $("words").replaceChildren(...Object.entries(kinds).filter(([kind]) => kind !== "word").map(([kind, words]) => {
    const set = document.createElement("fieldset"), legend = document.createElement("legend");
    legend.textContent = kind;
    set.append(legend, ...words.map((word) => {
      const chip = Object.assign(document.createElement("button"), { type: "button", textContent: word });
      chip.onclick = () => {
        $("prompt").value = put(word, words);
        mark();
        $("ask").requestSubmit();
      };
      return chip;
    }));
    return set;
  }));
  mark();
}

function put(word, rivals) {
  const words = $("prompt").value.split(/\s+/).filter(Boolean), at = words.findIndex((old) => rivals.includes(old.toLowerCase()));
  if (at >= 0) words[at] = word;
  else words.push(word);
  return words.join(" ").replace(/\ban? (?=(\w))/g, (_, next) => ("aeio".includes(next) ? "an " : "a "));
}

function mark() {
  const said = $("prompt").value.toLowerCase().split(/\s+/);
  for (const chip of $("words").querySelectorAll("button")) chip.setAttribute("aria-pressed", said.includes(chip.textContent));
}

// -- what comes back ----------------------------------------
function news(head) {
  facts = head;
  if (head.scores) scores = [...scores.slice(-79), head.scores];
  video.setAttribute("aria-label", `The video: ${head.prompt}`);
  const ms = (seconds) => `${Math.round(1000 * seconds)} ms`, fit = head.can >= speed();
  $("first").textContent = ms(head.first);
  $("fps").textContent = `${head.rate.toFixed(1)} of ${speed()}`;
  $("late").textContent = `${head.late} of ${head.of}` + (head.dropped ? `, ${head.dropped} not sent` : "");
  $("jitter").textContent = `${ms(head.p50)} / ${ms(head.p99)}`;
  $("can").textContent = `${Math.round(head.can)} frames/s`;
  $("steps").textContent = input ? `those below ${$("noise").textContent}` : `${head.steps} of ${hello.steps}`;
  $("chunk").textContent = `${head.chunk}`;
  $("mem").parentElement.hidden = head.memory === undefined;
  $("mem").textContent = `${Math.round(head.memory)} MiB`;
  const less = head.steps < hello.steps;
  $("slow").hidden = fit && !less;
  $("slow").textContent = less
    ? `Fewer steps, ${head.steps} of ${hello.steps}, to keep up with ${speed()} frames/s.`
    : `This machine makes ${head.can.toFixed(1)} of ${speed()} frames/s: frames come late.`;
  explain();
}

function explain() {
  const { sink, ring, averaged } = facts, parts = [];
  if (shown.memory && sink) {
    if (sink.length) parts.push(`sink: chunk ${sink.join(", ")}` + (averaged ? ` and the average of ${averaged} later ones` : ""));
    if (ring.length) parts.push(`ring: chunk ${ring.join(", ")}`);
    $("note").textContent = `Chunk ${facts.chunk} attends to itself${parts.map((part) => "; " + part).join("")}.`;
  } else $("note").textContent = "";
}

function remember(chunk, image) {
  const small = document.createElement("canvas");
  [small.width, small.height] = [image.width, image.height];
  small.getContext("2d").drawImage(image, 0, 0);
  pictures.set(chunk, small);
  for (const old of pictures.keys()) if (old > 1 && old < chunk - 12) pictures.delete(old);
}

// -- drawing ----------------------------------------
function draw() {
  if (!frame) return;
  const { width: w, height: h } = video;
  ink.imageSmoothingEnabled = w === hello.size[1];
  ink.drawImage(frame.image, 0, 0, w, h);
  if (shown.where && frame.map && facts.map) heat(frame.map, ...facts.map, w, h);
  if (shown.when && facts.time) bars(facts.time, w, h);
  if (shown.memory && facts.sink) boxes(w);
  if (shown.rewards) curve();
}

function heat(map, rows, columns, w, h) {
  const picture = new ImageData(columns, rows);
  map.forEach((value, i) => picture.data.set([255, 70 + 0.65 * value, 40, 0.75 * value], 4 * i));
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  small.getContext("2d").putImageData(picture, 0, 0);
  ink.drawImage(small, 0, 0, w, h);
}

function bars(weights, w, h) {
  const most = Math.max(...weights), own = weights.length - hello.chunk, step = w / weights.length;
  ink.fillStyle = "rgb(0 0 0 / .55)";
  ink.fillRect(0, 0.86 * h, w, 0.14 * h);
  weights.forEach((weight, i) => {
    const tall = (0.11 * h * weight) / most;
    ink.fillStyle = i === own + frame.place ? "#ffffff" : i >= own ? "#9dbcff" : "#6f7f9f";
    ink.fillRect(i * step + 2, 0.985 * h - tall, step - 4, tall);
  });
}

function boxes(w) {
  const side = Math.round(w / 7), gap = Math.round(side / 8), label = Math.round(w / 36);
  const all = [...facts.sink.map((n) => [n, "sink"]), ...facts.ring.map((n) => [n, age(n)]), [facts.chunk, "now"]];
  ink.fillStyle = "rgb(0 0 0 / .55)";
  ink.fillRect(0, 0, all.length * (side + gap) + gap, side + 2 * gap + 1.3 * label);
  ink.font = `${label}px system-ui, sans-serif`;
  ink.textBaseline = "top";
  all.forEach(([number, words], i) => {
    const x = gap + i * (side + gap);
    if (pictures.has(number)) ink.drawImage(pictures.get(number), x, gap, side, side);
    ink.strokeStyle = words === "now" ? "#ffffff" : "#9dbcff";
    ink.lineWidth = 2;
    ink.strokeRect(x, gap, side, side);
    ink.fillStyle = "#ffffff";
    ink.fillText(words, x, side + 1.4 * gap);
  });
}

function age(number) {
  return facts.chunk - number === 1 ? "1 before" : `${facts.chunk - number} before`;
}

function curve() {
  const canvas = $("curve"), pen = canvas.getContext("2d"), sharp = window.devicePixelRatio || 1;
  const [w, h] = [canvas.clientWidth, canvas.clientHeight];
  [canvas.width, canvas.height] = [w * sharp, h * sharp];
  pen.scale(sharp, sharp);
  const text = getComputedStyle(document.body).color;
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = text;
  if (!scores.length) return pen.fillText("after the first 4 chunks", 0, 14);
  const all = scores.flat(), low = Math.min(...all, -1), high = Math.max(...all, 1), right = w - 74;
  const y = (value) => h - 8 - ((h - 16) * (value - low)) / (high - low);
  pen.globalAlpha = 0.3;
  pen.fillRect(0, y(0), right, 1);
  pen.globalAlpha = 1;
  const ends = AXES.map((axis, i) => ({ axis, i, last: scores.at(-1)[i], at: y(scores.at(-1)[i]) })).sort((a, b) => a.at - b.at);
  ends.forEach((end, k) => (end.at = Math.max(end.at, k ? ends[k - 1].at + 14 : 8)));
  for (const { axis, i, last, at } of ends) {
    pen.strokeStyle = pen.fillStyle = COLOURS[i];
    pen.lineWidth = 2;
    pen.beginPath();
    scores.forEach((row, k) => pen.lineTo((right * k) / Math.max(scores.length - 1, 1), y(row[i])));
    pen.stroke();
    pen.fillRect(right + 6, at - 4, 8, 8);
    pen.fillStyle = text;
    pen.fillText(`${axis} ${last.toFixed(1)}`, right + 18, at + 4);
  }
}
