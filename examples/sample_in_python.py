"""Draw a few pictures at two resolutions and walk between two of them.

python examples/sample_in_python.py runs/demo/model pictures
"""

import sys
from pathlib import Path

import torch

from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline


def main(model: str, output: str) -> None:
    """Writes PNG files drawn by the pipeline in folder ``model`` to folder ``output``."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = MNIFPipeline.from_pretrained(model)
    for resolution in (32, 256):
        images = pipeline(4, torch.Generator().manual_seed(0), resolution=resolution).images
        for index, image in enumerate(images):
            image.save(folder / f"sample_{index}_at_{resolution}.png")

    start, end = torch.from_numpy(initial_noise(0, range(2), pipeline.decoder.config.latent_dim))
    angle = torch.linspace(0, torch.pi / 2, 8)[:, None]
    walk = pipeline(latents=torch.cos(angle) * start + torch.sin(angle) * end).images
    for index, image in enumerate(walk):
        image.save(folder / f"walk_{index}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
