"""`mnif encode` through the command line: partial observations, presets, splits, interruptions, refusals."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mnif.latents.inference
from mnif.cli import main
from mnif.data.images import load_images
from mnif.data.views import load_views
from mnif.latents.inference import infer_latents
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model

SMALL = ["--resolution", "16", "--num_bases", "16", "--width", "16", "--depth", "1", "--latent_dim", "24"]
TRAINING = ["--train_batch_size", "24", "--encoder_width", "64", "--compile", "off"]


@pytest.fixture(scope="module")
def images(picture_folder: Path) -> np.ndarray:
    return load_images(str(picture_folder), 16).images[:24]


@pytest.fixture(scope="module")
def pictures(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures with ids and groups."""
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(path, images=images, ids=[f"picture {n:02d}" for n in range(24)])
    return path


@pytest.fixture(scope="module")
def model(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows these pictures by heart, and an encoder of them."""
    run = tmp_path_factory.mktemp("runs") / "pictures"
    fit = ["fit", "--data", str(pictures), "--output_dir", str(run), *SMALL, *TRAINING, "--cells", "2"]
    fit += ["--held_out_fraction", "0", "--test_fraction", "0", "--latent_noise", "0.05"]
    assert main([*fit, "--max_train_steps", "400"]) == 0
    return run / "model"


@pytest.fixture(scope="module")
def meta_model(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "meta"
    fit = ["fit", "--data", str(pictures), "--output_dir", str(run), *SMALL, *TRAINING, "--cells", "1"]
    assert main([*fit, "--method", "meta", "--max_train_steps", "40", "--refinement_steps", "0"]) == 0
    return run / "model"


def encoded(folder: Path, model: Path, data: Path | str, *flags: str) -> tuple[LatentTable, dict]:
    """Latents and figures of a command that must succeed."""
    command = ["encode", "--model", str(model), "--data", str(data), "--output_dir", str(folder), *flags]
    assert main(command) == 0
    assert not (folder / ".parts").exists()
    return LatentTable.load(folder / "latents.safetensors"), json.loads((folder / "metrics.json").read_text())


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def drawn(model: Path, latents: Tensor) -> np.ndarray:
    """What latents show, on [0, 1]."""
    with torch.no_grad():
        return (load_component(MNIFModel, model, "decoder")(latents).clamp(-1, 1) / 2 + 0.5).numpy()


def test_figures_are_those_of_the_latents(model: Path, pictures: Path, images: np.ndarray, tmp_path: Path) -> None:
    table, metrics = encoded(tmp_path, model, pictures)
    errors = np.square(drawn(model, table.latents) - images / 255).mean(axis=(1, 2, 3))
    expected = 10 * np.log10(1 / errors)
    assert table.ids == [*metrics["psnr_per_instance"]] == [f"picture {n:02d}" for n in range(24)]
    np.testing.assert_allclose([*metrics["psnr_per_instance"].values()], expected, atol=2e-3)
    assert metrics["psnr"] == pytest.approx(expected.mean(), abs=1e-3)
    assert not table.held_out.any()


def test_presets_give_rising_quality(model: Path, picture_folder: Path, tmp_path: Path) -> None:
    """On pictures the model does not know."""
    pictures = tmp_path / "others.npz"
    np.savez(pictures, images=load_images(str(picture_folder), 16).images[24:])
    quality = [
        encoded(tmp_path / preset, model, pictures, "--preset", preset)[1]["psnr"]
        for preset in ("fast", "balanced", "best")
    ]
    assert quality[0] + 1 < quality[1] < quality[2] - 0.05
    own = encoded(tmp_path / "own", model, pictures, "--preset", "best", "--refinement_steps", "0")[1]
    assert own["psnr"] == pytest.approx(quality[0], abs=1e-6)


@pytest.fixture(scope="module")
def hidden(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The pictures with noise where they were not seen, and what was seen of each, [24, 16, 16] bool."""
    generator = np.random.default_rng(1)
    seen = np.ones((24, 16, 16), dtype=bool)
    for mask, (row, column) in zip(seen, generator.integers(0, 9, (24, 2)), strict=True):
        mask[row : row + 7, column : column + 7] = False
    noise = generator.integers(0, 256, images.shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "hidden.npz"
    ids = [f"picture {n:02d}" for n in range(24)]
    np.savez(path, images=np.where(seen[..., None], images, noise), ids=ids)
    return path, seen


def test_what_was_not_seen_is_filled_in(
    model: Path, pictures: Path, images: np.ndarray, hidden: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    data, seen = hidden
    np.save(tmp_path / "mask.npy", seen)
    flags = ("--mask", str(tmp_path / "mask.npy"), "--preset", "balanced", "--batch_size", "7")
    masked, _ = encoded(tmp_path / "masked", model, data, *flags)
    ignored, _ = encoded(tmp_path / "ignored", model, data, "--preset", "balanced")
    true, _ = encoded(tmp_path / "true", model, pictures, *flags)
    assert torch.equal(masked.latents, true.latents)  # the noise has no influence at all
    errors = {
        name: np.square(drawn(model, table.latents) - images / 255)[~seen].mean()
        for name, table in {"masked": masked, "ignored": ignored}.items()
    }
    average = np.square(images.mean(axis=0) - images / 255 * 255)[~seen].mean() / 255**2
    assert errors["masked"] < 0.7 * errors["ignored"]
    assert errors["masked"] < 0.7 * average


def test_masks_come_in_several_files(model: Path, hidden: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    data, seen = hidden

    def latents(mask: Path) -> Tensor:
        return encoded(
            tmp_path / mask.stem, model, data, "--mask", str(mask), "--refinement_steps", "3", "--batch_size", "7"
        )[0].latents

    np.save(tmp_path / "each.npy", seen.astype(np.float32))
    each = latents(tmp_path / "each.npy")
    order = np.random.default_rng(0).permutation(30)  # some of others, which do not matter
    ids = np.array([f"picture {n:02d}" for n in range(30)])
    more = np.concatenate([seen, ~seen[:6]])
    np.savez(tmp_path / "ids.npz", masks=more[order], ids=ids[order])
    assert torch.equal(latents(tmp_path / "ids.npz"), each)
    np.savez(tmp_path / "in_order.npz", masks=seen)
    assert torch.equal(latents(tmp_path / "in_order.npz"), each)

    np.save(tmp_path / "repeated.npy", np.repeat(seen[:1], 24, axis=0))
    one = latents(tmp_path / "repeated.npy")
    assert not torch.equal(one, each)
    torch.testing.assert_close(one[0], each[0])
    np.save(tmp_path / "one.npy", seen[0])
    assert torch.equal(latents(tmp_path / "one.npy"), one)
    Image.fromarray(np.where(seen[0], 255, 0).astype(np.uint8)).convert("RGB").save(tmp_path / "white.png")
    assert torch.equal(latents(tmp_path / "white.png"), one)


def test_masks_that_cannot_be_used(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = np.ones((24, 16, 16), dtype=bool)
    ids = np.array([f"picture {n:02d}" for n in range(24)])

    def refused(name: str, mask: np.ndarray | None = None, **arrays: np.ndarray) -> str:
        path = tmp_path / name
        if arrays:
            np.savez(path, **arrays)
        elif mask is not None:
            np.save(path, mask)
        command = ["encode", "--model", str(model), "--data", str(pictures), "--output_dir", f"{tmp_path}/out"]
        message = error_of([*command, "--mask", str(path)], capsys)
        assert message.startswith(f"mnif encode: --mask {path}: "), message
        return message.split(f"{path}: ", 1)[1]

    blind = seen.copy()
    blind[5] = False
    assert refused("a.npy", blind) == "nothing is observed of picture 05"
    assert refused("b.npy", ~seen[0]) == "nothing is observed of any instance"
    assert refused("c.npy", seen[0, :8]) == "masks are [8, 16]; [16, 16] is needed"
    assert refused("d.npy", seen[..., None]) == "masks are [16, 16, 1]; [16, 16] is needed"
    assert "23 masks for 24 instances" in refused("e.npy", seen[1:])
    assert refused("f.npz", masks=seen[1:], ids=ids[1:]) == "no mask for picture 00"
    assert refused("g.npz", masks=seen[1:], ids=ids) == "23 masks with 24 ids"
    assert 'an .npz with "masks" is needed' in refused("h.npz", mask=None, seen=seen)
    for name in ("i.npz", "i.npy", "i.png"):
        (tmp_path / name).write_bytes(b"PK no mask at all")
        assert 'an .npz with "masks" is needed' in refused(name)
    with (tmp_path / "j.npz").open("wb") as file:
        np.save(file, seen)
    with (tmp_path / "j.npy").open("wb") as file:
        np.savez(file, masks=seen)
    assert 'an .npz with "masks" is needed' in refused("j.npz")
    assert 'an .npz with "masks" is needed' in refused("j.npy")
    assert 'an .npz with "masks" is needed' in refused("nowhere.npy")
    assert not (tmp_path / "out").exists()


def unit(group: str) -> float:
    """The hash that names a group's side, as docs/data.md says it."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64


def test_a_split_is_exactly_its_part(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fractions = ("--held_out_fraction", "0.3", "--test_fraction", "0.4")
    whole, _ = encoded(tmp_path / "all", model, pictures, "--preset", "fast", *fractions)
    ids = [f"picture {n:02d}" for n in range(24)]
    assert whole.ids == ids
    ranges = {"held_out": (0, 0.3), "test": (0.3, 0.7), "train": (0.7, 1)}
    for split, (low, high) in ranges.items():
        table, metrics = encoded(tmp_path / split, model, pictures, "--preset", "fast", "--split", split, *fractions)
        expected = [id for id in ids if low <= unit(id) < high]
        assert table.ids == [*metrics["psnr_per_instance"]] == expected
        assert 0 < len(expected) < 24
        rows = [ids.index(id) for id in expected]
        torch.testing.assert_close(table.latents, whole.latents[rows], atol=1e-5, rtol=0)
    command = ["encode", "--model", str(model), "--data", str(pictures), "--output_dir", f"{tmp_path}/none"]
    assert "--split test: no picture of" in error_of([*command, "--split", "test", "--test_fraction", "0"], capsys)


class Interrupted:
    """In place of ``infer_latents``: counts batches, and is stopped by Ctrl-C before the one asked for."""

    def __init__(self, stop: int):
        self.stop, self.batches = stop, 0

    def __call__(self, *arguments: object, **options: object) -> Iterator[Tensor]:
        if self.batches == self.stop:
            raise KeyboardInterrupt
        self.batches += 1
        return infer_latents(*arguments, **options)


def test_a_stopped_command_continues(
    model: Path,
    pictures: Path,
    hidden: tuple[Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mask = tmp_path / "mask.npy"
    np.save(mask, hidden[1])
    flags = ("--batch_size", "7", "--refinement_steps", "4", "--mask", str(mask))
    whole, _ = encoded(tmp_path / "whole", model, pictures, *flags)
    out = tmp_path / "stopped"
    command = ["encode", "--model", str(model), "--data", str(pictures), "--output_dir", str(out), *flags]

    def interrupted(stop: int) -> Interrupted:
        counting = Interrupted(stop)
        monkeypatch.setattr(mnif.latents.inference, "infer_latents", counting)
        return counting

    interrupted(2)
    assert main(command) == 130
    assert not (out / "latents.safetensors").exists()
    counting = interrupted(-1)
    assert encoded(out, model, pictures, *flags)[0].latents.equal(whole.latents)
    assert counting.batches == 2  # of four

    interrupted(3)
    assert main(command) == 130
    np.save(mask, ~hidden[1])  # another search: nothing of the first one may be left in it
    counting = interrupted(-1)
    other, _ = encoded(out, model, pictures, *flags)
    assert counting.batches == 4
    assert other.latents.equal(encoded(tmp_path / "other", model, pictures, *flags)[0].latents)


def test_an_outlier_is_named(
    model: Path, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = images.copy()
    planted[9] = np.random.default_rng(0).integers(0, 256, images[9].shape)
    ids = [f"picture {n:02d}" for n in range(9)] + ["static", *(f"picture {n:02d}" for n in range(10, 24))]
    np.savez(tmp_path / "data.npz", images=planted, ids=ids)
    _, metrics = encoded(tmp_path / "out", model, tmp_path / "data.npz")
    assert next(iter(sorted(metrics["fitting_badly"], key=metrics["fitting_badly"].get))) == "static"
    assert metrics["fitting_badly"]["static"] == metrics["psnr_per_instance"]["static"]
    assert len(metrics["fitting_badly"]) < 6
    assert "of them fit much worse than the rest: static (" in capsys.readouterr().out


def test_where_a_search_starts(
    model: Path, meta_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(folder: Path, method: str) -> LatentTable:
        flags = ("--method", method, "--refinement_steps", "2")
        return encoded(tmp_path / f"{folder.parent.name} {method}", folder, pictures, *flags)[0]

    for folder, own, missing in ((model, "encoder", "meta"), (meta_model, "meta", "encoder")):
        assert torch.equal(found(folder, own).latents, found(folder, "auto").latents)
        from_zero = found(folder, "auto-decoding")
        assert not torch.allclose(from_zero.latents, found(folder, own).latents, atol=1e-2)
        command = ["encode", "--model", str(folder), "--data", str(pictures), "--output_dir", f"{tmp_path}/out"]
        name = "inner_loop" if missing == "meta" else "encoder"
        expected = f"{folder} has no {name}; `mnif fit --method {missing}` makes it"
        assert expected in error_of([*command, "--method", missing], capsys)
    bare = tmp_path / "bare"
    shutil.copytree(model / "decoder", bare / "decoder")
    flags = ("--method", "auto", "--refinement_steps", "2")
    expected = found(model, "auto-decoding").latents
    assert torch.equal(encoded(tmp_path / "zero", bare, pictures, *flags)[0].latents, expected)
    assert not (tmp_path / "out").exists()


def test_objects_are_found_from_some_of_their_views(
    ball_run: Path, ball_views: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, changed = ball_run / "model", tmp_path / "changed"
    shutil.copytree(ball_views, changed)
    for view in (0, 1, 3, 5):
        for path in changed.glob(f"*/{view}.png"):
            Image.new("RGB", (16, 16), "black").save(path)
    flags = ("--views", "4", "2", "--refinement_steps", "20")
    table, metrics = encoded(tmp_path / "a", model, ball_views, *flags)
    other, _ = encoded(tmp_path / "b", model, changed, *flags)
    assert torch.equal(table.latents, other.latents)  # other views have no influence
    assert not torch.equal(encoded(tmp_path / "c", model, ball_views, *flags[3:])[0].latents, table.latents)

    decoder = load_component(MNIFModel, model, "decoder")
    signal = signal_of_model(decoder)
    assert isinstance(signal, RadianceField)
    data = load_views(str(ball_views))
    batch = {name: torch.from_numpy(array) for name, array in data.arrays().items()}
    novel = signal.novel_views(batch)  # view 5, which neither model nor search have seen
    with torch.no_grad():
        shown = signal.predict(decoder, decoder.coefficients(table.latents), novel).clamp(-1, 1)
    error = (shown - novel.values).square().mean()
    assert error < 0.7 * (novel.values.mean(dim=0) - novel.values).square().mean()
    assert metrics["psnr_novel_views"] == pytest.approx(
        (-10 * ((shown - novel.values).square().mean(dim=(1, 2, 3, 4)) / 4).log10()).mean().item(), abs=1e-2
    )
    command = ["encode", "--model", str(model), "--data", str(ball_views), "--output_dir", f"{tmp_path}/out"]
    assert "--views 6: each object has views 0 to 5" in error_of([*command, "--views", "0", "6"], capsys)
    assert "--views -1: each object has views 0 to 5" in error_of([*command, "--views", "-1"], capsys)
    np.save(tmp_path / "mask.npy", np.ones((16, 16)))
    mask = ["--mask", f"{tmp_path}/mask.npy"]
    assert "give either --mask or --views" in error_of([*command, *mask, "--views", "0"], capsys)
    assert "[5, 16, 16] is needed" in error_of([*command, *mask], capsys)
    assert not (tmp_path / "out").exists()


def test_flags_and_data_that_do_not_fit(
    model: Path, ball_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str, model: Path = model, data: str = str(pictures)) -> str:
        command = ["encode", "--model", str(model), "--data", data, "--output_dir", f"{tmp_path}/out", *flags]
        return error_of(command, capsys)

    assert "--refinement_steps -1: must be at least 0" in refused("--refinement_steps", "-1")
    for rate in ("-0.1", "0", "nan", "inf"):
        assert "--refinement_learning_rate" in refused("--refinement_learning_rate", rate)
    assert "refining the latents diverged; lower" in refused("--refinement_learning_rate", "1e30")
    shutil.rmtree(tmp_path / "out")
    assert "--batch_size 0: must be at least 1" in refused("--batch_size", "0")
    assert "--views: a picture has no views; use --mask" in refused("--views", "0")
    assert "--held_out_fraction -1" in refused("--split", "test", "--held_out_fraction", "-1")
    assert "--data furniture: no such folder" in refused(data="furniture")
    np.savez(tmp_path / "shapes.npz", voxels=np.ones((2, 4, 4, 4), dtype=np.uint8))
    assert "shapes.npz" in refused(data=f"{tmp_path}/shapes.npz")
    assert "pictures.npz: no such folder" in refused(model=ball_run / "model")
    assert "nowhere: no such model folder" in refused(model=Path("nowhere"))
    assert not (tmp_path / "out").exists()
