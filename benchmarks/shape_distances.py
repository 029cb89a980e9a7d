"""Matrices of chamfer distances between real shapes: every entry, and only those that can be least in row or column.

    python benchmarks/shape_distances.py [shapes]

Half of the shapes are rows and half are columns; the built-in furniture at 32³, 2,048 points a surface. All entries
are measured for a part of the shapes and the time is scaled up, since all of them would take minutes.
"""

import sys
import time

import numpy as np
import torch

from evals.metrics.shapes import POINTS, distance_matrix, earth_movers_distance, set_metrics, surfaces_of_grids
from mnif.data.voxels import load_voxels

PART = 24  # shapes of each kind of which every distance is measured


def timed(*arguments, **options) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    matrix = distance_matrix(*arguments, **options)
    return time.perf_counter() - started, matrix


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    data = load_voxels("furniture")
    rows = np.random.default_rng(0).permutation(len(data))[: 2 * count]
    started = time.perf_counter()
    grids = data.occupancy(rows).astype(np.float32)
    points = surfaces_of_grids(grids, [data.ids[row] for row in rows], level=0.5).points
    each = (time.perf_counter() - started) / len(rows)
    a, b = points[:count], points[count:]
    print(f"{count} × {count} shapes, {POINTS} points, {torch.get_num_threads()} threads")
    print(f"  surface and points of a shape        {each * 1e3:9.1f} ms")

    seconds, _ = timed(a[:PART], b[:PART])
    per_pair = seconds / PART**2
    print(f"  a distance                           {per_pair * 1e3:9.1f} ms")
    print(f"  every distance (scaled from {PART}²)      {per_pair * count**2:9.1f} s")
    least, to_real = timed(a, b, exact="minima")
    print(f"  least of rows and columns            {least:9.1f} s   ratio {per_pair * count**2 / least:.0f}")
    among = [timed(part, exact="minima") for part in (a, b)]
    print(f"  the same among {count} shapes             {sum(seconds for seconds, _ in among) / 2:9.1f} s")
    print(f"  least of rows alone                  {timed(a, b, exact='row minima')[0]:9.1f} s")
    metrics = set_metrics(to_real, *(matrix for _, matrix in among))
    print(
        "  "
        + ", ".join(f"{name} {metrics[name]:.3g} ± {metrics[f'{name}_std']:.2g}" for name in ("mmd", "cov", "nna"))
    )
    for size in (256, 512):
        started = time.perf_counter()
        earth_movers_distance(a[0, :size], b[0, :size])
        print(f"  an earth mover's distance, {size} points {(time.perf_counter() - started) * 1e3:9.1f} ms")


if __name__ == "__main__":
    main()
