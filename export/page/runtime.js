// onnxruntime-web, from beside the page or from where runtime.json says, each file held to its hash.

const HERE = new URL(".", import.meta.url);

/** The backends that this browser has, the faster one first. */
export async function backends() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? ["webgpu", "wasm"] : ["wasm"];
}

/**
 * Loads onnxruntime-web for a backend, "webgpu" or "wasm".
 *
 * @throws {Error} it cannot be had, or is not what the page was written with.
 */
export async function loadRuntime(backend) {
  const settings = await (await fetch(new URL("runtime.json", HERE))).json();
  const { module, wasm } = settings.builds[backend];
  const source = new URL(settings.source, HERE);
  const [code, binary] = await Promise.all([module, wasm].map((file) => checked(new URL(file.file, source), file.integrity)));
  const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1; // more threads need headers that a plain static server does not send
  return { ort, version: settings.version };
}

async function checked(url, integrity) {
  try {
    const response = await fetch(url, { integrity });
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    return await response.arrayBuffer();
  } catch (error) {
    throw new Error(`${url}: ${error.message}; without it nothing can be drawn (mnif export --onnxruntime_web)`);
  }
}
