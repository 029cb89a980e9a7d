"""Pictures as `mnif eval` measures them, samples and reconstructions, beside PCA and the mean picture."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.arguments import EvalArguments, Protocol, protocol_of
from evals.evaluator import Evaluator, register_evaluator
from evals.features import extractor_by_name
from evals.features.extractor import Extractor, FeatureCache, IndexedImages
from evals.image_sets import (
    Reference,
    bundle_images,
    data_images,
    frechet_metrics,
    latent_images,
    novelty_metrics,
    reference_of,
    sample_images,
    set_metrics,
    shown,
)
from evals.loaded_run import SPLITS, LoadedRun, gaussian_latents, load_run, prior_latents
from evals.metrics.frechet import frechet_distance_from_features, is_statistics, load_moments, moments_of, save_moments
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.reconstruction import SSIM_WINDOW, border_step_ratio, mean_metrics, psnr_per_image, ssim_per_image
from evals.metrics.uncertainty import GROUPS, GroupedFeatures, frechet_spread, spread_over_halves
from mnif.data.batches import array_dataset, evenly_spaced
from mnif.data.dataset import Split
from mnif.data.images import ImageData, load_images
from mnif.latents.inference import infer_latents
from mnif.latents.inner_loop import InnerLoop
from mnif.latents.pca import fit_pca, pca_warnings
from mnif.utils.errors import UserError, require
from mnif.utils.files import sha256_of_file
from mnif.utils.model_folders import sha256_of_model
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import Processes

SHOWN = 24

_PCA_NUMBERS = 1 << 27  # of training pictures; where there are more, PCA is fitted to some of them

_BORDERS = 1024  # pictures that steps across borders are looked for in


@register_evaluator
class ImageEvaluator(Evaluator):
    """Measures a model of RGB pictures, a bundle's pictures, or a folder or file of pictures of one size.

    Raises:
        UserError: the model lacks a stage or draws other pictures, the bundle or the samples cannot be used, there are
            too few, or the reference or the extractor cannot be had.
    """

    signal = "image"

    def __init__(self, arguments: EvalArguments) -> None:
        super().__init__(arguments)
        self.protocol = protocol_of(arguments)
        self.subject = self._load_subject()
        if self.protocol.num_samples < GROUPS:
            raise UserError(f"--num_samples {self.protocol.num_samples}: at least {GROUPS} pictures are needed")
        if isinstance(self.subject, LoadedRun):
            assert arguments.model is not None
            self.measured, size = sha256_of_model(arguments.model), self.subject.decoder.config.resolution
        else:
            self.measured, size = self.subject.fingerprint, self.subject.size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        reference = Path(arguments.reference)
        of_statistics = is_statistics(reference)
        self.data = None if of_statistics else load_images(arguments.reference, self.size)
        self.reference_fingerprint = sha256_of_file(reference) if self.data is None else self.data.fingerprint()
        processes = Processes(arguments.device)
        self.cache = FeatureCache(
            self.protocol.resize, self._load_extractor(processes), processes, arguments.output_dir / ".parts"
        )
        self.statistics = load_moments(reference, self.cache.protocol(self.size)) if of_statistics else None

    def _load_subject(self) -> LoadedRun | IndexedImages:
        arguments = self.arguments
        if arguments.samples is not None:
            return sample_images(arguments.samples)
        if arguments.bundle is not None:
            return bundle_images(arguments.bundle, self.protocol.num_samples, arguments.seed)
        assert arguments.model is not None
        run = load_run(arguments.model, prior_needed=True)
        require("torchmetrics", "eval", "SSIM")
        channels = run.signal.channels
        if channels != 3:
            raise UserError(
                f"{arguments.model}: a model of pictures with {channels} channel(s); `mnif eval` measures RGB"
            )
        return run

    def _load_extractor(self, processes: Processes) -> Extractor:
        def load() -> Extractor:
            weights, grey = self.arguments.inception_weights, self.protocol.grey
            return extractor_by_name(self.protocol.extractor, weights, processes.device, grey)

        if processes.is_main:
            load()  # the main process alone downloads what is missing
        processes.wait()
        return load()

    def inputs(self) -> dict[str, str]:
        """Returns the fingerprints of model or samples and of the reference."""
        return {"measured": self.measured, "reference_fingerprint": self.reference_fingerprint}

    def evaluate(self, processes: Processes) -> dict[str, Any]:
        """Measures the samples; of a model also its reconstructions, and samples of a Gaussian as a control."""
        if isinstance(self.subject, LoadedRun):
            return self._evaluate_model(self.subject, processes)
        samples = self.subject.first(self.protocol.num_samples)
        return self._compare({"": self.cache.features(samples, "samples")}, samples, self._splits_by_flags())

    def _evaluate_model(self, run: LoadedRun, processes: Processes) -> dict[str, Any]:
        arguments, cache, quantise = self.arguments, self.cache, self.protocol.quantise
        seed, steps = arguments.seed, arguments.num_inference_steps
        assert run.pipeline is not None
        run.to(processes.device)
        latents = prior_latents(cache, run.pipeline, self.protocol.num_samples, seed, steps, self.measured)
        samples = latent_images(run.decoder, latents, f"{self.measured} {seed} {steps}", quantise)
        features = {"": cache.features(samples, "samples")}
        if run.table is not None:
            drawn = gaussian_latents(run.table, len(latents), seed)
            images = latent_images(run.decoder, drawn, f"{self.measured} {seed} Gaussian", quantise)
            features["_gaussian"] = cache.features(images, "Gaussian latents")
        metrics: dict[str, Any] = {"model": _cost(run, steps)}
        splits, warnings = None, []
        if self.data is not None:
            splits = run.splits(self.data, arguments.held_out_fraction, arguments.test_fraction)
            fingerprint = f"{self.measured} {self.reference_fingerprint}"
            metrics |= ImageReconstructions(
                cache,
                run,
                self.data,
                splits,
                self.protocol,
                arguments.refinement_steps,
                arguments.output_dir,
                fingerprint,
            ).metrics(self._real_features())
            warnings = pca_warnings(metrics["pca_components"], int((splits == Split.TRAIN).sum()))
        if processes.is_main and run.table is not None and run.table.held_out.any():
            metrics |= memorisation_metrics(latents, run.table)
        compared = self._compare(features, samples, splits)
        return metrics | compared | {"warnings": warnings + compared.get("warnings", [])}

    def _splits_by_flags(self) -> np.ndarray | None:
        """Splits the reference as the flags say, [N]; None if it is statistics."""
        if self.data is None:
            return None
        return self.data.split(self.arguments.held_out_fraction, self.arguments.test_fraction)

    def _real_features(self) -> np.ndarray:
        """Computes the features of all of the reference, [N, D], kept for the next evaluation."""
        assert self.data is not None
        return self.cache.features(data_images(self.data), "real pictures", keep=True)

    def _compare(
        self, features: dict[str, np.ndarray], samples: IndexedImages, splits: np.ndarray | None
    ) -> dict[str, Any]:
        """Compares sets of drawn pictures with the reference; every process calls it.

        Args:
            features: what a set's metrics end with ("" for the samples, "_gaussian") → [n, D].
            samples: the pictures of "".
            splits: [N] of :class:`mnif.data.dataset.Split`, or None if the reference is statistics.

        Returns:
            The metrics with their protocol and warnings; nothing in other processes than the main one.
        """
        stated = self.cache.protocol(self.size)
        protocol: dict[str, Any] = stated | {
            "preset": self.arguments.preset,
            "quantised": self.protocol.quantise,
            "reference": self.arguments.reference,
            "seed": self.arguments.seed,
        }
        if self.statistics is not None:
            metrics: dict[str, Any] = frechet_metrics(features, self.statistics, self.cache.extractor)
            protocol |= {"samples": len(features[""]), "reference_images": self.statistics.count}
            return metrics | {"protocol": protocol, "warnings": self._warnings(protocol)}
        assert self.data is not None
        assert splits is not None
        real = self._real_features()
        if not self.cache.processes.is_main:
            return {}
        reference = reference_of(self.data, splits, self.protocol.part)
        metrics = set_metrics(features, real, reference, self.cache.extractor, self.protocol.neighbours)
        metrics |= self._novelty(features[""], real, samples, splits)
        protocol |= self._counts(reference, splits, len(features[""]))
        if self.arguments.save_statistics is not None:
            more = {"reference": self.arguments.reference, "part": self.protocol.part}
            save_moments(self.arguments.save_statistics, moments_of(real[reference.rows]), stated | more)
        return metrics | {"protocol": protocol, "warnings": self._warnings(protocol)}

    def _novelty(
        self, features: np.ndarray, real: np.ndarray, samples: IndexedImages, splits: np.ndarray
    ) -> dict[str, float]:
        """Measures how near samples lie to training pictures, and shows some above the nearest of these."""
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
        """Counts the pictures of each set, and states the part of the reference."""
        return {
            "reference_part": self.protocol.part,
            "neighbours": self.protocol.neighbours,
            "samples": min(samples, reference.count or samples),
            "reference_images": len(reference.rows),
            "floor_images": min(samples, reference.count) if reference.count else len(reference.floor),
            "held_out_images": int((splits == Split.HELD_OUT).sum()),
        }

    def _warnings(self, protocol: dict[str, Any]) -> list[str]:
        name, dimension = self.cache.extractor.frechet, self.cache.extractor.dimension
        return [
            f"{protocol[count]} {what} are fewer than the {dimension} feature dimensions: {name} is biased up, and "
            f"{name}_infinity cannot tell by how much"
            for count, what in (("samples", "samples"), ("reference_images", "reference pictures"))
            if protocol[count] < dimension
        ]


@dataclass(frozen=True)
class ImageReconstructions:
    """Measures one model's reconstructions of a reference, with every process.

    Attributes:
        cache: of features.
        run: the model. Its encoder or inner loop gives training latents and the start of the others; without either,
            the table's are taken and the others start from zero.
        reference: the pictures.
        splits: [N] of :class:`mnif.data.dataset.Split`.
        protocol: gives the most pictures that distances are measured on, and whether these are rounded.
        refinement_steps: for latents of pictures not trained on.
        output_dir: gets pictures of originals above reconstructions.
        fingerprint: of model and reference.
    """

    cache: FeatureCache
    run: LoadedRun
    reference: ImageData
    splits: np.ndarray
    protocol: Protocol
    refinement_steps: int
    output_dir: Path
    fingerprint: str

    def metrics(self, real: np.ndarray) -> dict[str, float]:
        """Measures PSNR, SSIM and distance of every split's reconstructions and of its controls, and border steps.

        Args:
            real: features of all of the reference, [N, D].

        Returns:
            PSNR in dB and SSIM, means over pictures on [0, 1] with their standard errors; the Fréchet distance of
            reconstructions from their originals, ``r`` before its name; border steps as a share of the originals';
            ``pca_components``, fewer than the latent's numbers only where there are fewer training pictures.
        """
        components, controls = self._controls()
        metrics: dict[str, float] = {"pca_components": components}
        for name, split in SPLITS.items():
            rows = np.flatnonzero(self.splits == split)
            if not len(rows):
                continue
            latents = self._latents(rows, split)
            picked = evenly_spaced(len(rows), self.protocol.num_samples)
            metrics |= self._quality(rows, self._decoded(latents), name)
            metrics |= self._distance(rows[picked], self._decoded(latents[picked]), name, real)
            for control, reconstruct in controls.items():
                metrics |= self._quality(rows, self._control(control, reconstruct, rows), f"{control}_{name}")
                if control == "pca":
                    images = self._control(control, reconstruct, rows[picked])
                    metrics |= self._distance(rows[picked], images, f"pca_{name}", real)
            if split != Split.TRAIN and self.run.latent_init is not None:
                at_once = "inner_loop" if isinstance(self.run.latent_init, InnerLoop) else "encoder"
                metrics |= self._quality(rows, self._decoded(self._inferred(rows, 0)), f"{name}_{at_once}")
            if self.cache.processes.is_main:
                metrics |= self._borders(rows, self._decoded(latents), name)
        return metrics

    def _controls(self) -> tuple[int, dict[str, Callable[[np.ndarray], np.ndarray]]]:
        """Fits the controls: how many components PCA has, and what it and the mean make of pictures on [0, 1]."""
        train = np.flatnonzero(self.splits == Split.TRAIN)
        numbers = self.reference.images[0].size
        picked = evenly_spaced(len(train), max(_PCA_NUMBERS // numbers, 1))
        some = self.reference.images[train[picked]] / np.float32(255)
        # PCA cannot have more components than there are pictures or numbers in one.
        components = min(self.run.decoder.config.latent_dim, len(some), numbers)
        pca, mean = fit_pca(some, components), some.mean(axis=0, dtype=np.float64).astype(np.float32)
        return components, {"pca": pca.reconstruct, "mean": lambda images: np.broadcast_to(mean, images.shape)}

    def _control(self, name: str, control: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> IndexedImages:
        images, quantise = self.reference.images, self.protocol.quantise

        def read(some: range) -> np.ndarray:
            values = control(images[rows[some.start : some.stop]] / np.float32(255)).clip(0, 1) * np.float32(255)
            return values.round().astype(np.uint8) if quantise else values

        height, width = images.shape[1:3]
        key = f"{self.fingerprint} {name} {quantise} {_hash_of(rows)} {_hash_of(self.splits)}"
        return IndexedImages(len(rows), (height, width), key, read)

    def _latents(self, rows: np.ndarray, split: Split) -> np.ndarray:
        if split == Split.TRAIN and self.run.latent_init is not None:
            return self._inferred(rows, 0)
        table = self.run.known(self.reference)
        if split == Split.TRAIN and table is not None:
            return table.train.numpy()
        return self._inferred(rows, self.refinement_steps)

    def _inferred(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """Infers latents of some of the pictures, [n, D]."""
        run, images = self.run, self.reference.images

        def compute(batch: np.ndarray) -> np.ndarray:
            batches = infer_latents(run.decoder, run.signal, array_dataset({"images": batch}), run.latent_init, steps)
            return torch.cat([*batches]).cpu().numpy()

        def load(some: range) -> np.ndarray:
            return images[rows[some.start : some.stop]]

        key, width = [self.fingerprint, "latents", _hash_of(rows), steps], self.run.decoder.config.latent_dim
        return self.cache.rows(key, len(rows), width, load, compute, "finding latents")

    def _decoded(self, latents: np.ndarray) -> IndexedImages:
        fingerprint = f"{self.fingerprint} {_hash_of(latents)}"
        return latent_images(self.run.decoder, latents, fingerprint, self.protocol.quantise)

    def _quality(self, rows: np.ndarray, drawn: IndexedImages, ending: str) -> dict[str, float]:
        """Measures PSNR and SSIM of reconstructions, and the standard errors of these means."""
        images = self.reference.images

        def load(some: range) -> tuple[np.ndarray, np.ndarray]:
            return drawn.read(some), images[rows[some.start : some.stop]]

        def compute(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            values, originals = (part.astype(np.float64) / 255 for part in pair)
            return np.stack([measure(values, originals) for measure in measures.values()], axis=1)

        measures = {"psnr": psnr_per_image} | ({"ssim": ssim_per_image} if min(drawn.size) >= SSIM_WINDOW else {})
        key = [drawn.fingerprint, "quality", _hash_of(rows)]
        values = self.cache.rows(key, len(rows), len(measures), load, compute, f"quality: {ending}")
        return mean_metrics(dict(zip(measures, np.asarray(values, dtype=np.float64).T, strict=True)), ending)

    def _distance(self, rows: np.ndarray, drawn: IndexedImages, ending: str, real: np.ndarray) -> dict[str, float]:
        """Measures the Fréchet distance of reconstructions from their originals, with its standard error."""
        features = self.cache.features(drawn, f"reconstructions, {ending}")
        if not self.cache.processes.is_main or len(rows) < 2:
            return {}
        name, originals = f"r{self.cache.extractor.frechet}_{ending}", real[rows]
        metrics = {name: frechet_distance_from_features(features, originals)}
        if len(rows) >= 2 * GROUPS:
            metrics[f"{name}_std"] = frechet_spread(GroupedFeatures(features), moments_of(originals))
        return metrics

    def _borders(self, rows: np.ndarray, drawn: IndexedImages, split: str) -> dict[str, float]:
        """Measures steps across the borders of cells, and shows originals above reconstructions."""
        images, cells = self.reference.images, self.run.decoder.config.cells
        pick = evenly_spaced(len(rows), SHOWN)
        both = np.concatenate([images[rows[pick]], shown(drawn, pick)])
        save_image(self.output_dir / f"reconstructions_{split}.png", image_grid(both, columns=len(pick)))
        if cells == 1 or any(pixels % cells for pixels in drawn.size):
            return {}
        count = min(len(rows), _BORDERS)
        ours, originals = drawn.read(range(count)) / 255, images[rows[:count]] / 255

        def ratio(some: np.ndarray) -> float:
            return border_step_ratio(ours[some], originals[some], cells)

        name, every = f"border_step_ratio_{split}", np.arange(count)
        spread = {f"{name}_std": spread_over_halves(every, ratio)} if count >= GROUPS else {}
        return {name: ratio(every)} | spread


def _hash_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _cost(run: LoadedRun, steps: int) -> dict[str, Any]:
    """Counts what quality is paid with: parameters, operations and steps."""
    decoder = run.decoder
    assert run.pipeline is not None
    field = decoder.bake(decoder.coefficients(decoder.bases[0].new_zeros(1, decoder.config.latent_dim)))
    return {
        "num_bases": decoder.config.num_bases,
        "latent_dim": decoder.config.latent_dim,
        "decoder_parameters": decoder.num_parameters(),
        "denoiser_parameters": run.pipeline.denoiser.num_parameters(),
        "multiply_adds_per_value": field.multiply_adds_per_point(),
        "num_inference_steps": steps,
    }
