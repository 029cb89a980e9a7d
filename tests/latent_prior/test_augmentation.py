"""Priors that learn mirrored and recoloured instances too: the changes, their latents, and what is told of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_prior.augmentation import changed_instances
from latent_prior.denoisers import Denoiser, PaperDenoiser, ResMLPDenoiser, TransformerDenoiser
from latent_prior.diffusion import UNCHANGED, DenoisingLoss, sampling_scheduler
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import sample_latents
from mnif.cli import main
from mnif.data.batches import InstanceGenerator, instance_keys
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal
from mnif.signals.image import Image
from mnif.signals.voxels import Voxels

SMALL = ["--resolution", "16", "--latent_dim", "12", "--width", "8", "--num_bases", "6", "--encoder_width", "16"]
QUICK = ["--max_train_steps", "4", "--train_batch_size", "16", "--compile", "off"]


@pytest.mark.parametrize("signal", [Image(4, 3), Image(4, 1), Voxels(4)])
def test_changes_are_what_augmentations_make(signal: GridSignal) -> None:
    values = torch.rand(1, *[4] * signal.dimensions, signal.channels)
    seen = signal.on_grid(values.expand(200, *values.shape[1:]))
    assert signal.changes().keys() == signal.augmentations().keys()
    for flag, augmentation in signal.augmentations().items():
        made = augmentation(seen, InstanceGenerator(instance_keys(0, 0, torch.arange(200)))).values
        known = torch.cat([values, *(change(signal.on_grid(values)).values for change in signal.changes()[flag])])
        same = (made[:, None] == known[None]).flatten(2).all(dim=2)
        assert (same.sum(dim=1) == 1).all()  # each is one of them, all of which differ
        assert same.any(dim=0).all()  # and each of them is made


class Obedient(Denoiser):
    """Predicts the number it is told, zero if it is told zero."""

    def __init__(self) -> None:
        super().__init__(5)
        self.register_to_config(time_width=5)
        self.told: list[torch.Tensor] = []

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        generator: InstanceGenerator | None = None,
        told: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert told is not None
        self.told.append(told)
        return told


def test_the_denoiser_is_told_how_a_latent_was_changed() -> None:
    numbers = torch.arange(1.0, 4.0)[:, None].expand(3, 5)  # of three ways; the instance as it is has zeros
    loss = DenoisingLoss(Obedient(), "x0", num_changes=3)
    loss.change_embedding.data.copy_(numbers)
    key = instance_keys(0, 0, torch.arange(8000))
    assert loss(torch.zeros(8000, 5), key, changed=numbers.expand(8000, 3, 5)).item() == 0
    shares = torch.bincount(loss.denoiser.told[0][:, 0].long(), minlength=4) / 8000
    torch.testing.assert_close(shares, torch.tensor([UNCHANGED] + 3 * [(1 - UNCHANGED) / 3]), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "denoiser", [ResMLPDenoiser(6, 16, 1), PaperDenoiser(6, 32, 2), TransformerDenoiser(6, 3, 16, 1)]
)
def test_told_zeros_is_untold(denoiser: Denoiser) -> None:
    torch.manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sample, zeros = torch.randn(3, 6), torch.zeros(3, denoiser.config.time_width)
    torch.testing.assert_close(denoiser(sample, 500.0, None, zeros), denoiser(sample, 500.0))
    assert (denoiser(sample, 500.0, None, zeros + 1) - denoiser(sample, 500.0)).abs().max() > 1e-2


@pytest.fixture(scope="module")
def fitted(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("changes") / "run"
    flags = [*SMALL, *QUICK, "--random_flip", "--random_colours"]
    assert main(["fit", "--data", str(picture_folder), "--output_dir", str(run), *flags]) == 0
    return run


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted, tmp_path / "run")
    return tmp_path / "run"


PRIOR = ["--width", "16", "--depth", "1", "--augment", *QUICK]


def test_latents_of_changed_instances(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load(run / "latents.safetensors")
    latents = changed_instances(run, decoder, table).latents(torch.device("cpu"))
    assert latents.shape == (len(table.train), 11, 12)
    encode = [
        "encode",
        "--model",
        f"{run}/model",
        "--data",
        str(picture_folder),
        "--mirror",
        "--refinement_steps",
        "0",
    ]
    assert main([*encode, "--output_dir", f"{tmp_path}/mirrored"]) == 0
    mirrored = LatentTable.load(tmp_path / "mirrored/latents.safetensors")
    rows = mirrored.rows_of([id for id, out in zip(table.ids, table.held_out, strict=True) if not out], tmp_path)
    is_mirrored = [torch.allclose(latents[:, way], mirrored.latents[rows], atol=1e-5) for way in range(11)]
    assert sum(is_mirrored) == 1
    assert (latents[:, :, None] - latents[:, None]).abs().amax(dim=(0, 3)).fill_diagonal_(1).min() > 1e-4


def test_what_is_learned_of_changes_stays_out_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prior", "--run", str(run), *PRIOR]) == 0
    assert "also changed in 11 ways" in capsys.readouterr().out
    denoiser = load_pipeline(run / "model").denoiser
    plain = ResMLPDenoiser(12, 16, 1)
    assert denoiser.state_dict().keys() == plain.state_dict().keys()
    checkpoint = load_file(run / "checkpoints/prior/checkpoint-4/model.safetensors")
    assert checkpoint["change_embedding"].shape == (11, 128)
    assert checkpoint["change_embedding"].abs().min(dim=1).values.max() > 0


def test_a_stopped_prior_ends_with_the_same_weights(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "stopped")
    for folder in (run, tmp_path / "stopped"):
        assert main(["prior", "--run", str(folder), *PRIOR, "--checkpointing_steps", "2"]) == 0
    stopped = tmp_path / "stopped"
    shutil.rmtree(stopped / "checkpoints/prior/checkpoint-4")
    record = json.loads((stopped / "run.json").read_text())
    record["prior"]["finished"] = False
    (stopped / "run.json").write_text(json.dumps(record))
    assert main(["prior", "--run", str(stopped), *PRIOR]) == 0
    weights = [load_file(folder / "model/denoiser/diffusion_pytorch_model.safetensors") for folder in (run, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_cannot_be_augmented_gets_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line_of(*flags: str) -> str:
        assert main(["prior", "--run", str(run), *PRIOR, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    extra = f"{run}/latents.safetensors"
    assert "--augment: of --extra_latents nobody knows how they were changed" in line_of("--extra_latents", extra)
    record = json.loads((run / "run.json").read_text())
    for flag in ("random_flip", "random_colours"):
        record["fit"]["arguments"][flag] = False
    (run / "run.json").write_text(json.dumps(record))
    assert f"--augment: `mnif fit` changed no picture of {run}, as by --random_flip" in line_of()
    record["fit"]["arguments"]["random_flip"], record["fit"]["inputs"]["data_fingerprint"] = True, "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    assert f"--augment: {record['fit']['arguments']['data']} is not what {run} learned from any more" in line_of()
    shutil.rmtree(run / "model/encoder")
    assert "encoder" in line_of()
    assert not (run / "model/denoiser").exists()


def test_changes_do_not_leak_into_samples(decoder: MNIFModel) -> None:
    """Instances lie near (1, 1, …), changed ones near (−1, −1, …), and most of what is learned is changed."""
    torch.manual_seed(0)
    denoiser = ResMLPDenoiser(12, 32, 1, decoder_fingerprint=decoder.fingerprint())
    loss = DenoisingLoss(denoiser, "x0", num_changes=1)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-3)
    for step in range(300):
        instances = 1 + 0.1 * torch.randn(128, 12)
        loss(instances, instance_keys(0, step, torch.arange(128)), changed=-instances[:, None]).backward()
        optimizer.step()
        optimizer.zero_grad()
    pipeline = MNIFPipeline(decoder, denoiser.eval(), sampling_scheduler("x0"))
    pipeline.set_progress_bar_config(disable=True)
    assert (sample_latents(pipeline, 0, range(256)).mean(dim=1) > 0.5).float().mean() > 0.98
