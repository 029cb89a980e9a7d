"""Which graphs a bundle holds, in the order they are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.contents.browser import browser_cases
from export.contents.instances import Instances, noise_alone, of_table, sampled
from export.graphs.cases import GraphCase, baked_cases, decoder_case, sampler_case
from export.graphs.model import Resolution
from export.graphs.padding import for_decoder, padded
from export.graphs.radiance_cases import baked_radiance_cases, radiance_cases
from latent_prior.denoiser import LatentDenoiser
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError
from mnif.modeling import MNIFModel
from mnif.radiance import RadianceField
from mnif.signal_table import signal_of_model

_REFERENCES = 3  # latents that make the decoder's reference


@dataclass(frozen=True)
class Selection:
    """What is exported of a model.

    Attributes:
        decoder: stage one.
        pipeline: both stages; None for a model without a prior.
        resolution: pixels per axis of decoder and sampler.
        steps: for each sampler its number of denoising steps; what is baked is sampled with the last.
        num_baked: how many instances are baked.
        seed: of the samples and of the references.
        table: a latent table whose rows are baked; None bakes samples of the prior.
        ids: which of its rows.
        pad_channels: values get four channels.
        browser: the graphs of the page come too; they need a pipeline.
    """

    decoder: MNIFModel
    pipeline: MNIFPipeline | None
    resolution: Resolution
    steps: Sequence[int]
    num_baked: int
    seed: int
    table: Path | None = None
    ids: Sequence[str] | None = None
    pad_channels: bool = False
    browser: bool = False

    def cases(self) -> Iterator[GraphCase]:
        """Decoder, samplers, what radiance fields have besides, and the baked instances.

        Raises:
            UserError: the latent table does not fit, the scheduler cannot be exported, or float32 is not enough.
        """
        decoder = padded(self.decoder) if self.pad_channels else self.decoder
        signal, instances = signal_of_model(decoder), self._instances()
        shown = instances.latents[:_REFERENCES]
        yield decoder_case(decoder, shown, self.resolution)
        if self.pipeline is not None:
            resolution = None if isinstance(signal, RadianceField) else self.resolution
            for count in self.steps:
                yield sampler_case(self._drawing(decoder, count), count, resolution, self.seed)
            if self.browser:
                count = self.steps[-1]
                yield from browser_cases(self._drawing(decoder, count), count, self.resolution, self.seed)
        if isinstance(signal, RadianceField):
            yield from radiance_cases(decoder, signal, shown, self.seed)
        latents, labels = instances.latents[: len(instances.labels)], instances.labels
        yield from baked_cases(decoder, latents, labels, self.resolution)
        if isinstance(signal, RadianceField):
            yield from baked_radiance_cases(decoder, signal, latents, labels, self.seed)

    def _drawing(self, decoder: MNIFModel, steps: int) -> MNIFPipeline:
        """What draws in ``steps``: the student where it was distilled for them, as in the pipeline itself."""
        assert self.pipeline is not None
        denoiser, scheduler = self.pipeline.denoiser, self.pipeline.scheduler
        student = self.pipeline.student
        if student is not None and steps in student.config.distilled_steps:
            denoiser, scheduler = student, self.pipeline.student_scheduler
        if not isinstance(denoiser, LatentDenoiser):
            raise UserError(
                f"{type(denoiser).__name__} cannot be exported; `mnif distill` makes a student that can, for "
                "--num_inference_steps 1, 2 or 4"
            )
        drawing = MNIFPipeline(decoder, for_decoder(denoiser, decoder), scheduler)
        drawing.set_progress_bar_config(disable=True)
        return drawing

    def _instances(self) -> Instances:
        """What is baked, with as many further latents as references need."""
        if self.table is not None:
            return of_table(self.decoder, self.table, self.num_baked, self.ids, _REFERENCES)
        if self.pipeline is not None:
            return sampled(self.pipeline, self.num_baked, self.steps[-1], self.seed, _REFERENCES)
        return Instances(noise_alone(self.decoder, _REFERENCES, self.seed), [])
