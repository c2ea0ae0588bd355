// Runs the graph beside the page, so that the page stays alive meanwhile.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { crop, normalise, resizeImage, resizeLabels } from "./pixels.js";

const session = ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });

async function label(picture, model) {
  const graph = await session;
  const run = async (tensor) => (await graph.run({ [graph.inputNames[0]]: tensor }, ["labels"])).labels.data;
  const { height, width } = picture;
  if (model.preprocess === "graph") return run(new ort.Tensor("uint8", picture.data, [1, height, width, 3]));
  const image = resizeImage(picture, model.resize);
  const { data, dims } = normalise(image, model);
  const labels = crop(await run(new ort.Tensor("float32", data, dims)), dims[3], image.height, image.width);
  return resizeLabels(labels, height, width).data;
}

onmessage = async ({ data: { ticket, picture, model } }) => {
  try {
    postMessage({ ticket, labels: await label(picture, model) });
  } catch (error) {
    postMessage({ ticket, error: error.message ?? String(error) });
  }
};
