"""The models that come with the package."""

import io
import json
import shutil
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from PIL import Image

from latent_prior import MNIFPipeline
from mnif.cli import main
from mnif.data.images import load_images
from mnif.latents.table import LatentTable
from mnif.utils import model_folders
from mnif.utils.model_folders import TRAINED_MODELS, model_folder_in


def size_in_a_wheel(folder: Path) -> int:
    """What a folder adds to the package that is downloaded, bytes."""
    with ZipFile(packed := io.BytesIO(), "w", ZIP_DEFLATED) as wheel:
        for path in folder.rglob("*"):
            wheel.write(path)
    return len(packed.getvalue())


@pytest.mark.parametrize("name", TRAINED_MODELS)
def test_every_name_stands_for_its_published_bytes(name: str) -> None:
    folder = model_folder_in(Path(name))
    assert size_in_a_wheel(folder) < 12e6
    assert not [*folder.rglob("*.py"), *folder.rglob("*.bin")]
    card = (folder / "README.md").read_text()
    assert "mnif fit --data avatars" in card
    assert "cc0-1.0" in card
    assert "/work" not in card


def test_sample_and_encode_and_decode_take_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", "avatars", "--num_samples", "8", "--grid", "0", "--output_dir", "drawn"]) == 0
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("drawn").glob("*.png"))])
    assert drawn.shape == (8, 64, 64, 3)
    assert drawn.reshape(8, -1).std(axis=0).mean() > 20  # eight heads, no two alike
    assert main(["encode", "--model", "avatars", "--data", "drawn", "--output_dir", "found"]) == 0
    table = LatentTable.load(Path("found/latents.safetensors"))
    assert table.latents.shape == (8, 128)
    decode = ["decode", "--model", "avatars", "--latents", "found/latents.safetensors", "--output_dir", "again"]
    assert main(decode) == 0
    again = np.stack([np.asarray(Image.open(f"again/{id}.png")) for id in table.ids])
    error = np.square((again.astype(float) - drawn) / 255).mean()
    assert -10 * np.log10(error) > 35  # what it drew, it finds again


def test_a_name_knows_what_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Avatars pass its gate, but for false alarms; noisy ones and others' do not."""
    monkeypatch.chdir(tmp_path)
    avatars = load_images("avatars:open-peeps:40", 64).images
    noisy = avatars + np.random.default_rng(0).normal(0, 12.75, avatars.shape)  # 0.1 of values from -1 to 1
    others = load_images("avatars:lorelei:40", 64).images
    called = {}
    for kind, images in {"own": avatars, "noisy": noisy, "others": others}.items():
        np.savez(f"{kind}.npz", images=images.clip(0, 255).astype(np.uint8))
        encode = ["encode", "--model", "avatars", "--data", f"{kind}.npz", "--refinement_steps", "0", "--gate"]
        assert main([*encode, "--output_dir", kind]) == 0
        judged = json.loads(Path(kind, "metrics.json").read_text())["gate"]["instances"].values()
        called[kind] = sum(one["verdict"] != "in" for one in judged)
    assert called["own"] <= 6  # of 40 at 5 %: more has a probability of 0.4 %
    assert called["noisy"] == called["others"] == 40


def test_the_pipeline_takes_a_name() -> None:
    image = MNIFPipeline.from_pretrained("avatars")(batch_size=1, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "avatars/model").mkdir(parents=True)
    assert model_folder_in(Path("avatars")) == Path("avatars/model")


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_a_broken_installation_is_told(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "installed"
    if state == "damaged":
        shutil.copytree(model_folder_in(Path("avatars")), files / "avatars")
        (files / "avatars/decoder/config.json").write_text("{}")
    monkeypatch.setattr(model_folders, "_FOLDER", files)
    model_folders._trained_model.cache_clear()
    try:
        assert main(["sample", "--model", "avatars", "--output_dir", "drawn"]) == 2
    finally:
        model_folders._trained_model.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mnif sample: the model avatars is {state} in this installation")
    assert not Path("drawn").exists()
