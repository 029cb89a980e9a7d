// The page: what is typed and clicked, and what is shown for it.

import { openBundle } from "./bundle.js";

const DEFAULT_BUNDLE = "../../runs/demo/bundle/";
const KEPT = 12; // earlier samples on show

const byId = (id) => document.getElementById(id);
const [picture, caption, status] = ["picture", "caption", "status"].map(byId);
const [seed, sample, resolution, generate] = ["seed", "sample", "resolution", "generate"].map(byId);

let bundle;
let shown; // the sample in the picture: {seed, sample, coefficients}
let busy = false;
let waiting = false; // the slider moved while a picture was being drawn

async function start() {
  const folder = new URLSearchParams(location.search).get("bundle") ?? DEFAULT_BUNDLE;
  bundle = await openBundle(folder);
  const { grid, sampling } = bundle.manifest;
  resolution.value = Math.max(...grid.resolution);
  showSize();
  await bundle.draw(await bundle.sample(0n, 0n), 8); // the first run of a graph is slow: nobody waits for it later
  say(
    `${sampling.num_inference_steps} steps of ${sampling.scheduler}, ${grid.cells ** 2} networks a picture, ` +
      `trained at ${grid.resolution.join(" × ")}; ${bundle.runtime}, WebAssembly, one thread.`,
  );
  generate.disabled = false;
}

async function drawNext() {
  const wanted = { seed: BigInt(seed.value), sample: BigInt(sample.value) };
  const begun = performance.now();
  wanted.coefficients = await bundle.sample(wanted.seed, wanted.sample);
  byId("sampling").textContent = milliseconds(begun);
  await show(wanted);
  remember(wanted);
  sample.value = wanted.sample + 1n;
}

async function show(wanted) {
  shown = wanted;
  const begun = performance.now();
  const image = await bundle.draw(wanted.coefficients, resolution.valueAsNumber);
  byId("drawing").textContent = milliseconds(begun);
  [picture.width, picture.height] = [image.width, image.height];
  picture.getContext("2d").putImageData(image, 0, 0);
  caption.textContent = `seed ${wanted.seed}, sample ${wanted.sample}, ${image.width} × ${image.height} pixels`;
  picture.setAttribute("aria-label", `Picture of ${caption.textContent}`);
}

/** A small copy of the picture that brings its sample back. */
function remember(wanted) {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [picture.width, picture.height];
  copy.getContext("2d").drawImage(picture, 0, 0);
  const button = document.createElement("button");
  button.title = `seed ${wanted.seed}, sample ${wanted.sample}`;
  button.append(copy);
  button.addEventListener("click", () => alone(() => show(wanted)));
  const item = document.createElement("li");
  item.append(button);
  byId("earlier").prepend(item);
  if (byId("earlier").children.length > KEPT) byId("earlier").lastElementChild.remove();
}

/** Runs one piece of work at a time; what comes in between is dropped, but the slider's last place counts. */
async function alone(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
    while (waiting) {
      waiting = false;
      await show(shown);
    }
  } catch (error) {
    complain(error);
  } finally {
    busy = false;
  }
}

const milliseconds = (begun) => `${(performance.now() - begun).toFixed(1)} ms`;
const showSize = () => (byId("size").textContent = `${resolution.value} × ${resolution.value}`);

function say(text) {
  status.textContent = text;
  status.classList.remove("wrong");
}

function complain(error) {
  status.textContent = error.message;
  status.classList.add("wrong");
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  alone(drawNext);
});
seed.addEventListener("input", () => (sample.value = 0));
resolution.addEventListener("input", () => {
  showSize();
  if (!shown) return;
  waiting = busy;
  alone(() => show(shown));
});
start().catch(complain);
