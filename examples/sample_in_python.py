"""Draw a few samples at two resolutions and with less variety, and walk between two of them.

python examples/sample_in_python.py runs/demo/model pictures
"""

import sys
from pathlib import Path

import numpy as np
import torch

from latent_prior import MNIFPipeline
from latent_prior.sampling import initial_noise, slerp


def main(model: str, output: str) -> None:
    """Writes PNG files drawn by the pipeline ``model``, a folder or user/name on the hub, to folder ``output``."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = MNIFPipeline.from_pretrained(model)
    noise = initial_noise(0, range(4), pipeline.decoder.config.latent_dim)  # as `mnif sample --seed 0` begins
    for name, settings in {
        "sample_at_32": {"resolution": 32},
        "sample_at_256": {"resolution": 256},
        "typical": {"truncation": 0.7},
    }.items():
        for index, image in enumerate(pipeline(latents=torch.from_numpy(noise), **settings).images):
            image.save(folder / f"{name}_{index}.png")

    walk = slerp(noise[0], noise[1], np.linspace(0, 1, 8))
    for index, image in enumerate(pipeline(latents=torch.from_numpy(walk)).images):
        image.save(folder / f"walk_{index}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
