"""The whole chain on a folder of small pictures, through the command line, and what bad input gets on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.training.run_record import read_metrics_log

SMALL = [
    "--resolution",
    "16",
    "--cells",
    "2",
    "--num_bases",
    "8",
    "--width",
    "8",
    "--depth",
    "1",
    "--latent_dim",
    "12",
]
BAKE = ["--num_baked", "1", "--compile_rtx", "off"]
QUICK = ["--max_train_steps", "30", "--validation_steps", "15", "--train_batch_size", "16", "--compile", "off"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A finished run of every command, in the folders the report looks in."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model, pictures = f"{folder}/model", str(picture_folder)
    fit = ["fit", "--data", pictures, "--output_dir", str(folder), "--held_out_fraction", "0.25", "--random_flip"]
    evaluate = ["eval", "--reference", pictures, "--held_out_fraction", "0.25"]
    commands = [
        [*fit, *SMALL, *QUICK],
        ["prior", "--run", str(folder), "--width", "32", "--depth", "2", *QUICK],
        ["sample", "--model", model, "--num_samples", "10", "--output_dir", f"{folder}/pictures"],
        ["export", "--model", model, "--output_dir", f"{folder}/bundle", *BAKE],
        [*evaluate, "--model", model, "--num_samples", "20", "--output_dir", f"{folder}/eval"],
        ["report", "--run", str(folder)],
    ]
    called_as = sys.argv
    for command in commands:
        sys.argv = ["mnif", *command]
        assert main() == 0, command
    sys.argv = called_as
    return folder


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_run_folder_holds_what_it_promises(run: Path) -> None:
    assert {path.name for path in (run / "model").iterdir()} == {
        "README.md",
        "decoder",
        "denoiser",
        "encoder",
        "model_index.json",
        "pipeline.py",
        "samples.png",
        "scheduler",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"psnr_train", "psnr_heldout", "psnr_heldout_encoder", "seconds", "peak_rss_mb"} <= metrics.keys()
    assert metrics["psnr_heldout"] > metrics["psnr_heldout_encoder"]
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pth") or path.name.endswith(".tmp")]
    table = LatentTable.load(run / "latents.safetensors")
    kept = json.loads((run / "eval/metrics.json").read_text())
    assert "psnr_test" in kept  # what `mnif fit` never looked at
    assert 36 < len(table.ids) < 48
    assert 0 < int(table.held_out.sum()) < 24


def test_finished_stages_are_reused(run: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "model/denoiser/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert main(["prior", "--run", str(run), "--width", "32", "--depth", "2", *QUICK]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (run / "model/denoiser/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert main(["export", "--model", f"{run}/model", "--output_dir", f"{run}/bundle", *BAKE]) == 0
    assert "nothing to do" in capsys.readouterr().out
    evaluate = ["eval", "--reference", str(picture_folder), "--held_out_fraction", "0.25", "--model", f"{run}/model"]
    assert main([*evaluate, "--num_samples", "20", "--output_dir", f"{run}/eval"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    message = error_of(["prior", "--run", str(run), "--width", "64", "--depth", "2", *QUICK], capsys)
    assert "with width 32 where now it is 64" in message


def test_samples_continue_and_refuse_to_mix(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = run / "pictures"
    ninth = (pictures / "000009.png").read_bytes()
    (pictures / "000009.png").unlink()
    command = ["sample", "--model", f"{run}/model", "--output_dir", str(pictures)]
    assert main([*command, "--num_samples", "12", "--batch_size", "2"]) == 0
    assert (pictures / "000009.png").read_bytes() == ninth
    assert len(list(pictures.glob("*.png"))) == 12
    assert "seed 0, not 1" in error_of([*command, "--num_samples", "12", "--seed", "1"], capsys)


def test_resolution_of_samples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--model", f"{run}/model", "--output_dir", f"{tmp_path}/s", "--num_samples", "2"]
    assert "--resolution 0: must be at least 1" in error_of([*command, "--resolution", "0"], capsys)
    assert "no such scheduler" in error_of([*command, "--scheduler", "NoScheduler"], capsys)
    assert main([*command, "--resolution", "50"]) == 0
    with Image.open(tmp_path / "s/000001.png") as image:
        assert image.size == (50, 50)


def test_figures_stand_beside_their_controls(run: Path) -> None:
    metrics = json.loads((run / "eval/metrics.json").read_text())
    for name in ("psnr_train", "psnr_heldout", "psnr_pca_train", "psnr_pca_heldout", "psnr_mean_heldout"):
        assert 5 < metrics[name] < 60
    for name in ("fd_lite0", "fd_lite0_floor", "fd_lite0_gaussian", "nn_ratio", "nn_ratio_latents"):
        assert metrics[name] > 0
    assert metrics["fd_lite0_floor"] < metrics["fd_lite0"]
    assert metrics["protocol"]["samples"] == 20
    fit = json.loads((run / "metrics.json").read_text())
    assert metrics["psnr_train"] == pytest.approx(fit["psnr_train"], abs=1e-2)
    assert metrics["psnr_heldout_encoder"] == pytest.approx(fit["psnr_heldout_encoder"], abs=1e-2)


def test_eval_of_a_sample_folder(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    command = ["eval", "--samples", f"{run}/pictures", "--reference", str(picture_folder)]
    assert main([*command, "--output_dir", f"{tmp_path}/eval"]) == 0
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert "fd_lite0" in metrics
    assert "psnr_train" not in metrics


def test_eval_of_a_bundle_is_that_of_its_model(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    command = ["eval", "--bundle", f"{run}/bundle", "--reference", str(picture_folder), "--num_samples", "20"]
    assert main([*command, "--output_dir", f"{tmp_path}/eval"]) == 0
    metrics, expected = (json.loads((path / "eval/metrics.json").read_text()) for path in (tmp_path, run))
    assert metrics["protocol"]["samples"] == 20
    assert metrics["fd_lite0"] == pytest.approx(expected["fd_lite0"], rel=1e-2)


def test_encode_new_pictures(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    command = ["encode", "--model", f"{run}/model", "--data", str(picture_folder), "--refinement_steps", "5"]
    for batch_size in ("7", "48"):
        assert main([*command, "--batch_size", batch_size, "--output_dir", f"{tmp_path}/{batch_size}"]) == 0
    a, b = (LatentTable.load(tmp_path / size / "latents.safetensors") for size in ("7", "48"))
    torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=0)
    assert a.fingerprint == LatentTable.load(run / "latents.safetensors").fingerprint
    metrics = json.loads((tmp_path / "7/metrics.json").read_text())
    assert len(metrics["psnr_per_instance"]) == 48


def test_auto_decoding_and_the_papers_form(picture_folder: Path, tmp_path: Path) -> None:
    command = ["fit", "--data", str(picture_folder), "--output_dir", f"{tmp_path}/run", *SMALL, *QUICK]
    paper = ["--cells", "1", "--mixing", "average", "--output_sine", "--method", "auto-decoding"]
    assert main([*command, *paper, "--refinement_steps", "20"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["fields_per_instance"] == 1
    assert "psnr_heldout_encoder" not in metrics
    curve = [row["psnr_train"] for row in read_metrics_log(tmp_path / "run/metrics.jsonl") if "psnr_train" in row]
    assert curve[-1] > curve[0] + 1
    assert main(["prior", "--run", f"{tmp_path}/run", "--width", "32", "--objective", "flow", *QUICK]) == 0
    assert (
        main(["sample", "--model", f"{tmp_path}/run/model", "--num_samples", "2", "--output_dir", f"{tmp_path}/s"])
        == 0
    )


def test_bad_data_is_named_and_leaves_nothing(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    fit = ["fit", "--output_dir", f"{tmp_path}/run"]
    assert "found nothing" in error_of([*fit, "--data", f"{tmp_path}/empty"], capsys)
    (tmp_path / "cut").mkdir()
    whole = (picture_folder / "000.png").read_bytes()
    (tmp_path / "cut/a.png").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"cut/a\.png: unreadable picture", error_of([*fit, "--data", f"{tmp_path}/cut"], capsys))
    assert "--resolution 0" in error_of([*fit, "--data", f"{tmp_path}/cut", "--resolution", "0"], capsys)
    assert "zigzag" in error_of([*fit, "--data", f"{tmp_path}/cut", "--lr_scheduler", "zigzag"], capsys)
    assert not (tmp_path / "run").exists()


def test_nothing_held_out(picture_folder: Path, tmp_path: Path) -> None:
    folder = f"{tmp_path}/run"
    fit = ["fit", "--data", str(picture_folder), "--output_dir", folder, "--held_out_fraction", "0", *SMALL, *QUICK]
    assert main(fit) == 0
    assert main(["prior", "--run", folder, "--width", "32", *QUICK]) == 0
    evaluate = ["eval", "--model", f"{folder}/model", "--reference", str(picture_folder), "--num_samples", "20"]
    assert main([*evaluate, "--output_dir", f"{folder}/eval"]) == 0
    metrics = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert "psnr_train" in metrics
    assert not {"psnr_heldout", "nn_ratio"} & metrics.keys()
    assert main(["report", "--run", folder]) == 0


def test_model_folder_that_lacks_a_stage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "model/decoder", tmp_path / "model/decoder")
    message = error_of(["sample", "--model", f"{tmp_path}/model", "--output_dir", f"{tmp_path}/out"], capsys)
    assert "has no denoiser; `mnif prior` makes it" in message
    assert not (tmp_path / "out").exists()


def test_latents_of_another_decoder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    table = LatentTable.load(run / "latents.safetensors")
    table.fingerprint = "0" * 64
    table.save(tmp_path / "run/latents.safetensors")
    message = error_of(["prior", "--run", f"{tmp_path}/run", "--width", "32", "--depth", "2", *QUICK], capsys)
    assert "belong to decoder 000000000000" in message


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_continues(picture_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mnif", "fit", "--data", str(picture_folder), "--output_dir", str(run), *SMALL]
    command += ["--max_train_steps", "200", "--compile", "off", "--train_batch_size", "16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues" in output
    (checkpoint,) = (run / "checkpoints/fit").glob("checkpoint-*")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"resuming from {checkpoint}" in done.stdout
    whole = [*command[: command.index(str(run))], str(tmp_path / "whole"), *command[command.index(str(run)) + 1 :]]
    subprocess.run(whole, capture_output=True, check=True, env=environment)
    weights = [folder / "model/decoder/diffusion_pytorch_model.safetensors" for folder in (run, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_report_of_a_bundle_that_is_no_whole_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    unfinished = {"schema": "unfinished", "decoder_fingerprint": "", "files": {}}
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(unfinished))
    command = ["report", "--run", str(run), "--bundle", f"{tmp_path}/bundle", "--output", f"{tmp_path}/report.html"]
    assert "the export was stopped half-way; run `mnif export` again" in error_of(command, capsys)
    assert not (tmp_path / "report.html").exists()


def test_two_processes_learn_what_one_does(picture_folder: Path, tmp_path: Path) -> None:
    """The same batches, split over gloo processes, with everything that is random in 20 steps of each stage."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    steps = ["--max_train_steps", "20", "--train_batch_size", "16", "--compile", "off"]
    random = ["--latent_noise", "0.3", "--random_flip", "--random_colours", "--stride", "2"]
    for processes in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "-m", "--", "mnif"]
        folder = str(tmp_path / processes)
        fit = ["fit", "--data", str(picture_folder), "--output_dir", folder, *SMALL, *random, *steps]
        done = subprocess.run([*launch, *fit], check=True, capture_output=True, env=environment, text=True)
        assert done.stdout.count("pictures to train") == 1  # one of the processes speaks: they know of each other
        if processes == "2":  # rounding of the first stage would come on top
            for name in ("model", "latents.safetensors"):
                shutil.move(tmp_path / "2" / name, tmp_path / f"fit-{name}")
                copy = shutil.copytree if name == "model" else shutil.copy
                copy(tmp_path / "of-one" / name, tmp_path / "2" / name)
        else:
            shutil.copytree(tmp_path / "1", tmp_path / "of-one")
        prior = ["prior", "--run", folder, "--width", "32", "--dropout", "0.2", "--latent_noise", "0.1", *steps]
        distill = ["distill", "--run", folder, "--width", "32", "--num_pairs", "256", "--dropout", "0.2", *steps]
        distill += ["--matching_steps", "3"]
        for command in (prior, distill):
            subprocess.run([*launch, *command], check=True, capture_output=True, env=environment)
    weights = "diffusion_pytorch_model.safetensors"
    for one, two in (
        (tmp_path / "1/model/decoder", tmp_path / "fit-model/decoder"),
        (tmp_path / "1/model/encoder", tmp_path / "fit-model/encoder"),
        (tmp_path / "1/model/denoiser", tmp_path / "2/model/denoiser"),
        (tmp_path / "1/model/student", tmp_path / "2/model/student"),
    ):
        expected, found = load_file(one / weights), load_file(two / weights)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=f"{one.name}: {name}")


def test_report_is_self_contained_and_renders_in_a_browser(run: Path, tmp_path: Path) -> None:
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for command in ("fit", "prior", "sample", "export", "eval", "report"):
        assert re.search(rf"\b{command}\b", page[page.index('id="commands"') :])
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [browser, *flags, "--window-size=1200,2400", f"--screenshot={picture}", (run / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    assert (pixels[:1200].std(axis=(0, 1)) > 10).all()
