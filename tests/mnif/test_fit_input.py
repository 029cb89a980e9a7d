"""What `mnif fit` says to data it cannot learn from: one line, exit code 2, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnif.cli import main

SMALL = ["--num_bases", "4", "--width", "8", "--depth", "1", "--latent_dim", "6", "--cells", "1"]
QUICK = ["--max_train_steps", "4", "--train_batch_size", "4", "--encoder_width", "16", "--compile", "off"]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `mnif fit` on data it must refuse, and gives its one line on stderr."""
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))

    def run(data: Path, *flags: str) -> str:
        capsys.readouterr()
        assert main(["fit", "--data", str(data), "--output_dir", f"{tmp_path}/run", *SMALL, *QUICK, *flags]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.fixture
def nothing_written(tmp_path: Path) -> Callable[[], bool]:
    """Whether neither a run folder nor a piece of a cached data set was left behind."""
    return lambda: not (tmp_path / "run").exists() and not [*tmp_path.glob("cache/**/*.*")]


@pytest.fixture
def objects(ball_views: Path, tmp_path: Path) -> Path:
    """Three objects, to be damaged."""
    for name in ("00", "01", "02"):
        shutil.copytree(ball_views / name, tmp_path / "objects" / name)
    return tmp_path / "objects"


def test_pictures_with_nan(refused: Callable, nothing_written: Callable, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((6, 8, 8, 3), dtype=np.float32)
    images[4, 2, 3, 1] = np.nan
    np.savez(tmp_path / "data.npz", images=images)
    message = refused(tmp_path / "data.npz", "--resolution", "8")
    assert "data.npz" in message
    assert "NaN" in message
    assert nothing_written()


def test_duplicate_ids(refused: Callable, nothing_written: Callable, tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, ids=["a", "b", "a", "c"])
    message = refused(tmp_path / "data.npz", "--resolution", "8")
    assert f"duplicate id 'a' in {tmp_path}/data.npz" in message
    voxels = np.ones((4, 8, 8, 8), dtype=bool)
    np.savez(tmp_path / "data.npz", voxels=voxels, ids=["a", "b", "c", "c"])
    assert "duplicate id 'c'" in refused(tmp_path / "data.npz")
    assert nothing_written()


def test_empty_and_unclear_volumes(refused: Callable, nothing_written: Callable, tmp_path: Path) -> None:
    voxels = np.zeros((3, 8, 8, 8), dtype=np.float32)
    voxels[:, 2:5, 2:5, 2:5] = 1
    np.savez(tmp_path / "half.npz", voxels=voxels * 0.5)
    assert "other than 0 and 1 (up to 0.5)" in refused(tmp_path / "half.npz")
    voxels[1] = 0
    np.savez(tmp_path / "empty.npz", voxels=voxels, ids=["x", "y", "z"])
    assert f"{tmp_path}/empty.npz: shape 'y' is empty" in refused(tmp_path / "empty.npz")
    voxels[1, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", voxels=voxels)
    assert "holds NaN or infinity" in refused(tmp_path / "nan.npz")
    assert nothing_written()


def test_views_that_do_not_fit_together(refused: Callable, nothing_written: Callable, objects: Path) -> None:
    Image.new("RGB", (20, 16)).save(objects / "01/3.png")
    assert f"{objects}/01/3.png is 20×16 where the first is 16×16" in refused(objects)
    shutil.copy(objects / "01/2.png", objects / "01/3.png")
    path = objects / "02/transforms.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"frames": content["frames"][:4]}))
    assert "00 has 6 views, 02 4; take as many of each with --max_views 4" in refused(objects)
    assert "--held_out_views 4: each object has 4 views" in refused(
        objects, "--max_views", "4", "--held_out_views", "4"
    )
    content["frames"][1]["transform_matrix"][0][0] *= 1.5
    path.write_text(json.dumps(content))
    message = refused(objects)
    assert f"{path}: frame 1.png: the pose is no rotation" in message
    content["frames"][1]["transform_matrix"][0][0] = float("nan")
    path.write_text(json.dumps(content))
    assert "transforms.json: not a JSON file" in refused(objects)  # which knows no NaN
    assert nothing_written()


def test_volumes_that_cannot_be(refused: Callable, nothing_written: Callable, objects: Path) -> None:
    views = ("--held_out_views", "1")
    assert "--bound -2: must be above 0" in refused(objects, "--bound", "-2", *views)
    assert "--near 3 and --far 2" in refused(objects, "--near", "3", "--far", "2", *views)
    assert "--resolution 4 4 4: one number, or height and width" in refused(objects, "--resolution", "4", "4", "4")
    assert "--random_flip" in refused(objects, "--method", "encoder", "--random_flip")
    assert "--gradient_weight 0.5: needs values on a grid" in refused(objects, "--gradient_weight", "0.5")
    assert "--gradient_weight -1.0: must be at least 0" in refused(objects, "--gradient_weight", "-1")
    assert nothing_written()


def test_data_of_another_kind_than_said(refused: Callable, nothing_written: Callable, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", voxels=np.ones((2, 8, 8, 8), dtype=bool))
    assert "data.npz: needs" in refused(tmp_path / "data.npz", "--signal", "image")
    assert "data.npz: no such folder" in refused(tmp_path / "data.npz", "--signal", "radiance")
    assert "signal 'relief': must be one of image, radiance, voxels" in refused(
        tmp_path / "data.npz", "--signal", "relief"
    )
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros((2, 8, 8, 3), dtype=np.uint8))
    assert 'array.npz: needs "images"' in refused(tmp_path / "array.npz", "--signal", "image", "--resolution", "8")
    shutil.copy(tmp_path / "data.npz", tmp_path / "data.npy")
    assert "data.npy: not a readable .npy array" in refused(tmp_path / "data.npy", "--signal", "voxels")
    assert "data.npy: not a readable .npy array" in refused(tmp_path / "data.npy")
    assert nothing_written()


def test_an_inner_loop_that_diverges(refused: Callable, picture_folder: Path, tmp_path: Path) -> None:
    meta = ("--resolution", "8", "--method", "meta")
    message = refused(picture_folder, *meta, "--inner_learning_rate", "1e30")
    assert "lower --inner_learning_rate (now 1e+30)" in message
    run = tmp_path / "run"
    assert not {"model", "checkpoints", "latents.safetensors", "metrics.json"} & {path.name for path in run.iterdir()}
    assert json.loads((run / "run.json").read_text())["fit"]["finished"] is False
    # What it says to do helps, and the folder is no obstacle.
    fit = ["fit", "--data", str(picture_folder), "--output_dir", str(run), *SMALL, *QUICK, *meta]
    fit += ["--refinement_steps", "0", "--inner_learning_rate", "1"]
    assert "begin anew with --resume_from_checkpoint no" in refused(picture_folder, *meta, *fit[-4:])
    assert main([*fit, "--resume_from_checkpoint", "no"]) == 0
    assert json.loads((run / "run.json").read_text())["fit"]["finished"] is True


def test_data_that_changed_between_runs(refused: Callable, tmp_path: Path) -> None:
    data, flags = tmp_path / "data.npz", ("--resolution", "8", "--refinement_steps", "0")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    ids = [f"{n:02d}" for n in range(12)]
    np.savez(data, images=images, ids=ids)
    run = tmp_path / "run"
    assert main(["fit", "--data", str(data), "--output_dir", str(run), *SMALL, *QUICK, *flags]) == 0
    weights = run / "model/decoder/diffusion_pytorch_model.safetensors"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert weights in before
    images[3, 0, 0, 0] ^= 1
    np.savez(data, images=images, ids=ids)
    message = refused(data, *flags)
    assert f"{run} holds a `fit` with data_fingerprint" in message
    assert "begin anew with --resume_from_checkpoint no" in message
    images[3, 0, 0, 0] ^= 1
    np.savez(data, images=images, ids=["renamed", *ids[1:]])
    assert "data_fingerprint" in refused(data, *flags)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    np.savez(data, images=images, ids=ids)
    assert main(["fit", "--data", str(data), "--output_dir", str(run), *SMALL, *QUICK, *flags]) == 0
    assert weights.stat().st_mtime_ns == before[weights]
