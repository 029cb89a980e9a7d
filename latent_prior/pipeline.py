"""Noise to pictures: the diffusers pipeline that holds decoder, denoiser and scheduler."""

import inspect
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import msgspec
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_prior.denoisers import Denoiser, load_denoiser
from latent_prior.diffusion import load_scheduler, objective_of, takes_generator
from latent_prior.hub import downloaded, upload
from latent_prior.settings import INFERENCE_STEPS
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import check_output_type, postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.json_files import read_json

# diffusers finds the classes of an outside pipeline among the modules already imported, so both stand above.


@dataclass
class MNIFPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: in the form asked for, see :func:`mnif.signals.outputs.postprocess`.
    """

    images: list[Any] | np.ndarray | Tensor


class MNIFPipeline(DiffusionPipeline):
    """Samples latents with a diffusion prior and decodes them at any resolution.

    A sample depends on its own noise and generator alone: drawn in another batch it is the same to 1e-5 (its matrix
    products then run in other kernels, which round differently). ``mnif sample`` is exact, see
    :mod:`latent_prior.sampling`.

    Args:
        decoder: the stage-one model.
        denoiser: the stage-two model; its latents must belong to this decoder.
        scheduler: any diffusers scheduler that fits the denoiser's prediction.
        student: a denoiser distilled to draw in a few steps.
        student_scheduler: the student's.

    Raises:
        UserError: a denoiser was trained for another decoder, or the scheduler wants something else predicted.
    """

    model_cpu_offload_seq = "denoiser->decoder"
    _optional_components: ClassVar[list[str]] = ["student", "student_scheduler"]

    def __init__(
        self,
        decoder: MNIFModel,
        denoiser: Denoiser,
        scheduler: SchedulerMixin,
        student: Denoiser | None = None,
        student_scheduler: SchedulerMixin | None = None,
    ):
        super().__init__()
        self._objective = objective_of(scheduler)
        _check_fingerprints(decoder, denoiser, *([student] if student is not None else []))
        self.register_modules(
            decoder=decoder,
            denoiser=denoiser,
            scheduler=scheduler,
            student=student,
            student_scheduler=student_scheduler,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = INFERENCE_STEPS,
        resolution: int | None = None,
        latents: Tensor | None = None,
        truncation: float = 1.0,
        output_type: str = "pil",
        views: int = 8,
        use_student: bool | None = None,
        return_dict: bool = True,
    ) -> MNIFPipelineOutput | tuple:
        """Draws samples.

        Args:
            batch_size: how many; ignored if ``latents`` are given.
            generator: makes the noise, also that of every step if the scheduler adds some (DDPM); a list holds one
                generator per sample, so that a sample does not depend on the others.
            num_inference_steps: denoising steps, 1 to as many as the scheduler has timesteps.
            resolution: pixels per axis, at least 1; default: the training resolution.
            latents: finite initial noise [B, D] in place of the generator's.
            truncation: ψ in [0, 1]; latents are drawn towards their mean m: m + ψ (z − m), which trades variety for
                typical samples, as StyleGAN's truncation does (Karras et al., 2019, appendix B). 1 leaves them as
                they are; 0 gives the mean.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; of shapes and objects also ``"volume"`` and
                ``"views"``, of shapes ``"mesh"`` (:func:`mnif.signals.outputs.postprocess`).
            views: of each object, for ``"views"``.
            use_student: whether the student draws; default: if there is one that was distilled for this number of
                steps.
            return_dict: False returns a plain tuple.

        Returns:
            :class:`MNIFPipelineOutput`, or ``(images,)``.

        Raises:
            ValueError: an argument is out of range.
            UserError: the scheduler does not fit what the denoiser predicts, cannot take so many steps, or comes to
                NaN or infinity.

        Example:
            >>> import torch
            >>> from latent_prior.diffusion import sampling_scheduler
            >>> from latent_prior.denoisers import ResMLPDenoiser
            >>> from latent_prior.pipeline import MNIFPipeline
            >>> from mnif.models.mnif_model import MNIFModel
            >>> decoder = MNIFModel(resolution=16, latent_dim=12)
            >>> denoiser = ResMLPDenoiser(latent_dim=12, decoder_fingerprint=decoder.fingerprint())
            >>> pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler("x0"))
            >>> pipeline.set_progress_bar_config(disable=True)
            >>> images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), resolution=48).images
            >>> [image.size for image in images]
            [(48, 48), (48, 48)]

            A model that was trained is loaded by ``MNIFPipeline.from_pretrained("RUN/model")``.
        """
        # 1. Check the arguments
        check_output_type(signal_of_model(self.decoder), output_type)
        if not 0 <= truncation <= 1:
            raise ValueError(f"truncation {truncation}: must lie between 0 and 1")
        if latents is not None:
            _check_noise(latents, self.decoder.config.latent_dim)

        # 2. Choose teacher or student
        denoiser, scheduler = self.select_denoiser(num_inference_steps, use_student)

        # 3. Prepare the noise
        if latents is None:
            shape = (batch_size, self.decoder.config.latent_dim)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=denoiser.dtype)
        else:
            latents = latents.to(self._execution_device, denoiser.dtype)

        # 4. Denoise
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        options = {"generator": generator} if takes_generator(scheduler) else {}
        for timestep in self.progress_bar(scheduler.timesteps):
            latents = scheduler.step(denoiser(latents, timestep), timestep, latents, **options).prev_sample

        # 5. Truncate standardised latents, whose mean is 0, and give them the decoder's mean and scale
        latents = denoiser.to_latents(truncation * latents)
        if not latents.isfinite().all():
            raise UserError(
                f"the denoiser draws NaN or infinity with {num_inference_steps} steps of {type(scheduler).__name__}; "
                "take another number of steps or another scheduler"
            )

        # 6. Decode
        images = postprocess(self.decoder, latents, output_type, resolution, views)
        self.maybe_free_model_hooks()
        return MNIFPipelineOutput(images=images) if return_dict else (images,)

    def select_denoiser(self, steps: int, use_student: bool | None = None) -> tuple[Denoiser, SchedulerMixin]:
        """Chooses the denoiser that draws in ``steps`` steps, and its scheduler.

        Args:
            steps: denoising steps, 1 to as many as the scheduler has timesteps.
            use_student: whether it is the student; default: if there is one that was distilled for this number of
                steps.

        Raises:
            ValueError: there is no student to use.
            UserError: the scheduler does not fit what the denoiser predicts, or cannot take so many steps.
        """
        if use_student and self.student is None:
            raise ValueError("use_student: there is none; `mnif distill` makes one")
        if use_student or (use_student is None and self.student and steps in self.student.config.distilled_steps):
            _check_steps(steps, self.student_scheduler)
            return self.student, self.student_scheduler
        _check_steps(steps, self.scheduler)
        if objective_of(self.scheduler) != self._objective:
            raise UserError(
                f"{type(self.scheduler).__name__} does not fit what the denoiser predicts; "
                "take latent_prior.diffusion.scheduler_by_name(name, pipeline.scheduler)"
            )
        return self.denoiser, self.scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str | PathLike, **options: Any) -> "MNIFPipeline":
        """Loads a model folder (:func:`load_pipeline`), or ``user/name`` from the hub if there is no such folder.

        Args:
            pretrained_model_name: the folder's path, or the name.
            options: components by name, to take the place of the folder's; ``torch_dtype`` (or ``dtype``); those of
                :func:`latent_prior.hub.downloaded`. Others, which say how diffusers loads, are passed over.

        Raises:
            UserError: the folder is damaged, or there is none and the hub has no such model.
        """
        named = {name: options[name] for name in inspect.signature(cls.__init__).parameters if name in options}
        folder = Path(pretrained_model_name)
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name, **options))
        with torch.random.fork_rng(devices=[]):  # components draw weights before they read them
            pipeline = load_pipeline(folder, **named)
        dtype = options.get("torch_dtype", options.get("dtype"))
        return pipeline if dtype is None else pipeline.to(dtype=dtype)

    @classmethod
    def download(cls, pretrained_model_name: str | PathLike, **options: Any) -> str:
        """Fetches a model from the hub: called by ``from_pretrained("user/name")``.

        Raises:
            UserError: the hub cannot be reached, or has no such model.
        """
        return str(downloaded(str(pretrained_model_name), **options))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the pipeline, with the model card of the folder it was loaded from, to the hub.

        Args:
            repo_id: ``user/name``.
            options: ``commit_message``, ``private``, ``token``, ``create_pr`` as in diffusers.

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub cannot be reached or refuses.
        """
        source = Path(str(self.config.get("_name_or_path", "")))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), source, repo_id, **options)


_DenoiserClass = Literal["ResMLPDenoiser", "PaperDenoiser"]
_DenoiserModule = Literal["latent_prior.denoisers"]
_AnyScheduler = tuple[Literal["diffusers"], str]


class PipelineIndex(msgspec.Struct, forbid_unknown_fields=True):
    """A ``model_index.json``: for each component its module and class, of ours and of diffusers' schedulers alone.

    No other module is ever imported for it, and no other component read.
    """

    class_name: Literal["MNIFPipeline"] = msgspec.field(name="_class_name")
    decoder: tuple[Literal["mnif.models.mnif_model"], Literal["MNIFModel"]]
    denoiser: tuple[_DenoiserModule, _DenoiserClass]
    scheduler: _AnyScheduler
    student: tuple[_DenoiserModule | None, _DenoiserClass | None] = (None, None)
    student_scheduler: tuple[Literal["diffusers"] | None, str | None] = (None, None)
    diffusers_version: str | None = msgspec.field(default=None, name="_diffusers_version")
    name_or_path: str | None = msgspec.field(default=None, name="_name_or_path")


def load_pipeline(folder: Path, **components: Any) -> MNIFPipeline:
    """The pipeline in a model folder. Nothing but what its index names is read, and the network is never asked.

    Args:
        folder: the model folder.
        components: takes the place of those in the folder, by name.

    Raises:
        UserError: a stage is missing or damaged, or a denoiser belongs to another decoder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; `mnif prior` completes one at RUN/model")
    if not (folder / "denoiser").exists():
        raise UserError(f"{folder} has no denoiser; `mnif prior` makes it")
    index = read_json(folder / "model_index.json", PipelineIndex)
    has_student = index.student[1] is not None and index.student_scheduler[1] is not None
    for name in ("decoder", "denoiser", "scheduler", *(("student", "student_scheduler") if has_student else ())):
        if name not in components:
            components[name] = _load_part(folder, name, getattr(index, name)[1])
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = MNIFPipeline(**components)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _load_part(folder: Path, name: str, class_name: str) -> Any:
    """Reads one component, which must be of the class that the index names."""
    if name == "decoder":
        return load_component(MNIFModel, folder, name)
    part = load_scheduler(folder / name) if name.endswith("scheduler") else load_denoiser(folder, name)
    if type(part).__name__ != class_name:
        raise UserError(f"{folder / 'model_index.json'}: {name} is a {class_name}, its folder a {type(part).__name__}")
    return part


def _check_noise(latents: Tensor, latent_dim: int) -> None:
    """Raises a ValueError unless ``latents`` are finite numbers [B, ``latent_dim``]."""
    if latents.ndim != 2 or latents.shape[1] != latent_dim:
        raise ValueError(f"latents of shape {list(latents.shape)}: noise [B, {latent_dim}] is needed")
    if not latents.isfinite().all():
        raise ValueError("latents: the noise holds NaN or infinity")


def _check_steps(steps: int, scheduler: SchedulerMixin) -> None:
    """Raises a UserError where ``scheduler`` cannot take so many steps."""
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"num_inference_steps {steps}: {type(scheduler).__name__} takes 1 to {most} steps")


def _check_fingerprints(decoder: MNIFModel, *denoisers: Denoiser) -> None:
    """Latents of another decoder would decode to nonsense. Weights cut to half precision have no fingerprint."""
    if decoder.dtype not in (torch.float32, torch.float64):
        return
    fingerprint = decoder.fingerprint()
    for denoiser in denoisers:
        if denoiser.config.decoder_fingerprint != fingerprint:
            raise UserError(
                f"the denoiser was trained for decoder {denoiser.config.decoder_fingerprint[:12] or 'unknown'}, "
                f"but the decoder here is {fingerprint[:12]}; run `mnif prior` again"
            )
