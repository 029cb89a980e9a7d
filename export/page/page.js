// The page: what is typed and clicked, and what is shown for it.

import { openBundle } from "./bundle.js";
import { backends } from "./runtime.js";

const DEFAULT_BUNDLE = "../"; // the bundle that the page came in
const KEPT = 12; // earlier samples on show
const NAMES = { webgpu: "graphics processor", wasm: "processor" };

const byId = (id) => document.getElementById(id);
const [picture, caption, status, save] = ["picture", "caption", "status", "save"].map(byId);
const [seed, sample, resolution, way, steps, backend] = ["seed", "sample", "resolution", "way", "steps", "backend"].map(byId);
const [generate, walk] = ["generate", "walk"].map(byId);

let bundle;
let shown; // what is in the picture: {seed, sample, steps, way, coefficients}
let busy = false;
let waiting; // what came last while a picture was being drawn
let walking = false;

async function start() {
  const query = new URLSearchParams(location.search);
  bundle = await openBundle(query.get("bundle") ?? DEFAULT_BUNDLE);
  resolution.value = Math.max(...bundle.manifest.grid.resolution);
  fill(steps, bundle.steps.map((count) => [count, `${count}`]), bundle.manifest.graphs.prior.steps);
  const asked = query.get("backend");
  const available = (await backends()).filter((name) => !asked || name === asked);
  if (!available.length) throw new Error(`this browser has no ${asked}`);
  fill(backend, available.map((name) => [name, NAMES[name]]), available[0]);
  showSize();
  await chooseBackend(available);
  for (const control of [generate, steps, backend]) control.disabled = false;
}

const fill = (select, choices, chosen) => {
  select.replaceChildren(...choices.map(([value, name]) => new Option(name, value, false, value === chosen)));
};

/** Takes the first backend that draws. */
async function chooseBackend([name, ...others]) {
  try {
    say("Loading onnxruntime-web …");
    await bundle.use(name);
    // The first run of a graph is slow: nobody waits for it later.
    await bundle.draw(await bundle.sample(0n, 0n, Number(steps.value)), 8);
  } catch (error) {
    if (!others.length) throw error;
    return chooseBackend(others);
  }
  backend.value = name;
  const { grid, sampling } = bundle.manifest;
  say(
    `${sampling.scheduler}, ${grid.cells ** 2} networks a picture, trained at ${grid.resolution.join(" × ")}; ` +
      `${bundle.runtime}, ${name === "webgpu" ? "WebGPU" : "WebAssembly, one thread"}.`,
  );
}

async function drawNext() {
  way.value = 0;
  const number = BigInt(sample.value);
  await drawSample(BigInt(seed.value), number, 0);
  remember(shown);
  for (const control of [way, walk]) control.disabled = false;
  sample.value = number + 1n;
}

async function drawSample(seed, sample, way) {
  const wanted = { seed, sample, way, steps: Number(steps.value) };
  const begun = performance.now();
  wanted.coefficients = await bundle.sample(seed, sample, wanted.steps, way);
  byId("sampling").textContent = milliseconds(begun);
  await show(wanted);
}

async function show(wanted) {
  shown = wanted;
  way.value = 100 * wanted.way;
  byId("share").textContent = `${way.value} %`;
  const begun = performance.now();
  const image = await bundle.draw(wanted.coefficients, resolution.valueAsNumber);
  byId("drawing").textContent = milliseconds(begun);
  [picture.width, picture.height] = [image.width, image.height];
  picture.getContext("2d").putImageData(image, 0, 0);
  const part = wanted.way ? `, ${way.value} % of the way to ${wanted.sample + 1n}` : "";
  caption.textContent = `seed ${wanted.seed}, sample ${wanted.sample}${part}, ${image.width} × ${image.height} pixels`;
  picture.setAttribute("aria-label", `Picture of ${caption.textContent}`);
  [save.hidden, save.download] = [false, `seed${wanted.seed}-sample${wanted.sample}-${image.width}.png`];
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

/** Goes from sample to sample until it is stopped. */
async function stroll() {
  while (walking) {
    const next = shown.way >= 0.98 ? { sample: shown.sample + 1n, way: 0 } : { sample: shown.sample, way: shown.way + 0.04 };
    await drawSample(shown.seed, next.sample, Math.round(next.way * 100) / 100);
    await new Promise(requestAnimationFrame);
  }
}

/** Runs one piece of work at a time; of what comes in between the last one counts. */
async function alone(work) {
  if (busy) {
    waiting = work;
    return;
  }
  busy = true;
  try {
    for (waiting = work; waiting; ) {
      const now = waiting;
      waiting = undefined;
      await now();
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

function stop() {
  walking = false;
  walk.textContent = "▶ Walk";
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  stop();
  alone(drawNext);
});
seed.addEventListener("input", () => (sample.value = 0));
resolution.addEventListener("input", () => {
  showSize();
  if (shown && !walking) alone(() => show(shown));
});
way.addEventListener("input", () => {
  const share = way.valueAsNumber / 100;
  stop();
  alone(() => drawSample(shown.seed, shown.sample, share));
});
steps.addEventListener("change", () => shown && alone(() => drawSample(shown.seed, shown.sample, shown.way)));
backend.addEventListener("change", () =>
  alone(async () => {
    await chooseBackend([backend.value]);
    if (shown) await drawSample(shown.seed, shown.sample, shown.way);
  }),
);
walk.addEventListener("click", () => {
  if (walking) return stop();
  walking = true;
  walk.textContent = "❚❚ Stop";
  alone(stroll);
});
save.addEventListener("click", () => (save.href = picture.toDataURL()));
start().catch(complain);
