"""Noise to pictures: the diffusers pipeline that holds decoder, denoiser and scheduler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from latent_prior.denoiser import Denoiser
from latent_prior.denoisers import load_denoiser
from mnif.errors import UserError
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel
from mnif.signal_table import signal_of_model

# diffusers finds the classes of an outside pipeline among the modules already imported, so both stand above.


@dataclass
class MNIFPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: a list of PIL images; [B, H, W, C] float32 in [0, 1] for ``"np"``; a tensor [B, C, H, W] in [0, 1] for
            ``"pt"``; latents [B, D] for ``"latent"``.
    """

    images: list[Image.Image] | np.ndarray | Tensor


class MNIFPipeline(DiffusionPipeline):
    """Samples latents with a diffusion prior and decodes them at any resolution.

    Shapes and objects come as pictures of them, at a size of their own; ask for ``output_type="latent"`` and decode to
    have the volume itself.

    Args:
        decoder: the stage-one model.
        denoiser: the stage-two model; its latents must belong to this decoder.
        scheduler: any diffusers scheduler that fits the denoiser's prediction.
        student: a denoiser distilled to draw in a few steps.
        student_scheduler: the student's.
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
        num_inference_steps: int = 20,
        resolution: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> MNIFPipelineOutput | tuple:
        """Samples pictures.

        Args:
            batch_size: how many; ignored if ``latents`` are given.
            generator: makes the noise; a list holds one generator per picture.
            num_inference_steps: denoising steps, at least 1.
            resolution: pixels per axis, at least 1; default: the training resolution.
            latents: initial noise [B, D] in place of the generator's.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: False returns a plain tuple.

        Returns:
            :class:`MNIFPipelineOutput`, or ``(images,)``.

        Raises:
            ValueError: an argument is out of range.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'output_type "{output_type}": choose pil, np, pt or latent')
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps}: at least 1 step is needed")
        if latents is None:
            shape = (batch_size, self.decoder.config.latent_dim)
            latents = randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=self.denoiser.dtype
            )
        else:
            latents = latents.to(self._execution_device, self.denoiser.dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            prediction = self.denoiser(latents, timestep)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        latents = self.denoiser.to_latents(latents)

        images = latents if output_type == "latent" else self._pictures(latents, resolution, output_type)
        self.maybe_free_model_hooks()
        return MNIFPipelineOutput(images=images) if return_dict else (images,)

    def _pictures(self, latents: Tensor, resolution: int | None, output_type: str) -> Tensor | np.ndarray | list:
        signal = signal_of_model(self.decoder)
        if signal.name != "image":
            return _views(signal.pictures(self.decoder, latents), output_type)
        images = (self.decoder(latents, resolution) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images.permute(0, 3, 1, 2)
        array = images.float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _views(pictures: np.ndarray, output_type: str) -> Tensor | np.ndarray | list:
    """Pictures [B, H, W, 3] uint8 of shapes and objects in the form asked for."""
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in pictures]
    values = pictures.astype(np.float32) / 255
    return values if output_type == "np" else torch.from_numpy(values).permute(0, 3, 1, 2)


def load_pipeline(folder: Path) -> MNIFPipeline:
    """The pipeline in a model folder.

    Raises:
        UserError: a stage is missing or damaged, or the denoiser belongs to another decoder.
    """
    decoder = load_component(MNIFModel, folder, "decoder")
    denoiser = load_denoiser(folder)
    fingerprint = decoder.fingerprint()
    if denoiser.config.decoder_fingerprint != fingerprint:
        raise UserError(
            f"{folder}: the denoiser was trained for decoder {denoiser.config.decoder_fingerprint[:12]}, "
            f"but the decoder here is {fingerprint[:12]}; run `mnif prior` again"
        )
    diffusers.utils.logging.disable_progress_bar()
    try:
        return MNIFPipeline.from_pretrained(folder, decoder=decoder, denoiser=denoiser)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged pipeline ({str(error).splitlines()[0]}); run `mnif prior` again") from None


def scheduler_by_name(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler with the settings of ``current``, for the same denoiser.

    Args:
        name: the class's name, such as ``DDIMScheduler``.
        current: the scheduler the denoiser came with.

    Raises:
        UserError: diffusers has no such scheduler, or it does not fit what the denoiser predicts.
    """
    kind: Any = getattr(diffusers, name, None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise UserError(f"--scheduler {name}: diffusers has no such scheduler; try {type(current).__name__}")
    flow = "FlowMatch" in type(current).__name__
    if flow != ("FlowMatch" in name):
        predicts = "the velocity of a flow" if flow else "the clean latent"
        raise UserError(f"--scheduler {name} does not fit: the denoiser predicts {predicts}")
    scheduler = kind.from_config({key: value for key, value in current.config.items() if not key.startswith("_")})
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise UserError(
            f"--scheduler {name} does not fit: it scales its samples, which the denoiser was not trained on"
        )
    return scheduler
