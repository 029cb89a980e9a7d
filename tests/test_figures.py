from pathlib import Path

import numpy as np

from evals.figures import copying_verdict, reconstruction_figures
from mnif.data import ImageData, Split
from mnif.modeling import MNIFModel


def test_pca_has_no_more_components_than_there_are_pictures(decoder: MNIFModel, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    names = [str(row) for row in range(6)]
    sides = np.where(np.arange(6) == 5, Split.HELD_OUT, Split.TRAIN)
    figures = reconstruction_figures(
        decoder, None, ImageData("x", images, names, names), sides, None, refinement_steps=1, pictures=tmp_path
    )
    assert figures["pca_components"] == 5  # of a latent with 12 numbers
    assert figures["psnr_pca_train"] > 60  # five pictures are spanned exactly
    assert figures["psnr_pca_heldout"] < 20


def test_verdict_follows_the_smaller_ratio_and_the_share() -> None:
    assert copying_verdict({"fd_lite0": 1.0}) is None
    assert (copying_verdict({"nn_ratio": 1.6, "nn_ratio_latents": 0.5}) or "").startswith("copies: ")
    at_times = copying_verdict({"nn_ratio": 1.0, "nn_ratio_latents": 1.0, "copied_share_latents": 0.3})
    assert "30%" in (at_times or "")
    assert (copying_verdict({"nn_ratio": 1.0, "copied_share_latents": 0.05}) or "").startswith("does not copy more")
