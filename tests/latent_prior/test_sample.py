"""`mnif sample`: the same bytes however the work is shared out, in every format and for every signal."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise, sample_latents
from mnif.cli import main
from mnif.data.images import load_images
from mnif.data.voxels import load_voxels
from mnif.models.mnif_model import MNIFModel

# Runs a `mnif` command that is killed at its fourth chunk of samples.
KILLED = """
import os, signal, sys
from latent_prior import sample_writers
from mnif.cli import main

sample_latents, drawn = sample_writers.sample_latents, []

def killed(pipeline, seed, indices, **options):
    drawn.append(indices)
    if len(drawn) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample_latents(pipeline, seed, indices, **options)

sample_writers.sample_latents = killed
sys.exit(main(sys.argv[1:]))
"""
STOCHASTIC = ["--scheduler", "DDPMScheduler", "--num_inference_steps", "5"]


@pytest.fixture
def model(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def touchy(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    """A model whose pictures change by whole levels when a latent changes in its last bit."""
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pipeline.denoiser.latent_std *= 100
    pipeline.save_pretrained(tmp_path / "touchy")
    return tmp_path / "touchy"


def with_longer_headers(model: Path, characters: int) -> Path:
    """A copy whose weights begin further on in their files."""
    copy = model.with_name(f"{model.name}-{characters}")
    shutil.copytree(model, copy)
    for path in copy.rglob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "note": "x" * characters})
    return copy


def prior_for(decoder: MNIFModel, folder: Path) -> Path:
    torch.manual_seed(1)
    size = decoder.config.latent_dim
    denoiser = ResMLPDenoiser(size, width=16, depth=1, decoder_fingerprint=decoder.fingerprint())
    torch.nn.init.normal_(denoiser.write.weight)
    MNIFPipeline(decoder, denoiser, sampling_scheduler("x0")).save_pretrained(folder)
    return folder


def draw(model: Path, output: Path, count: int, *flags: str) -> dict[str, bytes]:
    """Runs the command; what it left, but for reports and previews."""
    command = ["sample", "--model", str(model), "--output_dir", str(output), "--num_samples", str(count), *flags]
    assert main(command) == 0
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not {"preview", ".seals"} & {*path.parts})
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in ("samples.json", "metrics.json")
    }


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bytes_depend_on_seed_and_number_alone(model: Path, tmp_path: Path) -> None:
    """Not on how many are drawn or decoded at a time, nor on which of a chunk are there already."""
    many = draw(model, tmp_path / "many", 100, *STOCHASTIC)
    few = draw(model, tmp_path / "few", 7, "--batch_size", "3", *STOCHASTIC)
    assert len(many) == 100
    assert few == {name: many[name] for name in few}
    for index in (1, 5, 70):
        (tmp_path / f"many/{index:06d}.png").unlink()
    (tmp_path / "many/000008.png").write_bytes(b"")  # as a power cut can leave it
    assert draw(model, tmp_path / "many", 100, "--batch_size", "1", *STOCHASTIC) == many
    assert draw(model, tmp_path / "few", 100, *STOCHASTIC) == many
    other = draw(model, tmp_path / "other", 2, "--seed", "1", *STOCHASTIC)
    assert not set(other.values()) & set(many.values())


@pytest.mark.parametrize("format", ["folder", "tar", "npz"])
def test_what_was_changed_since_is_drawn_anew(
    model: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--format", format, "--shard_size", "64", "--resolution", "8"]
    whole = draw(model, tmp_path / "drawn", 100, *flags)
    for changed in (0, 100 if format == "folder" else len(whole)):  # one file with one bit, then all without a seal
        if changed:
            shutil.rmtree(tmp_path / "drawn/.seals")
        else:
            path = tmp_path / "drawn" / min(whole)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        capsys.readouterr()
        assert draw(model, tmp_path / "drawn", 100, *flags) == whole
        output = capsys.readouterr().out
        assert f"drawn/{min(whole)}" in output
        assert "not known to be as it was written; made anew" in output
        assert draw(model, tmp_path / "drawn", 100, *flags) == whole
        assert "all 100 pictures are there already" in capsys.readouterr().out


def test_bytes_do_not_depend_on_where_weights_lie_in_their_files(touchy: Path, tmp_path: Path) -> None:
    latents, pictures = [], []
    for characters in (0, 8, 16, 24):  # a header is filled up to a multiple of 8
        model = with_longer_headers(touchy, characters)
        pipeline = MNIFPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        latents.append(sample_latents(pipeline, 0, range(64), num_inference_steps=2))
        pictures.append(draw(model, tmp_path / f"drawn-{characters}", 256, "--num_inference_steps", "5"))
    assert all(torch.equal(each, latents[0]) for each in latents)
    assert all(each == pictures[0] for each in pictures)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes(touchy: Path, tmp_path: Path) -> None:
    """1,024 samples by one process, and by one to four that torchrun starts."""
    model = with_longer_headers(touchy, 0)
    flags = ["--num_inference_steps", "5", "--format", "npz", "--shard_size", "64", "--grid", "0"]
    alone = draw(model, tmp_path / "alone", 1024, *flags)
    for processes in (1, 2, 3, 4):
        output = tmp_path / str(processes)
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "-m",
            "--",
            "mnif",
        ]
        command = ["sample", "--model", str(model), "--output_dir", str(output), "--num_samples", "1024", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert contents(output) == alone, f"{processes} processes"


def test_formats_hold_the_same_pictures(model: Path, tmp_path: Path) -> None:
    folder = draw(model, tmp_path / "folder", 140)
    shards = draw(model, tmp_path / "tar", 140, "--format", "tar", "--shard_size", "64")
    assert sorted(shards) == [f"samples-0000{shard}.tar" for shard in range(3)]
    members = {}
    for shard in sorted(shards):
        with tarfile.open(fileobj=io.BytesIO(shards[shard])) as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    assert members == folder
    assert list(members) == sorted(folder)
    assert list(draw(model, tmp_path / "npz", 140, "--format", "npz", "--shard_size", "64")) == ["samples.npz"]
    images = load_images(str(tmp_path / "npz/samples.npz"), 16).images
    with Image.open(io.BytesIO(folder["000139.png"])) as last:
        np.testing.assert_array_equal(images[139], np.asarray(last))
    read_back = load_images(str(tmp_path / "tar"), 16)
    assert read_back.ids == [f"{sample:06d}" for sample in range(140)]
    np.testing.assert_array_equal(read_back.images, images)
    assert images.shape == (140, 16, 16, 3)
    assert images.dtype == np.uint8
    assert {path.name for path in (tmp_path / "npz").iterdir()} == {
        ".seals",
        "metrics.json",
        "preview",
        "samples.json",
        "samples.npz",
    }


def test_pipeline_and_command_draw_the_same(model: Path, pipeline: MNIFPipeline, tmp_path: Path) -> None:
    drawn = draw(model, tmp_path / "drawn", 3, "--resolution", "20", "24", "--truncation", "0.7")
    noise = torch.from_numpy(initial_noise(0, range(3), 12))
    latents = pipeline(latents=noise, truncation=0.7, output_type="latent").images
    with torch.no_grad():
        values = pipeline.decoder(latents, (20, 24)).clamp(-1, 1) * 127.5 + 127.5
    for index in range(3):
        with Image.open(io.BytesIO(drawn[f"{index:06d}.png"])) as image:
            assert np.abs(np.asarray(image) - values[index].numpy()).max() < 0.51


@pytest.mark.parametrize("format", ["folder", "tar", "npz"])
def test_a_stopped_command_continues(
    model: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--format", format, "--shard_size", "128", "--resolution", "8"]
    whole = draw(model, tmp_path / "whole", 300, *flags)
    drawn: list[range] = []

    def stopped(pipeline: MNIFPipeline, seed: int, indices: range, **options: Any) -> torch.Tensor:
        drawn.append(indices)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return sample_latents(pipeline, seed, indices, **options)

    with monkeypatch.context() as patch:
        patch.setattr("latent_prior.sample_writers.sample_latents", stopped)
        command = ["sample", "--model", str(model), "--output_dir", f"{tmp_path}/parts", "--num_samples", "300"]
        assert main([*command, *flags]) == 130
    parts = contents(tmp_path / "parts")
    assert len(parts) == {"folder": 192, "tar": 1, "npz": 1}[format]
    (tmp_path / "parts/.samples-00000.tar.1.tmp").write_bytes(b"half")
    assert draw(model, tmp_path / "parts", 300, *flags) == whole
    capsys.readouterr()
    assert draw(model, tmp_path / "parts", 300, *flags) == whole
    assert "all 300 pictures are there already" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("format", ["folder", "tar"])
def test_killed_and_continued_on_two_processes(model: Path, tmp_path: Path, format: str) -> None:
    """One process is killed on the way, two finish: byte for byte what one draws that nobody disturbs."""
    (tmp_path / "run.py").write_text(KILLED)
    flags = ["--format", format, "--shard_size", "64", *STOCHASTIC]
    whole = draw(model, tmp_path / "whole", 256, *flags)
    command = ["sample", "--model", str(model), "--output_dir", f"{tmp_path}/parts", "--num_samples", "256", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), *command], capture_output=True, env=environment, timeout=300
    )
    assert killed.returncode == -9
    assert 0 < len(contents(tmp_path / "parts")) < len(whole) + 2
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "mnif"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures drawn") == 1
    assert contents(tmp_path / "parts") == whole
    assert [path.name for path in (tmp_path / "parts").rglob(".*")] == [".seals"]


def test_shapes_and_objects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"channels": 1, "dimensions": 3, "resolution": 8, "num_bases": 4, "width": 8, "depth": 1, "cells": 1}
    decoder = MNIFModel(**settings, latent_dim=12, signal="voxels", signal_settings={"resolution": 8})
    with torch.no_grad():
        decoder.means[-1][:, -1] = 0  # the bias, so that values lie on both sides of 0
    shapes = prior_for(decoder, tmp_path / "shapes")
    files = draw(shapes, tmp_path / "meshes", 2, "--mesh", "obj", "--turntable", "gif", "--frames", "2")
    assert sorted(files) == [f"00000{index}.{suffix}" for index in (0, 1) for suffix in ("gif", "obj", "png")]
    draw(shapes, tmp_path / "volumes", 2, "--format", "npz")
    assert load_voxels(str(tmp_path / "volumes/samples.npz"), 8).resolution == 8

    signal = {"resolution": 8, "samples": 4}
    decoder = MNIFModel(**settings | {"channels": 4}, latent_dim=12, signal="radiance", signal_settings=signal)
    objects = prior_for(decoder, tmp_path / "objects")
    files = draw(objects, tmp_path / "views", 2, "--views", "3")
    assert sorted(files) == [f"00000{index}/00{view}.png" for index in (0, 1) for view in range(3)]
    tars = draw(objects, tmp_path / "tar", 2, "--views", "3", "--format", "tar")
    with tarfile.open(fileobj=io.BytesIO(tars["samples-00000.tar"])) as archive:
        assert archive.getnames() == [f"00000{index}.00{view}.png" for index in (0, 1) for view in range(3)]
        assert archive.extractfile("000001.002.png").read() == files["000001/002.png"]
    draw(objects, tmp_path / "npz", 2, "--views", "3", "--format", "npz")
    views = np.load(tmp_path / "npz/samples.npz")["views"]
    with Image.open(io.BytesIO(files["000001/002.png"])) as view:
        np.testing.assert_array_equal(views[1, 2], np.asarray(view))


def test_previews(model: Path, tmp_path: Path) -> None:
    draw(model, tmp_path / "drawn", 3, "--grid", "2", "--interpolate", "4")
    preview = tmp_path / "drawn/preview"
    sheets = {}
    for name in ("grid", "interpolation"):
        with Image.open(preview / f"{name}.png") as image:
            sheets[name] = np.asarray(image)
    assert sheets["grid"].shape == (2 + 64 + 2, 2 * (2 + 64) + 2, 3)
    assert sheets["interpolation"].shape == (2 * (2 + 64) + 2, 5 * (2 + 64) + 2, 3)
    first, second = (sheets["grid"][2:66, left : left + 64].astype(int) for left in (2, 68))
    for row, left, expected in ((2, 2, first), (2, 2 + 4 * 66, second), (68, 2, second)):
        assert np.abs(sheets["interpolation"][row : row + 64, left : left + 64] - expected).max() <= 1
    with Image.open(preview / "interpolation.gif") as animation:
        assert 1 < animation.n_frames <= 9  # equal ones in a row are one
    draw(model, tmp_path / "large", 2, "--grid", "1", "--interpolate", "1", "--resolution", "70", "50")
    with Image.open(tmp_path / "large/preview/interpolation.png") as image:
        way = np.asarray(image)
    assert way.shape == (2 + 70 + 2, 2 * (2 + 50) + 2, 3)
    for number, left in ((0, 2), (1, 54)):
        with Image.open(tmp_path / f"large/00000{number}.png") as image:
            assert np.abs(way[2:72, left : left + 50].astype(int) - np.asarray(image.convert("RGB"))).max() <= 1
    draw(model, tmp_path / "plain", 3, "--grid", "0")
    assert not (tmp_path / "plain/preview").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_inference_steps", "0"], "--num_inference_steps 0: must be at least 1"),
        (["--num_samples", "0"], "--num_samples 0: must be at least 1"),
        (["--truncation", "1.1"], "--truncation 1.1: must lie between 0 and 1"),
        (["--shard_size", "100"], "--shard_size 100: must be a multiple of 64"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--interpolate", "3", "--num_samples", "1"], "--num_samples 2 at least"),
        (["--interpolate", "3", "--scheduler", "DDPMScheduler"], "DDPMScheduler adds noise in every step"),
        (["--mesh", "obj"], "not for the signal of this model, image"),
        (["--format", "npz", "--turntable", "gif"], "holds one array and no files"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "the denoiser predicts the clean latent"),
        (["--model", "nobody/nothing"], "nobody/nothing: no such folder, and the hub cannot be reached"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(model), "--output_dir", f"{tmp_path}/out"]
    assert words in error_of([*command, *flags], capsys)
    assert not (tmp_path / "out").exists()


def test_other_samples_are_not_mixed_in(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(model, tmp_path / "out", 2, "--format", "tar")
    before = contents(tmp_path / "out")
    command = ["sample", "--model", str(model), "--output_dir", f"{tmp_path}/out", "--num_samples"]
    for flags, words in (
        (["2", "--format", "tar", "--truncation", "0.5"], "truncation 1.0, not 0.5"),
        (["3", "--format", "tar"], "num_samples 2, not 3"),
        (["2"], "format tar, not folder"),
    ):
        assert words in error_of([*command, *flags], capsys)
    assert contents(tmp_path / "out") == before
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["denoiser"] == "teacher"
