"""Pictures as `mnif eval` measures them: the room of the signal ``image``."""

from pathlib import Path
from typing import Any

import numpy as np

from evals.arguments import EvalArguments
from evals.controls import gaussian_latents, latent_table_of, prior_latents
from evals.features import Extractor, extractor_by_name
from evals.images.bench import Bench, stated
from evals.images.reconstructions import SHOWN, Reconstructions
from evals.images.samples import Reference, frechet_figures, novelty_figures, reference_of, set_figures
from evals.images.sources import (
    PictureSource,
    bundle_pictures,
    data_pictures,
    latent_pictures,
    sample_pictures,
    shown,
)
from evals.metrics.frechet import is_statistics, load_moments, moments_of, save_moments
from evals.metrics.memorisation import memorisation_figures
from evals.metrics.spread import GROUPS
from evals.processes import Processes
from evals.protocols import protocol_of
from evals.rooms import Measurement
from evals.sides import is_of, sides_of
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.data import Split, load_images
from mnif.errors import UserError
from mnif.files import sha256_of_file, sha256_of_folder
from mnif.model_folder import load_finder
from mnif.modeling import MNIFModel
from mnif.pictures import picture_grid, save_picture
from mnif.signal_table import signal_of_model


def of_model(asked: EvalArguments) -> Measurement:
    """Reconstructions and samples of a model of RGB pictures.

    Raises:
        UserError: the model lacks a stage or draws other pictures, or the reference or the extractor cannot be had.
    """
    model = asked.model
    assert model is not None
    pipeline = load_pipeline(model)
    decoder = pipeline.decoder
    signal = signal_of_model(decoder)
    if signal.channels != 3:
        raise UserError(f"{model}: a model of pictures with {signal.channels} channel(s); `mnif eval` measures RGB")
    size = decoder.config.resolution
    room = _Room(asked, (size, size) if isinstance(size, int) else (size[0], size[1]))
    measured = sha256_of_folder(model)

    def figures(processes: Processes) -> dict[str, Any]:
        bench = room.bench(processes)
        pipeline.to(processes.device)
        table, quantise = latent_table_of(model, decoder), bench.protocol.quantise
        latents = prior_latents(bench, pipeline, asked.seed, asked.num_inference_steps, measured)
        name = f"{measured} {asked.seed} {asked.num_inference_steps}"
        samples = latent_pictures(decoder, latents, name, quantise)
        features = {"": bench.features(samples, "samples")}
        if table is not None:
            drawn = gaussian_latents(table, len(latents), asked.seed)
            pictures = latent_pictures(decoder, drawn, f"{measured} {asked.seed} Gaussian", quantise)
            features["_gaussian"] = bench.features(pictures, "Gaussian latents")
        found: dict[str, Any] = {"model": _facts(pipeline, asked)}
        sides = room.sides()
        if room.data is not None and sides is not None:
            known = table if table is not None and is_of(table, room.data) else None
            sides = sides if known is None else sides_of(known, room.data)
            finder = load_finder(model, signal)
            finder = None if finder is None else finder.to(processes.device)
            fingerprint = f"{measured} {room.fingerprint}"
            found |= Reconstructions(bench, decoder, finder, room.data, sides, known, asked, fingerprint).figures(
                room.real_features(bench)
            )
        if processes.is_main and table is not None and table.held_out.any():
            found |= memorisation_figures(latents, table)
        return found | room.compared(bench, features, samples, sides)

    return Measurement(room.inputs(measured), figures)


def of_samples(asked: EvalArguments) -> Measurement:
    """A folder or file of pictures of one size.

    Raises:
        UserError: the samples are not such, or the reference or the extractor cannot be had.
    """
    assert asked.samples is not None
    return _of_pictures(asked, sample_pictures(asked.samples))


def of_bundle(asked: EvalArguments) -> Measurement:
    """What an exported bundle draws.

    Raises:
        UserError: it cannot be used, or the reference or the extractor cannot be had.
    """
    assert asked.bundle is not None
    return _of_pictures(asked, bundle_pictures(asked.bundle, protocol_of(asked).num_samples, asked.seed))


def _of_pictures(asked: EvalArguments, pictures: PictureSource) -> Measurement:
    room = _Room(asked, pictures.size)

    def figures(processes: Processes) -> dict[str, Any]:
        bench = room.bench(processes)
        samples = pictures.first(bench.protocol.num_samples)
        return room.compared(bench, {"": bench.features(samples, "samples")}, samples, room.sides())

    return Measurement(room.inputs(pictures.fingerprint), figures)


class _Room:
    """The reference, and what samples are to it.

    Args:
        asked: the flags.
        size: of the pictures, height and width.

    Raises:
        UserError: the reference or the extractor cannot be had.
    """

    def __init__(self, asked: EvalArguments, size: tuple[int, int]) -> None:
        self.asked, self.protocol = asked, protocol_of(asked)
        if self.protocol.num_samples < GROUPS:
            raise UserError(f"--num_samples {self.protocol.num_samples}: at least {GROUPS} pictures are needed")
        of_statistics = is_statistics(Path(asked.reference))
        self.data = None if of_statistics else load_images(asked.reference, size)
        processes = Processes()
        if processes.is_main:  # who may download
            self._extractor(processes)
        processes.wait()
        self.extractor = self._extractor(processes)
        self.stated = stated(self.protocol, self.extractor, size)
        self.statistics = load_moments(Path(asked.reference), self.stated) if of_statistics else None

    def _extractor(self, processes: Processes) -> Extractor:
        protocol = self.protocol
        return extractor_by_name(
            protocol.extractor, self.asked.inception_weights, processes.device, grey=protocol.grey
        )

    @property
    def fingerprint(self) -> str:
        """Of the reference."""
        return sha256_of_file(Path(self.asked.reference)) if self.data is None else self.data.fingerprint()

    def inputs(self, measured: str) -> dict[str, str]:
        """What the figures depend on."""
        return {"measured": measured, "reference_fingerprint": self.fingerprint}

    def bench(self, processes: Processes) -> Bench:
        """Where features are made."""
        return Bench(self.protocol, self.extractor, processes, self.asked.output_dir / ".parts")

    def sides(self) -> np.ndarray | None:
        """The sides of the reference as the flags cut them."""
        if self.data is None:
            return None
        return self.data.split(self.asked.held_out_fraction, self.asked.test_fraction)

    def real_features(self, bench: Bench) -> np.ndarray:
        """Of all of the reference, kept for the next evaluation."""
        assert self.data is not None
        return bench.features(data_pictures(self.data), "real pictures", keep=True)

    def compared(
        self, bench: Bench, features: dict[str, np.ndarray], samples: PictureSource, sides: np.ndarray | None
    ) -> dict[str, Any]:
        """The figures of sets of drawn pictures, with their protocol; every process calls it."""
        protocol: dict[str, Any] = self.stated | {
            "preset": self.asked.preset,
            "quantised": self.protocol.quantise,
            "reference": self.asked.reference,
            "seed": self.asked.seed,
        }
        if self.statistics is not None:
            found: dict[str, Any] = frechet_figures(features, self.statistics, self.extractor)
            protocol |= {"samples": len(features[""]), "reference_images": self.statistics.count}
        else:
            assert self.data is not None
            assert sides is not None
            real = self.real_features(bench)
            if not bench.processes.is_main:
                return {}
            reference = reference_of(self.data, sides, self.protocol.part)
            found = set_figures(features, real, reference, self.extractor, self.protocol)
            found |= self._novelty(features[""], real, samples, sides)
            protocol |= self._counts(reference, sides, len(features[""]))
            if self.asked.save_statistics is not None:
                more = {"reference": self.asked.reference, "part": self.protocol.part}
                moments = moments_of(real[reference.rows])
                save_moments(self.asked.save_statistics, moments, self.stated | more)
        return found | {"protocol": protocol, "warnings": self._warnings(protocol)}

    def _novelty(
        self, features: np.ndarray, real: np.ndarray, samples: PictureSource, sides: np.ndarray
    ) -> dict[str, float]:
        """How near samples lie to training pictures, and a picture of some above the nearest of these."""
        assert self.data is not None
        train = np.flatnonzero(sides == Split.TRAIN)
        if not len(train):
            return {}
        figures, nearest = novelty_figures(features, real[sides == Split.HELD_OUT], real[train])
        first = np.arange(min(SHOWN, len(features)))
        pairs = np.concatenate([shown(samples, first), self.data.images[train[nearest[first]]]])
        save_picture(self.asked.output_dir / "nearest.png", picture_grid(pairs, columns=len(first)))
        return figures

    def _counts(self, reference: Reference, sides: np.ndarray, samples: int) -> dict[str, Any]:
        return {
            "reference_part": self.protocol.part,
            "neighbours": self.protocol.neighbours,
            "samples": min(samples, reference.count or samples),
            "reference_images": len(reference.rows),
            "floor_images": min(samples, reference.count) if reference.count else len(reference.floor),
            "held_out_images": int((sides == Split.HELD_OUT).sum()),
        }

    def _warnings(self, protocol: dict[str, Any]) -> list[str]:
        name, dimension = self.extractor.frechet, self.extractor.dimension
        return [
            f"{protocol[count]} {what} are fewer than the {dimension} feature dimensions: {name} is biased up, and "
            f"{name}_infinity cannot tell by how much"
            for count, what in (("samples", "samples"), ("reference_images", "reference pictures"))
            if protocol[count] < dimension
        ]


def _facts(pipeline: MNIFPipeline, asked: EvalArguments) -> dict[str, Any]:
    """What quality is paid with."""
    decoder: MNIFModel = pipeline.decoder
    field = decoder.bake(decoder.coefficients(decoder.bases[0].new_zeros(1, decoder.config.latent_dim)))
    return {
        "num_bases": decoder.config.num_bases,
        "latent_dim": decoder.config.latent_dim,
        "decoder_parameters": decoder.num_parameters(),
        "denoiser_parameters": pipeline.denoiser.num_parameters(),
        "multiply_adds_per_value": field.multiply_adds_per_point(),
        "num_inference_steps": asked.num_inference_steps,
    }
