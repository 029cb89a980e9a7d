"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05 with PyTorch's usual names of weights.

It differs from other Inceptions (Szegedy et al., CVPR 2016) in its 1008 classes, in average pooling that leaves the
padding out, and in a last block that pools by the maximum; distances in the features of any other are not FID (Heusel
et al., NeurIPS 2017).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from evals.features.extractor import Extractor, PublishedWeights, found_weights
from evals.features.resize import Resize
from mnif.utils.devices import sent
from mnif.utils.errors import UserError

Size = int | tuple[int, int]

_BATCH_SIZE = 32


INCEPTION = PublishedWeights(
    name="pt_inception-2015-12-05-6726825d.pth",
    size=95_628_359,
    digest="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    variable="MNIF_INCEPTION_WEIGHTS",
    flag="--inception_weights",
    instead="--extractor lite0 works offline; its distance is fd_lite0, not FID",
)


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
        """States the network, its weights and its normalisation."""
        return {
            "extractor": "inception: FID's Inception-v3 of 2015-12-05, 2048 features after global average pooling",
            "weights_sha256": INCEPTION.digest,
            "normalisation": f"(x - {self.grey:g}) / {self.grey:g}, x in 0..255, RGB",
        }

    @torch.inference_mode()
    def features(self, images: np.ndarray, resize: Resize) -> Iterator[np.ndarray]:
        """Yields features of pictures; a thread resizes the next batch while the network looks at this one, and an
        accelerator looks at one while that before is fetched."""
        batches = [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
        with ThreadPoolExecutor(1) as thread:
            resized = thread.map(lambda batch: resize(batch, self.size), batches)
            for features, _ in pairwise(chain(map(self._features, resized), [None])):
                assert features is not None
                yield features.cpu().numpy()

    def _features(self, pixels: np.ndarray) -> torch.Tensor:
        values = (sent(torch.from_numpy(pixels), self.device).permute(0, 3, 1, 2) - self.grey) / self.grey
        return self.network(values)


class InceptionV3(nn.Module):
    """Maps values [N, 3, 299, 299] in [-1, 1] to features [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, width=128)
        self.Mixed_6c = InceptionC(768, width=160)
        self.Mixed_6d = InceptionC(768, width=160)
        self.Mixed_6e = InceptionC(768, width=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, partial(max_pool2d, kernel_size=3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)  # in the file of weights; features are what comes before it

    def forward(self, x: Tensor) -> Tensor:
        """Computes the features before the classifier."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


class BasicConv2d(nn.Module):
    """A convolution without bias, batch norm and ReLU: [N, inputs, H, W] → [N, outputs, H', W'], at least 0."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the values."""
        return self.bn(self.conv(x)).relu()


class InceptionA(nn.Module):
    """Convolutions of 1×1, 5×5 and twice 3×3 side by side, at 35×35 pixels: ``inputs`` → 224 + ``pooled`` channels."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 64, 1)
        self.branch5x5_1 = BasicConv2d(inputs, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Joins the channels of all branches."""
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3, self.branch_pool(average_pool(x))], dim=1)


class InceptionB(nn.Module):
    """Halves 35×35 pixels to 17×17: ``inputs`` → 480 + ``inputs`` channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Joins the channels of all branches."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, 2)], dim=1)


class InceptionC(nn.Module):
    """Convolutions of 1×7 and 7×1 in a row, once and twice, at 17×17 pixels: ``inputs`` → 768 channels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = BasicConv2d(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = BasicConv2d(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = BasicConv2d(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Joins the channels of all branches."""
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), branch7x7, double, self.branch_pool(average_pool(x))], dim=1)


class InceptionD(nn.Module):
    """Halves 17×17 pixels to 8×8: ``inputs`` → 512 + ``inputs`` channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Joins the channels of all branches."""
        branch7x7 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat(
            [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7), max_pool2d(x, 3, 2)], dim=1
        )


class InceptionE(nn.Module):
    """Branches that fork into 1×3 and 3×1 at 8×8 pixels: ``inputs`` → 2048 channels; ``pool`` keeps the size."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = BasicConv2d(inputs, 320, 1)
        self.branch3x3_1 = BasicConv2d(inputs, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Joins the channels of all branches."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], dim=1)


def average_pool(x: Tensor) -> Tensor:
    """Averages 3×3 pixels [N, C, H, W] around each, without the padding."""
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)
