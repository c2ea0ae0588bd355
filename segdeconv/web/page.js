// The page: a picture in, its classes painted over it. What does the labelling is segment.js: the server's
// version posts the picture, the static demo's runs the graph in the browser.

import { segment } from "./segment.js";

const at = (id) => document.getElementById(id);
const model = await (await fetch("model.json")).json();
let latest = 0; // a picture chosen meanwhile makes an older answer void
let urls = [];

at("name").textContent = document.title = model.name ?? "segdeconv";
at("about").textContent =
  [model.architecture, model.encoder].filter(Boolean).join(", ") + ` · ${model.classes.length} classes`;

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

async function take(file) {
  const ticket = ++latest;
  const begun = performance.now();
  say(`Labelling ${file.name} …`);
  at("result").setAttribute("aria-busy", "true");
  try {
    const { overlay, pixels } = await segment(file, model);
    if (ticket !== latest) return;
    await show(file, overlay);
    list(pixels);
    at("result").hidden = false;
    const { naturalWidth: width, naturalHeight: height } = at("overlay");
    say(`${file.name}: ${width} × ${height} pixels, ${((performance.now() - begun) / 1000).toFixed(2)} s`);
  } catch (error) {
    if (ticket !== latest) return;
    at("result").hidden = true; // an older picture's, which would be taken for this one's
    say(`${file.name}: ${error.message}`, true);
  } finally {
    if (ticket === latest) at("result").removeAttribute("aria-busy");
  }
}

async function show(picture, overlay) {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [picture, overlay].map((blob) => URL.createObjectURL(blob));
  [at("picture").src, at("overlay").src] = urls;
  await Promise.all([at("picture"), at("overlay")].map((image) => image.decode()));
}

function list(pixels) {
  const total = Object.values(pixels).reduce((sum, count) => sum + count, 0);
  const classes = model.classes.map((name, i) => ({ name, color: model.palette[i], count: pixels[name] }));
  const present = classes.filter((entry) => entry.count).sort((a, b) => b.count - a.count);
  at("legend").replaceChildren(...present.map(({ name, color, count }) => {
    const row = document.createElement("tr");
    const [swatch, label, share] = [0, 0, 0].map(() => row.appendChild(document.createElement("td")));
    const square = swatch.appendChild(document.createElement("span"));
    square.className = "swatch";
    square.style.background = `rgb(${color})`;
    label.textContent = name;
    share.textContent = `${((100 * count) / total).toFixed(1)} %`;
    return row;
  }));
  const absent = classes.filter((entry) => !entry.count).map((entry) => entry.name);
  at("absent").textContent = absent.length ? `Not in the picture: ${absent.join(", ")}` : "";
}

function fade() {
  at("overlay").style.opacity = at("opacity").value / 100;
  at("percent").textContent = `${at("opacity").value} %`;
}

at("opacity").addEventListener("input", fade);
at("file").addEventListener("change", () => {
  if (at("file").files.length) take(at("file").files[0]);
  at("file").value = ""; // so that the same picture can be chosen again
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}
fade();
