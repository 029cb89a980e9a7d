"""Pictures by number, wherever they come from: a data set, a folder, a model's latents, an exported bundle."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from evals.features.extractor import IndexedImages
from export.device import runtime
from export.device.bundle import BundleError
from export.device.runtime import Sampler, load_bundle
from mnif.data.images import ImageData, array_source, image_files, image_size, load_images, open_image
from mnif.models.mnif_model import MNIFModel
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
    """Reads the pictures in a folder, ``.npz`` or ``.npy`` file, in the order of their names.

    Raises:
        UserError: there are fewer than two, something else is among them, they differ in size or are not RGB.
    """
    path = Path(source)
    found = _folder_images(path) if path.is_dir() else _file_images(path)
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
            wanted = torch.from_numpy(np.array(latents[rows.start : rows.stop])).to(decoder.device)
            return np.concatenate([_pixels(decoder(batch), quantise) for batch in wanted.split(_DECODED_AT_ONCE)])

    return IndexedImages(len(latents), (height, width), f"{fingerprint} quantised {quantise}", read)


def bundle_images(folder: Path, count: int, seed: int) -> IndexedImages:
    """Draws samples 0 to ``count`` - 1 of ``seed`` from an exported bundle by ONNX Runtime.

    Raises:
        UserError: the bundle is incomplete or changed, or does not draw RGB pictures.
    """

    def read(rows: range) -> np.ndarray:
        try:
            return runtime.to_uint8(sampler(len(rows), seed, rows.start, _DECODED_AT_ONCE))
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


def _folder_images(folder: Path) -> IndexedImages:
    files = image_files(folder)
    strangers = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in _BESIDE_SAMPLES
    ]
    for name in strangers:
        if name not in files and not any(file.startswith(f"{name}/") for file in files):
            raise UserError(f"{folder / name}: no picture; move it away from the samples")
    digest, sizes = hashlib.sha256(), Counter[tuple[int, int]]()
    for name, path in files.items():
        with open_image(path) as image:
            sizes[image.height, image.width] += 1
            if image.mode not in ("RGB", "P") or "transparency" in image.info:
                raise UserError(f"{path}: a picture of mode {image.mode}; RGB without transparency is needed")
            if len(sizes) > 1:
                ((height, width), _), *_ = sizes.most_common()
                raise UserError(
                    f"{path}: {image.height}×{image.width} pixels where the others have {height}×{width}; "
                    "samples of one size are needed"
                )
        digest.update(f"{name} {sha256_of_file(path)}\n".encode())
    paths, (size,) = list(files.values()), sizes

    def read(rows: range) -> np.ndarray:
        images = []
        for path in paths[rows.start : rows.stop]:
            with open_image(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.stack(images)

    return IndexedImages(len(paths), size, digest.hexdigest(), read)


def _file_images(path: Path) -> IndexedImages:
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
