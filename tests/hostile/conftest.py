"""One small model, run, bundle and data set that every damaged file is a copy of, and what must hold for each."""

import json
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.device.bundle import BundleError
from latent_prior.diffusion import student_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.latents.table import LatentTable
from mnif.utils.errors import UserError
from tests.conftest import small_decoder, small_pipeline

MOST_MEGABYTES = 1500
MOST_SECONDS = 20


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no answer in {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    """What a module's damaged files take at most, beyond what the process has before."""
    before = _resident()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak < before + MOST_MEGABYTES


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.fixture(autouse=True)
def _nothing_half_written(tmp_path: Path) -> Iterator[None]:
    yield
    left = list(tmp_path.rglob(".*.tmp"))
    shutil.rmtree(tmp_path)  # hundreds of copies
    assert not left


def refusal_of(read: Callable[[], Any]) -> str | None:
    """The one line that a file is refused with; None if it is accepted. Any other error is a fault."""
    refusal = None
    try:
        read()
    except (UserError, BundleError) as error:
        refusal = str(error)
    assert refusal is None or (refusal.strip() and "\n" not in refusal and len(refusal) < 3000)
    return refusal


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the commands leave it, and data of every kind beside it."""
    folder = tmp_path_factory.mktemp("whole")
    pipeline = small_pipeline(small_decoder())
    student = small_pipeline(small_decoder()).denoiser
    student.register_to_config(distilled_steps=[1])
    whole = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, student_scheduler())
    whole.save_pretrained(folder / "model")
    held_out = torch.arange(10) < 3
    table = LatentTable(
        torch.randn(10, 12), [f"a/{i}" for i in range(10)], held_out, pipeline.decoder.fingerprint(), "x"
    )
    table.save(folder / "latents.safetensors")
    _write_records(folder)
    _write_data(folder / "data")
    return folder


def _write_records(folder: Path) -> None:
    stage = {"command": "mnif fit", "arguments": {"seed": "0"}, "inputs": {"data_fingerprint": "a"}, "finished": True}
    figures = {"decoder_parameters": 7, "fields_per_instance": 4, "field_parameters": 9, "seconds": 1.5}
    prior = {"denoiser_parameters": 3, "seconds": 2.0, "peak_rss_mb": 300.0}
    evaluation = {
        "psnr_heldout": 20.5,
        "psnr_heldout_std": 0.5,
        "nn_ratio": 0.9,
        "protocol": {"samples": 10, "seed": 0},
        "inputs": {"seed": "0"},
        "warnings": ["few samples"],
        "command": "mnif eval",
    }
    files = {
        "run.json": {"fit": stage, "prior": stage},
        "metrics.json": figures | {"peak_rss_mb": 200.0, "psnr_heldout": 20.0, "prior": prior},
        "eval/metrics.json": evaluation,
        "other/metrics.json": evaluation | {"psnr_heldout": 21.5},
        "preset.json": {"about": "a", "arguments": {"num_bases": 8, "resolution": [16], "method": "encoder"}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1))
    rows = [{"stage": "fit", "step": step, "seconds": 0.1 * step, "loss": 1 / (step + 1)} for step in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_data(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    grids = np.zeros((3, 8, 8, 8), dtype=np.uint8)
    grids[:, 2:6, 2:5, 3:7] = 1
    np.save(folder / "images.npy", images)
    np.savez_compressed(folder / "images.npz", images=images, ids=[f"p{i}" for i in range(4)], unused=np.zeros(9))
    np.save(folder / "voxels.npy", grids)
    np.savez(folder / "voxels.npz", voxels=grids)
    for name in ("pictures", "jpegs"):
        (folder / name).mkdir()
    Image.fromarray(images[0]).save(folder / "pictures/a.png")
    Image.fromarray(images[1].repeat(4, 0).repeat(4, 1)).save(folder / "jpegs/a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08")
    (folder / "shards").mkdir()

    def untimed(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = 0
        return member

    with tarfile.open(folder / "shards/a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder / "pictures/a.png", "a.png", filter=untimed)
        archive.add(
            folder / "jpegs/a.jpg", f"{'b' * 120}.jpg", filter=untimed
        )  # a name that needs a header of its own


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a file or folder of the run to be damaged."""

    def copy(name: str) -> Path:
        source, target = made / name, tmp_path / "copy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target))

    return copy
