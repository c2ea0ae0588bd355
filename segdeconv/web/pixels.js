// What segdeconv.images and segdeconv.runtime do to pixels. Pictures are {data, height, width, channels} with data
// a Uint8Array, rows first.

const BITS = 22; // Pillow's fixed-point coefficients for 8-bit pictures (Resample.c, PRECISION_BITS)

// Pillow's bilinear weights of one axis: for each output position its first input position and integer weights.
function bilinearWeights(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1); // antialiasing: the triangle is as wide as an output pixel
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = first; x < end; x++) {
      const weight = Math.max(0, 1 - Math.abs((x - center + 0.5) * (1 / support)));
      weights.push(weight);
      sum += weight;
    }
    return { first, weights: weights.map((weight) => Math.trunc(0.5 + (weight / sum) * (1 << BITS))) };
  });
}

// One pass along an axis of `from` positions that are `stride` bytes apart.
function resampleAxis(data, out, outer, from, to, inner) {
  bilinearWeights(from, to).forEach(({ first, weights }, i) => {
    for (let o = 0; o < outer; o++) {
      for (let c = 0; c < inner; c++) {
        let sum = 1 << (BITS - 1);
        let at = (o * from + first) * inner + c;
        for (let k = 0; k < weights.length; k++, at += inner) sum += data[at] * weights[k];
        out[(o * to + i) * inner + c] = Math.min(255, sum >> BITS);
      }
    }
  });
  return out;
}

export function resizeImage(image, size) {
  if (!size || (size[0] === image.height && size[1] === image.width)) return image;
  const [height, width] = size;
  const { channels } = image;
  // Columns first, then rows, as Pillow does, and only where there is something to change. Pillow 13 takes rows
  // first for some sizes; the rounding between the two then differs by one in some pixels.
  let { data } = image;
  if (width !== image.width) {
    const out = new Uint8Array(image.height * width * channels);
    data = resampleAxis(data, out, image.height, image.width, width, channels);
  }
  if (height !== image.height) {
    const out = new Uint8Array(height * width * channels);
    data = resampleAxis(data, out, 1, image.height, height, width * channels);
  }
  return { data, height, width, channels };
}

// Nearest neighbour of a label map; positions add up step by step, as Pillow's do.
export function resizeLabels(labels, height, width) {
  if (labels.height === height && labels.width === width) return labels;
  const positions = (from, to) => {
    const step = from / to;
    let at = step * 0.5;
    return Array.from({ length: to }, () => {
      const position = Math.trunc(at);
      at += step;
      return Math.min(position, from - 1);
    });
  };
  const rows = positions(labels.height, height);
  const columns = positions(labels.width, width);
  const data = new Uint8Array(height * width);
  rows.forEach((row, y) => columns.forEach((column, x) => {
    data[y * width + x] = labels.data[row * labels.width + column];
  }));
  return { data, height, width, channels: 1 };
}

// RGB bytes to normalised float32, planes, zero-padded right and below to the size multiple.
export function normalise(image, model) {
  const multiple = model.size_multiple;
  const [height, width] = [image.height, image.width].map((side) => Math.ceil(side / multiple) * multiple);
  const data = new Float32Array(3 * height * width);
  for (let c = 0; c < 3; c++) {
    const mean = Math.fround(Math.fround(model.mean[c]) * 255);
    const std = Math.fround(Math.fround(model.std[c]) * 255);
    const table = Float32Array.from({ length: 256 }, (_, value) => Math.fround(value - mean) / std);
    for (let y = 0; y < image.height; y++) {
      for (let x = 0; x < image.width; x++) {
        data[(c * height + y) * width + x] = table[image.data[(y * image.width + x) * 3 + c]];
      }
    }
  }
  return { data, dims: [1, 3, height, width] };
}

export function crop(data, stride, height, width) {
  const out = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) out.set(data.subarray(y * stride, y * stride + width), y * width);
  return { data: out, height, width, channels: 1 };
}
