"""Pictures as `mnif eval` measures them, samples and reconstructions, beside PCA and the mean picture."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.baselines import gaussian_latents, prior_latents
from evals.evaluator import Measurement
from evals.features.extractor import Extractor, FeatureCache, IndexedImages, extractor_by_name, stated
from evals.image_sets import Reference, frechet_metrics, novelty_metrics, reference_of, set_metrics
from evals.image_sources import bundle_images, data_images, latent_images, sample_images, shown
from evals.loaded_run import is_of, latent_table_of, splits_of
from evals.metrics.frechet import frechet_distance_from_features, is_statistics, load_moments, moments_of, save_moments
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.reconstruction import SSIM_WINDOW, border_step_ratio, psnr_per_image, ssim_per_image
from evals.metrics.uncertainty import GROUPS, GroupedFeatures, frechet_spread, spread_over_halves, standard_error
from evals.protocol import EvalArguments, protocol_of
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.data.batches import array_dataset
from mnif.data.dataset import Split
from mnif.data.images import ImageData, load_images
from mnif.latents.inference import LatentInit, infer_latents, load_latent_init
from mnif.latents.inner_loop import InnerLoop
from mnif.latents.pca import fit_pca
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file, sha256_of_folder
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import Processes

SHOWN = 24


_PCA_NUMBERS = 1 << 27  # of training pictures; where there are more, PCA is fitted to some of them


_BORDERS = 1024  # pictures that steps across borders are looked for in


class Reconstructions:
    """Measures one model's reconstructions of a reference, side by side.

    Args:
        bench: of the evaluation.
        decoder: the bases, on the device they are to run on.
        finder: gives training latents and the start of the others; None takes the table's and starts from zero.
        reference: the pictures.
        sides: [N] of :class:`mnif.data.dataset.Split`.
        table: the latents of ``reference``, if they are known.
        asked: refinement steps, and where pictures of originals above reconstructions go.
        fingerprint: of model and reference.
    """

    def __init__(
        self,
        bench: FeatureCache,
        decoder: MNIFModel,
        latent_init: LatentInit,
        reference: ImageData,
        splits: np.ndarray,
        table: LatentTable | None,
        arguments: EvalArguments,
        fingerprint: str,
    ):
        self.bench, self.decoder, self.latent_init, self.reference = bench, decoder, latent_init, reference
        self.splits, self.table, self.arguments, self.fingerprint = splits, table, arguments, fingerprint

    def metrics(self, real: np.ndarray) -> dict[str, float]:
        """PSNR, SSIM and distance of every side's reconstructions and of its controls, and border steps.

        Args:
            real: features of all of the reference, [N, D].

        Returns:
            PSNR in dB and SSIM, means over pictures on [0, 1] with their standard errors; the Fréchet distance of
            reconstructions from their originals, ``r`` before its name; border steps as a share of the originals';
            ``pca_components``, fewer than the latent's numbers only where there are fewer training pictures.
        """
        components, controls = self._controls()
        found: dict[str, float] = {"pca_components": components}
        for part, split in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
            rows = np.flatnonzero(self.splits == split)
            if not len(rows):
                continue
            latents = self._latents(rows, split)
            picked = evenly(len(rows), self.bench.protocol.num_samples)
            found |= self._quality(rows, self._drawn(latents), part)
            found |= self._distance(rows[picked], self._drawn(latents[picked]), part, real)
            for name, control in controls.items():
                found |= self._quality(rows, self._control(name, control, rows), f"{name}_{part}")
                if name == "pca":
                    found |= self._distance(
                        rows[picked], self._control(name, control, rows[picked]), f"pca_{part}", real
                    )
            if split != Split.TRAIN and self.latent_init is not None:
                at_once = "inner_loop" if isinstance(self.latent_init, InnerLoop) else "encoder"
                found |= self._quality(rows, self._drawn(self._searched(rows, 0)), f"{part}_{at_once}")
            if self.bench.processes.is_main:
                found |= self._borders(rows, self._drawn(latents), part)
        return found

    def _controls(self) -> tuple[int, dict[str, Callable[[np.ndarray], np.ndarray]]]:
        """How many components PCA has, and what it and the mean picture make of pictures on [0, 1]."""
        train = np.flatnonzero(self.splits == Split.TRAIN)
        numbers = self.reference.images[0].size
        some = self.reference.images[train[evenly(len(train), max(_PCA_NUMBERS // numbers, 1))]] / np.float32(255)
        # PCA cannot have more components than there are pictures or numbers in one.
        components = min(self.decoder.config.latent_dim, len(some), numbers)
        pca, mean = fit_pca(some, components), some.mean(axis=0, dtype=np.float64).astype(np.float32)
        return components, {"pca": pca.reconstruct, "mean": lambda images: np.broadcast_to(mean, images.shape)}

    def _control(self, name: str, control: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> IndexedImages:
        images, quantise = self.reference.images, self.bench.protocol.quantise

        def read(some: range) -> np.ndarray:
            values = control(images[rows[some.start : some.stop]] / np.float32(255)).clip(0, 1) * np.float32(255)
            return values.round().astype(np.uint8) if quantise else values

        height, width = images.shape[1:3]
        key = f"{self.fingerprint} {name} {quantise} {_hash_of(rows)} {_hash_of(self.splits)}"
        return IndexedImages(len(rows), (height, width), key, read)

    def _latents(self, rows: np.ndarray, split: Split) -> np.ndarray:
        if split == Split.TRAIN and self.latent_init is not None:
            return self._searched(rows, 0)
        if split == Split.TRAIN and self.table is not None:
            return self.table.train.numpy()
        return self._searched(rows, self.arguments.refinement_steps)

    def _searched(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """Latents of some of the pictures, [n, D]."""
        signal, images = signal_of_model(self.decoder), self.reference.images

        def compute(batch: np.ndarray) -> np.ndarray:
            found = infer_latents(self.decoder, signal, array_dataset({"images": batch}), self.latent_init, steps)
            return torch.cat([*found]).cpu().numpy()

        def load(some: range) -> np.ndarray:
            return images[rows[some.start : some.stop]]

        key, width = [self.fingerprint, "latents", _hash_of(rows), steps], self.decoder.config.latent_dim
        return self.bench.rows(key, len(rows), width, load, compute, "finding latents")

    def _drawn(self, latents: np.ndarray) -> IndexedImages:
        fingerprint = f"{self.fingerprint} {_hash_of(latents)}"
        return latent_images(self.decoder, latents, fingerprint, self.bench.protocol.quantise)

    def _quality(self, rows: np.ndarray, drawn: IndexedImages, ending: str) -> dict[str, float]:
        """PSNR and SSIM of reconstructions, and the standard errors of these means."""
        images = self.reference.images

        def load(some: range) -> tuple[np.ndarray, np.ndarray]:
            return drawn.read(some), images[rows[some.start : some.stop]]

        def compute(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            values, originals = (part.astype(np.float64) / 255 for part in pair)
            return np.stack([measure(values, originals) for measure in measures.values()], axis=1)

        measures = {"psnr": psnr_per_image} | ({"ssim": ssim_per_image} if min(drawn.size) >= SSIM_WINDOW else {})
        key = [drawn.fingerprint, "quality", _hash_of(rows)]
        values = self.bench.rows(key, len(rows), len(measures), load, compute, f"quality: {ending}")
        found: dict[str, float] = {}
        for name, column in zip(measures, np.asarray(values, dtype=np.float64).T, strict=True):
            found |= {f"{name}_{ending}": float(column.mean()), f"{name}_{ending}_std": standard_error(column)}
        return found

    def _distance(self, rows: np.ndarray, drawn: IndexedImages, ending: str, real: np.ndarray) -> dict[str, float]:
        """The Fréchet distance of reconstructions from their originals."""
        features = self.bench.features(drawn, f"reconstructions, {ending}")
        if not self.bench.processes.is_main or len(rows) < 2:
            return {}
        name, originals = f"r{self.bench.extractor.frechet}_{ending}", real[rows]
        found = {name: frechet_distance_from_features(features, originals)}
        if len(rows) >= 2 * GROUPS:
            found[f"{name}_std"] = frechet_spread(GroupedFeatures(features), moments_of(originals))
        return found

    def _borders(self, rows: np.ndarray, drawn: IndexedImages, part: str) -> dict[str, float]:
        """Steps across the borders of cells; and a picture of originals above reconstructions."""
        images, cells = self.reference.images, self.decoder.config.cells
        pick = evenly(len(rows), SHOWN)
        both = np.concatenate([images[rows[pick]], shown(drawn, pick)])
        save_image(self.arguments.output_dir / f"reconstructions_{part}.png", image_grid(both, columns=len(pick)))
        if cells == 1 or any(pixels % cells for pixels in drawn.size):
            return {}
        count = min(len(rows), _BORDERS)
        ours, originals = drawn.read(range(count)) / 255, images[rows[:count]] / 255

        def ratio(some: np.ndarray) -> float:
            return border_step_ratio(ours[some], originals[some], cells)

        name, every = f"border_step_ratio_{part}", np.arange(count)
        spread = {f"{name}_std": spread_over_halves(every, ratio)} if count >= GROUPS else {}
        return {name: ratio(every)} | spread


def evenly(count: int, wanted: int) -> np.ndarray:
    """At most ``wanted`` row numbers out of ``count``, evenly spread."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def _hash_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def of_model(arguments: EvalArguments) -> Measurement:
    """Reconstructions and samples of a model of RGB pictures.

    Raises:
        UserError: the model lacks a stage or draws other pictures, or the reference or the extractor cannot be had.
    """
    model = arguments.model
    assert model is not None
    pipeline = load_pipeline(model)
    decoder = pipeline.decoder
    signal = signal_of_model(decoder)
    if signal.channels != 3:
        raise UserError(f"{model}: a model of pictures with {signal.channels} channel(s); `mnif eval` measures RGB")
    size = decoder.config.resolution
    room = _Room(arguments, (size, size) if isinstance(size, int) else (size[0], size[1]))
    measured = sha256_of_folder(model)

    def metrics(processes: Processes) -> dict[str, Any]:
        bench = room.bench(processes)
        pipeline.to(processes.device)
        table, quantise = latent_table_of(model, decoder), bench.protocol.quantise
        latents = prior_latents(bench, pipeline, arguments.seed, arguments.num_inference_steps, measured)
        name = f"{measured} {arguments.seed} {arguments.num_inference_steps}"
        samples = latent_images(decoder, latents, name, quantise)
        features = {"": bench.features(samples, "samples")}
        if table is not None:
            drawn = gaussian_latents(table, len(latents), arguments.seed)
            pictures = latent_images(decoder, drawn, f"{measured} {arguments.seed} Gaussian", quantise)
            features["_gaussian"] = bench.features(pictures, "Gaussian latents")
        found: dict[str, Any] = {"model": _facts(pipeline, arguments)}
        splits = room.splits()
        if room.data is not None and splits is not None:
            known = table if table is not None and is_of(table, room.data) else None
            splits = splits if known is None else splits_of(known, room.data)
            latent_init = load_latent_init(model, signal)
            latent_init = None if latent_init is None else latent_init.to(processes.device)
            fingerprint = f"{measured} {room.fingerprint}"
            found |= Reconstructions(
                bench, decoder, latent_init, room.data, splits, known, arguments, fingerprint
            ).metrics(room.real_features(bench))
        if processes.is_main and table is not None and table.held_out.any():
            found |= memorisation_metrics(latents, table)
        return found | room.compared(bench, features, samples, splits)

    return Measurement(room.inputs(measured), metrics)


def of_samples(arguments: EvalArguments) -> Measurement:
    """A folder or file of pictures of one size.

    Raises:
        UserError: the samples are not such, or the reference or the extractor cannot be had.
    """
    assert arguments.samples is not None
    return _of_pictures(arguments, sample_images(arguments.samples))


def of_bundle(arguments: EvalArguments) -> Measurement:
    """What an exported bundle draws.

    Raises:
        UserError: it cannot be used, or the reference or the extractor cannot be had.
    """
    assert arguments.bundle is not None
    return _of_pictures(arguments, bundle_images(arguments.bundle, protocol_of(arguments).num_samples, arguments.seed))


def _of_pictures(arguments: EvalArguments, pictures: IndexedImages) -> Measurement:
    room = _Room(arguments, pictures.size)

    def metrics(processes: Processes) -> dict[str, Any]:
        bench = room.bench(processes)
        samples = pictures.first(bench.protocol.num_samples)
        return room.compared(bench, {"": bench.features(samples, "samples")}, samples, room.splits())

    return Measurement(room.inputs(pictures.fingerprint), metrics)


class _Room:
    """The reference, and what samples are to it.

    Args:
        asked: the flags.
        size: of the pictures, height and width.

    Raises:
        UserError: the reference or the extractor cannot be had.
    """

    def __init__(self, arguments: EvalArguments, size: tuple[int, int]) -> None:
        self.arguments, self.protocol = arguments, protocol_of(arguments)
        if self.protocol.num_samples < GROUPS:
            raise UserError(f"--num_samples {self.protocol.num_samples}: at least {GROUPS} pictures are needed")
        of_statistics = is_statistics(Path(arguments.reference))
        self.data = None if of_statistics else load_images(arguments.reference, size)
        processes = Processes()
        if processes.is_main:  # who may download
            self._extractor(processes)
        processes.wait()
        self.extractor = self._extractor(processes)
        self.stated = stated(self.protocol, self.extractor, size)
        self.statistics = load_moments(Path(arguments.reference), self.stated) if of_statistics else None

    def _extractor(self, processes: Processes) -> Extractor:
        protocol = self.protocol
        return extractor_by_name(
            protocol.extractor, self.arguments.inception_weights, processes.device, grey=protocol.grey
        )

    @property
    def fingerprint(self) -> str:
        """Of the reference."""
        return sha256_of_file(Path(self.arguments.reference)) if self.data is None else self.data.fingerprint()

    def inputs(self, measured: str) -> dict[str, str]:
        """What the figures depend on."""
        return {"measured": measured, "reference_fingerprint": self.fingerprint}

    def bench(self, processes: Processes) -> FeatureCache:
        """Where features are made."""
        return FeatureCache(self.protocol, self.extractor, processes, self.arguments.output_dir / ".parts")

    def splits(self) -> np.ndarray | None:
        """The sides of the reference as the flags cut them."""
        if self.data is None:
            return None
        return self.data.split(self.arguments.held_out_fraction, self.arguments.test_fraction)

    def real_features(self, bench: FeatureCache) -> np.ndarray:
        """Of all of the reference, kept for the next evaluation."""
        assert self.data is not None
        return bench.features(data_images(self.data), "real pictures", keep=True)

    def compared(
        self, bench: FeatureCache, features: dict[str, np.ndarray], samples: IndexedImages, splits: np.ndarray | None
    ) -> dict[str, Any]:
        """The figures of sets of drawn pictures, with their protocol; every process calls it."""
        protocol: dict[str, Any] = self.stated | {
            "preset": self.arguments.preset,
            "quantised": self.protocol.quantise,
            "reference": self.arguments.reference,
            "seed": self.arguments.seed,
        }
        if self.statistics is not None:
            found: dict[str, Any] = frechet_metrics(features, self.statistics, self.extractor)
            protocol |= {"samples": len(features[""]), "reference_images": self.statistics.count}
        else:
            assert self.data is not None
            assert splits is not None
            real = self.real_features(bench)
            if not bench.processes.is_main:
                return {}
            reference = reference_of(self.data, splits, self.protocol.part)
            found = set_metrics(features, real, reference, self.extractor, self.protocol)
            found |= self._novelty(features[""], real, samples, splits)
            protocol |= self._counts(reference, splits, len(features[""]))
            if self.arguments.save_statistics is not None:
                more = {"reference": self.arguments.reference, "part": self.protocol.part}
                moments = moments_of(real[reference.rows])
                save_moments(self.arguments.save_statistics, moments, self.stated | more)
        return found | {"protocol": protocol, "warnings": self._warnings(protocol)}

    def _novelty(
        self, features: np.ndarray, real: np.ndarray, samples: IndexedImages, splits: np.ndarray
    ) -> dict[str, float]:
        """How near samples lie to training pictures, and a picture of some above the nearest of these."""
        assert self.data is not None
        train = np.flatnonzero(splits == Split.TRAIN)
        if not len(train):
            return {}
        metrics, nearest = novelty_metrics(features, real[splits == Split.HELD_OUT], real[train])
        first = np.arange(min(SHOWN, len(features)))
        pairs = np.concatenate([shown(samples, first), self.data.images[train[nearest[first]]]])
        save_image(self.arguments.output_dir / "nearest.png", image_grid(pairs, columns=len(first)))
        return metrics

    def _counts(self, reference: Reference, splits: np.ndarray, samples: int) -> dict[str, Any]:
        return {
            "reference_part": self.protocol.part,
            "neighbours": self.protocol.neighbours,
            "samples": min(samples, reference.count or samples),
            "reference_images": len(reference.rows),
            "floor_images": min(samples, reference.count) if reference.count else len(reference.floor),
            "held_out_images": int((splits == Split.HELD_OUT).sum()),
        }

    def _warnings(self, protocol: dict[str, Any]) -> list[str]:
        name, dimension = self.extractor.frechet, self.extractor.dimension
        return [
            f"{protocol[count]} {what} are fewer than the {dimension} feature dimensions: {name} is biased up, and "
            f"{name}_infinity cannot tell by how much"
            for count, what in (("samples", "samples"), ("reference_images", "reference pictures"))
            if protocol[count] < dimension
        ]


def _facts(pipeline: MNIFPipeline, arguments: EvalArguments) -> dict[str, Any]:
    """What quality is paid with."""
    decoder: MNIFModel = pipeline.decoder
    field = decoder.bake(decoder.coefficients(decoder.bases[0].new_zeros(1, decoder.config.latent_dim)))
    return {
        "num_bases": decoder.config.num_bases,
        "latent_dim": decoder.config.latent_dim,
        "decoder_parameters": decoder.num_parameters(),
        "denoiser_parameters": pipeline.denoiser.num_parameters(),
        "multiply_adds_per_value": field.multiply_adds_per_point(),
        "num_inference_steps": arguments.num_inference_steps,
    }
