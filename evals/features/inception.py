"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05 with PyTorch's usual names of weights.

It differs from other Inceptions (Szegedy et al., CVPR 2016) in its 1008 classes, in average pooling that leaves the
padding out, and in a last block that pools by the maximum; distances in the features of any other are not FID (Heusel
et al., NeurIPS 2017).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from evals.features.extractor import Extractor
from evals.features.resize import Resize
from evals.features.weights import INCEPTION, found_weights
from mnif.utils.errors import UserError

Kernel = int | tuple[int, int]


_BATCH_SIZE = 32


_ACROSS, _DOWN = (1, 7), (7, 1)


class Layer(NamedTuple):
    """A convolution of a branch."""

    name: str
    outputs: int
    kernel: Kernel
    stride: int = 1


Branch = list[Layer | str | list[Layer]]
"""Layers in a row; a word pools, a list forks."""


class Inception(Extractor):
    """FID's Inception with the standard weights.

    Args:
        weights: their file; default: looked for.
        device: where it computes.
        grey: the value in 0..255 that becomes 0.

    Raises:
        UserError: the weights are missing or others.
    """

    name = "inception"
    frechet, kernel, suffix = "fid", "kid", "inception"
    dimension = 2048
    size = 299

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu", grey: float = 128.0) -> None:
        path = found_weights(INCEPTION, weights)
        self.network = InceptionV3()
        missing, unknown = self.network.load_state_dict(
            torch.load(path, map_location="cpu", weights_only=True), strict=False
        )
        if unknown or any(not name.endswith("num_batches_tracked") for name in missing):
            raise UserError(f"{path}: not the weights of FID's Inception; {INCEPTION.name} is needed")
        self.network.eval().to(device)
        self.device, self.grey = device, grey

    def protocol(self) -> dict[str, str]:
        """The network, its weights and its normalisation."""
        return {
            "extractor": "inception: FID's Inception-v3 of 2015-12-05, 2048 features after global average pooling",
            "weights_sha256": INCEPTION.sha256,
            "normalisation": f"(x - {self.grey:g}) / {self.grey:g}, x in 0..255, RGB",
        }

    @torch.inference_mode()
    def features(self, images: np.ndarray, resize: Resize) -> Iterator[np.ndarray]:
        """Features of pictures; a thread resizes the next batch while the network looks at this one."""
        batches = [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
        with ThreadPoolExecutor(1) as thread:
            for pixels in thread.map(lambda batch: resize(batch, self.size), batches):
                values = (torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2) - self.grey) / self.grey
                yield self.network(values).cpu().numpy()


class InceptionV3(nn.Module):
    """Values [N, 3, 299, 299] in [-1, 1] → features [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed(192, _fives_and_threes(pooled=32))
        self.Mixed_5c = Mixed(256, _fives_and_threes(pooled=64))
        self.Mixed_5d = Mixed(288, _fives_and_threes(pooled=64))
        self.Mixed_6a = Mixed(288, _HALVED_TO_17)
        self.Mixed_6b = Mixed(768, _sevens(128))
        self.Mixed_6c = Mixed(768, _sevens(160))
        self.Mixed_6d = Mixed(768, _sevens(160))
        self.Mixed_6e = Mixed(768, _sevens(192))
        self.Mixed_7a = Mixed(768, _HALVED_TO_8)
        self.Mixed_7b = Mixed(1280, _forked("average"))
        self.Mixed_7c = Mixed(2048, _forked("maximum"))
        self.fc = nn.Linear(2048, 1008)  # in the file of weights; features are what comes before it

    def forward(self, x: Tensor) -> Tensor:
        """Features before the classifier."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


class Convolution(nn.Module):
    """A convolution without bias, batch norm and ReLU; with stride 1 it keeps the size unless ``padding`` is 0."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (height // 2, width // 2) if padding is None and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Values at least 0."""
        return self.bn(self.conv(x)).relu()


class Mixed(nn.Module):
    """Branches side by side, their channels one after another."""

    def __init__(self, inputs: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = inputs
            for step in branch:
                for layer in _layers(step):
                    self.add_module(layer.name, Convolution(channels, layer.outputs, layer.kernel, layer.stride))
                channels = next((layer.outputs for layer in _layers(step)), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Every branch of the same input."""
        return torch.cat([self._follow(x, branch) for branch in self.branches], dim=1)

    def _follow(self, x: Tensor, branch: Branch) -> Tensor:
        for step in branch:
            pool = _POOLS.get(step) if isinstance(step, str) else None
            x = pool(x) if pool else torch.cat([getattr(self, layer.name)(x) for layer in _layers(step)], dim=1)
        return x


_POOLS = {
    "average": lambda x: avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: max_pool2d(x, 3, 1, 1),
    "halving": lambda x: max_pool2d(x, 3, 2),
}


def _layers(step: Layer | str | list[Layer]) -> list[Layer]:
    return [] if isinstance(step, str) else step if isinstance(step, list) else [step]


def _fives_and_threes(pooled: int) -> list[Branch]:
    return [
        [Layer("branch1x1", 64, 1)],
        [Layer("branch5x5_1", 48, 1), Layer("branch5x5_2", 64, 5)],
        [Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3)],
        ["average", Layer("branch_pool", pooled, 1)],
    ]


_HALVED_TO_17: list[Branch] = [
    [Layer("branch3x3", 384, 3, 2)],
    [Layer("branch3x3dbl_1", 64, 1), Layer("branch3x3dbl_2", 96, 3), Layer("branch3x3dbl_3", 96, 3, 2)],
    ["halving"],
]


def _sevens(width: int) -> list[Branch]:
    double: Branch = [Layer("branch7x7dbl_1", width, 1), Layer("branch7x7dbl_2", width, _DOWN)]
    double += [
        Layer("branch7x7dbl_3", width, _ACROSS),
        Layer("branch7x7dbl_4", width, _DOWN),
        Layer("branch7x7dbl_5", 192, _ACROSS),
    ]
    return [
        [Layer("branch1x1", 192, 1)],
        [Layer("branch7x7_1", width, 1), Layer("branch7x7_2", width, _ACROSS), Layer("branch7x7_3", 192, _DOWN)],
        double,
        ["average", Layer("branch_pool", 192, 1)],
    ]


_HALVED_TO_8: list[Branch] = [
    [Layer("branch3x3_1", 192, 1), Layer("branch3x3_2", 320, 3, 2)],
    [
        Layer("branch7x7x3_1", 192, 1),
        Layer("branch7x7x3_2", 192, _ACROSS),
        Layer("branch7x7x3_3", 192, _DOWN),
        Layer("branch7x7x3_4", 192, 3, 2),
    ],
    ["halving"],
]


def _forked(pool: str) -> list[Branch]:
    fork: list[Layer] = [Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))]
    double_fork: list[Layer] = [Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))]
    return [
        [Layer("branch1x1", 320, 1)],
        [Layer("branch3x3_1", 384, 1), fork],
        [Layer("branch3x3dbl_1", 448, 1), Layer("branch3x3dbl_2", 384, 3), double_fork],
        [pool, Layer("branch_pool", 192, 1)],
    ]
