"""Noise to pictures for fixed numbers of samples, steps and pixels: on a GPU one CUDA graph, started by one call.

At batch 1 a GPU waits most of the time for the next of some hundred small kernels to be named to it. A graph names
them all at once. PyTorch records it (``torch.cuda.make_graphed_callables``), so its kernels, and what they compute,
are those of the pipeline.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from latent_prior.call_arguments import check_noise, check_truncation, check_whole, grid_size
from latent_prior.pipeline import MNIFPipeline
from latent_prior.schedulers import adds_noise, model_input, set_timesteps, starting_sigma
from latent_prior.settings import INFERENCE_STEPS
from mnif.signals.outputs import postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError


class FixedSampler:
    """Draws what a pipeline draws from the same noise, with numbers that are fixed beforehand.

    On the CPU it makes the pipeline's own calls, and gives its very bits. On a GPU it records them once, when it is
    made; weights that are changed in place are seen by the graph, and the pipeline must stay where it is.

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
        UserError: the scheduler draws noise in its steps or cannot take so many, parts of the pipeline are on
            different devices, or the GPU cannot record what it does.

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
        self.scheduler = copy.deepcopy(scheduler)
        self.batch_size, self.steps = batch_size, num_inference_steps
        self.size = grid_size(signal_of_model(self.decoder), self.decoder, resolution, None, None)
        if adds_noise(self.scheduler):
            name = type(self.scheduler).__name__
            raise UserError(f"{name} draws noise in every step, which would be the same in each call; take another")
        if self.denoiser.device != self.decoder.device:
            places = f"the denoiser is on {self.denoiser.device}, the decoder on {self.decoder.device}"
            raise UserError(f"{places}; move the whole pipeline to one")
        # The denoiser is told its times on the device, and the scheduler on the CPU, where it looks up its numbers.
        timesteps = set_timesteps(self.scheduler, num_inference_steps, "cpu")
        self.times = timesteps.to(self.denoiser.device).unbind()
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
        scheduler, dtype = self.scheduler, self._dtype
        timesteps = set_timesteps(scheduler, self.steps, "cpu")  # some schedulers count their steps
        latents = noise * starting_sigma(scheduler)
        for timestep, time in zip(timesteps, self.times, strict=True):
            noisy = model_input(scheduler, latents, timestep).to(self.denoiser.dtype)
            latents = scheduler.step(self.denoiser(noisy, time).to(dtype), timestep, latents).prev_sample
        latents = self.denoiser.to_latents(self.truncation * latents).to(self.decoder.dtype)
        return postprocess(self.decoder, latents, self.output_type, self.size)

    def _recorded(self) -> Callable[[Tensor], Tensor]:
        """Has PyTorch record the calls, after some that compile what is to be compiled and find the memory."""
        device = self.denoiser.device
        noise = torch.zeros(self.batch_size, self.denoiser.config.latent_dim, dtype=self._dtype, device=device)
        try:
            with torch.cuda.device_of(noise):
                return torch.cuda.make_graphed_callables(self.drawn, (noise,))
        except (RuntimeError, AssertionError) as error:
            name, reason = type(self.scheduler).__name__, str(error).strip().splitlines()[0]
            raise UserError(
                f"a CUDA graph of {self.steps} steps of {name} cannot be recorded ({reason}); take another scheduler, "
                "or the pipeline itself"
            ) from None
