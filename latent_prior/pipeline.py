"""Noise to pictures: the diffusers pipeline that holds decoder, denoiser and scheduler."""

import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_prior.call_arguments import (
    CALLBACK_TENSORS,
    StepCallback,
    callback_inputs,
    check_generators,
    check_noise,
    check_own_steps,
    check_truncation,
    check_whole,
    grid_size,
)
from latent_prior.denoisers import DENOISERS, Denoiser, check_decoder
from latent_prior.diffusion import OBJECTIVES, objective_of
from latent_prior.hub import cached_folder, downloaded, upload
from latent_prior.pipeline_folder import REMOTE_MODULE, copy_beside, read_components, write_remote_code
from latent_prior.schedulers import check_steps, fitted, model_input, set_timesteps, starting_sigma, takes_generator
from latent_prior.settings import INFERENCE_STEPS, Objective
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import check_output_type, postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.devices import sent
from mnif.utils.errors import UserError
from mnif.utils.model_folders import model_folder_in

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
        scheduler: any diffusers scheduler that fits what the denoiser predicts
            (:func:`latent_prior.schedulers.fitted`), here as wherever it is set; its clipping is switched off.
        student: a denoiser distilled to draw in a few steps.
        student_scheduler: the student's.

    Raises:
        UserError: a denoiser was trained for another decoder, or the scheduler does not fit.
    """

    model_cpu_offload_seq = "denoiser->student->decoder"
    _optional_components: ClassVar[list[str]] = ["student", "student_scheduler"]
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS

    def __init__(
        self,
        decoder: MNIFModel,
        denoiser: Denoiser,
        scheduler: SchedulerMixin,
        student: Denoiser | None = None,
        student_scheduler: SchedulerMixin | None = None,
    ):
        super().__init__()
        _learn_prediction_type(denoiser, scheduler)
        self.register_modules(
            decoder=decoder,
            denoiser=denoiser,
            scheduler=scheduler,
            student=student,
            student_scheduler=student_scheduler,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a part, if it fits the others; of a scheduler that clips, a copy that does not."""
        parts = {**vars(self), name: value}
        if name in ("decoder", "denoiser", "student") and parts.get("decoder") is not None:
            for part in ("denoiser", "student"):
                if parts.get(part) is not None and name in ("decoder", part):
                    check_decoder(parts["decoder"], parts[part])
            if name == "denoiser" and parts.get("scheduler") is not None:
                _learn_prediction_type(value, self.scheduler)
        elif name == "scheduler" and value is not None:
            value = fitted(value, _objective(self.denoiser))
        elif name == "student_scheduler" and value is not None:
            value = fitted(value, "x0", distilled=True)
        super().__setattr__(name, value)

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
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MNIFPipelineOutput | tuple:
        """Draws samples.

        Args:
            batch_size: how many; ignored if ``latents`` are given.
            generator: makes the noise, also that of every step if the scheduler adds some (DDPM); a list holds one
                generator per sample, so that a sample does not depend on the others.
            num_inference_steps: denoising steps, 1 to as many as the scheduler has timesteps.
            resolution: pixels per axis, at least 1; default: the training resolution.
            latents: standard normal noise [B, D] in place of the generator's, finite.
            truncation: ψ in [0, 1]; latents are drawn towards their mean m: m + ψ (z − m), which trades variety for
                typical samples, as StyleGAN's truncation does (Karras et al., 2019, appendix B). 1 leaves them as
                they are; 0 gives the mean.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; of shapes and objects also ``"volume"`` and
                ``"views"``, of shapes ``"mesh"`` (:func:`mnif.signals.outputs.postprocess`).
            views: of each object, for ``"views"``.
            use_student: whether the student draws; default: if there is one that was distilled for this number of
                steps.
            return_dict: False returns a plain tuple.
            num_images_per_prompt: multiplies ``batch_size``, for scripts that were written for other pipelines.
            height: of pictures, in place of ``resolution``; default: that of the training pictures.
            width: likewise.
            timesteps: in place of the number of steps, if the scheduler takes any; the denoiser draws, unless
                ``use_student`` is given.
            sigmas: likewise.
            callback_on_step_end: is called with the pipeline, the number of the step from 0 on, its timestep and the
                tensors by name, after each step; what it returns of them takes their place. It may set
                ``pipeline._interrupt`` to leave out the steps to come.
            callback_on_step_end_tensor_inputs: ``"latents"`` or none: standardised and on the scheduler's scale.

        Returns:
            :class:`MNIFPipelineOutput`, or ``(images,)``.

        Raises:
            ValueError: an argument is of another kind or out of range.
            UserError: the scheduler does not fit what the denoiser predicts, cannot take these steps, or comes to NaN
                or infinity.

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
        signal = signal_of_model(self.decoder)
        check_output_type(signal, output_type)
        check_truncation(truncation)
        check_whole(1, batch_size=batch_size, num_images_per_prompt=num_images_per_prompt, views=views)
        check_own_steps(timesteps=timesteps, sigmas=sigmas)
        size = grid_size(signal, self.decoder, resolution, height, width)
        inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        count = batch_size * num_images_per_prompt
        if latents is not None:
            count = check_noise(latents, self.decoder.config.latent_dim)
        check_generators(generator, count)

        # 2. Choose teacher or student, and the steps
        given_steps = timesteps if timesteps is not None else sigmas
        denoiser, scheduler = self.select_denoiser(num_inference_steps if given_steps is None else None, use_student)
        device = self._execution_device
        # Schedulers look numbers up by timesteps: those stay on the CPU, and the denoiser's own copies go ahead of it.
        steps = set_timesteps(scheduler, num_inference_steps, "cpu", timesteps, sigmas)
        told = sent(steps, device)

        # 3. Prepare the noise, in float32 at least: some schedulers begin with numbers that half precision lacks
        dtype = torch.promote_types(denoiser.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor((count, denoiser.config.latent_dim), generator, torch.device(device), dtype)
        latents = sent(latents, device).to(dtype) * starting_sigma(scheduler)

        # 4. Denoise
        options = {"generator": generator} if takes_generator(scheduler) else {}
        self._interrupt, self._num_timesteps = False, len(steps)
        for index, (timestep, own) in enumerate(self.progress_bar([*zip(steps, told, strict=True)])):
            if self._interrupt:
                continue
            noisy = model_input(scheduler, latents, timestep).to(denoiser.dtype)
            latents = _stepped(scheduler, denoiser(noisy, own).to(dtype), timestep, latents, options)
            if callback_on_step_end is not None:
                tensors = callback_on_step_end(self, index, timestep, dict.fromkeys(inputs, latents)) or {}
                latents = tensors.get("latents", latents)

        # 5. Truncate standardised latents, whose mean is 0, and give them the decoder's mean and scale
        latents = denoiser.to_latents(truncation * latents).to(self.decoder.dtype)
        if not latents.isfinite().all():
            raise UserError(
                f"the denoiser draws NaN or infinity with {len(steps)} steps of {type(scheduler).__name__}; "
                "take another number of steps or another scheduler"
            )

        # 6. Decode, where a decoder that waits on the CPU is fetched: hooks act on `forward` alone
        if hasattr(self.decoder, "_hf_hook"):
            self.decoder._hf_hook.pre_forward(self.decoder)
        images = postprocess(self.decoder, latents, output_type, size, views)
        self.maybe_free_model_hooks()
        return MNIFPipelineOutput(images=images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to leave out the steps to come."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many steps the last call took."""
        return self._num_timesteps

    def select_denoiser(self, steps: int | None, use_student: bool | None = None) -> tuple[Denoiser, SchedulerMixin]:
        """Chooses the denoiser that draws in ``steps`` steps, and its scheduler.

        Args:
            steps: denoising steps; None: those that the caller will set.
            use_student: whether it is the student; default: if there is one that was distilled for this number of
                steps.

        Raises:
            ValueError: there is no student to use, or ``steps`` is no whole number.
            UserError: the scheduler does not fit what the denoiser predicts, or cannot take so many steps.
        """
        if use_student and self.student is None:
            raise ValueError("use_student: there is none; `mnif distill` makes one")
        if use_student or (use_student is None and self.student and steps in self.student.config.distilled_steps):
            denoiser, scheduler = self.student, self.student_scheduler
        else:
            denoiser, scheduler = self.denoiser, fitted(self.scheduler, _objective(self.denoiser))
        if steps is not None:
            check_whole(0, num_inference_steps=steps)
            check_steps(scheduler, steps)
        return denoiser, scheduler

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str | PathLike, **options: Any) -> "MNIFPipeline":
        """Loads a model folder (:func:`load_pipeline`), or ``user/name`` from the hub if there is no such folder.

        Args:
            pretrained_model_name: the path of the folder, or of the run that it is in; or the name.
            options: components by name, to take the place of the folder's; ``torch_dtype`` (or ``dtype``), one for
                all or a dictionary of them by component; ``variant``; those of
                :func:`latent_prior.hub.downloaded`. Others, which say how diffusers loads, are passed over.

        Raises:
            UserError: the folder is damaged, or there is none and the hub has no such model.
        """
        named = {name: options[name] for name in inspect.signature(cls.__init__).parameters if name in options}
        folder = model_folder_in(Path(pretrained_model_name))
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name, **options))
        with torch.random.fork_rng(devices=[]):  # components draw weights before they read them
            pipeline = load_pipeline(folder, options.get("variant"), **named)
        dtype = options.get("torch_dtype", options.get("dtype"))
        for name, part in pipeline.components.items():
            one = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
            if one is not None and isinstance(part, torch.nn.Module):
                part.to(dtype=one)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str | PathLike, **options: Any) -> str:
        """Fetches a model from the hub: called by ``from_pretrained("user/name")``.

        Raises:
            UserError: the hub cannot be reached, or has no such model.
        """
        return str(downloaded(str(pretrained_model_name), **options))

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Writes all parts, what lay beside them in the folder they came from, and what diffusers needs to load them.

        Args:
            save_directory: the folder, made if it is missing.
            safe_serialization: True: weights are safetensors, and nothing else is ever written.
            variant: a word in the names of the weights' files, such as ``"fp16"``.
            push_to_hub: upload the folder too (:meth:`push_to_hub`), as ``repo_id``.
            options: ``max_shard_size``; to push, ``repo_id`` and the options of :func:`latent_prior.hub.upload`.

        Raises:
            ValueError: pickles are asked for.
            UserError: the denoiser is none that could be loaded again, or the hub cannot be reached or refuses.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: weights are written as safetensors alone")
        if not isinstance(self.denoiser, tuple(DENOISERS.values())):
            raise UserError(f"a {type(self.denoiser).__name__} is not saved; save the pipelines it is made of")
        folder = Path(save_directory)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        to_push = {name: options.pop(name) for name in names if name in options}
        write_remote_code(folder)
        if (source := cached_folder(self.config.get("_name_or_path") or "")) is not None:
            copy_beside(source, folder)
        super().save_pretrained(folder, variant=variant, **options)
        if push_to_hub:
            upload(folder, to_push.pop("repo_id", folder.resolve().name), **to_push)

    def push_to_hub(self, repo_id: str, variant: str | None = None, **options: Any) -> str:
        """Uploads the pipeline, with the model card of the folder it was loaded from, to the hub.

        Args:
            repo_id: ``user/name``.
            variant: as of :meth:`save_pretrained`.
            options: ``commit_message``, ``private``, ``token``, ``create_pr`` as in diffusers.

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, options.pop("safe_serialization", True), variant)
            return upload(Path(folder), repo_id, **options)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """Refuses to fetch layer by layer: fields are mixed from all bases at once.

        Raises:
            UserError: always.
        """
        raise UserError("enable_sequential_cpu_offload: fields need all bases at once; use enable_model_cpu_offload")

    def to_json_string(self) -> str:
        """Gives the index as JSON: the class by the module that lies beside it, and no path of this machine."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        return (
            json.dumps(index | {"_class_name": [REMOTE_MODULE, type(self).__name__]}, indent=2, sort_keys=True) + "\n"
        )

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """Names the classes that ``from_pipe`` takes over, which diffusers compares one by one."""
        kinds = tuple(DENOISERS.values())
        return super()._get_signature_types() | {"denoiser": kinds, "student": (*kinds, type(None))}


def load_pipeline(folder: Path | str, variant: str | None = None, **components: Any) -> MNIFPipeline:
    """The pipeline in a model folder. Nothing but what its index names is read, and the network is never asked.

    Args:
        folder: the model folder, or the run folder that it is in.
        variant: of the weights (:func:`latent_prior.pipeline_folder.read_components`).
        components: takes the place of those in the folder, by name.

    Raises:
        UserError: a stage is missing or damaged, or a denoiser belongs to another decoder.
    """
    folder = model_folder_in(Path(folder))
    components = read_components(folder, variant, **components)
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = MNIFPipeline(**components)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _learn_prediction_type(denoiser: Denoiser, scheduler: SchedulerMixin) -> None:
    """Notes what a denoiser predicts that was written before denoisers said so: what its scheduler is for."""
    if denoiser.config.get("prediction_type") is None:
        denoiser.register_to_config(prediction_type=OBJECTIVES[objective_of(scheduler)].prediction_type)


def _objective(denoiser: Denoiser) -> Objective:
    """What a denoiser predicts, as its configuration says."""
    said = denoiser.config.prediction_type
    return next(objective for objective, prediction in OBJECTIVES.items() if prediction.prediction_type == said)


def _stepped(
    scheduler: SchedulerMixin, prediction: Tensor, timestep: Tensor, latents: Tensor, options: dict[str, Any]
) -> Tensor:
    """One step of the scheduler.

    Raises:
        UserError: it runs out of what it has noted of its steps, as some do where two are all but the same.
    """
    try:
        return scheduler.step(prediction, timestep, latents, **options).prev_sample
    except IndexError as error:
        name, steps = type(scheduler).__name__, len(scheduler.timesteps)
        raise UserError(f"{name} cannot take these {steps} steps ({error}); take fewer") from None
