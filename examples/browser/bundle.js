// An exported bundle in the browser: its two graphs for drawing at any resolution, run by onnxruntime-web.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { initialNoise } from "./noise.js";
import { allPoints, axisCells, blended } from "./picture.js";

ort.env.wasm.numThreads = 1; // more threads need headers that a plain static server does not send

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
  const sessions = {};
  for (const kind of ["prior", "field"]) {
    const graph = Object.values(manifest.graphs).find((entry) => entry.kind === kind);
    if (!graph) throw new Error(`${folder} has no ${kind} graph; export it with --browser`);
    const content = await download(new URL(graph.file, folder));
    await check(content, manifest.files[graph.file].sha256, graph.file);
    sessions[kind] = await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
  }
  return new Bundle(manifest, sessions.prior, sessions.field);
}

class Bundle {
  constructor(manifest, prior, field) {
    this.manifest = manifest;
    this.prior = prior;
    this.field = field;
    this.runtime = `onnxruntime-web ${ort.env.versions.web}`;
  }

  /** Noise → the coefficients that mix the light networks of a sample of a seed (both BigInt). */
  async sample(seed, sample) {
    const count = this.manifest.sampling.latent_dim;
    const noise = new ort.Tensor("float32", initialNoise(seed, sample, count), [1, count]);
    return (await this.prior.run({ noise })).coefficients;
  }

  /** Coefficients → a picture of any resolution. */
  async draw(coefficients, resolution) {
    const { cells, overlap } = this.manifest.grid;
    const axis = axisCells(resolution, cells, overlap);
    const shape = [cells * cells, axis.points * axis.points, 2];
    const coordinates = new ort.Tensor("float32", allPoints(axis, cells), shape);
    const { values } = await this.field.run({ coefficients, coordinates });
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
