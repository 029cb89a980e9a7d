"""A model folder as it is measured: its stages, which split an instance is on, and latents drawn in a Gaussian's
place too."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evals.features.extractor import FeatureCache
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import CHUNK, sample_latents
from mnif.data.batches import ArrayDataset, array_dataset
from mnif.data.dataset import Dataset, Split
from mnif.latents.inference import LatentInit, infer_latents, load_latent_init
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.signals.registry import signal_of_model
from mnif.utils.process import progress_bar
from mnif.utils.resumable import chunks_of

SPLITS = {"train": Split.TRAIN, "heldout": Split.HELD_OUT, "test": Split.TEST}
"""As names of metrics have them."""


def is_of(table: LatentTable, reference: Dataset) -> bool:
    """Tells whether the table's instances are the reference's, in order; some may be kept out of it for a test."""
    known = set(table.ids)
    return table.ids == [id for id in reference.ids if id in known]


def splits_of(table: LatentTable, reference: Dataset) -> np.ndarray:
    """Returns the splits [N] of :class:`mnif.data.dataset.Split` as `mnif fit` cut them.

    What is not in its table it never looked at: that is a test.
    """
    splits = np.full(len(reference), Split.TEST, dtype=np.int8)
    known = set(table.ids)
    splits[[id in known for id in reference.ids]] = np.where(table.held_out.numpy(), Split.HELD_OUT, Split.TRAIN)
    return splits


def latent_table_of(model: Path, decoder: MNIFModel) -> LatentTable | None:
    """Loads the latent table that ``mnif fit`` wrote beside the model folder, or None if it was left behind."""
    path = model.parent / "latents.safetensors"
    return LatentTable.load_for(decoder, path) if path.exists() else None


@dataclass(frozen=True)
class LoadedRun:
    """What a model folder and its run hold.

    Attributes:
        decoder: stage one.
        signal: its signal.
        latent_init: its encoder or inner loop, if it has one.
        table: the latents that `mnif fit` found, if they lie beside the model.
        pipeline: both stages, if there is a prior.
    """

    decoder: MNIFModel
    signal: Signal
    latent_init: LatentInit
    table: LatentTable | None
    pipeline: MNIFPipeline | None

    def to(self, device: torch.device) -> None:
        """Moves all networks."""
        for network in (self.decoder, self.latent_init, self.pipeline):
            if network is not None:
                network.to(device)

    def splits(self, data: Dataset, held_out_fraction: float, test_fraction: float) -> np.ndarray:
        """Returns the splits [N] of :class:`mnif.data.dataset.Split` of the table or, without one, of the flags."""
        table = self.known(data)
        return data.split(held_out_fraction, test_fraction) if table is None else splits_of(table, data)

    def known(self, data: Dataset) -> LatentTable | None:
        """Returns the table if its instances are those of ``data``."""
        return self.table if self.table is not None and is_of(self.table, data) else None

    def latents(
        self, data: Dataset, splits: np.ndarray, split: Split, refinement_steps: int
    ) -> tuple[ArrayDataset, Tensor]:
        """Infers the latents [n, D] of the instances of one split; returns both.

        Training latents are the encoder's or inner loop's, or the table's without either; others are refined.
        """
        rows = array_dataset(data.arrays()).subset(np.flatnonzero(splits == split))
        table = self.known(data)
        if split == Split.TRAIN and self.latent_init is None and table is not None:
            return rows, table.train
        steps = 0 if split == Split.TRAIN and self.latent_init is not None else refinement_steps
        found = infer_latents(self.decoder, self.signal, rows, self.latent_init, steps, batch_size=64, progress=True)
        return rows, torch.cat([*found])


def load_run(model: Path, prior_needed: bool = False) -> LoadedRun:
    """Reads a model folder with what `mnif fit` left beside it.

    Raises:
        UserError: a part is damaged or belongs to another decoder, or the prior is needed and missing.
    """
    pipeline = load_pipeline(model) if prior_needed or (model / "denoiser").is_dir() else None
    decoder = load_component(MNIFModel, model, "decoder") if pipeline is None else pipeline.decoder
    signal = signal_of_model(decoder)
    table = latent_table_of(model, decoder)
    return LoadedRun(decoder, signal, load_latent_init(model, decoder, signal), table, pipeline)


def drawn_latents(pipeline: MNIFPipeline, count: int, seed: int, steps: int) -> Tensor:
    """The latents of samples 0 to ``count`` of ``seed`` as `mnif sample` draws them, [count, D]."""
    pipeline.set_progress_bar_config(disable=True)
    chunks = progress_bar(chunks_of(range(count), CHUNK), desc="sampling", unit="chunk")
    return torch.cat([sample_latents(pipeline, seed, chunk, steps) for chunk in chunks])


def prior_latents(
    cache: FeatureCache, pipeline: MNIFPipeline, count: int, seed: int, steps: int, fingerprint: str
) -> np.ndarray:
    """The latents of samples 0 to ``count`` of ``seed``, [count, D] float32, memory-mapped.

    Sample i is the one of `mnif sample`, whichever process draws it.
    """
    pipeline.set_progress_bar_config(disable=True)

    def drawn(rows: range) -> np.ndarray:
        return sample_latents(pipeline, seed, rows, steps).cpu().numpy()

    key = [fingerprint, "prior", seed, steps]
    return cache.rows(key, count, pipeline.decoder.config.latent_dim, lambda rows: rows, drawn, "sampling")


def gaussian_latents(table: LatentTable, count: int, seed: int) -> np.ndarray:
    """Draws latents [count, D] float32 from a full-covariance Gaussian fitted to the table's training rows."""
    rows = table.train.double().numpy()
    generator = np.random.default_rng([seed, 1])
    drawn = generator.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=count, method="eigh")
    return drawn.astype(np.float32)
