"""Feature extractors by name: networks that turn pictures into vectors, their weights, the resizing before them."""

from pathlib import Path

import torch

from evals.features.extractor import Extractor
from mnif.utils.errors import UserError


def extractor_by_name(
    name: str,
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
    grey: float = 128.0,
) -> Extractor:
    """Makes an extractor, with its weights found and checked.

    Args:
        name: "lite0", "resnet" or "inception".
        inception_weights: a file of Inception's weights; default: looked for (:mod:`evals.features.extractor`).
        device: where it computes; of those in ONNX Runtime see :func:`evals.features.extractor.session_on`.
        grey: of Inception, the value in 0..255 that becomes 0.

    Raises:
        UserError: there is no such extractor, or its weights are missing or not the standard ones.
    """
    if name == "lite0":  # imported only if it is used
        from evals.features.lite0 import Lite0

        return Lite0(device)
    if name == "resnet":
        from evals.features.resnet import ResNet

        return ResNet(device)
    if name == "inception":
        from evals.features.inception import Inception

        return Inception(inception_weights, device, grey)
    raise UserError(f"--extractor {name}: must be one of lite0, resnet, inception")
