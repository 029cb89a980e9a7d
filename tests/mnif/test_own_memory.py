"""Loaded numbers lie where PyTorch would put them, wherever they lie in their file."""

from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from latent_prior.denoisers import PaperDenoiser, ResMLPDenoiser, TransformerDenoiser
from mnif.latents.inner_loop import InnerLoop
from mnif.latents.table import LatentTable
from mnif.models.encoders import PatchEncoder, TokenEncoder, ViewsEncoder
from mnif.models.mnif_model import MNIFModel

ALIGNMENT = 64  # bytes, of PyTorch's memory on a CPU


@pytest.mark.parametrize("settings", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}])
@pytest.mark.parametrize(
    "component",
    [
        MNIFModel(resolution=8, num_bases=3, width=5, depth=1, latent_dim=7, cells=1),
        MNIFModel(resolution=8, num_bases=3, width=5, depth=1, latent_dim=12, cells=4, tokens=2),
        PatchEncoder(resolution=8, latent_dim=7),
        TokenEncoder(resolution=8, latent_dim=8, tokens=2, width=32),
        ViewsEncoder(resolution=8, latent_dim=7),
        InnerLoop(latent_dim=7),
        ResMLPDenoiser(latent_dim=7, width=9, depth=1),
        PaperDenoiser(latent_dim=7, width=32, depth=2),
        TransformerDenoiser(latent_dim=6, num_tokens=3, width=9, depth=1),
    ],
    ids=lambda component: type(component).__name__,
)
def test_components(component: ModelMixin, settings: dict[str, object], tmp_path: Path) -> None:
    component.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    for characters in range(8, 72, 8):
        save_file(load_file(path), path, {"format": "pt", "note": "x" * characters})
        loaded = type(component).from_pretrained(tmp_path, **settings)
        addresses = {name: tensor.data_ptr() % ALIGNMENT for name, tensor in loaded.state_dict().items()}
        assert not any(addresses.values()), addresses
        kind = settings.get("torch_dtype", torch.float32)
        for name, tensor in component.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.to(kind))


def test_loading_report_is_handed_on(tmp_path: Path) -> None:
    InnerLoop(latent_dim=7).save_pretrained(tmp_path)
    loaded, report = InnerLoop.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.rates.shape == (7,)
    assert report["missing_keys"] == []


def test_latent_tables(tmp_path: Path) -> None:
    for characters in range(16):
        ids = [f"{row}{'x' * characters}" for row in range(3)]
        table = LatentTable(torch.randn(3, 5), ids, torch.zeros(3, dtype=torch.bool), "f" * characters, "data")
        table.save(tmp_path / "latents.safetensors")
        loaded = LatentTable.load(tmp_path / "latents.safetensors")
        assert loaded.latents.data_ptr() % ALIGNMENT == 0
        assert torch.equal(loaded.latents, table.latents)
