// Where frames come from when a server makes them: one WebSocket, opened again whenever it closes.

export function connect(on) {
  let socket = null, wait = 0.5, turn = Promise.resolve(), shown = null, refused = false;

  function open() {
    refused = false;
    socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/stream`);
    socket.binaryType = "arraybuffer";
    const mine = socket;  // pictures are decoded one after the other: none overtakes another
    socket.onmessage = ({ data }) => {
      turn = turn.then(() => (typeof data === "string" ? text(JSON.parse(data)) : binary(data, mine))).catch(console.error);
    };
    socket.onclose = ({ code, reason }) => {
      const why = code === 1012 ? "the server has stopped" : reason || "no connection";
      refused = code === 1008;
      if (refused) return on.lost(`${why}; press a button to line up again`); // it has no use for a seat
      on.lost(`${why}; trying again`);
      setTimeout(open, 1000 * wait);
      wait = Math.min(2 * wait, 8);
    };
  }

  function text(message) {
    if (message.type === "hello") {
      wait = 0.5;
      on.hello(message);
    } else if (message.type === "line") on.line(message.place);
    else if (message.type === "refused") on.refused(message.why);
  }

  async function binary(data, mine) {
    const size = new DataView(data).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
    const body = new Uint8Array(data, 4 + size);
    if (head.type === "clip") return on.clip(new Blob([body], { type: "video/mp4" }));
    const image = await createImageBitmap(new Blob([body.subarray(0, head.jpeg)], { type: "image/jpeg" }));
    on.frame(head, image, body.subarray(head.jpeg));
    shown?.close();
    shown = image;
    if (mine.readyState === WebSocket.OPEN) mine.send(JSON.stringify({ type: "ack", frame: head.frame }));
  }

  open();
  // a message, or a picture's pixels: a line that is slow gets fewer pictures, not older ones
  return (message) => {
    const pixels = message instanceof Uint8ClampedArray;
    if (pixels && socket.bufferedAmount > 4 * message.length) return;
    if (socket.readyState === WebSocket.OPEN) socket.send(pixels ? message : JSON.stringify(message));
    else if (socket.readyState === WebSocket.CLOSED && refused) open();
  };
}
