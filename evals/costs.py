"""What showing an instance costs, what a device carries for it, and what samples are worth after a short prior."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evals.timing import settled_seconds
from export.graphs.fields import decoder_graph
from export.graphs.precision import convert
from latent_prior.distillation import energy_distance
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import sample_latents
from mnif.data.batches import ArrayDataset, array_dataset, evenly_spaced
from mnif.data.dataset import Dataset
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, Signal
from mnif.signals.radiance import RadianceField

_COMPARED = 128  # samples
_MOST_NUMBERS = 1 << 24  # of all that are compared
_BATCH = 32
_FLOAT = 4  # bytes
_LARGE = 4096  # numbers of a matrix that samplers store in int8


def decode_costs(decoder: MNIFModel, signal: Signal, rows: ArrayDataset) -> dict[str, float]:
    """Measures what one instance costs from its latent on: all of its grid, or one view where it is seen in views.

    Args:
        decoder: the bases.
        signal: what the rows are.
        rows: instances; the first one says from where it is seen.

    Returns:
        ``decode_multiply_adds`` (map, mixing and fields, without sines), ``decode_milliseconds`` in PyTorch one at a
        time, ``field_bytes`` of the baked fields in float32, and ``shipped_bytes`` (:func:`shipped_bytes`).
    """
    (batch,) = rows.subset(np.arange(1)).batches(1, decoder.device)
    observation = _observed(signal, batch)
    latents = torch.zeros(1, decoder.config.latent_dim, device=decoder.device)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            field = decoder.bake(decoder.coefficients(latents))
        seconds = settled_seconds(
            lambda: signal.predict(decoder, decoder.coefficients(latents), observation).cpu(), least=0.2
        )
    return {
        "decode_multiply_adds": counter.get_total_flops() // 2
        + _points(decoder, signal) * field.multiply_adds_per_point(),
        "decode_milliseconds": 1e3 * seconds,
        "field_bytes": _FLOAT * decoder.num_cells * field.parameters_per_field(),
        "shipped_bytes": shipped_bytes(decoder),
    }


def _observed(signal: Signal, batch: Mapping[str, Tensor]) -> Observation:
    """Observes the whole grid of a batch, or the first view."""
    return signal.observe_views(batch, [0]) if signal.num_views(batch) else signal.observe(batch)


def _points(decoder: MNIFModel, signal: Signal) -> int:
    """Counts the points that fields are asked at, those of borders in each of the cells that share them."""
    if isinstance(signal, RadianceField):
        return math.prod(signal.size) * signal.samples
    return decoder.grid(signal.grid_resolution).coordinates.shape[1] * decoder.num_cells


def shipped_bytes(decoder: MNIFModel) -> int:
    """Counts the bytes that a sampler of a bundle holds for the decoder.

    That is the decoder's graph in mixed precision, and the map from latents to coefficients, large matrices in int8.
    """
    graph = convert(decoder_graph(copy.deepcopy(decoder).cpu(), decoder.config.resolution), "mixed", "fp16")
    size = graph.ByteSize()
    for parameter in decoder.coefficient_map.parameters() if decoder.coefficient_map is not None else ():
        is_large = parameter.ndim == 2 and parameter.numel() >= _LARGE
        size += parameter.numel() + _FLOAT * len(parameter) if is_large else _FLOAT * parameter.numel()
    return size


@torch.no_grad()
def samples_distance(
    model: Path, signal: Signal, train_data: Dataset, held_out: ArrayDataset, seed: int
) -> dict[str, float]:
    """Compares samples of a model with held-out instances, by their values.

    Each sample is seen as one of the instances was: on its grid, or from its first camera.

    Args:
        model: the folder of both stages.
        signal: what the data are.
        train_data: the instances learned from.
        held_out: others; 128 are compared at most, and as many samples.
        seed: of the samples.

    Returns:
        ``samples_distance``, the energy distance of both sets over the root of the number of values, and
        ``samples_distance_floor``, that of as many training instances; nothing if there are fewer than two of either.
    """
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    train_rows, decoder = array_dataset(train_data.arrays()), pipeline.decoder
    numbers = _observed(signal, next(held_out.batches(1))).values.numel()
    count = min(_COMPARED, len(held_out), len(train_rows), max(_MOST_NUMBERS // numbers, 2))
    if count < 2:
        return {}
    real, train = (rows.subset(evenly_spaced(len(rows), count)) for rows in (held_out, train_rows))
    latents = sample_latents(pipeline, seed, range(count))
    drawn = []
    for batch, some in zip(real.batches(_BATCH), latents.split(_BATCH), strict=True):
        drawn.append(signal.predict(decoder, decoder.coefficients(some), _observed(signal, batch)).clamp(-1, 1))
    values = [torch.cat([_observed(signal, batch).values for batch in rows.batches(_BATCH)]) for rows in (real, train)]
    truth, floor, samples = ((part.flatten(1) / math.sqrt(numbers)) for part in (*values, torch.cat(drawn)))
    return {
        "samples_distance": energy_distance(samples, truth),
        "samples_distance_floor": energy_distance(floor, truth),
    }
