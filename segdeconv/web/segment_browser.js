// Labels from onnxruntime-web, in a worker of this page. The picture stays here.

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let tickets = 0;

worker.onmessage = ({ data: { ticket, labels, error } }) => {
  const { resolve, reject } = waiting.get(ticket);
  waiting.delete(ticket);
  if (error) reject(new Error(error));
  else resolve(labels);
};
worker.onerror = () => {
  for (const { reject } of waiting.values()) reject(new Error("onnxruntime-web cannot be loaded"));
  waiting.clear();
};

async function decode(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" })
    .catch(() => { throw new Error("not a picture that this browser can read"); });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d");
  canvas.drawImage(bitmap, 0, 0);
  const rgba = canvas.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(height * width * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { data, height, width, channels: 3 };
}

export async function segment(file, model) {
  const picture = await decode(file);
  const { height, width } = picture;
  const labels = await new Promise((resolve, reject) => {
    const ticket = ++tickets;
    waiting.set(ticket, { resolve, reject });
    worker.postMessage({ ticket, picture, model }, [picture.data.buffer]);
  });
  const counts = model.classes.map(() => 0);
  const painted = new ImageData(width, height);
  const pixels32 = new Uint32Array(painted.data.buffer); // little-endian, as all that run browsers are
  const colors = model.palette.map(([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red);
  for (let i = 0; i < labels.length; i++) {
    counts[labels[i]]++;
    pixels32[i] = colors[labels[i]];
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(painted, 0, 0);
  const pixels = Object.fromEntries(model.classes.map((name, i) => [name, counts[i]]));
  return { overlay: await canvas.convertToBlob({ type: "image/png" }), pixels };
}
