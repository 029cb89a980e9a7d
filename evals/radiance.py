"""How well a radiance field shows views it was not given, beside the mean view and the nearest view it was given."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.arguments import EvalArguments, protocol_of
from evals.evaluator import Evaluator, register_evaluator
from evals.features import extractor_by_name
from evals.features.extractor import FeatureCache, IndexedImages
from evals.features.resize import RESIZES
from evals.image_sets import novelty_metrics, sample_images
from evals.loaded_run import SPLITS, LoadedRun, drawn_latents, gaussian_latents, load_run
from evals.metrics.frechet import Moments, frechet_distance, moments_of
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.reconstruction import SSIM_WINDOW, joined, mean_metrics, psnr_per_image, ssim_per_image
from evals.metrics.uncertainty import GROUPS, GroupedFeatures, frechet_spread
from mnif.data.batches import evenly_spaced
from mnif.data.dataset import Split
from mnif.data.views import ViewData, load_views
from mnif.signals.radiance import RadianceField
from mnif.utils.errors import UserError, require
from mnif.utils.model_folders import sha256_of_model
from mnif.utils.pixels import image_grid, save_image, to_uint8
from mnif.utils.process import Processes, progress_bar

_OBJECTS = 64  # of a split, evenly spread; what rendering costs

_SHOWN = 12

_VIEWS = 8  # of each object, evenly spread; more of the same object tell little


@dataclass(frozen=True)
class ViewReconstructions:
    """Measures one model's renderings of a reference.

    Attributes:
        run: the model.
        data: the reference.
        splits: [N] of :class:`mnif.data.dataset.Split`.
        refinement_steps: for latents of objects not trained on.
        output_dir: gets pictures of originals above renderings.
    """

    run: LoadedRun
    data: ViewData
    splits: np.ndarray
    refinement_steps: int
    output_dir: Path

    def metrics(self) -> dict[str, float]:
        """Measures PSNR in dB and SSIM on [0, 1] of every split, means over objects with standard errors.

        ``psnr_novel_views_…`` is of the views that the model's ``held_out_views`` keep back from fitting and encoding,
        ``psnr_…`` of up to four of the others. ``…_nearest_…`` shows the picture of the same object whose camera is
        nearest instead; ``…_mean_…`` the mean training object from that camera, if all objects have the same cameras.
        """
        metrics: dict[str, float] = {}
        for name, split in SPLITS.items():
            if (self.splits == split).any():
                metrics |= self._metrics_of_split(name, split)
        return metrics

    def _metrics_of_split(self, split_name: str, split: Split) -> dict[str, float]:
        chosen = np.flatnonzero(self.splits == split)
        _, latents = self.run.latents(self.data, self.splits, split, self.refinement_steps)
        signal = self.run.signal
        assert isinstance(signal, RadianceField)
        count = self.data.images.shape[1]
        given = count - signal.held_out_views
        views = {"": evenly_spaced(given, 4)}
        if signal.held_out_views:
            views["novel_views_"] = np.arange(given, count)
        means = self._mean_views()
        scores: dict[str, list[dict[str, np.ndarray]]] = {}
        shown = []
        for place in progress_bar(evenly_spaced(len(chosen), _OBJECTS), desc=f"rendering {split_name}", unit="object"):
            row = chosen[place]
            for kind, numbers in views.items():
                truth = self.data.images[row, numbers] / 255
                drawn = rendered(self.run, latents[place : place + 1], self.data, row, numbers) / 255
                images = {"": drawn}
                if kind:
                    images["nearest_"] = self.data.images[row, self._nearest(row, numbers, given)] / 255
                    shown.append((truth[0], drawn[0]))
                if means is not None:
                    images["mean_"] = means[numbers]
                for subject, values in images.items():
                    scores.setdefault(kind + subject, []).append(_scores(values, truth))
        self._save_image(split_name, shown)
        metrics: dict[str, float] = {}
        for name, parts in scores.items():
            metrics |= mean_metrics(joined(parts), f"{name}{split_name}")
        return metrics

    def _mean_views(self) -> np.ndarray | None:
        """Averages the views of training objects, [V, H, W, 3] in [0, 1]; None if their cameras differ."""
        poses = np.asarray(self.data.poses)
        train = np.flatnonzero(self.splits == Split.TRAIN)
        if not len(train) or np.abs(poses - poses[:1]).max() > 1e-4:
            return None
        total = np.zeros(self.data.images.shape[1:])
        for row in train:
            total += self.data.images[row]
        return total / len(train) / 255

    def _nearest(self, row: int, views: np.ndarray, given: int) -> np.ndarray:
        """Finds the given view of the object whose camera stands nearest to each of ``views``."""
        cameras = self.data.poses[row, :, :3, 3]
        return np.linalg.norm(cameras[views, None] - cameras[None, :given], axis=-1).argmin(axis=1)

    def _save_image(self, split_name: str, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
        if not shown:
            return
        originals, drawn = zip(*(shown[row] for row in evenly_spaced(len(shown), _SHOWN)), strict=True)
        pixels = (np.stack([*originals, *drawn]) * 255).round().astype(np.uint8)
        save_image(self.output_dir / f"novel_views_{split_name}.png", image_grid(pixels, columns=len(drawn)))


@torch.no_grad()
def rendered(run: LoadedRun, latent: torch.Tensor, data: ViewData, row: int, views: np.ndarray) -> np.ndarray:
    """Renders a latent [1, D] for some of the cameras of an object: [views, H, W, 3] uint8."""
    signal, decoder = run.signal, run.decoder
    assert isinstance(signal, RadianceField)
    batch = {name: torch.from_numpy(np.array(array[row : row + 1])) for name, array in data.arrays().items()}
    batch = {name: tensor.to(decoder.device) for name, tensor in batch.items()}
    cameras = signal.observe_views(batch, views.tolist()).query
    colours = signal.render_views(decoder, decoder.coefficients(latent.to(decoder.device)), cameras)[0]
    return to_uint8(colours)


def _scores(images: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Scores one object by the means over its views, [1] each."""
    scores = {"psnr": psnr_per_image(images, truth)}
    if min(truth.shape[1:3]) >= SSIM_WINDOW:
        scores["ssim"] = ssim_per_image(images, truth)
    return {name: values.mean(keepdims=True) for name, values in scores.items()}


@register_evaluator
class RadianceEvaluator(Evaluator):
    """Measures a model of radiance fields by held-out views and, if it has a prior, samples; or pictures of objects.

    Raises:
        UserError: the model, the samples, which are pictures of one size from whatever cameras, or the reference
            cannot be had.
    """

    signal = "radiance"

    def __init__(self, arguments: EvalArguments) -> None:
        super().__init__(arguments)
        self.subject: LoadedRun | IndexedImages
        if arguments.model is not None:
            self.subject = load_run(arguments.model)
            require("torchmetrics", "eval", "SSIM")
            data = self.subject.signal.load_like(arguments.reference)
            assert isinstance(data, ViewData)
            self.data, self.measured = data, sha256_of_model(arguments.model)
        else:
            assert arguments.samples is not None
            self.subject = sample_images(arguments.samples)
            # Only pictures are compared here, whatever their cameras see.
            self.data = load_views(arguments.reference, self.subject.size, bound=math.inf)
            self.measured = self.subject.fingerprint

    def inputs(self) -> dict[str, str]:
        """Returns the fingerprints of model or samples and of the reference."""
        return {"measured": self.measured, "reference_fingerprint": self.data.fingerprint()}

    def evaluate(self, processes: Processes) -> dict[str, Any]:
        """Measures the samples, if there are any, and a model's views of the reference.

        Raises:
            UserError: there are too few objects, or the extractor cannot be had.
        """
        if isinstance(self.subject, LoadedRun):
            return self._evaluate_model(self.subject, processes)
        comparison = ViewComparison(self.arguments, self.data, processes)
        images = self.subject.first(comparison.count(None) * len(comparison.views))
        metrics = comparison.distances({"": comparison.cache.features(images, "samples")})
        splits = self.data.split(self.arguments.held_out_fraction, self.arguments.test_fraction)
        return metrics | {"protocol": comparison.protocol() | self._protocol(splits)}

    def _evaluate_model(self, run: LoadedRun, processes: Processes) -> dict[str, Any]:
        arguments, data = self.arguments, self.data
        run.to(processes.device)
        splits = run.splits(data, arguments.held_out_fraction, arguments.test_fraction)
        metrics, protocol = {}, {}
        if run.pipeline is not None:
            comparison = ViewComparison(arguments, data, processes)
            count = comparison.count(arguments.num_samples)
            latents = drawn_latents(run.pipeline, count, arguments.seed, arguments.num_inference_steps)
            sets = _drawn_sets(run, latents, arguments.seed)
            metrics, protocol = comparison.metrics(sets, run, splits, self.measured), comparison.protocol()
            if run.table is not None and run.table.held_out.any():
                metrics |= memorisation_metrics(latents.cpu().numpy(), run.table)
        if not processes.is_main:
            return {}
        steps, output_dir = arguments.refinement_steps, arguments.output_dir
        metrics |= ViewReconstructions(run, data, splits, steps, output_dir).metrics()
        return metrics | {"protocol": protocol | self._protocol(splits)}

    def _protocol(self, splits: np.ndarray) -> dict[str, Any]:
        """Returns all that another number must share to be comparable."""
        height, width = self.data.images.shape[2:4]
        return {
            "reference": self.arguments.reference,
            "resolution": f"{height}×{width}",
            "psnr": "of pictures in [0, 1], mean over views, then over objects",
            "seed": self.arguments.seed,
            "train_objects": int((splits == Split.TRAIN).sum()),
            "held_out_objects": int((splits == Split.HELD_OUT).sum()),
            "test_objects": int((splits == Split.TEST).sum()),
        }


class ViewComparison:
    """Compares renderings with real views: those of one half of the designs; the other half is the floor.

    Raises:
        UserError: there are too few objects, or the extractor cannot be had.
    """

    def __init__(self, arguments: EvalArguments, data: ViewData, processes: Processes) -> None:
        protocol = protocol_of(arguments)
        extractor = extractor_by_name(protocol.extractor, arguments.inception_weights, processes.device)
        self.data, self.output_dir = data, arguments.output_dir
        self.cache = FeatureCache(protocol.resize, extractor, processes, arguments.output_dir / ".parts")
        self.views = evenly_spaced(data.images.shape[1], _VIEWS)
        half = data.held_out(0.5)
        order = np.random.default_rng(0).permutation(len(data))
        self.reference, self.floor = order[half[order]], order[~half[order]]
        if min(len(self.reference), len(self.floor)) < 2:
            raise UserError(f"--reference {data.name}: {len(data)} objects; at least 2 in each half are needed")

    def count(self, wanted: int | None) -> int:
        """Objects in each compared set but the reference."""
        return min(wanted or len(self.floor), len(self.floor))

    def metrics(
        self, sets: dict[str, torch.Tensor], run: LoadedRun, splits: np.ndarray, measured: str
    ) -> dict[str, Any]:
        """Measures distances of rendered latents and how near samples lie to training objects, and shows both.

        Args:
            sets: what a set's metrics end with ("" for the samples, "_gaussian" …) → latents [n, D].
            run: the model that renders them.
            splits: [N] of :class:`mnif.data.dataset.Split`.
            measured: fingerprint of the model.
        """
        rendering = {name: self._rendered(run, latents, f"{measured} {name}") for name, latents in sets.items()}
        features = {name: self.cache.features(source, f"views{name}") for name, source in rendering.items()}
        metrics = self.distances(features)
        if not self.cache.processes.is_main:
            return metrics
        real, train = self._by_object(self._real()), np.flatnonzero(splits == Split.TRAIN)
        if len(train):
            held_out = real[splits == Split.HELD_OUT]
            novelty, nearest = novelty_metrics(self._by_object(features[""]), held_out, real[train])
            metrics |= novelty
            first = range(min(_SHOWN, len(sets[""])))
            above = [rendering[""].read(range(row * len(self.views), row * len(self.views) + 1))[0] for row in first]
            below = [self.data.images[train[nearest[row]], self.views[0]] for row in first]
            save_image(self.output_dir / "nearest.png", image_grid([*above, *below], columns=len(above)))
        return metrics

    def distances(self, features: dict[str, np.ndarray]) -> dict[str, Any]:
        """Measures the Fréchet distance of each set of features, of the floor and of the mean view."""
        real, views = self._real(), len(self.views)
        if not self.cache.processes.is_main:
            return {}
        by_view = real.reshape(len(self.data), views, -1)
        reference = moments_of(by_view[self.reference].reshape(-1, real.shape[1]))
        count = min(len(rows) for rows in features.values())
        sets = features | {"_floor": by_view[self.floor].reshape(-1, real.shape[1])[:count]}
        name = self.cache.extractor.frechet
        metrics: dict[str, Any] = {}
        for ending, rows in sets.items():
            metrics[f"{name}{ending}"] = frechet_distance(moments_of(rows), reference)
            if (spread := self._spread(rows, reference)) is not None:
                metrics[f"{name}{ending}_std"] = spread
        if (mean := self._mean_view_features()) is not None:
            metrics[f"{name}_mean"] = frechet_distance(moments_of(mean), reference)
        dimension, warnings = self.cache.extractor.dimension, []
        if count < dimension:
            warnings = [f"{count} views in each set are fewer than the {dimension} features: {name} is biased up"]
        return metrics | {"warnings": warnings}

    def protocol(self) -> dict[str, Any]:
        """Returns what another distance must share to be comparable."""
        size = (self.data.images.shape[2], self.data.images.shape[3])
        return self.cache.protocol(size) | {
            "views_of_each_object": len(self.views),
            "reference_objects": len(self.reference),
            "reference_part": "half",
        }

    def _real(self) -> np.ndarray:
        """Computes the features of the chosen views of every real object, object by object."""
        images, views = self.data.images, self.views

        def read(rows: range) -> np.ndarray:
            return np.stack([images[row // len(views), views[row % len(views)]] for row in rows])

        height, width = images.shape[2:4]
        key = f"{self.data.fingerprint()} views {views.tolist()}"
        source = IndexedImages(len(self.data) * len(views), (height, width), key, read)
        return self.cache.features(source, "real views", keep=True)

    def _rendered(self, run: LoadedRun, latents: torch.Tensor, name: str) -> IndexedImages:
        """Renders latents for the cameras of the floor's objects, one after the other."""
        views, data, floor = self.views, self.data, self.floor

        def read(rows: range) -> np.ndarray:
            images = []
            for number in range(rows.start // len(views), -(-rows.stop // len(views))):
                wanted = [row % len(views) for row in rows if row // len(views) == number]
                images.append(rendered(run, latents[number : number + 1], data, floor[number], views[wanted]))
            return np.concatenate(images)

        height, width = data.images.shape[2:4]
        digest = hashlib.sha256(np.ascontiguousarray(latents.cpu().numpy()).tobytes()).hexdigest()
        key = f"{name} {digest} {data.fingerprint()} {views.tolist()}"
        return IndexedImages(len(latents) * len(views), (height, width), key, read)

    def _mean_view_features(self) -> np.ndarray | None:
        """Computes the features of the floor's mean from each camera; None if the cameras differ."""
        poses = np.asarray(self.data.poses)
        if np.abs(poses - poses[:1]).max() > 1e-4 or len(self.views) < 2:
            return None
        total = np.zeros((len(self.views), *self.data.images.shape[2:]))
        for row in self.floor:
            total += self.data.images[row, self.views]
        images = (total / len(self.floor)).round().astype(np.uint8)
        extractor = self.cache.extractor
        return np.concatenate([*extractor.features(images, RESIZES[self.cache.resize])])

    def _by_object(self, features: np.ndarray) -> np.ndarray:
        """Averages features over the views of each object, [objects, D]."""
        return features.reshape(-1, len(self.views), features.shape[1]).mean(axis=1)

    def _spread(self, rows: np.ndarray, reference: Moments) -> float | None:
        """Estimates the standard error that the choice of objects gives; all views of an object go together."""
        views = len(self.views)
        blocks = len(rows) // (views * GROUPS)
        if not blocks:
            return None
        whole = rows[: blocks * views * GROUPS].reshape(blocks, GROUPS, views, -1)
        return frechet_spread(GroupedFeatures(whole.transpose(0, 2, 1, 3).reshape(-1, rows.shape[1])), reference)


def _drawn_sets(run: LoadedRun, latents: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Collects latents [n, D] of samples and of their controls: a Gaussian's, and those of training objects."""
    sets = {"": latents}
    if run.table is not None:
        sets["_gaussian"] = torch.from_numpy(gaussian_latents(run.table, len(latents), seed))
        sets["_reconstructed"] = run.table.train[: len(latents)]
    return sets
