"""What can only be tested on a CUDA device; skips with a reason elsewhere."""

import json
from pathlib import Path

import pytest
import torch

from latent_prior.fixed_sampler import FixedSampler
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.models import field_torch
from mnif.models.field_op import field_errors, field_values
from mnif.models.mnif_model import MNIFModel
from tests.mnif.test_field_op import SHAPES, plain_values, random_rows

# Every kernel is compiled for each of them, some seconds long.
field_shapes = [
    *("cells of width 24", "voxels, points of their own", "a single point", "width 64, as in the paper"),
]

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
    sizes, output_sine, fields, sets, points = SHAPES[name]
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


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 0.02), ("bf16", 0.2)])
def test_kernels_of_less_precision_are_near(precision: str, bound: float) -> None:
    pytest.importorskip("triton")
    sizes, output_sine, fields, sets, points = SHAPES["cells of width 24"]
    torch.manual_seed(0)
    coordinates, rows = torch.rand(sets, points, sizes[0], device="cuda") * 2 - 1, random_rows(fields, sizes).cuda()
    expected = plain_values(coordinates.double(), rows.double(), sizes, output_sine)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            found = field_values(coordinates, rows, sizes, output_sine)
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-6 < (found - expected).abs().max() / expected.abs().max() < bound


def test_fields_without_a_kernel_are_compiled() -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    for fields, points in ((3, 50), (5, 70)):
        rows, coordinates = random_rows(fields, (2, 160, 160, 3)), torch.rand(1, points, 2)
        found = []
        for device, function in (("cuda", field_torch.compiled_values), ("cpu", plain_values)):
            parameters = rows.to(device).requires_grad_()
            values = function(coordinates.to(device), parameters, (2, 160, 160, 3), True)
            (gradient,) = torch.autograd.grad(values.square().sum(), parameters)
            found.append((values.detach().cpu(), gradient.cpu()))
        for ours, cpus in zip(*found, strict=True):
            assert (ours - cpus).abs().max() <= 1e-5 * cpus.abs().max()
    assert not field_torch._failed


@pytest.mark.parametrize("steps", [1, 8])
def test_a_cuda_graph_draws_what_the_pipeline_draws(pipeline: MNIFPipeline, steps: int) -> None:
    pipeline.to("cuda")
    draw, noise = FixedSampler(pipeline, 2, steps), torch.randn(2, 2, 12)
    drawn = [draw(each) for each in noise]
    for each, pictures in zip(noise, drawn, strict=True):
        expected = pipeline(latents=each, num_inference_steps=steps, output_type="pt").images
        torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card at most")
def test_a_second_card_works_while_the_first_is_current() -> None:
    coordinates, rows = torch.rand(1, 40, 2), random_rows(3, (2, 24, 24, 3))
    found = field_values(coordinates.to("cuda:1"), rows.to("cuda:1"), (2, 24, 24, 3), False)
    torch.testing.assert_close(found.cpu(), plain_values(coordinates, rows, (2, 24, 24, 3), False), atol=1e-5, rtol=0)


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
