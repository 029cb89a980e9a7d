import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_prior.commands.prior import add_prior
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import student_scheduler
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import CHUNK, initial_noise, sample_latents, slerp, step_generators
from latent_prior.schedulers import scheduler_by_name
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import check_output_type, decode_images, postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.meshes import mesh_from_values


def test_output_types_agree(pipeline: MNIFPipeline) -> None:
    noise = torch.randn(3, 12)
    pictures = {kind: pipeline(latents=noise, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert pictures["latent"].shape == (3, 12)
    assert pictures["np"].shape == (3, 16, 16, 3)
    torch.testing.assert_close(pictures["pt"].permute(0, 2, 3, 1), torch.from_numpy(pictures["np"]))
    np.testing.assert_array_equal(np.asarray(pictures["pil"][1]), (pictures["np"][1] * 255).round().astype(np.uint8))
    decoded = (pipeline.decoder(pictures["latent"]) / 2 + 0.5).clamp(0, 1).detach()
    torch.testing.assert_close(decoded, torch.from_numpy(pictures["np"]))


def test_the_example_in_the_docstring_runs() -> None:
    example = doctest.DocTestParser().get_doctest(str(MNIFPipeline.__call__.__doc__), {}, "call", None, None)
    assert len(example.examples) > 1
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


def test_generator_steps_resolution_and_return_dict(pipeline: MNIFPipeline) -> None:
    def draw(seed: int, **settings: object) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        (images,) = pipeline(2, generator, output_type="np", return_dict=False, **settings)
        return images

    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    assert not np.array_equal(draw(0), draw(0, num_inference_steps=3))
    assert draw(0, resolution=37).shape == (2, 37, 37, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_type": "jpg"},
        {"output_type": "mesh"},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"latents": torch.full((2, 12), torch.nan)},
        {"latents": torch.zeros(2, 11)},
        {"latents": torch.zeros(12)},
        {"truncation": -0.1},
        {"truncation": 1.5},
        {"use_student": True},
    ],
)
def test_settings_out_of_range_are_refused(pipeline: MNIFPipeline, settings: dict) -> None:
    with pytest.raises((ValueError, UserError), match=next(iter(settings))):
        pipeline(**settings)


def test_no_picture_is_made_of_what_is_not_finite(pipeline: MNIFPipeline) -> None:
    assert len(pipeline(num_inference_steps=1000).images) == 1
    pipeline.denoiser.write.bias.data[3] = torch.nan
    with pytest.raises(UserError, match=r"draws NaN or infinity with 8 steps of UniPC.*; take another"):
        pipeline()


def test_saved_pipeline_draws_the_same_in_a_fresh_process(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    expected = pipeline(generator=torch.Generator().manual_seed(3)).images[0]
    program = (
        "import sys, torch; from latent_prior.pipeline import MNIFPipeline; "
        "pipeline = MNIFPipeline.from_pretrained(sys.argv[1]); "
        "pipeline(generator=torch.Generator().manual_seed(3)).images[0].save(sys.argv[2])"
    )
    picture = tmp_path / "0.png"
    subprocess.run([sys.executable, "-c", program, tmp_path / "model", picture], check=True, capture_output=True)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_sample_depends_on_seed_and_number_alone(pipeline: MNIFPipeline) -> None:
    noise = initial_noise(7, range(5), 12)
    np.testing.assert_array_equal(initial_noise(7, [3], 12)[0], noise[3])
    together = pipeline(latents=torch.from_numpy(noise), output_type="latent").images
    alone = pipeline(latents=torch.from_numpy(noise[3:4]), output_type="latent").images
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DDPMScheduler"])
def test_samples_are_the_same_to_the_last_bit_in_whatever_company(pipeline: MNIFPipeline, scheduler: str) -> None:
    pipeline.scheduler = scheduler_by_name(scheduler, pipeline.scheduler)
    whole = sample_latents(pipeline, 7, range(3 * CHUNK), 4, truncation=0.9)
    assert whole.shape == (192, 12)
    for indices in (range(1), range(60, 70), range(100, 150), range(63, 129), [191, 3, 5], [150, 2, 149]):
        assert torch.equal(sample_latents(pipeline, 7, indices, 4, truncation=0.9), whole[[*indices]])
    assert not torch.allclose(sample_latents(pipeline, 8, range(1), 4), whole[:1])


def test_loading_names_what_is_missing(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        load_pipeline(tmp_path / "model")
    save_component(tmp_path / "model", "decoder", pipeline.decoder)
    with pytest.raises(UserError, match="has no denoiser; `mnif prior` makes it"):
        load_pipeline(tmp_path / "model")
    add_prior(tmp_path / "model", pipeline)
    load_pipeline(tmp_path / "model")
    with torch.no_grad():
        pipeline.decoder.bases[0].add_(0.1)
    save_component(tmp_path / "model", "decoder", pipeline.decoder)
    with pytest.raises(UserError, match="the denoiser was trained for decoder"):
        load_pipeline(tmp_path / "model")
    (tmp_path / "model/decoder/diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged component"):
        load_pipeline(tmp_path / "model")


def test_stochastic_samples_depend_on_their_own_generator_alone(pipeline: MNIFPipeline) -> None:
    def draw(indices: list[int], steps: int = 5) -> torch.Tensor:
        noise = torch.from_numpy(initial_noise(7, indices, 12))
        generators = step_generators(7, indices)
        return pipeline(generator=generators, latents=noise, num_inference_steps=steps, output_type="latent").images

    for name in ("DDPMScheduler", "SASolverScheduler"):
        pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
        together = draw([0, 1, 2, 3, 4])
        torch.testing.assert_close(draw([3]), together[3:4], atol=1e-5, rtol=0)
        torch.testing.assert_close(draw([4, 2]), together[[4, 2]], atol=1e-5, rtol=0)
        assert not torch.allclose(draw([3]), pipeline.denoiser.to_latents(torch.zeros(12)))
        noise = torch.from_numpy(initial_noise(7, [3], 12))
        other = pipeline(
            generator=step_generators(8, [3]), latents=noise, num_inference_steps=5, output_type="latent"
        ).images
        assert not torch.allclose(other, together[3:4], atol=1e-2)


def test_step_generators_are_independent_of_the_initial_noise() -> None:
    first, again, other = (step_generators(3, [index])[0] for index in (5, 5, 6))
    draws = [torch.randn(1000, generator=generator) for generator in (first, again, other)]
    assert torch.equal(draws[0], draws[1])
    noise = torch.from_numpy(initial_noise(3, [5], 1000)[0])
    for one, two in ((draws[0], draws[2]), (draws[0], noise)):
        assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1].item()) < 0.15


def test_truncation_draws_latents_towards_their_mean(pipeline: MNIFPipeline) -> None:
    noise = torch.randn(4, 12)
    whole, half, none = (
        pipeline(latents=noise, truncation=truncation, output_type="latent").images for truncation in (1.0, 0.5, 0.0)
    )
    mean = pipeline.denoiser.latent_mean
    torch.testing.assert_close(half - mean, (whole - mean) / 2)
    torch.testing.assert_close(none, mean.expand(4, 12))


def test_student_draws_in_the_steps_it_was_distilled_for(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    student = ResMLPDenoiser(
        latent_dim=12, width=16, depth=1, decoder_fingerprint=pipeline.decoder.fingerprint(), distilled_steps=[1, 2]
    )
    with torch.no_grad():
        student.write.bias.fill_(0.25)  # and nothing else: it draws 0.25 wherever it starts
    both = MNIFPipeline(
        pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student=student, student_scheduler=student_scheduler()
    )
    both.save_pretrained(tmp_path / "model")
    for drawing in (both, load_pipeline(tmp_path / "model")):
        drawing.set_progress_bar_config(disable=True)
        noise = torch.randn(2, 12)
        for steps in (1, 2):
            latents = drawing(latents=noise, num_inference_steps=steps, output_type="latent").images
            torch.testing.assert_close(latents, torch.full((2, 12), 0.25))
        for steps, use_student in ((3, None), (2, False)):
            expected = pipeline(latents=noise, num_inference_steps=steps, output_type="latent").images
            latents = drawing(
                latents=noise, num_inference_steps=steps, output_type="latent", use_student=use_student
            ).images
            torch.testing.assert_close(latents, expected)
        latents = drawing(latents=noise, num_inference_steps=4, output_type="latent", use_student=True).images
        torch.testing.assert_close(latents, torch.full((2, 12), 0.25))


def test_fingerprints_are_checked_wherever_a_pipeline_is_made(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    stranger = ResMLPDenoiser(latent_dim=12, width=16, depth=1, decoder_fingerprint="0" * 64)
    with pytest.raises(UserError, match="trained for decoder 000000000000"):
        MNIFPipeline(pipeline.decoder, stranger, pipeline.scheduler)
    with pytest.raises(UserError, match="trained for decoder 000000000000"):
        MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, stranger, student_scheduler())
    pipeline.save_pretrained(tmp_path / "model")
    MNIFPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)


def test_slerp_is_shoemakes() -> None:
    start, end = initial_noise(0, [0, 1], 50)
    way = slerp(start, end, np.linspace(0, 1, 5))
    np.testing.assert_allclose(way[[0, -1]], [start, end], rtol=1e-5, atol=1e-6)
    units = [(vector / np.linalg.norm(vector)).astype(np.float64) for vector in (start, end)]
    on_sphere = slerp(*units, np.linspace(0, 1, 5)).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(on_sphere, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.sum(on_sphere[1:] * on_sphere[:-1], axis=1), np.cos(np.arccos(units[0] @ units[1]) / 4), rtol=1e-5
    )
    np.testing.assert_allclose(slerp(start, start, np.array([0.3]))[0], start, rtol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_pictures_do_not_depend_on_how_many_are_decoded_at_once(
    decoder: MNIFModel, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("mnif.models.siren.can_evaluate", lambda *tensors: False)
    latents = torch.randn(16, 12)
    with torch.no_grad():
        whole = decoder(latents, 21)
        for at_once in (1, 3, 64):
            parts = [*decode_images(decoder, latents, 21, at_once)]
            assert max(len(part) for part in parts) == min(at_once, 16)
            assert torch.equal(torch.cat(parts), whole)
        monkeypatch.setattr("mnif.signals.outputs._POINTS_AT_ONCE", 400)
        torch.testing.assert_close(torch.cat([*decode_images(decoder, latents, 21)]), whole, atol=1e-4, rtol=0)


def test_forms_of_shapes() -> None:
    torch.manual_seed(0)
    decoder = MNIFModel(
        channels=1,
        dimensions=3,
        resolution=8,
        num_bases=4,
        width=8,
        depth=1,
        latent_dim=12,
        cells=1,
        signal="voxels",
        signal_settings={"resolution": 8},
    )
    latents = torch.randn(3, 12)
    with torch.no_grad():
        decoder.means[-1][:, -1] = 0  # the bias, so that values lie on both sides of 0
        volumes = postprocess(decoder, latents, "volume", 10)
        torch.testing.assert_close(torch.from_numpy(volumes), decoder(latents, 10)[..., 0])
        for volume, mesh, views in zip(
            volumes,
            postprocess(decoder, latents, "mesh", 10),
            postprocess(decoder, latents, "views", 10, 2),
            strict=True,
        ):
            assert mesh is not None
            np.testing.assert_array_equal(mesh[0], mesh_from_values(volume)[0])
            assert [view.size for view in views] == [(256, 256)] * 2
            assert not np.array_equal(*map(np.asarray, views))
        decoder.bases[-1].zero_()
        decoder.means[-1].copy_(torch.zeros_like(decoder.means[-1]))
        decoder.means[-1][:, -1] = -0.5
        assert postprocess(decoder, latents[:1], "mesh") == [None]  # nothing is above 0
        assert np.asarray(postprocess(decoder, latents[:1], "views", views=1)[0][0]).min() == 255
    with pytest.raises(ValueError, match="pil, np, pt, latent, volume, mesh, views"):
        check_output_type(signal_of_model(decoder), "video")


def test_forms_of_radiance_fields() -> None:
    torch.manual_seed(0)
    settings = {"channels": 4, "dimensions": 3, "num_bases": 4, "width": 8, "depth": 1, "latent_dim": 12, "cells": 1}
    decoder = MNIFModel(**settings, signal="radiance", signal_settings={"resolution": 16, "samples": 4})
    latents = torch.randn(2, 12)
    with torch.no_grad():
        assert postprocess(decoder, latents, "volume", 6).shape == (2, 6, 6, 6, 4)
        objects = postprocess(decoder, latents, "views", 12, 3)
        expected = signal_of_model(decoder).turntable(decoder, latents, 3, 20.0, 12)
        for views, pictures in zip(objects, expected, strict=True):
            difference = np.stack(views).astype(int) - pictures
            assert np.abs(difference).max() <= 1
        assert postprocess(decoder, latents, "np").shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match='"mesh": of the signal radiance choose'):
        check_output_type(signal_of_model(decoder), "mesh")
