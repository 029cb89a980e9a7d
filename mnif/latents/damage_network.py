"""The small convolutional network that tells kinds of damage from sound observations, as it is learned.

It learns without labels: training instances against copies of them that are damaged in known ways
(:mod:`mnif.latents.damage`), each variant a class of its own, as telling geometric transformations apart is known to
tell foreign instances too (Golan and El-Yaniv, *Deep anomaly detection using geometric transformations*, 2018).
:func:`mnif.latents.surprise.log_odds_of` asks it, in NumPy.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnif.latents.damage import some_damaged
from mnif.latents.surprise import network_shapes, strides_of, with_places
from mnif.utils.process import progress_bar

_BATCH = 96
_MOST_STEPS = 1500
_LEAST_STEPS = 30
_EPOCHS = 20  # of the sound ones, at most
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05
_DROPOUT = 0.3


def learn_damage(
    pictures: np.ndarray, probabilities: np.ndarray, seed: int = 0, steps: int | None = None
) -> dict[str, np.ndarray]:
    """Learns to tell damage: the arrays from ``conv_0`` to ``logits_bias``, in half precision.

    Args:
        pictures: [n, pixels…, C], sound ones.
        probabilities: of each to be drawn, [n].
        seed: of weights and draws; PyTorch's own generator stays as it is.
        steps: None: about a minute of one core, less where there are few instances.
    """
    grid, channels = pictures.shape[1:-1], pictures.shape[-1]
    draw, steps = np.random.default_rng(seed), steps or _steps_of(len(pictures))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(grid, channels)
        optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps, pct_start=0.15)
        for _ in progress_bar(range(steps), desc="profile", unit="step"):
            values, classes = some_damaged(_drawn(pictures, probabilities, draw), draw)
            loss = F.cross_entropy(network(torch.from_numpy(with_places(values))), torch.from_numpy(classes))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.arrays()


def _steps_of(instances: int) -> int:
    return min(_MOST_STEPS, max(_LEAST_STEPS, instances * _EPOCHS * 3 // _BATCH))


def _drawn(pictures: np.ndarray, probabilities: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draws sound pictures: half of them mirrored along the last axis (if not the only one), all with their channels
    in any order, as pictures are few to learn from."""
    drawn = pictures[draw.choice(len(pictures), _BATCH, p=probabilities)].astype(np.float32)
    if drawn.ndim > 3:
        mirrored = draw.random(len(drawn)) < 0.5
        drawn[mirrored] = np.flip(drawn[mirrored], axis=-2)
    orders = draw.random((len(drawn), *[1] * (drawn.ndim - 2), drawn.shape[-1])).argsort(axis=-1)
    return np.take_along_axis(drawn, orders, axis=-1)


class _Network(nn.Module):
    """The network of :func:`mnif.latents.surprise.log_odds_of`, with batch normalization and dropout for learning."""

    def __init__(self, grid: tuple[int, ...], channels: int):
        super().__init__()
        shapes, dimensions = network_shapes(grid, channels), len(grid)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        normalization = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.dimensions = dimensions
        self.convolutions, self.normalizations = nn.ModuleList(), nn.ModuleList()
        for number, stride in enumerate(strides_of(grid)):
            _, incoming, outgoing = shapes[f"conv_{number}"]
            self.convolutions.append(convolution(incoming, outgoing, 3, stride, 1, bias=False))
            self.normalizations.append(normalization(outgoing))
        (incoming, width), (_, classes) = shapes["hidden"], shapes["logits"]
        self.hidden, self.logits = nn.Linear(incoming, width), nn.Linear(width, classes)

    def forward(self, values: Tensor) -> Tensor:
        """Computes logits [B, 1 + V] of values with their places [B, pixels…, C + d]."""
        seen = values.movedim(-1, 1)  # a view: channels stay last in memory, which is the fastest
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            seen = F.relu(normalization(convolution(seen)))
        hidden = F.dropout(seen.movedim(1, -1).flatten(1), _DROPOUT, self.training)
        return self.logits(F.relu(self.hidden(hidden)))

    @torch.no_grad()
    def arrays(self) -> dict[str, np.ndarray]:
        """Gives what has been learned, normalization folded into the convolutions, in half precision."""
        state, found = self.state_dict(), {}
        for number in range(len(self.convolutions)):
            normal = f"normalizations.{number}"
            scale = state[f"{normal}.weight"] / (state[f"{normal}.running_var"] + 1e-5).sqrt()  # PyTorch's own
            weight = state[f"convolutions.{number}.weight"].movedim((1, 0), (-2, -1)).flatten(0, self.dimensions - 1)
            found[f"conv_{number}"] = weight * scale
            found[f"conv_{number}_bias"] = state[f"{normal}.bias"] - state[f"{normal}.running_mean"] * scale
        for name in ("hidden", "logits"):
            found |= {name: state[f"{name}.weight"].T, f"{name}_bias": state[f"{name}.bias"]}
        return {name: array.contiguous().numpy().astype(np.float16) for name, array in found.items()}
