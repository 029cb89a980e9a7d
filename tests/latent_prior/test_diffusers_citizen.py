"""What a user of diffusers does with a saved model: each test is a script with a real folder and the real library."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, SchedulerMixin
from diffusers.callbacks import PipelineCallback
from diffusers.utils import dynamic_modules_utils

from latent_prior import load_pipeline
from latent_prior.commands.distill import add_student
from latent_prior.commands.prior import add_prior
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.scheduler_table import linear_scheduler_table
from latent_prior.schedulers import scheduler_by_name
from mnif import load_model
from mnif.models.encoders import PatchEncoder
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.model_folders import sha256_of_model
from tests.conftest import small_decoder, small_pipeline
from tests.latent_prior.test_schedulers import assert_draws_the_gaussian, exact_pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with decoder, encoder, denoiser and student as the commands leave it; who changes it copies it."""
    folder = tmp_path_factory.mktemp("runs") / "emoji"
    model = folder / "model"
    pipeline = small_pipeline(small_decoder())
    save_component(model, "decoder", pipeline.decoder)
    save_component(model, "encoder", PatchEncoder(resolution=16, channels=3, latent_dim=12, patches=2, width=8))
    add_prior(model, pipeline)
    student = ResMLPDenoiser(12, 16, 1, decoder_fingerprint=pipeline.decoder.fingerprint(), distilled_steps=[1, 2])
    add_student(model, pipeline, student)
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# emoji\n")
    (model / "samples.png").write_bytes(b"a picture")
    (model / "profile").mkdir()
    for name in ("profile.json", "arrays.safetensors"):
        (model / "profile" / name).write_bytes(b"of held-out instances")
    return folder


@pytest.fixture
def model(run: Path) -> Path:
    return run / "model"


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code that diffusers copies out of model folders goes to a folder of the test."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = list(sys.path)
    yield
    sys.path[:] = before


def latents_of(pipeline: DiffusionPipeline, **options: object) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    return pipeline(latents=noise, **{"num_inference_steps": 4, "output_type": "latent"} | options).images


def drawn_by_mnif(model: Path) -> torch.Tensor:
    return latents_of(MNIFPipeline.from_pretrained(model))


# 1. The class of a pipeline that is not diffusers' own


@pytest.mark.parametrize("options", [{}, {"custom_pipeline": "pipeline"}, {"custom_pipeline": "FOLDER"}])
def test_diffusion_pipeline_loads_the_folder(model: Path, options: dict[str, str]) -> None:
    options = {name: str(model) if value == "FOLDER" else value for name, value in options.items()}
    pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **options)
    assert type(pipeline) is MNIFPipeline
    assert pipeline.student is not None
    assert torch.equal(latents_of(pipeline), drawn_by_mnif(model))
    assert torch.equal(
        latents_of(pipeline, num_inference_steps=1),
        latents_of(load_pipeline(model), use_student=True, num_inference_steps=1),
    )


def test_diffusion_pipeline_asks_before_it_runs_code(model: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(model)


def test_without_mnif_the_error_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "latent_prior.pipeline", None)
    with pytest.raises(ImportError, match="pip install mnif-diffusion"):
        DiffusionPipeline.from_pretrained(model, trust_remote_code=True)


def test_folders_of_earlier_versions_load(model: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(model, tmp_path / "old"))
    (old / "pipeline.py").unlink()
    index = json.loads((old / "model_index.json").read_text())
    (old / "model_index.json").write_text(json.dumps(index | {"_class_name": "MNIFPipeline"}))
    for name in ("denoiser", "student"):
        config = json.loads((old / name / "config.json").read_text())
        for entry in ("rounded_fingerprints", "prediction_type"):
            del config[entry]
        (old / name / "config.json").write_text(json.dumps(config))
    pipeline = MNIFPipeline.from_pretrained(old)
    assert torch.equal(latents_of(pipeline), drawn_by_mnif(model))
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler does not fit"):
        MNIFPipeline.from_pretrained(old, scheduler=sampling_scheduler("flow"))
    pipeline.save_pretrained(tmp_path / "new")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "new", trust_remote_code=True)) is MNIFPipeline


# 2. Other precisions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["fp16", None])
def test_half_precision_is_saved_and_loaded(model: Path, tmp_path: Path, dtype: torch.dtype, variant: str) -> None:
    pipeline = MNIFPipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.save_pretrained(tmp_path / "half", variant=variant)
    weights = "diffusion_pytorch_model.fp16.safetensors" if variant else "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half/decoder" / weights).stat().st_size < 0.7 * (
        model / "decoder/diffusion_pytorch_model.safetensors"
    ).stat().st_size
    expected = latents_of(MNIFPipeline.from_pretrained(model))
    loaded = [
        MNIFPipeline.from_pretrained(tmp_path / "half"),
        MNIFPipeline.from_pretrained(tmp_path / "half", variant=variant, torch_dtype=dtype),
        DiffusionPipeline.from_pretrained(tmp_path / "half", variant=variant, dtype=dtype, trust_remote_code=True),
    ]
    assert [one.decoder.dtype for one in loaded] == [torch.float32, dtype, dtype]
    for one in loaded:
        torch.testing.assert_close(latents_of(one).float(), expected, atol=0.05, rtol=0.05)
        assert np.isfinite(one(1, output_type="np").images).all()
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    loaded[0].to(dtype=other).save_pretrained(tmp_path / "again")  # rounded twice
    MNIFPipeline.from_pretrained(tmp_path / "again")


def test_default_and_variant_side_by_side(model: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    MNIFPipeline.from_pretrained(model).save_pretrained(both)
    MNIFPipeline.from_pretrained(model, torch_dtype=torch.float16).save_pretrained(both, variant="fp16")
    assert torch.equal(drawn_by_mnif(both), drawn_by_mnif(model))
    half = latents_of(MNIFPipeline.from_pretrained(both, variant="fp16"))
    assert not torch.equal(half, drawn_by_mnif(model))
    with pytest.raises(UserError, match="no weights of the variant int8"):
        MNIFPipeline.from_pretrained(both, variant="int8")


def test_a_wrong_decoder_is_refused_in_any_precision(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    stranger = MNIFModel(resolution=16, num_bases=6, width=8, depth=1, latent_dim=12, cells=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipeline = MNIFPipeline.from_pretrained(model, torch_dtype=dtype)
        pipeline.save_pretrained(tmp_path / "half")
        stranger.to(dtype).save_pretrained(tmp_path / "half/decoder")
        for load in (MNIFPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
            with pytest.raises(UserError, match="trained for decoder"):
                load(tmp_path / "half", trust_remote_code=True)
        with pytest.raises(UserError, match="trained for decoder"):
            pipeline.decoder = stranger
        assert pipeline.decoder is not stranger


def test_fingerprints_of_float32_are_as_they_were(model: Path) -> None:
    decoder = load_model(model)
    assert decoder.fingerprint() == json.loads((model / "denoiser/config.json").read_text())["decoder_fingerprint"]
    rounded = decoder.rounded_fingerprints()
    assert decoder.fingerprint() not in rounded
    assert rounded[0] != rounded[1]
    assert load_model(model).half().fingerprint() == rounded[0]
    assert load_model(model).bfloat16().half().bfloat16().fingerprint() == rounded[1]
    assert load_model(model).half().bfloat16().half().fingerprint() == rounded[2]


# 3. Everything is kept


def test_save_pretrained_keeps_everything(model: Path, tmp_path: Path) -> None:
    for number, load in enumerate((MNIFPipeline.from_pretrained, DiffusionPipeline.from_pretrained)):
        saved = tmp_path / str(number)
        load(model, trust_remote_code=True).save_pretrained(saved)
        names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (model, saved)]
        assert names[0] == names[1]
        for name in (
            "README.md",
            "samples.png",
            "encoder/diffusion_pytorch_model.safetensors",
            "profile/profile.json",
        ):
            assert (saved / name).read_bytes() == (model / name).read_bytes()
        assert str(tmp_path) not in (saved / "model_index.json").read_text()
    pipeline = MNIFPipeline.from_pretrained(saved)
    pipeline.save_pretrained(saved)  # onto itself
    assert (saved / "README.md").read_bytes() == (model / "README.md").read_bytes()
    with pytest.raises(ValueError, match="safetensors alone"):
        pipeline.save_pretrained(saved, safe_serialization=False)


def test_what_lies_beside_the_parts_does_not_change_the_model(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "README.md").write_text("other")
    (copy / "samples.png").unlink()
    shutil.rmtree(copy / "profile")
    assert sha256_of_model(copy) == sha256_of_model(model)
    (copy / "scheduler/scheduler_config.json").write_text("{}")
    assert sha256_of_model(copy) != sha256_of_model(model)


# 4. and 5. Schedulers


def clipping(pipeline: MNIFPipeline) -> SchedulerMixin:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert scheduler.config.clip_sample
    return scheduler


def test_clipping_is_off_however_a_scheduler_is_set(model: Path) -> None:
    pipeline = exact_pipeline()
    scheduler = clipping(pipeline)
    pipeline.scheduler = scheduler
    assert_draws_the_gaussian(pipeline)
    assert_draws_the_gaussian(MNIFPipeline(pipeline.decoder, pipeline.denoiser, clipping(pipeline)))
    assert scheduler.config.clip_sample  # that of the user is left alone
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, thresholding=True)
    assert_draws_the_gaussian(pipeline)
    for load in (MNIFPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        loaded = load(
            model, scheduler=clipping(pipeline), student_scheduler=clipping(pipeline), trust_remote_code=True
        )
        assert not loaded.scheduler.config.clip_sample
        assert not loaded.student_scheduler.config.clip_sample


def test_scaled_samples_warn_of_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    reference = latents_of(pipeline, num_inference_steps=200)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    latents = latents_of(pipeline, num_inference_steps=200)
    assert "scale_model_input" not in capfd.readouterr().err
    torch.testing.assert_close(latents, reference, atol=0.05, rtol=0.05)
    pipeline.to(torch.float16)
    torch.testing.assert_close(latents_of(pipeline, num_inference_steps=200).float(), reference, atol=0.1, rtol=0.1)


# 6. Arguments of a call


def test_callback_on_step_end(model: Path) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    seen = []

    def watch(given: MNIFPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((given, step, int(timestep), sorted(tensors), tensors["latents"].shape))
        return tensors

    expected = latents_of(pipeline)
    assert torch.equal(latents_of(pipeline, callback_on_step_end=watch), expected)
    assert [row[1] for row in seen] == [0, 1, 2, 3]
    assert [row[2] for row in seen] == pipeline.scheduler.timesteps.tolist()
    assert all(row[0] is pipeline and row[3] == ["latents"] and row[4] == (3, 12) for row in seen)
    assert pipeline.num_timesteps == 4

    zero = latents_of(pipeline, callback_on_step_end=lambda *given: {"latents": torch.zeros(3, 12)})
    torch.testing.assert_close(zero, pipeline.denoiser.latent_mean.expand(3, 12))
    assert torch.equal(latents_of(pipeline, callback_on_step_end=lambda *given: None), expected)
    nothing = latents_of(pipeline, callback_on_step_end=lambda *given: given[3], callback_on_step_end_tensor_inputs=[])
    assert torch.equal(nothing, expected)
    with pytest.raises(ValueError, match='"prompt_embeds": there is "latents" alone'):
        latents_of(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_callbacks_of_diffusers_and_interruption(model: Path) -> None:
    class Stop(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012
        steps = 0

        def callback_fn(self, pipeline: MNIFPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            Stop.steps += 1
            pipeline._interrupt = step == 1
            return tensors

    pipeline = MNIFPipeline.from_pretrained(model)
    latents_of(pipeline, callback_on_step_end=Stop())
    assert Stop.steps == 2
    assert pipeline.interrupt
    latents_of(pipeline)
    assert not pipeline.interrupt


def test_timesteps_and_sigmas_of_ones_own(model: Path) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    with pytest.raises(UserError, match=r"timesteps: UniPCMultistepScheduler takes none"):
        latents_of(pipeline, timesteps=[999, 500])
    pipeline.scheduler = scheduler_by_name("DPMSolverMultistepScheduler", pipeline.scheduler)
    expected = latents_of(pipeline, num_inference_steps=3)
    own = pipeline.scheduler.timesteps.tolist()
    assert torch.equal(latents_of(pipeline, timesteps=own), expected)
    assert not torch.equal(latents_of(pipeline, timesteps=[999, 100]), expected)
    flow = exact_pipeline("flow")
    latents = flow(2, sigmas=np.linspace(1, 0.01, 50).tolist(), output_type="latent").images
    assert flow.num_timesteps == 50
    assert latents.isfinite().all()
    for bad in (
        {"sigmas": [1.0], "timesteps": [999]},
        {"timesteps": ["a"]},
        {"timesteps": []},
        {"timesteps": 5},
        {"timesteps": [float("nan")]},
        {"timesteps": [10, 500]},
    ):
        with pytest.raises((UserError, ValueError), match="timesteps") as error:
            latents_of(pipeline, **bad)
        assert "\n" not in str(error.value)


def test_height_width_and_counts(model: Path) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(batch_size=2, num_images_per_prompt=3, height=20, width=12).images
    assert [picture.size for picture in pictures] == [(12, 20)] * 6
    assert pipeline(height=20).images[0].size == (16, 20)
    with pytest.raises(ValueError, match="height and width"):
        pipeline(height=20, resolution=20)


def test_from_pipe_and_components(model: Path) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    assert set(pipeline.components) == {"decoder", "denoiser", "scheduler", "student", "student_scheduler"}
    for other in (MNIFPipeline.from_pipe(pipeline), MNIFPipeline(**pipeline.components)):
        assert other.denoiser is pipeline.denoiser
        assert other.student is pipeline.student
        assert torch.equal(latents_of(other), latents_of(pipeline))
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert isinstance(MNIFPipeline.from_pipe(pipeline, scheduler=ddim).scheduler, DDIMScheduler)
    pipeline.to(torch.bfloat16)
    assert MNIFPipeline.from_pipe(pipeline, dtype=torch.bfloat16).decoder.dtype == torch.bfloat16


def test_one_dtype_for_each_part(model: Path) -> None:
    dtypes = {"denoiser": torch.bfloat16, "default": torch.float32}
    pipeline = MNIFPipeline.from_pretrained(model, torch_dtype=dtypes)
    assert (pipeline.decoder.dtype, pipeline.denoiser.dtype) == (torch.float32, torch.bfloat16)
    assert pipeline(1, output_type="np").images.dtype == np.float32


def test_model_offloading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no accelerator here: its place is taken by the CPU, and what would be moved is counted."""
    pipeline = MNIFPipeline.from_pretrained(model)
    expected = latents_of(pipeline, output_type="pt")
    if not torch.accelerator.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipeline.enable_model_cpu_offload()
    with pytest.raises(UserError, match="use enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload(device="cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    fetched = []
    for name in ("denoiser", "student", "decoder"):
        hook = getattr(pipeline, name)._hf_hook
        before = hook.pre_forward

        def count(module: torch.nn.Module, *given: object, _name: str = name, _before: Callable = before) -> object:
            fetched.append(_name)
            return _before(module, *given)

        monkeypatch.setattr(hook, "pre_forward", count)
    assert torch.equal(latents_of(pipeline, output_type="pt"), expected)
    assert fetched == ["denoiser"] * 4 + ["decoder"]
    assert torch.equal(latents_of(pipeline, output_type="pt"), expected)  # the hooks are there again


# 7. and 8. What cannot be meant


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size 0: a whole number is needed, at least 1"),
        ({"batch_size": 2.0}, "batch_size 2.0"),
        ({"batch_size": True}, "batch_size True"),
        ({"batch_size": "2"}, "batch_size '2'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
        ({"resolution": 33.0}, "resolution 33.0"),
        ({"resolution": 0}, "resolution 0"),
        ({"height": -1}, "height -1"),
        ({"width": 1.5}, "width 1.5"),
        ({"views": 0}, "views 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5"),
        ({"num_inference_steps": 1001}, "takes 1 to 1000 steps"),
        ({"truncation": float("nan")}, "truncation nan"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "a list of 1 for 3 samples"),
        ({"latents": torch.zeros(2, 12), "generator": [torch.Generator()] * 3}, "a list of 3 for 2 samples"),
        ({"generator": 7}, "generator: a torch.Generator.*not int"),
        ({"generator": [7]}, "generator: a torch.Generator.*not int"),
        ({"latents": np.zeros((2, 12))}, "latents of ndarray"),
        ({"latents": torch.zeros(2, 12, dtype=torch.int64)}, "latents of torch.int64"),
        ({"latents": torch.zeros(0, 12)}, r"latents of shape \[0, 12\]"),
        ({"latents": torch.zeros(2, 11)}, r"noise \[B, 12\] is needed"),
        ({"latents": torch.full((2, 12), torch.nan)}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_meant_is_one_line(pipeline: MNIFPipeline, settings: dict, words: str) -> None:
    with pytest.raises((ValueError, UserError), match=words) as error:
        pipeline(**settings)
    assert "\n" not in str(error.value)


def test_latents_of_other_dtypes_are_taken(pipeline: MNIFPipeline) -> None:
    noise = torch.randn(2, 12)
    expected = pipeline(latents=noise, output_type="latent").images
    assert torch.equal(pipeline(latents=noise.double(), output_type="latent").images, expected)
    assert pipeline(latents=noise.half(), output_type="latent").images.dtype == torch.float32


# 10. The run in place of its model


def test_a_run_stands_for_its_model(run: Path, model: Path) -> None:
    expected = drawn_by_mnif(model)
    assert torch.equal(drawn_by_mnif(run), expected)
    assert torch.equal(latents_of(load_pipeline(run)), expected)
    assert load_model(run).fingerprint() == load_model(model).fingerprint()


# A name on the hub in place of a folder


def test_a_hub_id_loads_in_diffusers_and_keeps_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from the cache that an earlier download left."""
    repository, commit = tmp_path / "hub/models--me--emoji", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pipeline = DiffusionPipeline.from_pretrained("me/emoji", cache_dir=tmp_path / "hub", trust_remote_code=True)
    assert torch.equal(latents_of(pipeline), drawn_by_mnif(model))
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_bytes() == (model / "README.md").read_bytes()
    assert (tmp_path / "saved/encoder/config.json").is_file()


def test_schedulers_of_consistency_models_are_for_students(model: Path) -> None:
    pipeline = MNIFPipeline.from_pretrained(model)
    for kind in (diffusers.LCMScheduler, diffusers.TCDScheduler):
        with pytest.raises(UserError, match=f"{kind.__name__} does not fit: .* draws samples with"):
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        pipeline.student_scheduler = kind.from_config(pipeline.student_scheduler.config)
        assert latents_of(pipeline, use_student=True, num_inference_steps=2).isfinite().all()


def test_a_scheduler_that_scales_its_samples_is_not_exported(model: Path) -> None:
    scheduler = EulerDiscreteScheduler.from_config(load_pipeline(model).scheduler.config)
    with pytest.raises(UserError, match="EulerDiscreteScheduler cannot be exported or recorded: it scales"):
        linear_scheduler_table(scheduler, 4)


def test_pipelines_from_memory_have_nothing_beside_them(
    pipeline: MNIFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("of something else")
    pipeline.save_pretrained("saved")
    parts = ["decoder", "denoiser", "model_index.json", "pipeline.py", "scheduler"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == parts
