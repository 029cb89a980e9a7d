"""Four hundred grey faces, aligned, of five hands: the emoji that are faces, for trials of stage one on few pictures.

    python benchmarks/trials/grey_faces.py runs/faces.npz
    mnif fit --data runs/faces.npz --channels 1 --output_dir runs/faces

Faces of one code point are one group, so a held-out face is a new expression, drawn by any hand.
"""

import sys

import numpy as np

from mnif.data.images import load_images

FACES = {
    *(*range(0x1F600, 0x1F645), *range(0x1F910, 0x1F918), *range(0x1F920, 0x1F930), *range(0x1F970, 0x1F97B)),
    *(*range(0x1FAE0, 0x1FAE9), 0x1F47F, 0x1F608, 0x1F9D0, 0x2639, 0x263A),
}
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of BT.601, as Pillow has it


def main(path: str) -> None:
    data = load_images("emoji", 32)
    rows = np.array([row for row, name in enumerate(data.groups) if _code_point(name) in FACES])
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:400])
    images = (data.images[rows].astype(np.float32) @ _LUMINANCE).round().astype(np.uint8)
    names = {"ids": [data.ids[row] for row in rows], "groups": [data.groups[row] for row in rows]}
    np.savez(path, images=images[..., None], **{name: np.array(values) for name, values in names.items()})
    print(f"{path}: {len(rows)} faces, {len(set(names['groups']))} expressions")


def _code_point(group: str) -> int | None:
    return int(group, 16) if group.isalnum() else None


if __name__ == "__main__":
    main(sys.argv[1])
