// The noise a sample starts from, number for number what latent_prior/sampling.py draws:
// numpy.random.default_rng([seed, index]).standard_normal(count, dtype=float32).
//
// Seed sequence: O'Neill, "Developing a seed_seq alternative" (2015). Generator: PCG64, XSL-RR 128/64, O'Neill, "PCG"
// (2014). Normal numbers: Marsaglia and Tsang, "The Ziggurat Method" (2000), with 256 layers and 23 bits.

/**
 * @param {bigint} seed at least 0.
 * @param {bigint} index number of the sample, at least 0.
 * @param {number} count how many numbers.
 * @returns {Float32Array} standard normal numbers; they depend on seed and index alone.
 */
export function initialNoise(seed, index, count) {
  const nextUint32 = pcg64([...words(seed), ...words(index)]);
  return Float32Array.from({ length: count }, () => standardNormal(nextUint32));
}

/**
 * Noise on the way between that of two samples, on the sphere (Shoemake, 1985), as latent_prior/sampling.py has it.
 *
 * @param {Float32Array} start noise of one sample.
 * @param {Float32Array} end noise of another.
 * @param {number} way 0 to 1.
 */
export function slerp(start, end, way) {
  const dot = (one, other) => one.reduce((sum, value, place) => sum + value * other[place], 0);
  const cosine = dot(start, end) / Math.sqrt(dot(start, start) * dot(end, end));
  const angle = Math.acos(Math.min(Math.max(cosine, -1), 1));
  const [first, last] =
    Math.sin(angle) < 1e-6
      ? [1 - way, way] // one and the same direction
      : [Math.sin((1 - way) * angle) / Math.sin(angle), Math.sin(way * angle) / Math.sin(angle)];
  return start.map((value, place) => first * value + last * end[place]);
}

/** A whole number as 32-bit words, the lowest first; zero is one word. */
function words(number) {
  const found = [];
  do {
    found.push(Number(number & 0xffffffffn));
    number >>= 32n;
  } while (number > 0n);
  return found;
}

const POOL = 4; // words of entropy that are kept

/** Eight well-mixed 32-bit words from any number of them. */
function seedSequence(entropy) {
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const mix = (one, other) => {
    const mixed = Math.imul(0xca01f9dd, one) - Math.imul(0x4973f715, other);
    return mixed ^ (mixed >>> 16);
  };
  const pool = Array.from({ length: POOL }, (_, place) => hash(entropy[place] ?? 0));
  for (let from = 0; from < POOL; from++) {
    for (let to = 0; to < POOL; to++) {
      if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
    }
  }
  for (const word of entropy.slice(POOL)) {
    for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to], hash(word));
  }
  let out = 0x8b51f9dd;
  return Array.from({ length: 8 }, (_, place) => {
    let word = pool[place % POOL] ^ out;
    out = Math.imul(out, 0x58f38ded);
    word = Math.imul(word, out);
    return (word ^ (word >>> 16)) >>> 0;
  });
}

const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const MASK_64 = (1n << 64n) - 1n;
const MASK_128 = (1n << 128n) - 1n;

/** A function that gives the next 32-bit number; each 64-bit number of PCG64 makes two, the low half first. */
function pcg64(entropy) {
  const [high, low, streamHigh, streamLow] = pairs(seedSequence(entropy));
  const increment = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & MASK_128;
  let state = 0n;
  const step = () => {
    state = (state * MULTIPLIER + increment) & MASK_128;
  };
  step();
  state += (high << 64n) | low;
  step();

  let kept = null;
  return () => {
    if (kept !== null) {
      const half = kept;
      kept = null;
      return half;
    }
    step();
    const folded = (state >> 64n) ^ (state & MASK_64);
    const turn = state >> 122n;
    const number = ((folded >> turn) | (folded << (64n - turn))) & MASK_64;
    kept = Number(number >> 32n);
    return Number(number & 0xffffffffn);
  };
}

function pairs(halves) {
  return [0, 2, 4, 6].map((place) => (BigInt(halves[place + 1]) << 32n) | BigInt(halves[place]));
}

const TAIL = 3.6541528853610088; // where the lowest layer's tail begins
const LAYERS = ziggurat();

/** For each layer its width in units of 2^-23, the integers that need no second look, and the density at its edge. */
function ziggurat() {
  const scale = 2 ** 23;
  const density = (x) => Math.exp(-0.5 * x * x);
  const area = 0.004928673233974658; // of every layer
  const base = area / density(TAIL);
  const width = new Float32Array(256);
  const sure = new Uint32Array(256);
  const edge = new Float32Array(256);
  width[0] = base / scale;
  width[255] = TAIL / scale;
  sure[0] = Math.round((TAIL / base) * scale);
  edge[0] = 1;
  edge[255] = density(TAIL);
  let outer = TAIL;
  for (let layer = 254; layer > 0; layer--) {
    const inner = Math.sqrt(-2 * Math.log(area / outer + density(outer)));
    sure[layer + 1] = Math.round((inner / outer) * scale);
    width[layer] = inner / scale;
    edge[layer] = density(inner);
    outer = inner;
  }
  return { width, sure, edge };
}

/** One number, rounded to float32 wherever NumPy rounds. */
function standardNormal(nextUint32) {
  const uniform = () => (nextUint32() >>> 8) / 2 ** 24;
  for (;;) {
    const bits = nextUint32();
    const layer = bits & 0xff;
    const steps = bits >>> 9;
    const size = Math.fround(steps * LAYERS.width[layer]);
    if (steps >= LAYERS.sure[layer]) {
      if (layer === 0) return tail(uniform, (steps & 0x100) !== 0);
      const rise = Math.fround(LAYERS.edge[layer - 1] - LAYERS.edge[layer]);
      const height = Math.fround(Math.fround(rise * uniform()) + LAYERS.edge[layer]);
      if (height >= Math.exp(-0.5 * size * size)) continue;
    }
    return bits & 0x100 ? -size : size;
  }
}

/** Marsaglia's method for the tail beyond the lowest layer. */
function tail(uniform, negative) {
  const logarithm = () => Math.fround(Math.log1p(-uniform()));
  for (;;) {
    const beyond = Math.fround(-Math.fround(1 / TAIL) * logarithm());
    const test = -logarithm();
    if (Math.fround(2 * test) > Math.fround(beyond * beyond)) {
      const size = Math.fround(Math.fround(TAIL) + beyond);
      return negative ? -size : size;
    }
  }
}
