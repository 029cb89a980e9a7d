"""How well a model of pictures draws what it is given, beside PCA with as many numbers and the mean picture."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from evals.arguments import EvalArguments
from evals.images.bench import Bench
from evals.images.sources import PictureSource, latent_pictures, shown
from evals.metrics.frechet import frechet_distance_from_features, moments_of
from evals.metrics.reconstruction import SSIM_WINDOW, border_step_ratio, psnr_per_image, ssim_per_image
from evals.metrics.spread import GROUPS, GroupedFeatures, frechet_spread, spread_over_halves, standard_error
from mnif.data import ImageData, Split
from mnif.inner_loop import InnerLoop
from mnif.latents import LatentTable
from mnif.modeling import MNIFModel
from mnif.pca import fit_pca
from mnif.pictures import picture_grid, save_picture
from mnif.refinement import Finder, latents_of
from mnif.rows import rows_of
from mnif.signal_table import signal_of_model

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
        sides: [N] of :class:`mnif.data.Split`.
        table: the latents of ``reference``, if they are known.
        asked: refinement steps, and where pictures of originals above reconstructions go.
        fingerprint: of model and reference.
    """

    def __init__(
        self,
        bench: Bench,
        decoder: MNIFModel,
        finder: Finder,
        reference: ImageData,
        sides: np.ndarray,
        table: LatentTable | None,
        asked: EvalArguments,
        fingerprint: str,
    ):
        self.bench, self.decoder, self.finder, self.reference = bench, decoder, finder, reference
        self.sides, self.table, self.asked, self.fingerprint = sides, table, asked, fingerprint

    def figures(self, real: np.ndarray) -> dict[str, float]:
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
        for part, side in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
            rows = np.flatnonzero(self.sides == side)
            if not len(rows):
                continue
            latents = self._latents(rows, side)
            picked = evenly(len(rows), self.bench.protocol.num_samples)
            found |= self._quality(rows, self._drawn(latents), part)
            found |= self._distance(rows[picked], self._drawn(latents[picked]), part, real)
            for name, control in controls.items():
                found |= self._quality(rows, self._control(name, control, rows), f"{name}_{part}")
                if name == "pca":
                    found |= self._distance(
                        rows[picked], self._control(name, control, rows[picked]), f"pca_{part}", real
                    )
            if side != Split.TRAIN and self.finder is not None:
                at_once = "inner_loop" if isinstance(self.finder, InnerLoop) else "encoder"
                found |= self._quality(rows, self._drawn(self._searched(rows, 0)), f"{part}_{at_once}")
            if self.bench.processes.is_main:
                found |= self._borders(rows, self._drawn(latents), part)
        return found

    def _controls(self) -> tuple[int, dict[str, Callable[[np.ndarray], np.ndarray]]]:
        """How many components PCA has, and what it and the mean picture make of pictures on [0, 1]."""
        train = np.flatnonzero(self.sides == Split.TRAIN)
        numbers = self.reference.images[0].size
        some = self.reference.images[train[evenly(len(train), max(_PCA_NUMBERS // numbers, 1))]] / np.float32(255)
        # PCA cannot have more components than there are pictures or numbers in one.
        components = min(self.decoder.config.latent_dim, len(some), numbers)
        pca, mean = fit_pca(some, components), some.mean(axis=0, dtype=np.float64).astype(np.float32)
        return components, {"pca": pca.reconstruct, "mean": lambda images: np.broadcast_to(mean, images.shape)}

    def _control(self, name: str, control: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> PictureSource:
        images, quantise = self.reference.images, self.bench.protocol.quantise

        def read(some: range) -> np.ndarray:
            values = control(images[rows[some.start : some.stop]] / np.float32(255)).clip(0, 1) * np.float32(255)
            return values.round().astype(np.uint8) if quantise else values

        height, width = images.shape[1:3]
        key = f"{self.fingerprint} {name} {quantise} {_hash_of(rows)} {_hash_of(self.sides)}"
        return PictureSource(len(rows), (height, width), key, read)

    def _latents(self, rows: np.ndarray, side: Split) -> np.ndarray:
        if side == Split.TRAIN and self.finder is not None:
            return self._searched(rows, 0)
        if side == Split.TRAIN and self.table is not None:
            return self.table.train.numpy()
        return self._searched(rows, self.asked.refinement_steps)

    def _searched(self, rows: np.ndarray, steps: int) -> np.ndarray:
        """Latents of some of the pictures, [n, D]."""
        signal, images = signal_of_model(self.decoder), self.reference.images

        def compute(batch: np.ndarray) -> np.ndarray:
            found = latents_of(self.decoder, signal, rows_of({"images": batch}), self.finder, steps)
            return torch.cat([*found]).cpu().numpy()

        def load(some: range) -> np.ndarray:
            return images[rows[some.start : some.stop]]

        key, width = [self.fingerprint, "latents", _hash_of(rows), steps], self.decoder.config.latent_dim
        return self.bench.rows(key, len(rows), width, load, compute, "finding latents")

    def _drawn(self, latents: np.ndarray) -> PictureSource:
        fingerprint = f"{self.fingerprint} {_hash_of(latents)}"
        return latent_pictures(self.decoder, latents, fingerprint, self.bench.protocol.quantise)

    def _quality(self, rows: np.ndarray, drawn: PictureSource, ending: str) -> dict[str, float]:
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

    def _distance(self, rows: np.ndarray, drawn: PictureSource, ending: str, real: np.ndarray) -> dict[str, float]:
        """The Fréchet distance of reconstructions from their originals."""
        features = self.bench.features(drawn, f"reconstructions, {ending}")
        if not self.bench.processes.is_main or len(rows) < 2:
            return {}
        name, originals = f"r{self.bench.extractor.frechet}_{ending}", real[rows]
        found = {name: frechet_distance_from_features(features, originals)}
        if len(rows) >= 2 * GROUPS:
            found[f"{name}_std"] = frechet_spread(GroupedFeatures(features), moments_of(originals))
        return found

    def _borders(self, rows: np.ndarray, drawn: PictureSource, part: str) -> dict[str, float]:
        """Steps across the borders of cells; and a picture of originals above reconstructions."""
        images, cells = self.reference.images, self.decoder.config.cells
        pick = evenly(len(rows), SHOWN)
        both = np.concatenate([images[rows[pick]], shown(drawn, pick)])
        save_picture(self.asked.output_dir / f"reconstructions_{part}.png", picture_grid(both, columns=len(pick)))
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
