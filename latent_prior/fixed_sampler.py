"""Noise to pictures for fixed numbers of samples, steps and pixels: on a GPU one CUDA graph, started by one call.

At batch 1 a GPU waits most of the time for the next of some hundred small kernels to be named to it. A graph names
them all at once. PyTorch records it (``torch.cuda.make_graphed_callables``), so its kernels are the pipeline's. What
schedulers do on the CPU meanwhile cannot be recorded: here they are tables of numbers.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from latent_prior.call_arguments import check_noise, check_truncation, check_whole, grid_size
from latent_prior.pipeline import MNIFPipeline
from latent_prior.scheduler_table import linear_scheduler_table
from latent_prior.settings import INFERENCE_STEPS
from mnif.signals.outputs import postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError


class FixedSampler:
    """Draws what a pipeline draws from the same noise, to rounding, with numbers that are fixed beforehand.

    On a GPU its calls are recorded when it is made. Weights that are changed in place are seen by the graph; the
    pipeline must stay where it is. On the CPU the same calls are made each time.

    Args:
        pipeline: on the device that shall draw, all of it.
        batch_size: how many samples at once.
        num_inference_steps: denoising steps, 1 to as many as the scheduler has timesteps.
        resolution: pixels per axis; default: the training resolution.
        truncation: ψ in [0, 1], as of the pipeline.
        output_type: ``"pt"`` or ``"latent"``, as of the pipeline.
        use_student: whether the student draws; default: if there is one that was distilled for this number of steps.

    Raises:
        ValueError: an argument is of another kind or out of range.
        UserError: the scheduler is none that :func:`latent_prior.scheduler_table.linear_scheduler_table` takes, parts
            of the pipeline are on different devices, or the GPU cannot record what they do.

    Example:
        >>> import torch
        >>> from latent_prior import load_pipeline
        >>> from latent_prior.fixed_sampler import FixedSampler
        >>> pipeline = load_pipeline("avatars")
        >>> draw = FixedSampler(pipeline, batch_size=1, num_inference_steps=8)
        >>> draw(torch.randn(1, pipeline.decoder.config.latent_dim)).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        pipeline: MNIFPipeline,
        batch_size: int = 1,
        num_inference_steps: int = INFERENCE_STEPS,
        resolution: int | None = None,
        truncation: float = 1.0,
        output_type: str = "pt",
        use_student: bool | None = None,
    ):
        check_whole(1, batch_size=batch_size, num_inference_steps=num_inference_steps)
        check_truncation(truncation)
        if output_type not in ("pt", "latent"):
            raise ValueError(f'output_type "{output_type}": choose pt or latent')
        self.decoder, self.truncation, self.output_type = pipeline.decoder, truncation, output_type
        self.denoiser, scheduler = pipeline.select_denoiser(num_inference_steps, use_student)
        self.batch_size, self.steps = batch_size, linear_scheduler_table(scheduler, num_inference_steps)
        self.size = grid_size(signal_of_model(self.decoder), self.decoder, resolution, None, None)
        if self.denoiser.device != self.decoder.device:
            places = f"the denoiser is on {self.denoiser.device}, the decoder on {self.decoder.device}"
            raise UserError(f"{places}; move the whole pipeline to one")
        times = torch.tensor(self.steps.timesteps, dtype=torch.float32, device=self.denoiser.device)
        self.times = times.split(1)
        self._graph = self._recorded() if self.denoiser.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, noise: Tensor) -> Tensor:
        """Draws samples.

        Args:
            noise: standard normal, [batch_size, D], finite, on any device.

        Returns:
            Pictures [batch_size, C, H, W] in [0, 1], or latents [batch_size, D], on the pipeline's device.

        Raises:
            ValueError: the noise is of another shape, or not finite.
        """
        count = check_noise(noise, self.denoiser.config.latent_dim)
        if count != self.batch_size:
            raise ValueError(f"noise for {count} samples: this sampler draws {self.batch_size} at a time")
        noise = noise.to(self.denoiser.device, self._dtype)
        return self.drawn(noise) if self._graph is None else self._graph(noise).clone()  # it writes there again

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.denoiser.dtype, torch.float32)

    @torch.no_grad()
    def drawn(self, noise: Tensor) -> Tensor:
        """Draws from noise [batch_size, D] on the device, kernel by kernel, without a word from it to the CPU."""
        samples, predictions = [noise], list[Tensor]()
        for step, time in enumerate(self.times):
            predictions.append(self.denoiser(samples[-1].to(self.denoiser.dtype), time).to(noise.dtype))
            (first, weight), *others = self.steps.terms(step, samples, predictions)
            sample = weight * first
            for other, weight in others:
                sample = torch.add(sample, other, alpha=weight)
            samples.append(sample)
        latents = self.denoiser.to_latents(self.truncation * samples[-1]).to(self.decoder.dtype)
        return postprocess(self.decoder, latents, self.output_type, self.size)

    def _recorded(self) -> Callable[[Tensor], Tensor]:
        """Has PyTorch record the calls, after some that compile what is to be compiled and find the memory."""
        device = self.denoiser.device
        noise = torch.zeros(self.batch_size, self.denoiser.config.latent_dim, dtype=self._dtype, device=device)
        try:
            with torch.cuda.device_of(noise):
                return cast(Callable[[Tensor], Tensor], torch.cuda.make_graphed_callables(self.drawn, (noise,)))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"what this model does cannot be recorded as a CUDA graph ({reason}); draw with the pipeline itself"
            ) from None
