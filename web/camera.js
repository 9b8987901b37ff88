// A webcam or a clip as the stream's input: its pictures, at the stream's size and rate.

// canvas: shows them; give: takes a picture's pixels, 4 bytes each; rate: → pictures a second; ended: called when
// there are no more → what stops it. Raises why there is no picture.
export async function watch(file, canvas, give, rate, ended) {
  const film = Object.assign(document.createElement("video"), { muted: true, loop: true, playsInline: true });
  if (file) film.src = URL.createObjectURL(file);
  else if (navigator.mediaDevices) film.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
  else throw new Error("a browser gives its camera to pages of https and of this machine alone");
  const { width, height } = canvas, ink = canvas.getContext("2d", { willReadFrequently: true });
  let timer = 0;

  function stop() {
    clearTimeout(timer);
    film.pause();
    film.srcObject?.getTracks().forEach((track) => track.stop());
    if (file) URL.revokeObjectURL(film.src);
  }

  // the middle of it, as large as the stream's shape allows
  function picture() {
    const scale = Math.max(width / film.videoWidth, height / film.videoHeight);
    const [w, h] = [scale * film.videoWidth, scale * film.videoHeight];
    ink.drawImage(film, (width - w) / 2, (height - h) / 2, w, h);
    give(ink.getImageData(0, 0, width, height).data);
    timer = setTimeout(picture, 1000 / rate());
  }

  film.srcObject?.getTracks().forEach((track) => (track.onended = ended));
  await film.play().catch((error) => {
    stop();
    throw error;
  });
  picture();
  return stop;
}
