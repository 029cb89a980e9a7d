"""`mnif eval` on voxels and radiance fields through the command line, on models small enough to fit here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_prior.commands.prior import add_prior
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel

pytest.importorskip("trimesh")
pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def _own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.features.extractor.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 boxes of many sizes around the middle of 8³ cells."""
    generator = np.random.default_rng(0)
    voxels = np.zeros((48, 8, 8, 8), dtype=bool)
    for shape in voxels:
        low, high = generator.integers(0, 4, 3), generator.integers(5, 9, 3)
        shape[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    path = tmp_path_factory.mktemp("data") / "boxes.npz"
    np.savez(path, voxels=voxels)
    return path


@pytest.fixture(scope="module")
def box_run(tmp_path_factory: pytest.TempPathFactory, boxes: Path) -> Path:
    """A short fit of them; a quarter is held out."""
    run = tmp_path_factory.mktemp("runs") / "boxes"
    fit = ["fit", "--data", str(boxes), "--output_dir", str(run), "--compile", "off", "--max_train_steps", "80"]
    fit += ["--cells", "1", "--num_bases", "12", "--width", "16", "--depth", "1", "--latent_dim", "8"]
    fit += ["--encoder_width", "32", "--lr_warmup_steps", "5", "--refinement_steps", "5", "--train_batch_size", "24"]
    assert main([*fit, "--held_out_fraction", "0.25"]) == 0
    return run


def with_prior(run: Path, folder: Path) -> Path:
    """A copy of a run's model and latents with a denoiser that has learned nothing."""
    shutil.copytree(run / "model", folder / "model")
    shutil.copy(run / "latents.safetensors", folder)
    decoder = load_component(MNIFModel, folder / "model", "decoder")
    table = LatentTable.load(folder / "latents.safetensors")
    torch.manual_seed(0)
    width, fingerprint = decoder.config.latent_dim, decoder.fingerprint()
    denoiser = ResMLPDenoiser(latent_dim=width, width=16, depth=2, decoder_fingerprint=fingerprint)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mean, std = table.mean_and_std()
    denoiser.latent_mean.copy_(mean)
    denoiser.latent_std.copy_(std)
    add_prior(folder / "model", MNIFPipeline(decoder, denoiser, sampling_scheduler("x0")))
    return folder / "model"


def evaluated(*flags: object) -> dict:
    output = Path(str(flags[flags.index("--output_dir") + 1]))
    assert main(["eval", *map(str, flags)]) == 0
    return json.loads((output / "metrics.json").read_text())


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    assert main(["eval", *map(str, flags)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_model_of_voxels_without_a_prior_is_measured_by_its_reconstructions(
    box_run: Path, boxes: Path, tmp_path: Path
) -> None:
    flags = ("--model", box_run / "model", "--reference", boxes, "--refinement_steps", 5)
    metrics = evaluated(*flags, "--output_dir", tmp_path / "out")
    fitted = json.loads((box_run / "metrics.json").read_text())
    for name in ("psnr_train", "psnr_heldout", "iou_train", "iou_heldout", "psnr_pca_heldout", "iou_pca_heldout"):
        assert metrics[name] == pytest.approx(fitted[name], abs=1e-3), name
    for part in ("train", "heldout"):
        assert metrics[f"iou_mean_{part}"] < metrics[f"iou_{part}"]
        assert metrics[f"chamfer_floor_{part}"] < metrics[f"chamfer_{part}"] < metrics[f"chamfer_mean_{part}"]
        assert metrics[f"accuracy_{part}_std"] > 0
        assert size_of(tmp_path / f"out/reconstructions_{part}.png")[0] > 96
    assert "mmd_chamfer" not in metrics
    assert "[0, 1]" in metrics["protocol"]["occupancy"]


def test_pca_on_fewer_shapes_than_numbers_is_called_meaningless(box_run: Path, boxes: Path, tmp_path: Path) -> None:
    with np.load(boxes) as content:
        np.savez(tmp_path / "few.npz", **{name: values[:9] for name, values in content.items()})
    flags = ("--model", box_run / "model", "--reference", tmp_path / "few.npz", "--refinement_steps", 1)
    metrics = evaluated(*flags, "--output_dir", tmp_path / "out")
    assert metrics["iou_pca_train"] == pytest.approx(1)
    assert [line for line in metrics["warnings"] if line.startswith("PCA")]


def test_samples_of_a_model_of_voxels_stand_beside_their_controls(box_run: Path, boxes: Path, tmp_path: Path) -> None:
    flags = ("--model", with_prior(box_run, tmp_path), "--reference", boxes, "--refinement_steps", 1)
    metrics = evaluated(*flags, "--emd_points", 32, "--output_dir", tmp_path / "out")
    count = metrics["protocol"]["shapes_of_each_set"]
    assert count == (~np.isin(np.arange(48), _train_rows(box_run))).sum()
    for metric in ("chamfer", "emd"):
        for ending in ("", "_floor", "_gaussian", "_pca"):
            assert 0 <= metrics[f"cov_{metric}{ending}"] <= 1
            assert 0 <= metrics[f"nna_{metric}{ending}"] <= 1
            assert metrics[f"mmd_{metric}{ending}_std"] > 0
        assert metrics[f"cov_{metric}_floor"] > max(0.3, metrics[f"cov_{metric}"])
    assert metrics["mmd_chamfer_floor"] < metrics["mmd_chamfer"]
    assert metrics["nn_ratio_copies"] < 0.7
    assert "nn_ratio_latents" in metrics
    assert f"{count} shapes in each set" in metrics["warnings"][-1]
    assert size_of(tmp_path / "out/nearest.png")[1] > 2 * 96
    fewer = evaluated(*flags, "--num_samples", 9, "--output_dir", tmp_path / "fewer")
    assert fewer["protocol"]["shapes_of_each_set"] == 9


def _train_rows(run: Path) -> list[int]:
    table = LatentTable.load(run / "latents.safetensors")
    return [int(id) for id, held_out in zip(table.ids, table.held_out, strict=True) if not held_out]


def test_files_of_shapes_are_measured(boxes: Path, tmp_path: Path) -> None:
    """Training shapes as samples: found out as copies; half of them empty or full: counted, and covering less."""
    voxels = np.load(boxes)["voxels"]
    flags = ("--reference", boxes, "--held_out_fraction", 0.25)
    np.save(tmp_path / "copies.npy", voxels[:12])
    copies = evaluated("--samples", tmp_path / "copies.npy", *flags, "--output_dir", tmp_path / "a")
    assert copies["copied_share"] > 0.5
    assert copies["empty_shapes"] == copies["full_shapes"] == 0
    broken = voxels[:12].copy()
    broken[::4], broken[2::4] = False, True
    np.save(tmp_path / "broken.npy", broken)
    metrics = evaluated("--samples", tmp_path / "broken.npy", *flags, "--output_dir", tmp_path / "b")
    assert (metrics["empty_shapes"], metrics["full_shapes"]) == (3, 3)
    assert metrics["cov_chamfer"] < copies["cov_chamfer"]
    assert metrics["nna_chamfer"] > copies["nna_chamfer"]
    np.save(tmp_path / "nothing.npy", np.zeros((12, 8, 8, 8)))
    nothing = evaluated("--samples", tmp_path / "nothing.npy", *flags, "--output_dir", tmp_path / "c")
    assert (nothing["cov_chamfer"], nothing["empty_shapes"]) == (0, 12)
    assert "mmd_chamfer" not in nothing
    assert "12 samples are empty" in nothing["warnings"][0]


def test_bad_samples_of_shapes_get_one_line(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ("--output_dir", tmp_path / "out")
    np.save(tmp_path / "one.npy", np.load(boxes)["voxels"][:1])
    assert "1 drawn shapes; at least 8" in refused(
        capsys, "--samples", tmp_path / "one.npy", "--reference", boxes, *output
    )
    np.save(tmp_path / "pictures.npy", np.zeros((4, 8, 8, 3)))
    assert "cubes" in refused(capsys, "--samples", tmp_path / "pictures.npy", "--reference", boxes, *output)
    np.savez(tmp_path / "few.npz", voxels=np.ones((3, 8, 8, 8)))
    assert "at least 8" in refused(capsys, "--samples", boxes, "--reference", tmp_path / "few.npz", *output)
    assert "--num_samples 7: at least 8 shapes" in refused(
        capsys, "--samples", boxes, "--reference", boxes, "--num_samples", 7, *output
    )
    assert not (tmp_path / "out").exists()


def test_a_model_of_views_is_measured_by_views_it_never_saw(ball_run: Path, ball_views: Path, tmp_path: Path) -> None:
    flags = ("--model", ball_run / "model", "--reference", ball_views, "--output_dir", tmp_path / "out")
    metrics = evaluated(*flags)
    fitted = json.loads((ball_run / "metrics.json").read_text())
    assert metrics["psnr_train"] == pytest.approx(fitted["psnr_train"], abs=1)  # of views here, of objects there
    assert metrics["psnr_novel_views_train"] > metrics["psnr_novel_views_mean_train"]
    assert metrics["psnr_novel_views_nearest_train"] > 5
    assert 0 < metrics["ssim_novel_views_train"] <= 1
    assert "fd_lite0" not in metrics
    assert size_of(tmp_path / "out/novel_views_train.png")[0] > 12 * 16


def test_rendered_samples_stand_beside_their_controls(ball_run: Path, ball_views: Path, tmp_path: Path) -> None:
    flags = ("--model", with_prior(ball_run, tmp_path), "--reference", ball_views, "--output_dir", tmp_path / "out")
    metrics = evaluated(*flags)
    assert metrics["protocol"]["views_of_each_object"] == 6
    for control in ("floor", "gaussian", "reconstructed", "mean"):
        assert metrics[f"fd_lite0_{control}"] >= 0
    assert metrics["fd_lite0_floor"] < metrics["fd_lite0"]
    assert metrics["fd_lite0_floor"] < metrics["fd_lite0_mean"]
    assert "biased up" in metrics["warnings"][0]
    assert size_of(tmp_path / "out/nearest.png")[1] > 2 * 16


def test_pictures_of_drawn_objects_are_measured(ball_views: Path, tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    for number, path in enumerate(sorted(ball_views.glob("0[0-5]/*.png"))):
        shutil.copy(path, tmp_path / f"drawn/{number:03d}.png")
    flags = ("--samples", tmp_path / "drawn", "--reference", ball_views, "--output_dir", tmp_path / "out")
    metrics = evaluated(*flags)
    assert metrics["fd_lite0"] < 2 * metrics["fd_lite0_floor"]
