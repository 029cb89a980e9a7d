// From one light network per cell to a picture: where each cell is asked, and how neighbours blend. The same as
// mnif/models/cell_grid.py, which says why.

/**
 * One axis of pixels as its cells see it.
 *
 * @param {number} resolution pixels along the axis.
 * @param {number} cells cells along the axis.
 * @param {number} overlap how far a cell reaches over its borders, as a fraction of its width.
 * @returns points per cell; `coordinates`, cells × points, in each cell's own [-1, 1]; for each pixel `first` and
 *   `second`, the places of its two values among (cells, points), and `weight`, the share of the second.
 */
export function axisCells(resolution, cells, overlap) {
  const perCell = resolution / cells;
  const reach = cells > 1 ? Math.max(overlap - 1e-9, 0) : 0;
  const numbers = [...Array(cells).keys()];
  const start = numbers.map((cell) => Math.ceil((cell - reach) * perCell - 0.5));
  const stop = numbers.map((cell) => Math.floor((cell + 1 + reach) * perCell - 0.5) + 1);
  const points = Math.max(1, ...numbers.map((cell) => stop[cell] - start[cell]));
  const coordinates = new Float32Array(cells * points);
  for (const cell of numbers) {
    for (let point = 0; point < points; point++) {
      coordinates[cell * points + point] = ((start[cell] + point + 0.5) / perCell - cell) * 2 - 1;
    }
  }

  const first = new Int32Array(resolution);
  const second = new Int32Array(resolution);
  const weight = new Float32Array(resolution);
  for (let pixel = 0; pixel < resolution; pixel++) {
    const position = (pixel + 0.5) / perCell;
    const border = Math.round(position);
    const distance = position - border;
    const blended = border >= 1 && border < cells && Math.abs(distance) < reach;
    const inside = Math.min(Math.floor(position), cells - 1);
    const left = blended ? border - 1 : inside;
    const right = blended ? border : inside;
    first[pixel] = left * points + pixel - start[left];
    second[pixel] = right * points + pixel - start[right];
    weight[pixel] = blended ? Math.min(Math.max(distance / (2 * overlap) + 0.5, 0), 1) : 0;
  }
  return { points, coordinates, first, second, weight };
}

/** Every cell's points, [cells², points², 2]: rows run along coordinate 0, columns along coordinate 1. */
export function allPoints({ points, coordinates }, cells) {
  const all = new Float32Array(cells * cells * points * points * 2);
  let place = 0;
  for (let row = 0; row < cells; row++) {
    for (let column = 0; column < cells; column++) {
      for (let down = 0; down < points; down++) {
        for (let along = 0; along < points; along++) {
          all[place++] = coordinates[row * points + down];
          all[place++] = coordinates[column * points + along];
        }
      }
    }
  }
  return all;
}

/**
 * Blends the cells' values to pixels.
 *
 * @param {Float32Array} values [cells², points², stride], in about [-1, 1].
 * @param axis what axisCells gave.
 * @param {number} cells per axis.
 * @param {number} channels that are shown: 1 is grey, 3 RGB, 4 RGBA.
 * @param {number} stride numbers to a value; those beyond the channels only fill up.
 * @returns {ImageData} the picture.
 */
export function blended(values, axis, cells, channels, stride) {
  const { points, first, second, weight } = axis;
  const resolution = first.length;
  // A value's place is the sum of what its row and what its column contribute.
  const along = (places, perCell, perPoint) =>
    places.map((place) => (Math.floor(place / points) * perCell + (place % points) * perPoint) * stride);
  const [up, down] = [first, second].map((places) => along(places, cells * points * points, points));
  const [left, right] = [first, second].map((places) => along(places, points * points, 1));

  const picture = new ImageData(resolution, resolution);
  const between = (one, other, share) => one + share * (other - one);
  let place = 0;
  for (let row = 0; row < resolution; row++) {
    for (let column = 0; column < resolution; column++, place += 4) {
      for (let channel = 0; channel < 4; channel++) {
        const shift = Math.min(channel, channels - 1);
        const [near, far] = [left[column] + shift, right[column] + shift];
        const above = between(values[up[row] + near], values[up[row] + far], weight[column]);
        const below = between(values[down[row] + near], values[down[row] + far], weight[column]);
        picture.data[place + channel] = between(above, below, weight[row]) * 127.5 + 127.5;
      }
      if (channels < 4) picture.data[place + 3] = 255;
    }
  }
  return picture;
}
