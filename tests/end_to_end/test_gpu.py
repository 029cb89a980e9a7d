"""What can only be tested on a CUDA device; skips with a reason elsewhere."""

import json
from pathlib import Path

import pytest
import torch

from mnif.cli import main
from mnif.models.field_op import field_errors, field_values
from mnif.models.mnif_model import MNIFModel
from tests.mnif.test_field_op import SHAPES, random_rows

field_shapes = {name: shape for name, shape in SHAPES.items() if len({*shape[0][1:-1]}) == 1 and shape[0][1] <= 64}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_decoder_on_a_gpu_equals_the_cpu(decoder: MNIFModel) -> None:
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    latents = torch.randn(3, 12)
    points = torch.rand(3, 40, 2) * 2 - 1
    with torch.no_grad():
        expected = decoder(latents), decoder.values_at(decoder.coefficients(latents), points)
        decoder.cuda()
        latents, points = latents.cuda(), points.cuda()
        found = decoder(latents), decoder.values_at(decoder.coefficients(latents), points)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", field_shapes)
def test_kernels_of_fields_equal_the_cpu(name: str) -> None:
    pytest.importorskip("triton")
    sizes, output_sine, fields, sets, points = field_shapes[name]
    torch.manual_seed(0)
    coordinates, rows = torch.rand(sets, points, sizes[0]) * 2 - 1, random_rows(fields, sizes)
    targets, weights = torch.randn(fields, points, sizes[-1]), torch.rand(sets, points)
    direction, found = torch.randn_like(rows), []
    for device in ("cuda", "cpu"):
        parameters = rows.to(device).requires_grad_()
        given = coordinates.to(device), parameters, targets.to(device), weights.to(device), sizes, output_sine
        errors = field_errors(*given)
        (gradient,) = torch.autograd.grad(errors.sum(), parameters, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction.to(device)).sum(), parameters)
        values = field_values(coordinates.to(device), parameters, sizes, output_sine)
        (by_values,) = torch.autograd.grad((values * targets.to(device)).sum(), parameters, create_graph=True)
        (second,) = torch.autograd.grad((by_values * direction.to(device)).sum(), parameters)
        found.append([tensor.detach().cpu() for tensor in (errors, gradient, product, values, by_values, second)])
    for ours, cpus in zip(*found, strict=True):
        assert (ours - cpus).abs().max() <= 1e-5 * cpus.abs().max()


@pytest.mark.parametrize("method", ["encoder", "auto-decoding", "meta"])
def test_every_way_of_learning_runs_on_a_gpu(method: str, picture_folder: Path, tmp_path: Path) -> None:
    size = ["--resolution", "16", "--num_bases", "4", "--width", "8", "--latent_dim", "8", "--train_batch_size", "8"]
    command = ["fit", "--data", str(picture_folder), "--output_dir", f"{tmp_path}/run", "--method", method, *size]
    assert main([*command, "--max_train_steps", "5", "--refinement_steps", "2"]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["psnr_train"] > 0
    model, latents = ["--model", f"{tmp_path}/run/model"], f"{tmp_path}/encoded/latents.safetensors"
    steps = ["--refinement_steps", "2", "--output_dir", f"{tmp_path}/encoded"]
    assert main(["encode", *model, "--data", str(picture_folder), *steps]) == 0
    assert json.loads((tmp_path / "encoded/metrics.json").read_text())["psnr"] > 0
    assert main(["decode", *model, "--latents", latents, "--num", "2", "--output_dir", f"{tmp_path}/decoded"]) == 0
