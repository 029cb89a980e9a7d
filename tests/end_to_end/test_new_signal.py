"""A signal of one's own: examples/audio_signal.py, driven as docs/new_signal.md says."""

import importlib.util
import json
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals import registry
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "audio_signal.py"
LENGTH, RATE = 512, 4000


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example as a module; importing it makes its signal known, to the end of these tests."""
    known = dict(registry._REGISTERED)
    specification = importlib.util.spec_from_file_location("audio_signal", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    registry._REGISTERED.clear()
    registry._REGISTERED.update(known)


def write_clip(path: Path, values: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(path), "wb") as clip:
        clip.setparams((channels, width, rate, 0, "NONE", ""))
        clip.writeframes((values * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}").tobytes())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 tones that glide from one pitch between 30 and 90 Hz to another, a little longer than is asked for."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    time = np.arange(LENGTH + 88) / RATE
    for index in range(160):
        start, end = generator.uniform(30, 90, 2)
        turns = start * time + (end - start) * time**2 / (2 * time[-1])
        write_clip(folder / f"{index:03d}.wav", generator.uniform(0.4, 0.9) * np.sin(2 * np.pi * turns))
    return folder


@pytest.fixture(scope="module")
def run(example: ModuleType, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fit through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "clips"
    data = ["--signal", "audio", "--data", str(clips), "--resolution", str(LENGTH), "--held_out_fraction", "0.2"]
    model = ["--cells", "4", "--num_bases", "16", "--width", "16", "--depth", "1", "--latent_dim", "16"]
    training = ["--max_train_steps", "300", "--train_batch_size", "32", "--encoder_width", "128", "--compile", "off"]
    assert example.main(["fit", *data, *model, *training, "--output_dir", str(folder), "--latent_noise", "0.1"]) == 0
    return folder


def test_its_data_are_recognized(example: ModuleType, clips: Path, tmp_path: Path) -> None:
    assert detect_signal(str(clips)) == "audio"
    (tmp_path / "cover.png").touch()
    assert detect_signal(str(tmp_path)) == "image"
    (tmp_path / "a.WAV").touch()
    assert detect_signal(str(tmp_path)) == "audio"  # signals of one's own are heard first


def psnr_of_silence(example: ModuleType, clips: Path) -> float:
    """Mean PSNR in dB of predicting zero, with a peak of 2."""
    samples = example.load_audio(str(clips), LENGTH).samples / 32768
    return float(np.mean(10 * np.log10(4 / np.square(samples).mean(axis=1))))


def test_fields_of_sound_beat_silence(example: ModuleType, clips: Path, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    silence = psnr_of_silence(example, clips)
    assert 10 < silence < 16
    assert metrics["psnr_train"] > silence + 12
    assert metrics["psnr_heldout"] > silence + 12
    config = MNIFModel.load_config(run / "model/decoder")
    assert (config["signal"], config["dimensions"], config["channels"]) == ("audio", 1, 1)
    assert config["signal_settings"] == {"resolution": LENGTH, "channels": 1, "stride": 1, "rate": RATE}
    with Image.open(run / "samples/reconstructions.png") as sheet:
        assert sheet.size[1] > 3 * 64


@pytest.mark.slow
def test_encode_runs_in_the_examples_process_and_only_there(
    example: ModuleType, clips: Path, run: Path, tmp_path: Path
) -> None:
    encode = ["encode", "--model", f"{run}/model", "--data", str(clips), "--output_dir", f"{tmp_path}/latents"]
    subprocess.run([sys.executable, str(EXAMPLE), *encode], check=True, capture_output=True)
    metrics = json.loads((tmp_path / "latents/metrics.json").read_text())
    assert metrics["psnr"] > psnr_of_silence(example, clips) + 12
    table = LatentTable.load(tmp_path / "latents/latents.safetensors")
    assert table.latents.shape == (160, 16)
    plain = subprocess.run([sys.executable, "-m", "mnif", *encode], capture_output=True, text=True)
    assert plain.returncode == 2
    assert "signal 'audio': must be one of image, radiance, voxels" in plain.stderr


def test_waveforms_are_drawn_where_the_sound_is(example: ModuleType) -> None:
    values = torch.sin(torch.linspace(0, 2 * torch.pi, 600))[None, :, None]
    (picture,) = example._waveforms(values)
    assert picture.shape == (64, 128, 3)
    inked = (picture < 255).any(axis=2)
    assert inked.any(axis=0).all()
    heights = 1 - 2 * inked.argmax(axis=0) / 63
    np.testing.assert_allclose(heights, np.sin(np.linspace(0, 2 * np.pi, 128)), atol=0.08)


def test_unusable_clips_are_named(example: ModuleType, tmp_path: Path) -> None:
    tone = np.sin(np.arange(1200) / 9)

    def refusal(length: int = 400) -> str:
        with pytest.raises(UserError) as error:
            example.load_audio(str(tmp_path), length)
        (path := tmp_path / "b.wav").unlink(missing_ok=True)
        return str(error.value).replace(str(path), "b.wav")

    assert "no folder with .wav files" in refusal()
    write_clip(tmp_path / "a.wav", tone)
    assert example.load_audio(str(tmp_path), 1200).samples.shape == (1, 1200)
    assert "a.wav: 1200 samples where 1300 are needed" in refusal(1300)
    write_clip(tmp_path / "b.wav", tone, channels=2)
    assert refusal() == "b.wav: 2 channel(s) of 16 bits; one channel of 16 bits is needed"
    write_clip(tmp_path / "b.wav", tone, width=4)
    assert refusal() == "b.wav: 1 channel(s) of 32 bits; one channel of 16 bits is needed"
    write_clip(tmp_path / "b.wav", tone, rate=8000)
    assert refusal() == "b.wav: 8000 samples a second where a.wav has 4000; resample it"
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    assert re.match(r"b\.wav: not a readable WAV file \(.*\); remove or replace it", refusal())
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:900])
    assert "b.wav: 428 samples where 1000 are needed" in refusal(1000)
