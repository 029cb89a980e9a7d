// An exported bundle in the browser: its graphs for drawing at any resolution, run by onnxruntime-web.

import { initialNoise, slerp } from "./noise.js";
import { allPoints, axisCells, blended } from "./picture.js";
import { loadRuntime } from "./runtime.js";

const SCHEMA = 2;

/**
 * Opens a bundle that `mnif export --browser` wrote.
 *
 * @param {string} url of the folder.
 * @throws {Error} with one line for the user: it is not there, not for this page, or damaged.
 */
export async function openBundle(url) {
  const folder = new URL(url.endsWith("/") ? url : `${url}/`, document.baseURI);
  const manifest = JSON.parse(new TextDecoder().decode(await download(new URL("manifest.json", folder))));
  if (manifest.schema !== SCHEMA) throw new Error(`${folder} is not a bundle of schema ${SCHEMA}; export it again`);
  if (manifest.grid.dimensions !== 2) throw new Error(`${folder} does not draw pictures but ${manifest.signal}`);
  const graphs = Object.values(manifest.graphs);
  for (const kind of ["prior", "field"]) {
    if (!graphs.some((graph) => graph.kind === kind)) throw new Error(`${folder} has no ${kind} graph; export it with --browser`);
  }
  return new Bundle(folder, manifest, graphs);
}

class Bundle {
  constructor(folder, manifest, graphs) {
    [this.folder, this.manifest] = [folder, manifest];
    this.field = graphs.find((graph) => graph.kind === "field");
    this.priors = new Map(graphs.filter((graph) => graph.kind === "prior").map((graph) => [graph.steps, graph]));
    this.contents = new Map();
  }

  /** Numbers of denoising steps that there are graphs of, fewest first. */
  get steps() {
    return [...this.priors.keys()].sort((one, other) => one - other);
  }

  /** Takes a backend, "webgpu" or "wasm", from now on. */
  async use(backend) {
    const { ort, version } = await loadRuntime(backend);
    [this.ort, this.runtime, this.backend, this.sessions] = [ort, `onnxruntime-web ${version}`, backend, new Map()];
    await this.session(this.field);
  }

  async session(graph) {
    if (!this.contents.has(graph.file)) {
      const content = await download(new URL(graph.file, this.folder));
      await check(content, this.manifest.files[graph.file].sha256, graph.file);
      this.contents.set(graph.file, content);
    }
    if (!this.sessions.has(graph.file)) {
      const options = { executionProviders: [this.backend] };
      this.sessions.set(graph.file, await this.ort.InferenceSession.create(this.contents.get(graph.file), options));
    }
    return this.sessions.get(graph.file);
  }

  /**
   * Noise → the coefficients that mix the light networks.
   *
   * @param {bigint} seed of the noise.
   * @param {bigint} sample number of the sample.
   * @param {number} steps of denoising.
   * @param {number} way how far to go towards the next sample's noise, 0 to 1.
   */
  async sample(seed, sample, steps, way = 0) {
    const count = this.manifest.sampling.latent_dim;
    const start = initialNoise(seed, sample, count);
    const noise = way === 0 ? start : slerp(start, initialNoise(seed, sample + 1n, count), way);
    const session = await this.session(this.priors.get(steps));
    return (await session.run({ noise: new this.ort.Tensor("float32", noise, [1, count]) })).coefficients;
  }

  /** Coefficients → a picture of any resolution. */
  async draw(coefficients, resolution) {
    const { cells, overlap } = this.manifest.grid;
    const axis = axisCells(resolution, cells, overlap);
    const shape = [cells * cells, axis.points * axis.points, 2];
    const coordinates = new this.ort.Tensor("float32", allPoints(axis, cells), shape);
    const { values } = await (await this.session(this.field)).run({ coefficients, coordinates });
    return blended(values.data, axis, cells, this.manifest.values.channels, values.dims.at(-1));
  }
}

async function download(url) {
  const response = await fetch(url);
  if (!response.ok) {
    throw new Error(`${url}: the server answers ${response.status}; is a bundle there? ?bundle= names another folder`);
  }
  return new Uint8Array(await response.arrayBuffer());
}

/** Compares with the manifest's SHA-256; browsers offer hashes to localhost and https alone. */
async function check(content, expected, file) {
  if (!globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const found = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected) throw new Error(`${file} differs from what was exported (SHA-256); export the bundle again`);
}
