"""What the page shows of bases, instances and samples: pictures with and without, maps of cells, strips of steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evals.atlas.mixture import AT_ONCE, Mixture, Subject, coefficients_of
from evals.atlas.removal import mean_errors, some_at_random, strongest
from evals.atlas.usage import Usage
from evals.report.exhibits import easel_of
from mnif.utils.pixels import as_axes

USERS = 3
"""Instances that a basis is shown on: those that use it most."""
STEPS = (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)
"""Of a coefficient: 0 is the instance's own, -1 without, each step what the instance has of it beyond the baseline."""
STRIPS = 6
"""Bases that a subject names."""

_PIXELS = 96  # of pictures; views, which take longer, have 64
_GAIN = 64  # at most, of a difference
_MAP = (36, 72, 196)  # the colour of cells that count; the more the less transparent
_BETWEEN = (212, 217, 225, 255)  # the colour of what parts layers of cells


@dataclass(frozen=True)
class BasisPlate:
    """One basis.

    Attributes:
        users: ids of the instances that use it most.
        shown: what they look like, [USERS, H, W, 3]; of objects seen in views the first of them, from several sides.
        without: the same without the basis.
        difference: what the basis adds, grey where it is nothing.
        gain: by which the difference is enlarged.
        cells: where it is used, a picture (:func:`cell_map`), or None of one cell.
    """

    users: list[str]
    shown: np.ndarray
    without: np.ndarray
    difference: np.ndarray
    gain: int
    cells: np.ndarray | None


@dataclass(frozen=True)
class Strip:
    """One of the bases that a subject names: what becomes of the subject as its coefficient changes.

    Attributes:
        basis: its number.
        share: of the rises of all bases.
        error: the squared error without it.
        steps: those of :data:`STEPS` that are drawn.
        frames: from each side, at each step, [sides, steps, H, W, 3].
        difference: what the basis adds to the subject as it is, [sides, H, W, 3].
        gain: by which the difference is enlarged.
        cells: where the error rises without it.
    """

    basis: int
    share: float
    error: float
    steps: tuple[float, ...]
    frames: np.ndarray
    difference: np.ndarray
    gain: int
    cells: np.ndarray | None


@dataclass(frozen=True)
class SubjectPlate:
    """An instance or a sample.

    Attributes:
        name: of it.
        original: as it is in the data, [H, W, 3]; None of a sample.
        beside_original: the same view as the model draws it, of objects that are drawn from other sides; else None.
        shown: as the model draws it, from each side, [sides, H, W, 3].
        error: its squared error.
        left: without the coefficients that it names as strongest.
        left_error: its squared error then.
        left_others: without as many others.
        left_others_error: likewise.
        cells: where the error rises most, whatever basis is taken away.
        strips: the bases that it names.
    """

    name: str
    original: np.ndarray | None
    beside_original: np.ndarray | None
    shown: np.ndarray
    error: float
    left: np.ndarray
    left_error: float
    left_others: np.ndarray
    left_others_error: float
    cells: np.ndarray | None
    strips: list[Strip]


class Draughtsman:
    """Draws a model's mixtures; pictures are [H, W, 3] uint8.

    Views take longer than pictures, and there are several of an object: they are smaller, and have fewer steps.

    Args:
        mixture: the model.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.easel = mixture, easel_of(mixture.by_coefficients)
        several = self.easel.sides > 1
        self.pixels = 64 if several else _PIXELS
        self.steps: tuple[float, ...] = STEPS[::2] if several else STEPS
        self._known: dict[int, np.ndarray] = {}

    @torch.no_grad()
    def drawn(self, coefficients: Tensor) -> np.ndarray:
        """Draws coefficients [B, cells, layers, M]: [B, sides, H, W, 3]."""
        some = [self.mixture.as_latents(part) for part in coefficients.split(AT_ONCE)]
        return np.concatenate([self.easel.around(latents, self.pixels) for latents in some])

    @torch.no_grad()
    def basis(self, basis: int, usage: Usage, latents: Tensor, ids: Sequence[str]) -> BasisPlate:
        """Draws what a basis does to those of the instances (``latents`` [N, D], ``ids``) that use it most."""
        named = usage.users(basis, USERS)
        users = named if self.easel.sides == 1 else named[:1]
        whole = coefficients_of(self.mixture.decoder, latents[users])
        chosen = torch.zeros(whole[0, 0].numel(), dtype=torch.bool, device=whole.device)
        chosen[basis] = True
        without = np.concatenate(self.drawn(self.mixture.without(whole, chosen.view(whole[0, 0].shape))))
        for row in {*users.tolist()} - self._known.keys():
            self._known[row] = self.drawn(coefficients_of(self.mixture.decoder, latents[row : row + 1]))[0]
        shown = np.concatenate([self._known[row] for row in users.tolist()])
        difference, gain = signed_difference(shown, without)
        used = usage.cells.flatten(1)[:, basis]
        return BasisPlate([ids[row] for row in named], shown, without, difference, gain, self.map(used))

    @torch.no_grad()
    def subject(self, subject: Subject, rises: Tensor, count: int) -> SubjectPlate:
        """Draws a subject by the bases whose ``rises`` [cells, layers, M] are largest.

        Args:
            subject: the subject.
            rises: :func:`evals.atlas.removal.error_rises`.
            count: of the coefficients without which it is drawn.
        """
        mixture, whole = self.mixture, subject.coefficients
        held = mixture.held.to(rises.device)
        top = strongest(rises.where(held, -torch.inf), count)
        others = some_at_random(held & ~top, count, np.random.default_rng(0)).to(whole.device)
        mixtures = torch.stack([whole, mixture.without(whole, top), mixture.without(whole, others)])
        error, left_error, others_error = mean_errors(mixture, subject, mixtures).tolist()
        shown, left, left_others = self.drawn(mixtures)
        original, beside_original = self._originals(subject)
        total = rises.sum(dim=0).flatten()
        strips = [self._strip(subject, rises, basis) for basis in total.topk(min(STRIPS, len(total))).indices.tolist()]
        cells = self.map(rises.sum(dim=(1, 2)))
        return SubjectPlate(
            subject.name,
            original,
            beside_original,
            shown,
            error,
            left,
            left_error,
            left_others,
            others_error,
            cells,
            strips,
        )

    def _originals(self, subject: Subject) -> tuple[np.ndarray | None, np.ndarray | None]:
        mixture, signal = self.mixture, self.mixture.signal
        if subject.is_sample:
            return None, None
        (original,) = signal.original_images(subject.row)
        if self.easel.sides == 1:
            return original, None
        latents = mixture.as_latents(subject.coefficients[None])
        return original, signal.reconstruction_images(mixture.by_coefficients, latents, subject.row)[0]

    def _strip(self, subject: Subject, rises: Tensor, basis: int) -> Strip:
        of_cells = rises.flatten(1)
        own = (subject.coefficients - self.mixture.baseline).flatten(1)[:, basis]
        steps = torch.tensor(self.steps, device=own.device)
        mixtures = subject.coefficients.repeat(len(steps), 1, 1, 1)
        mixtures.flatten(2)[:, :, basis] += steps[:, None] * own
        error = mean_errors(self.mixture, subject, mixtures[self.steps.index(-1)][None]).item()
        rise = of_cells[:, basis]
        share = float(rise.sum() / of_cells.clamp_min(0).sum().clamp_min(1e-12))
        frames = self.drawn(mixtures).swapaxes(0, 1)
        shown, without = (frames[:, self.steps.index(step)] for step in (0, -1))
        difference, gain = signed_difference(shown, without)
        return Strip(basis, share, error, self.steps, frames, difference, gain, self.map(rise))

    def map(self, values: Tensor) -> np.ndarray | None:
        """Draws what cells have as :func:`cell_map`; None of a model with one cell."""
        config = self.mixture.decoder.config
        if config.cells == 1:
            return None
        return cell_map(values.cpu().numpy().reshape(as_axes(config.cells, config.dimensions)))


def cell_map(values: np.ndarray) -> np.ndarray:
    """Draws values on a grid of cells, from nothing at 0 or below to the full colour at the largest: [H, W, 4] uint8.

    One axis is a row; two are rows and columns; of three, indexed [x, y, z] with y up, the layers stand side by side
    from the bottom to the top, each as seen from above, with a grey line between. Further axes lie in the rows.
    """
    if values.ndim == 3:
        layers = values.transpose(1, 2, 0)
        gap = np.full((layers.shape[1], 1), np.nan)
        plane = np.concatenate([part for layer in layers for part in (layer, gap)][:-1], axis=1)
    else:
        plane = values.reshape(-1, values.shape[-1])
    share = np.nan_to_num(plane).clip(0) / max(np.nanmax(plane), 1e-12)
    picture = np.empty((*plane.shape, 4), dtype=np.uint8)
    picture[..., :3], picture[..., 3] = _MAP, np.rint(255 * share)
    picture[np.isnan(plane)] = _BETWEEN
    return picture


def signed_difference(pictures: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, int]:
    """Subtracts pictures, enlarged by a power of two so that it can be seen: grey where they are alike.

    Args:
        pictures: [B, H, W, 3] uint8.
        others: likewise.

    Returns:
        [B, H, W, 3] uint8, and by how much the difference is enlarged, from 1 to 64.
    """
    difference = pictures.astype(np.float32) - others
    largest = max(float(np.quantile(np.abs(difference), 0.998)), 1.0)
    gain = min(2 ** max(int(np.log2(255 / largest)), 0), _GAIN)
    return np.clip(np.rint(127.5 + gain * difference / 2), 0, 255).astype(np.uint8), gain
