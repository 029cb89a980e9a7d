"""Pictures as `mnif eval` measures them: the room of the signal ``image``."""

from typing import Any

import numpy as np

from evals.arguments import EvalArguments
from evals.controls import gaussian_latents, latent_table_of, prior_latents
from evals.figures import decoded_pictures, memorisation_figures, reconstruction_figures, sample_figures
from evals.processes import Processes
from evals.rooms import Measurement
from latent_prior.pipeline import MNIFPipeline
from mnif.data import ImageData, Split, load_images, picture_size
from mnif.errors import UserError
from mnif.files import sha256_of_folder
from mnif.latents import LatentTable
from mnif.model_folder import load_finder
from mnif.signal_table import signal_of_model


def of_model(asked: EvalArguments, pipeline: MNIFPipeline) -> Measurement:
    """Reconstructions and samples of a model of RGB pictures.

    Raises:
        UserError: the model draws other pictures, or the reference cannot be read.
    """
    model, decoder = asked.model, pipeline.decoder
    assert model is not None
    signal = signal_of_model(decoder)
    if signal.channels != 3:
        raise UserError(f"{model}: a model of pictures with {signal.channels} channel(s); `mnif eval` measures RGB")
    reference = load_images(asked.reference, _size(decoder.config.resolution))

    def figures(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        finder = load_finder(model, signal)
        table = latent_table_of(model, pipeline)
        sides = reference.split(asked.held_out_fraction, asked.test_fraction)
        known = table if table is not None and _is_of(table, reference) else None
        if known is not None:
            sides = _sides(known, reference)
        steps, output = asked.refinement_steps, asked.output_dir
        found: dict[str, Any] = {}
        found |= reconstruction_figures(decoder, finder, reference, sides, known, steps, output)
        latents = prior_latents(pipeline, asked.num_samples, asked.seed, asked.num_inference_steps)
        drawn = {"fd_lite0": decoded_pictures(decoder, latents)}
        if table is not None:
            gaussian = gaussian_latents(table, asked.num_samples, asked.seed)
            drawn["fd_lite0_gaussian"] = decoded_pictures(decoder, gaussian)
            if table.held_out.any():
                found |= memorisation_figures(latents.numpy(), table)
        return found | sample_figures(drawn, reference, sides, output)

    return Measurement(_inputs(reference, sha256_of_folder(model)), figures)


def of_samples(asked: EvalArguments) -> Measurement:
    """A folder or file of square pictures of one size.

    Raises:
        UserError: samples or reference cannot be read.
    """
    assert asked.samples is not None
    samples = load_images(asked.samples, picture_size(asked.samples))
    reference = load_images(asked.reference, samples.images.shape[1])

    def figures(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        drawn = {"fd_lite0": samples.images[: asked.num_samples]}
        sides = reference.split(asked.held_out_fraction, asked.test_fraction)
        return sample_figures(drawn, reference, sides, asked.output_dir)

    return Measurement(_inputs(reference, samples.fingerprint()), figures)


def _size(resolution: int | list[int]) -> int | tuple[int, int]:
    return resolution if isinstance(resolution, int) else (resolution[0], resolution[1])


def _is_of(table: LatentTable, reference: ImageData) -> bool:
    """Whether the table's instances are the reference's, in order, some perhaps kept out of it for a test."""
    known = set(table.ids)
    return table.ids == [id for id in reference.ids if id in known]


def _sides(table: LatentTable, reference: ImageData) -> np.ndarray:
    """The sides as `mnif fit` cut them; what is not in its table was never looked at."""
    sides = np.full(len(reference), Split.TEST, dtype=np.int8)
    known = set(table.ids)
    sides[[id in known for id in reference.ids]] = np.where(table.held_out.numpy(), Split.HELD_OUT, Split.TRAIN)
    return sides


def _inputs(reference: ImageData, measured: str) -> dict[str, str]:
    return {"measured": measured, "reference_fingerprint": reference.fingerprint()}
