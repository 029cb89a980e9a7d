import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evals.arguments import PRESETS
from evals.features import extractor_by_name
from evals.features.extractor import FeatureCache
from evals.images import ImageReconstructions
from evals.loaded_run import LoadedRun
from mnif.cli import main
from mnif.data.dataset import Split
from mnif.data.images import ImageData
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from mnif.utils.process import Processes


def test_pca_has_no_more_components_than_there_are_pictures(decoder: MNIFModel, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    names = [str(row) for row in range(7)]
    splits = np.where(np.arange(7) < 5, Split.TRAIN, Split.HELD_OUT)
    protocol, run = PRESETS["offline"], LoadedRun(decoder, signal_of_model(decoder), None, None, None)
    cache = FeatureCache(protocol.resize, extractor_by_name("lite0"), Processes(), tmp_path / "parts")
    reference = ImageData("x", images, names, names)
    real = np.random.default_rng(1).standard_normal((7, 1280))
    metrics = ImageReconstructions(cache, run, reference, splits, protocol, 1, tmp_path, "here").metrics(real)
    assert metrics["pca_components"] == 5  # of a latent with 12 numbers
    assert metrics["psnr_pca_train"] > 60  # five pictures are spanned exactly
    assert metrics["psnr_pca_heldout"] < 20
    assert metrics["ssim_pca_train"] == pytest.approx(1)
    assert metrics["psnr_mean_heldout"] < metrics["psnr_mean_train"]
    assert {"rfd_lite0_train", "rfd_lite0_pca_heldout", "psnr_heldout_std"} <= metrics.keys()


def test_pca_on_fewer_pictures_than_numbers_is_called_meaningless(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, run = tmp_path / "few", tmp_path / "run"
    few.mkdir()
    for picture in sorted(picture_folder.iterdir())[:22]:
        shutil.copy(picture, few)
    fit = ["fit", "--data", str(few), "--output_dir", str(run), "--resolution", "12", "--cells", "2", "--width", "8"]
    fit += ["--num_bases", "4", "--latent_dim", "24", "--encoder_width", "8", "--held_out_fraction", "0.3"]
    assert main([*fit, "--max_train_steps", "2", "--refinement_steps", "1"]) == 0
    assert "warning: PCA with 24 components holds all of the " in capsys.readouterr().out
    assert main(["prior", "--run", str(run), "--width", "8", "--depth", "1", "--max_train_steps", "2"]) == 0
    evaluate = ["eval", "--model", f"{run}/model", "--reference", str(few), "--output_dir", f"{run}/eval"]
    assert main([*evaluate, "--num_samples", "8", "--refinement_steps", "1"]) == 0
    metrics = json.loads((run / "eval/metrics.json").read_text())
    assert metrics["psnr_pca_train"] > 90
    (warning,) = [line for line in metrics["warnings"] if line.startswith("PCA")]
    assert "mean nothing" in warning
    assert warning in (run / "eval/metrics.md").read_text()
