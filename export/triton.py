"""A model repository for NVIDIA's Triton Inference Server (`mnif export --triton`).

Every decoder and sampler becomes a model with a dynamic batch. A model has two configurations: ``config.pbtxt`` runs
its ONNX file with ONNX Runtime, on a GPU or without one; ``configs/tensorrt.pbtxt`` runs ``1/model.plan``, which is
built on the GPU it is for and put beside the ONNX file. ``tritonserver --model-config-name=tensorrt`` chooses the
second (Triton 24.05 and later). The fields are those of ``ModelConfig`` in Triton's model_config.proto.
"""

import shutil
from pathlib import Path
from typing import Any

from export.graphs.specs import KINDS

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}

_LONGEST_WAIT = 500  # microseconds that a request waits for company


def write_model_repository(bundle: Path, graphs: dict[str, dict[str, Any]]) -> None:
    """Writes ``triton/`` into a bundle's folder.

    Args:
        bundle: the folder, with the graphs' files in it.
        graphs: the manifest's graphs (:mod:`export.device.bundle`).
    """
    for name, graph in graphs.items():
        if not KINDS[graph["kind"]].served:
            continue
        model = bundle / "triton" / name
        (model / "1").mkdir(parents=True)
        (model / "configs").mkdir()
        shutil.copyfile(bundle / graph["file"], model / "1" / "model.onnx")
        (model / "config.pbtxt").write_text(_configuration(name, graph, "onnxruntime_onnx", "KIND_AUTO"))
        on_tensorrt = _configuration(name, graph, "tensorrt_plan", "KIND_GPU") + _CUDA_GRAPHS
        (model / "configs" / "tensorrt.pbtxt").write_text(on_tensorrt)


def _configuration(name: str, graph: dict[str, Any], platform: str, device: str) -> str:
    shapes = graph["profile"].values()
    return _CONFIGURATION.format(
        name=name,
        platform=platform,
        device=device,
        largest=min(shape["maximum"][0] for shape in shapes),
        best=min(shape["optimum"][0] for shape in shapes),
        wait=_LONGEST_WAIT,
        inputs=_tensors(graph["inputs"]),
        outputs=_tensors(graph["outputs"]),
        zeros="".join(_zeros(tensor) for tensor in graph["inputs"]),
    )


def _tensors(tensors: list[dict[str, Any]]) -> str:
    return ",".join(f'\n  {{ name: "{tensor["name"]}" {_kind(tensor)} }}' for tensor in tensors)


def _zeros(tensor: dict[str, Any]) -> str:
    return f'\n    inputs {{ key: "{tensor["name"]}" value: {{ {_kind(tensor)} zero_data: true }} }}'


def _kind(tensor: dict[str, Any]) -> str:
    """Writes type and shape without the batch, which Triton puts in front; it has no tensors without other axes."""
    sizes = [size if isinstance(size, int) else -1 for size in tensor["shape"][1:]]
    shape = f"dims: {sizes}" if sizes else "dims: [1] reshape: { shape: [] }"
    return f"data_type: {_TYPES[tensor['type']]} {shape}"


_CONFIGURATION = """\
name: "{name}"
platform: "{platform}"
max_batch_size: {largest}
input [{inputs}
]
output [{outputs}
]
dynamic_batching {{
  preferred_batch_size: [ {best}, {largest} ]
  max_queue_delay_microseconds: {wait}
}}
instance_group [
  {{ kind: {device} count: 1 }}
]
model_warmup [
  {{
    name: "zeros"
    batch_size: 1{zeros}
  }}
]
"""

_CUDA_GRAPHS = """\
optimization { cuda { graphs: true } }
"""
