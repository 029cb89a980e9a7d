"""Sets of images, wherever they come from, and how far drawn ones are from real ones.

Images are known by number: of a data set, a folder, a model's latents or an exported bundle. Each metric stands beside
its controls and with its spread.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evals.features.extractor import Extractor, IndexedImages
from evals.metrics.frechet import Moments, frechet_distance, moments_of
from evals.metrics.kernel import kernel_distance_of_subsets, kernel_distance_with_spread
from evals.metrics.neighbours import nearest_neighbour_distances, novelty_ratio, unit_of_novelty
from evals.metrics.precision_recall import knn_radii, precision_recall
from evals.metrics.uncertainty import (
    GROUPS,
    GroupedFeatures,
    frechet_at_infinity,
    frechet_at_infinity_spread,
    frechet_spread,
    standard_error,
)
from export.device import pictures
from export.device.bundle import BundleError
from export.device.runtime import Sampler, load_bundle
from mnif.data.dataset import Split
from mnif.data.images import ImageData, array_source, holds_files, image_files, image_size, load_images, open_file
from mnif.data.shards import ShardMember
from mnif.data.source import DataSource, readable
from mnif.models.mnif_model import MNIFModel
from mnif.utils.devices import sent
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file
from mnif.utils.pixels import to_uint8

_BESIDE_SAMPLES = (".json", ".jsonl", ".safetensors", ".md", ".html", ".log")  # what commands write there themselves

_DECODED_AT_ONCE = 64


def data_images(data: ImageData) -> IndexedImages:
    """Reads the pictures of a data set."""
    height, width = data.images.shape[1:3]
    images = data.images
    return IndexedImages(
        len(data), (height, width), data.fingerprint(), lambda rows: np.asarray(images[rows.start : rows.stop])
    )


def sample_images(source: str) -> IndexedImages:
    """Reads the pictures in a folder, tar shards, ``.npz`` or ``.npy`` file, in the order of their names.

    Raises:
        UserError: there are fewer than two, something else is among them, they differ in size or are not RGB.
    """
    found = _images_of_files(DataSource(source)) if holds_files(source) else _array_images(Path(source))
    if found.count < 2:
        raise UserError(f"--samples {source}: {found.count} picture; at least 2 are needed")
    return found


def latent_images(decoder: MNIFModel, latents: np.ndarray, fingerprint: str, quantise: bool) -> IndexedImages:
    """Decodes latents [N, D] float32 to pictures.

    Args:
        decoder: a model of RGB pictures, on the device it is to run on.
        latents: memory-mapped, or in memory.
        fingerprint: of decoder and latents.
        quantise: round to uint8, as files hold; else clamp only.
    """
    size = decoder.config.resolution
    height, width = (size, size) if isinstance(size, int) else size

    def read(rows: range) -> np.ndarray:
        with torch.no_grad():  # which holds for this thread; in inference mode the decoder would keep unusable grids
            wanted = sent(torch.from_numpy(np.array(latents[rows.start : rows.stop])), decoder.device)
            return np.concatenate([_pixels(decoder(batch), quantise) for batch in wanted.split(_DECODED_AT_ONCE)])

    return IndexedImages(len(latents), (height, width), f"{fingerprint} quantised {quantise}", read)


def bundle_images(folder: Path, count: int, seed: int) -> IndexedImages:
    """Draws samples 0 to ``count`` - 1 of ``seed`` from an exported bundle by ONNX Runtime.

    Raises:
        UserError: the bundle is incomplete or changed, or does not draw RGB pictures.
    """

    def read(rows: range) -> np.ndarray:
        try:
            return pictures.to_uint8(sampler(len(rows), seed, rows.start, _DECODED_AT_ONCE))
        except BundleError as error:
            raise UserError(str(error)) from None

    try:
        sampler = Sampler(load_bundle(folder))
    except BundleError as error:
        raise UserError(str(error)) from None
    shape = read(range(1)).shape
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"--bundle {folder}: draws samples of shape {list(shape[1:])}; RGB pictures are needed")
    fingerprint = f"{sha256_of_file(folder / 'manifest.json')} seed {seed}"
    return IndexedImages(count, (shape[1], shape[2]), fingerprint, read)


def _images_of_files(data: DataSource) -> IndexedImages:
    files = image_files(data.name)
    if data.path.is_dir() and data.pattern is None:
        shards = any(isinstance(file, ShardMember) for file in files.values())
        _refuse_strangers(data.path, set(files), _BESIDE_SAMPLES + ((".tar",) if shards else ()))
    digest, sizes = hashlib.sha256(), Counter[tuple[int, int]]()
    for name, file in files.items():
        with open_file(file) as image:
            sizes[image.height, image.width] += 1
            if image.mode not in ("RGB", "P") or "transparency" in image.info:
                raise UserError(f"{file}: a picture of mode {image.mode}; RGB without transparency is needed")
            if len(sizes) > 1:
                ((height, width), _), *_ = sizes.most_common()
                raise UserError(
                    f"{file}: {image.height}×{image.width} pixels where the others have {height}×{width}; "
                    "samples of one size are needed"
                )
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    listed, (size,) = list(files.values()), sizes

    def read(rows: range) -> np.ndarray:
        images = []
        for file in listed[rows.start : rows.stop]:
            with open_file(file) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.stack(images)

    return IndexedImages(len(listed), size, digest.hexdigest(), read)


def _refuse_strangers(folder: Path, names: set[str], beside: tuple[str, ...]) -> None:
    """Raises a UserError for a file in a folder of samples that is none of ``names`` and has another suffix."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix.lower() in beside:
            continue
        if readable(path.name) not in names and not any(name.startswith(f"{path.name}/") for name in names):
            raise UserError(f"{path}: no picture; move it away from the samples")


def _array_images(path: Path) -> IndexedImages:
    size = image_size(str(path))
    images = array_source(path).array
    if images is not None and images.shape[3:] != (3,):
        raise UserError(f"{path}: pictures {list(images.shape[1:])}; RGB is needed, [N, H, W, 3]")
    return data_images(load_images(str(path), size))


def _pixels(values: torch.Tensor, quantise: bool) -> np.ndarray:
    return to_uint8(values) if quantise else (values.clamp(-1, 1) * 127.5 + 127.5).cpu().numpy()


def shown(source: IndexedImages, rows: np.ndarray) -> np.ndarray:
    """Reads a few pictures by number, to look at: [n, H, W, 3] uint8."""
    images = np.concatenate([source.read(range(row, row + 1)) for row in rows.tolist()])
    return images if images.dtype == np.uint8 else images.round().astype(np.uint8)


@dataclass(frozen=True)
class Reference:
    """The real pictures that drawn ones are compared with.

    Attributes:
        rows: of the data, those compared with.
        floor: of the data, those that stand for perfect samples.
        floor_rows: what the floor is compared with; a part of ``rows``.
        count: drawn pictures that are compared, no more than this if it is not None.
    """

    rows: np.ndarray
    floor: np.ndarray
    floor_rows: np.ndarray
    count: int | None


def reference_of(data: ImageData, splits: np.ndarray, part: str) -> Reference:
    """Chooses the part of the data that a protocol compares with.

    "half": half of the designs; the other half is the floor, and samples are no more than it has, so that both
    distances have the same bias. "train" and "all": the floor is one half of their designs against the other.

    Raises:
        UserError: the data are too few.
    """
    chosen = splits == Split.TRAIN if part == "train" else np.full(len(data), True)
    half = data.held_out(0.5)
    first, second = np.flatnonzero(chosen & half), np.flatnonzero(chosen & ~half)
    if min(len(first), len(second)) < GROUPS:
        raise UserError(
            f"--reference {data.name}: {len(first)} and {len(second)} pictures in the two halves of its designs; "
            f"at least {GROUPS} in each are needed"
        )
    if part == "half":
        return Reference(first, np.random.default_rng(0).permutation(second), first, len(second))
    return Reference(np.flatnonzero(chosen), second, first, None)


def set_metrics(
    features: Mapping[str, np.ndarray],
    real: np.ndarray,
    reference: Reference,
    extractor: Extractor,
    neighbours: int,
) -> dict[str, float]:
    """Measures each set of drawn pictures, and the floor, against real ones.

    Args:
        features: what a set's metrics end with ("" for the samples, "_gaussian" …) → [n, D].
        real: features of all real pictures.
        reference: the rows compared with.
        extractor: names the metrics.
        neighbours: k of precision, recall, density and coverage.

    Returns:
        For each set the Fréchet distance, the kernel distance, precision, recall, density and coverage, each with its
        standard error ``NAME_std``; for the samples also the Fréchet distance at infinity and the kernel
        distance over subsets.

    Raises:
        UserError: too few samples, or features that are not finite.
    """
    drawn = {name: rows[: reference.count] for name, rows in features.items()}
    floor = {"_floor": real[reference.floor[: len(drawn[""]) if reference.count is not None else None]]}
    metrics = _metrics(drawn, real[reference.rows], extractor, neighbours)
    metrics |= _metrics(floor, real[reference.floor_rows], extractor, neighbours)
    samples, others = drawn[""], real[reference.rows]
    metrics |= _infinity(GroupedFeatures(samples), moments_of(others), extractor)
    mean, spread = kernel_distance_of_subsets(samples, others)
    return metrics | {f"{extractor.kernel}_subset_mean": mean, f"{extractor.kernel}_subset_std": spread}


def frechet_metrics(features: Mapping[str, np.ndarray], reference: Moments, extractor: Extractor) -> dict[str, float]:
    """Measures the Fréchet distances of sets of drawn pictures from statistics alone, with standard errors.

    Args:
        features: as for :func:`set_metrics`.
        reference: the statistics.
        extractor: names the metrics.

    Raises:
        UserError: too few samples, other features than the statistics have, or features that are not finite.
    """
    metrics: dict[str, float] = {}
    for ending, rows in features.items():
        grouped, name = GroupedFeatures(rows), f"{extractor.frechet}{ending}"
        metrics[name] = frechet_distance(grouped.moments(), reference)
        metrics[f"{name}_std"] = frechet_spread(grouped, reference)
        if ending == "":
            metrics |= _infinity(grouped, reference, extractor)
    return metrics


def novelty_metrics(
    samples: np.ndarray, held_out: np.ndarray, train: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Measures ``nn_ratio`` with its standard error, if anything was held out, and finds neighbours.

    All are features [·, D].

    Returns:
        The metrics, and the row of the nearest training picture of every sample, [N].

    Raises:
        UserError: half of the held-out pictures are training pictures.
    """
    distances, nearest = nearest_neighbour_distances(samples, train)
    if not len(held_out):
        return {}, nearest
    ratio, std = novelty_ratio(distances, unit_of_novelty(held_out, train))
    return {"nn_ratio": ratio, "nn_ratio_std": std}, nearest


def _metrics(
    sets: Mapping[str, np.ndarray], real: np.ndarray, extractor: Extractor, neighbours: int
) -> dict[str, float]:
    moments, real_radii = moments_of(real), knn_radii(real, neighbours)
    metrics: dict[str, float] = {}
    for name, rows in sets.items():
        grouped = GroupedFeatures(rows)
        distance, spread = kernel_distance_with_spread(rows, real)
        metrics |= {
            f"{extractor.frechet}{name}": frechet_distance(grouped.moments(), moments),
            f"{extractor.frechet}{name}_std": frechet_spread(grouped, moments),
            f"{extractor.kernel}{name}": distance,
            f"{extractor.kernel}{name}_std": spread,
        }
        quality = precision_recall(rows, real, neighbours, real_radii)
        for metric in ("precision", "recall", "density", "coverage"):
            values = getattr(quality, metric)
            metrics[f"{metric}_{extractor.suffix}{name}"] = float(values.mean())
            metrics[f"{metric}_{extractor.suffix}{name}_std"] = standard_error(values)
    return metrics


def _infinity(samples: GroupedFeatures, reference: Moments, extractor: Extractor) -> dict[str, float]:
    name = f"{extractor.frechet}_infinity"
    return {
        name: frechet_at_infinity(samples, reference),
        f"{name}_std": frechet_at_infinity_spread(samples, reference),
    }
