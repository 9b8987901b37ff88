// The student in a worker: what rollout.stream does, a chunk at a time, with the networks as ONNX files.
import { Generator } from "./noise.js";
import { meaning } from "./words.js";

let ort, tables, pass, decoder, stream = null;

// on WebGPU where there is one, else on WebAssembly; ?engine=wasm and ?engine=webgpu (also one that a CPU
// imitates, which is slow) choose
const ready = (async () => {
  tables = await (await fetch("tables.json")).json();
  const asked = new URLSearchParams(location.search).get("engine");
  const gpu = asked === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  const able = gpu && (asked === "webgpu" || !gpu.info?.isFallbackAdapter);
  let why = "";
  for (const engine of able ? ["webgpu", "wasm"] : ["wasm"]) {
    const about = { engine: (engine === "wasm" ? "WebAssembly" : "WebGPU") + why, megabytes: tables.megabytes[engine] };
    postMessage({ hello: tables, ...about });
    try {
      await opened(engine);
      return postMessage({ loaded: about });
    } catch (error) {
      if (engine === "wasm") throw error;
      why = ", as WebGPU failed";
      console.warn(`WebGPU failed: ${error.message}`);
    }
  }
})();
ready.catch(failed);

// and a first pass of each: what a driver cannot do shows there, and shaders are compiled
async function opened(engine) {
  ort = await import(`./ort.${engine}.min.mjs`);
  ort.env.wasm.numThreads = 1; // more need headers that a server of plain files does not send
  const open = (file) => ort.InferenceSession.create(file, { executionProviders: [engine] });
  [pass, decoder] = [await open("pass.onnx"), await open("decoder.onnx")];
  stream = begun({ prompt: tables.prompt, seed: 0 });
  const { v } = await run(new Float32Array(tables.chunk * tables.latent.reduce((a, b) => a * b)), 1);
  await pictures(v);
  stream = null;
}

function failed(error) {
  postMessage({ failed: error.message ?? String(error) });
}

// {prompt, seed, run}: a stream with another `run` begins anew, with another prompt it goes on
onmessage = ({ data: wish }) => ready.then(() => made(wish)).catch(failed);

async function made(wish) {
  const begin = performance.now();
  if (stream?.wish.run !== wish.run) stream = begun(wish);
  else if (stream.wish.prompt !== wish.prompt) await switched(wish);
  else if (stream.behind) commit((await run(stream.behind, 0)).kv);
  const about = remembered(), x = await denoised(), images = await pictures(x);
  stream.behind = x;
  (stream.first.length < tables.sink ? stream.first : stream.recent).push(x);
  if (stream.recent.length > tables.cached - tables.sink) stream.recent.shift();
  about.chunk = stream.number++;
  postMessage({ images, about, wish, seconds: (performance.now() - begin) / 1000 }, images);
}

async function pictures(x) {
  const { frames } = await decoder.run({ x: tensor(x, [1, tables.chunk, ...tables.latent]) });
  const [h, w] = tables.size, size = 4 * h * w, bytes = new Uint8ClampedArray(frames.data);
  return Promise.all(Array.from({ length: tables.chunk }, (_, i) =>
    createImageBitmap(new ImageData(bytes.slice(i * size, (i + 1) * size), w, h))));
}

function begun(wish) {
  const seed = new Generator(wish.seed, "sample", 0).seed();
  return { wish, seed, text: embedded(wish.prompt), number: 0, rebuilt: 0, first: [], recent: [], chunks: [], behind: null };
}

// another prompt: the cache is rebuilt with it, from the first chunks and the recent ones
async function switched(wish) {
  Object.assign(stream, { wish, text: embedded(wish.prompt), rebuilt: stream.number, chunks: [] });
  for (const x of [...stream.first, ...stream.recent]) commit((await run(x, 0)).kv);
}

async function denoised() {
  const { grid, chunk, latent } = tables, size = chunk * latent.reduce((a, b) => a * b);
  const rng = new Generator(stream.seed, stream.number);
  rng.randn(size); // a noisy context would be made of it
  const noise = grid.map(() => rng.randn(size));
  let x = noise[0], x0;
  for (let i = 0; i < grid.length; i++) {
    const { v } = await run(x, grid[i]), later = grid[i + 1];
    x0 = x.map((value, k) => value - grid[i] * v[k]);
    if (later) x = x0.map((value, k) => (1 - later) * value + later * noise[i + 1][k]);
  }
  return x0;
}

function tensor(data, shape) {
  return new ort.Tensor("float32", data, shape);
}

// a pass: x at a noise level → velocity, own keys and values
async function run(x, level) {
  const { chunk, latent, layers, tokens, heads, width } = tables, { chunks } = stream;
  const block = tokens * heads * width, past = [0, 1].map((part) => {
    const all = new Float32Array(layers * chunks.length * block);
    for (let layer = 0; layer < layers; layer++)
      chunks.forEach((kv, i) => all.set(kv[part].subarray(layer * block, (layer + 1) * block), (layer * chunks.length + i) * block));
    return tensor(all, [layers, 1, chunks.length * tokens, heads, width]);
  });
  const out = await pass.run({
    xt: tensor(x, [1, chunk, ...latent]), t: tensor(new Float32Array([level]), [1, 1]),
    text: tensor(stream.text, [1, tables.places.length, tables.places[0].length]), keys: past[0], values: past[1],
  });
  return { v: out.v.data, kv: [out.own_keys.data, out.own_values.data] };
}

// as ListCache does: sink first, then oldest to newest; what leaves goes into an EMA sink
function commit(kv) {
  const { chunks } = stream, { cached, sink, mode, decay } = tables;
  chunks.push(kv);
  if (chunks.length <= cached) return;
  const [oldest] = chunks.splice(sink, 1);
  if (mode === "ema") chunks[0] = chunks[0].map((old, part) => old.map((value, i) => value + (1 - decay) * (oldest[part][i] - value)));
}

function embedded(prompt) {
  const width = tables.places[0].length, text = new Float32Array(tables.places.length * width);
  meaning(prompt, tables).forEach((word, place) => {
    if (word) tables.vocabulary[word].forEach((value, i) => (text[place * width + i] = (value + tables.places[place][i]) / Math.SQRT2));
  });
  return text;
}

// live/overlay.py
function remembered() {
  const { cached, sink, mode } = tables, { number, rebuilt } = stream, ring = cached - sink;
  const range = (from, to) => Array.from({ length: Math.max(to - from, 0) }, (_, i) => from + i);
  const recent = range(Math.max(sink, number - ring), number);
  const left = range(Math.max(sink, rebuilt - ring), Math.max(sink, number - ring));
  return { sink: range(0, Math.min(sink, number)), ring: recent, averaged: mode === "ema" ? left.length : 0 };
}
