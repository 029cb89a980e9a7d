"""`mnif grow` and `mnif lineage` on a small run with a prior, and what a bundle of the grown model still answers."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from export.device.runtime import Camera, Decoder, load_bundle
from latent_prior.augmentation import changed_in_all_generations, changed_instances, changed_latents
from latent_prior.denoisers import Denoiser, PaperDenoiser, ResMLPDenoiser, TransformerDenoiser, continued
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.lineage import fingerprints, grown, places, widened
from mnif.models.mnif_model import MNIFModel
from mnif.training.checkpoints import Checkpoints

SMALL = ["--num_bases", "6", "--width", "8", "--depth", "1", "--cells", "2", "--latent_dim", "12"]
SHORT = ["--max_train_steps", "4", "--refinement_steps", "2", "--train_batch_size", "16", "--encoder_width", "16"]
EXPORT = ["--num_inference_steps", "1", "--compile_rtx", "off", "--num_baked", "1"]


@pytest.fixture(scope="module")
def more_pictures(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same number of others: what was there, each beside its neighbour."""
    from PIL import Image

    folder, files = tmp_path_factory.mktemp("more"), sorted(picture_folder.glob("*.png"))
    pictures = [np.asarray(Image.open(path)) for path in files]
    for number, (one, other) in enumerate(pairwise(pictures)):
        Image.fromarray(np.concatenate([one[:8], 255 - other[8:]])).save(folder / f"more-{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def old(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a prior."""
    run = tmp_path_factory.mktemp("old") / "run"
    fit = ["fit", "--data", str(picture_folder), "--output_dir", str(run), "--resolution", "16", *SMALL, *SHORT]
    assert main([*fit, "--random_flip"]) == 0
    prior = ["--width", "16", "--depth", "1", "--max_train_steps", "4", "--validation_steps", "2"]
    assert main(["prior", "--run", str(run), *prior]) == 0
    return run


def grow_command(old: Path, data: Path, output: Path, *flags: str) -> list[str]:
    small = ["--add_bases", "4", "--add_latents", "5", *SHORT]
    return ["grow", "--model", str(old), "--data", str(data), "--output_dir", str(output), *small, *flags]


@pytest.fixture(scope="module")
def child(old: Path, more_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("grown") / "run"
    assert main(grow_command(old, more_pictures, run, "--random_flip")) == 0
    return run


def test_old_latents_are_the_same_bytes_through_every_runtime(old: Path, child: Path, tmp_path: Path) -> None:
    before, after = (load_component(MNIFModel, run, "decoder") for run in (old, child))
    tables = [LatentTable.load_for(model, old / "latents.safetensors") for model in (before, after)]
    with torch.no_grad():
        coefficients = [
            model.coefficients(table.latents) for model, table in zip((before, after), tables, strict=True)
        ]
        values = [model(table.latents).numpy() for model, table in zip((before, after), tables, strict=True)]
    assert values[0].tobytes() == values[1].tobytes()
    answers, baked = [], []
    for run, alphas in zip((old, child), coefficients, strict=True):
        table = ["--latents", str(old / "latents.safetensors")]
        bundle = tmp_path / run.parent.name
        assert main(["export", "--model", str(run), "--output_dir", str(bundle), *table, *EXPORT]) == 0
        (answer,) = load_bundle(bundle, "onnxruntime", 1).run("decoder", alphas[:7].numpy())
        answers.append(answer)
        baked.append((bundle / "onnx/baked_0000.onnx").read_bytes())
    assert answers[0].tobytes() == answers[1].tobytes()
    np.testing.assert_allclose(answers[1], values[1][:7], atol=1e-5)
    assert _weights_of(baked[0]) == _weights_of(baked[1])
    manifest = json.loads((tmp_path / child.parent.name / "manifest.json").read_text())
    assert [one["fingerprint"] for one in manifest["lineage"]] == fingerprints(after)
    assert manifest["lineage"][1]["added"] == {"num_bases": 4, "latent_dim": 5}
    assert json.loads((tmp_path / old.parent.name / "manifest.json").read_text())["lineage"] == []


def _weights_of(model: bytes) -> list[bytes]:
    import onnx

    return [tensor.SerializeToString() for tensor in onnx.load_from_string(model).graph.initializer]


@pytest.mark.parametrize(("signal", "flags"), [("voxels", ["--coefficient_sparsity", "2"]), ("radiance", [])])
def test_old_shapes_and_scenes_are_the_same_bytes_through_every_runtime(
    signal: str, flags: list[str], ball_views: Path, tmp_path: Path
) -> None:
    """Of shapes with sparse coefficients; scenes are seen by the camera of the bundle."""
    slopes, data = np.mgrid[0:8, 0:8, 0:8][1] - 3.5 < np.linspace(-3, 3, 24)[:, None, None, None], ball_views
    if signal == "voxels":
        np.savez(data := tmp_path / "slopes.npz", voxels=slopes)
    run, child, quick = tmp_path / "run", tmp_path / "child", [*SHORT, "--compile", "off"]
    quick += ["--rays_per_step", "16", "--samples_per_ray", "8"] if signal == "radiance" else []
    fit = ["fit", "--data", str(data), "--output_dir", str(run), *SMALL, *quick, "--method", "auto-decoding", *flags]
    assert main([*fit, *(["--held_out_views", "1"] if signal == "radiance" else [])]) == 0
    assert main(grow_command(run, data, child, "--compile", "off")) == 0
    taken = json.loads((child / "run.json").read_text())["grow"]["arguments"]  # what is not given is as in `mnif fit`
    assert (taken["latent_noise"], taken["validation_steps"]) == ((0.1, 500) if signal == "voxels" else (0.3, 2000))
    answers = []
    for number, folder in enumerate((run, child)):
        decoder, bundle = load_component(MNIFModel, folder, "decoder"), tmp_path / f"bundle_{number}"
        latents = LatentTable.load_for(decoder, run / "latents.safetensors").latents[:3]
        table = ["--latents", str(run / "latents.safetensors"), *EXPORT, "--num_baked", "0"]
        assert main(["export", "--model", str(folder), "--output_dir", str(bundle), *table]) == 0
        loaded = load_bundle(bundle, "onnxruntime", 1)
        with torch.no_grad():
            coefficients = decoder.coefficients(latents)
            points = decoder.values_at(coefficients, torch.rand(1, 50, 3, generator=torch.manual_seed(0)) * 2 - 1)
        alphas = coefficients.numpy()
        shown = Decoder(loaded)(alphas) if signal == "voxels" else Camera(loaded)(alphas[:1], 40.0)
        answers.append((points.numpy().tobytes(), shown.tobytes()))
    assert answers[0] == answers[1]
    assert np.frombuffer(answers[0][1], np.float32).std() > 0


def test_commands_take_old_latents_and_new_ones(old: Path, child: Path, more_pictures: Path, tmp_path: Path) -> None:
    pictures = []
    for run in (old, child):
        output = tmp_path / run.parent.name
        decode = ["decode", "--model", str(run), "--latents", str(old / "latents.safetensors"), "--num", "3"]
        assert main([*decode, "--output_dir", str(output)]) == 0
        pictures.append({path.name: path.read_bytes() for path in output.glob("*.png")})
    assert len(pictures[0]) >= 3
    assert pictures[0] == pictures[1]
    encode = ["encode", "--model", str(child), "--data", str(more_pictures), "--refinement_steps", "1"]
    assert main([*encode, "--output_dir", str(tmp_path / "encoded")]) == 0
    found = LatentTable.load(tmp_path / "encoded/latents.safetensors")
    assert found.latents.shape == (47, 17)
    assert found.ancestors == (LatentTable.load(old / "latents.safetensors").fingerprint,)


def test_the_prior_goes_on_and_learns_both(
    old: Path, child: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(child, run)
    prior = ["prior", "--run", str(run), "--max_train_steps", "2", "--validation_steps", "1"]
    assert main([*prior, "--objective", "v"]) == 2
    assert (
        "--objective v: the old model's denoiser was trained with x0; take that, or --from" in capsys.readouterr().err
    )
    assert main([*prior, "--learning_rate", "0"]) == 0
    trained = sum(len(LatentTable.load(one / "latents.safetensors").train) for one in (old, child))
    assert f"{trained} latents to train" in capsys.readouterr().out
    (before, after), place = ([_tensors(one / "model/denoiser") for one in (old, run)], slice(0, 12))
    assert before["blocks.0.up.weight"].equal(after["blocks.0.up.weight"])  # its shape, too, is the old one's
    assert before["read.weight"].equal(after["read.weight"][:, place])
    assert not after["read.weight"][:, 12:].any()
    assert before["latent_mean"].equal(after["latent_mean"][place])
    sample = ["sample", "--model", str(run), "--num_samples", "2", "--num_inference_steps", "2"]
    assert main([*sample, "--output_dir", str(tmp_path / "drawn")]) == 0
    assert "It was grown from a model of other data, `pictures0`" in (run / "model/README.md").read_text()


def test_the_prior_learns_changed_instances_of_all_generations(
    old: Path, child: Path, more_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(child, run)
    parent, decoder = (load_component(MNIFModel, one, "decoder") for one in (old, run))
    tables = [LatentTable.load(one / "latents.safetensors") for one in (run, old)]
    found = changed_latents(changed_in_all_generations(run, decoder, tables[0]), torch.device("cpu"))
    before = changed_instances(old, parent, tables[1]).latents(torch.device("cpu"))
    assert found.shape == (sum(len(table.train) for table in tables), 1, 17)
    assert torch.equal(found[-len(before) :, 0], widened(decoder, before[:, 0]))
    prior = ["prior", "--run", str(run), "--max_train_steps", "2", "--augment"]
    assert main(prior) == 0
    assert f"{len(found)} latents to train, also changed in 1 ways" in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    record["grow"]["arguments"]["random_colours"] = True
    (run / "run.json").write_text(json.dumps(record))
    assert main([*prior, "--seed", "1"]) == 2
    reason = f"--augment: {run} was changed by --random_flip --random_colours, {run}/inherited/"
    assert reason in capsys.readouterr().err


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_lineage_is_shown_and_an_ancestor_had_back(
    old: Path, child: Path, more_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grandchild, back = tmp_path / "grandchild", tmp_path / "back"
    assert main(grow_command(child, more_pictures, grandchild, "--replay")) == 0
    assert 20 < json.loads((grandchild / "metrics.json").read_text())["psnr_of_old_fields"] <= 100
    capsys.readouterr()
    assert main(["lineage", "--model", str(grandchild)]) == 0
    shown = capsys.readouterr().out.splitlines()
    known = fingerprints(load_component(MNIFModel, grandchild, "decoder"))
    assert [line.strip("└─ ").split()[0] for line in shown if "numbers in a latent" in line] == [k[:12] for k in known]
    assert sum("psnr_heldout" in line for line in shown) >= 4  # of each on its data, and of parents on what was next
    assert "as before, the same bytes" in "".join(shown)

    assert main(["lineage", "--model", str(child), "--rollback_to", "0", "--output_dir", str(back)]) == 0
    for name in ("latents.safetensors", "metrics.json", "model/decoder/config.json", "model/denoiser/config.json"):
        assert (back / name).read_bytes() == (old / name).read_bytes()
    for name in ("decoder", "encoder", "denoiser"):
        weights = f"model/{name}/diffusion_pytorch_model.safetensors"
        assert (back / weights).read_bytes() == (old / weights).read_bytes()

    for command, reason in {
        ("--rollback_to", "0"): "--rollback_to and --output_dir: give both or none",
        ("--rollback_to", "0", "--output_dir", str(back)): f"{back} is not empty; choose another --output_dir",
        ("--rollback_to", "0", "--output_dir", f"{tmp_path}/x"): "its bases moved when the model was grown by more",
    }.items():
        assert main(["lineage", "--model", str(grandchild), *command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["meta", "auto-decoding"])
def test_the_other_ways_of_learning_leave_old_latents_alone(
    method: str, old: Path, more_pictures: Path, tmp_path: Path
) -> None:
    assert main(grow_command(old, more_pictures, tmp_path / "run", "--method", method)) == 0
    child, parent = (load_component(MNIFModel, run, "decoder") for run in (tmp_path / "run", old))
    assert fingerprints(child)[0] == parent.fingerprint()
    assert (tmp_path / "run/model/inner_loop").is_dir() == (method == "meta")


def test_a_stopped_growth_goes_on_to_the_same_bytes(
    old: Path, child: Path, more_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = grow_command(old, more_pictures, tmp_path / "run", "--random_flip", "--checkpointing_steps", "2")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", lambda *arguments: stop(save(*arguments)))
        assert main(command) == 130
    assert not (tmp_path / "run/model").exists()
    assert main(["prior", "--run", str(tmp_path / "run")]) == 2
    assert main(command) == 0
    for name in ("latents.safetensors", "model/decoder/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (child / name).read_bytes()


def test_what_cannot_grow_is_said_in_a_line(
    old: Path, child: Path, more_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "voxels.npz", voxels=np.zeros((9, 8, 8, 8), np.uint8))
    shutil.copytree(old / "model", tmp_path / "alone/model")
    new = tmp_path / "new"
    cases = {
        "--add_bases 0: nothing to grow; at least 1 is needed": grow_command(
            old, more_pictures, new, "--add_bases", "0"
        ),
        "the model was trained on image, and grows by that alone": grow_command(old, tmp_path / "voxels.npz", new),
        "old latents are what is learned again": grow_command(tmp_path / "alone", more_pictures, new, "--replay"),
        "is of `mnif fit`": grow_command(old, more_pictures, old),
        "is of `mnif grow`": ["fit", "--data", str(more_pictures), "--output_dir", str(child)],
        "needs --method encoder": grow_command(old, more_pictures, new, "--method", "meta", "--random_flip"),
        "no such model folder": grow_command(tmp_path / "nowhere", more_pictures, new),
        "--earlier_learning_rate -1": grow_command(old, more_pictures, new, "--earlier_learning_rate", "-1"),
        "which was grown from the one at hand": [
            *("decode", "--model", str(old), "--latents", str(child / "latents.safetensors"), "--output_dir", str(new))
        ],
    }
    for reason, command in cases.items():
        capsys.readouterr()
        assert main(command) == 2, reason
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not new.exists()


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings", "layout"),
    [
        (ResMLPDenoiser, {}, {}),
        (PaperDenoiser, {"width": 32, "depth": 2}, {}),
        (TransformerDenoiser, {"num_tokens": 4, "width": 32, "depth": 1}, {"cells": 4, "tokens": 2}),
    ],
)
def test_a_denoiser_that_goes_on_begins_with_what_it_knew(
    kind: type[Denoiser], settings: dict[str, int], layout: dict[str, int]
) -> None:
    parent = MNIFModel(
        **{"resolution": 16, "num_bases": 3, "width": 4, "depth": 0, "latent_dim": 12, "cells": 2} | layout
    )
    child, denoiser = grown(parent, 2, 4), kind(latent_dim=12, **settings).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    longer = continued(denoiser, child, torch.zeros(16), torch.ones(16)).eval()
    noisy, further = torch.randn(3, 12), torch.randn(3, 16)
    further[:, places(child, 12)] = noisy
    torch.testing.assert_close(longer(further, 5.0), widened(child, denoiser(noisy, 5.0)), rtol=0, atol=1e-5)
