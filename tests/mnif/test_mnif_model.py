import math
from pathlib import Path

import pytest
import torch

from mnif.models.cell_grid import cell_grid
from mnif.models.mnif_model import MNIFModel


def reference_values(model: MNIFModel, latents: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """The broadcast form: mix whole networks as [fields, M, parameters], then evaluate them one by one."""
    values = []
    for alpha in model.coefficients(latents).flatten(0, 1):
        hidden = coordinates
        mixed = 0
        for index, shape in enumerate(model.shapes):
            if index < len(model.shared):
                row = model.shared[index][0]
            else:
                row = (alpha[mixed][:, None] * model.bases[mixed]).sum(0)
                row = row + (model.means[mixed][0] if model.means else 0)
                mixed += 1
            split = shape.inputs * shape.outputs
            hidden = hidden @ row[:split].view(shape.inputs, shape.outputs) + row[split:]
            if index + 1 < len(model.shapes) or model.config.output_sine:
                hidden = torch.sin(hidden)
        values.append(hidden)
    return torch.stack(values)


@pytest.mark.parametrize(("mixing", "cells", "output_sine"), [("delta", 2, False), ("average", 1, True)])
def test_baked_fields_equal_the_broadcast_form(mixing: str, cells: int, output_sine: bool) -> None:
    torch.manual_seed(0)
    model = MNIFModel(num_bases=5, width=8, depth=2, latent_dim=7, cells=cells, mixing=mixing, output_sine=output_sine)
    model.double()
    torch.nn.init.normal_(model.coefficient_map.weight)
    latents = torch.randn(3, 7, dtype=torch.float64)
    coordinates = torch.rand(11, 2, dtype=torch.float64) * 2 - 1
    field = model.bake(model.coefficients(latents))
    expected = reference_values(model, latents, coordinates)
    torch.testing.assert_close(field(coordinates[None]), expected, atol=1e-10, rtol=0)


def test_paper_form_is_one_field_on_pixel_centres_with_all_layers_mixed() -> None:
    model = MNIFModel(resolution=8, num_bases=5, width=8, depth=2, cells=1, mixing="average", output_sine=True)
    assert len(model.bases) == 4  # depth + 2 linear layers
    latents = torch.randn(2, 128)
    centres = (torch.arange(8) + 0.5) / 4 - 1
    coordinates = torch.cartesian_prod(centres, centres)
    expected = model.bake(model.coefficients(latents))(coordinates[None]).view(2, 8, 8, 3)
    torch.testing.assert_close(model(latents), expected)
    assert model(latents).abs().max() <= 1


@pytest.mark.parametrize("mixing", ["delta", "average"])
@pytest.mark.parametrize("num_bases", [1, 16, 256])
def test_field_is_alive_at_the_start_whatever_the_number_of_bases(mixing: str, num_bases: int) -> None:
    """Each mixed hidden layer keeps the SIREN scale, std sqrt(2 / in) with the frequency folded in."""
    torch.manual_seed(0)
    model = MNIFModel(num_bases=num_bases, width=64, depth=2, cells=1, mixing=mixing, omega=30.0)
    field = model.bake(model.coefficients(torch.randn(4, 128)))
    for weight, _ in field.layers()[1:-1]:
        assert weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    grid = cell_grid(32, 1, 0.0)
    assert field(grid.coordinates).std() > 0.01


def test_decoding_shows_the_same_picture_at_every_resolution(decoder: MNIFModel) -> None:
    latents = torch.randn(2, 12)
    fine = decoder(latents, 192)
    coarse = decoder(latents, 64)
    torch.testing.assert_close(fine[:, 1::3, 1::3], coarse, atol=1e-5, rtol=0)  # every third centre coincides
    odd = decoder(latents, 37)
    assert odd.shape == (2, 37, 37, 3)


def test_an_instance_does_not_depend_on_its_batch(decoder: MNIFModel) -> None:
    latents = torch.randn(5, 12)
    torch.testing.assert_close(decoder(latents)[3:4], decoder(latents[3:4]), atol=1e-6, rtol=0)


def test_fingerprint_follows_weights_and_settings(decoder: MNIFModel) -> None:
    before = decoder.fingerprint()
    assert before == decoder.fingerprint()
    with torch.no_grad():
        decoder.bases[0][0, 0] += 1e-3
    assert decoder.fingerprint() != before


def test_saved_model_loads_the_same(decoder: MNIFModel, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path)
    loaded = MNIFModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.fingerprint() == decoder.fingerprint()


@pytest.mark.parametrize("setting", [{"mixing": "sum"}, {"overlap": 0.7}])
def test_unknown_settings_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        MNIFModel(**setting)
