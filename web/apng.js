// Frames → an animated PNG, which every browser plays, and which holds every pixel as it was.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let i = 0; i < 8; i++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

// length, name, content, checksum; content: numbers of 4 bytes, or arrays of bytes
function part(name, ...content) {
  const all = [[...name].map((letter) => letter.charCodeAt()), ...content.map((x) => (x.length === undefined ? bytes(x) : x))];
  const body = new Uint8Array(all.reduce((sum, x) => sum + x.length, 0));
  all.reduce((at, x) => (body.set(x, at), at + x.length), 0);
  const sum = body.reduce((crc, byte) => TABLE[(crc ^ byte) & 255] ^ (crc >>> 8), -1);
  return [bytes(body.length - 4), body, bytes(~sum)].map((x) => Uint8Array.from(x));
}

function bytes(n) {
  return [n >>> 24, (n >>> 16) & 255, (n >>> 8) & 255, n & 255];
}

// images of one size, frames a second, the least width or height: pixels are enlarged to reach it
export async function animated(images, fps, least) {
  if (!images.length) throw new Error("nothing to save yet");
  const { width, height } = images[0], zoom = Math.max(1, Math.floor(least / Math.min(width, height)));
  const canvas = new OffscreenCanvas(zoom * width, zoom * height), ink = canvas.getContext("2d", { alpha: false });
  ink.imageSmoothingEnabled = false;
  const parts = [];
  let count = 0;
  for (const image of images) {
    ink.drawImage(image, 0, 0, canvas.width, canvas.height);
    const png = new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
    if (!count) parts.push(png.slice(0, 33), ...part("acTL", images.length, 0)); // after signature and IHDR
    parts.push(...part("fcTL", count++, canvas.width, canvas.height, 0, 0, [0, 1, 0, fps, 0, 0]));
    for (const data of pixels(png)) parts.push(...(count === 1 ? part("IDAT", data) : part("fdAT", count++, data)));
  }
  return new Blob([...parts, ...part("IEND")], { type: "image/png" });
}

function* pixels(png) {
  const view = new DataView(png.buffer);
  for (let at = 8; at < png.length; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) === 0x49444154) yield png.subarray(at + 8, at + 8 + view.getUint32(at));
  }
}
