"""The model repository against Triton's own schema and rules, and its configurations against the graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto

from export.commands.export import ExportArguments, export_bundle
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from tests.conftest import small_encoder

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")

FILES = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}
TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16"}


@pytest.fixture
def repository(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    options = ExportArguments(
        model=Path("model"),
        output_dir=tmp_path / "bundle",
        num_baked=1,
        num_inference_steps=[1, 4],
        sampler_precision=["fp32", "mixed"],
        triton=True,
        compile_rtx="off",
    )
    export_bundle(pipeline, options, encoder=small_encoder())
    return options.output_dir / "triton"


def configurations(repository: Path) -> list[tuple[Path, object]]:
    """Every configuration, parsed by Triton's own schema, which refuses unknown fields and values."""
    paths = sorted(repository.glob("*/config.pbtxt")) + sorted(repository.glob("*/configs/*.pbtxt"))
    return [(path, text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())) for path in paths]


def test_repository_holds_what_triton_looks_for(repository: Path) -> None:
    names = sorted(path.name for path in repository.iterdir())
    assert {"decoder", "decoder_mixed", "encoder", "sampler_1", "sampler_4_mixed"} <= set(names)
    assert not [name for name in names if name.startswith("baked")]
    for name in names:
        assert sorted(path.relative_to(repository / name).as_posix() for path in (repository / name).rglob("*.*")) == [
            "1/model.onnx",
            "config.pbtxt",
            "configs/tensorrt.pbtxt",
        ]
        bundled = repository.parent / "onnx" / f"{name}.onnx"
        assert (repository / name / "1/model.onnx").read_bytes() == bundled.read_bytes()


def test_configurations_follow_the_schema_and_the_graphs(repository: Path) -> None:
    found = configurations(repository)
    assert len(found) == 2 * len(list(repository.iterdir()))
    for path, config in found:
        folder = repository / path.relative_to(repository).parts[0]
        assert config.name == folder.name  # Triton refuses any other
        plan = path.parent.name == "configs"
        assert config.platform == ("tensorrt_plan" if plan else "onnxruntime_onnx")
        assert not config.default_model_filename  # 1/model.onnx and 1/model.plan are what the platforms look for

        graph = onnx.load(folder / "1/model.onnx").graph
        for stated, tensors in ((config.input, graph.input), (config.output, graph.output)):
            assert [each.name for each in stated] == [tensor.name for tensor in tensors]
            for each, tensor in zip(stated, tensors, strict=True):
                kind = tensor.type.tensor_type
                first, *rest = kind.shape.dim
                assert first.dim_param  # Triton puts its batch in front of dims
                assert list(each.dims) == ([axis.dim_value for axis in rest] or [1])  # dims are never empty
                assert each.HasField("reshape") == (not rest)
                assert not each.reshape.shape
                assert model_config_pb2.DataType.Name(each.data_type) == TYPES[kind.elem_type]


def test_batches_and_instances_keep_tritons_rules(repository: Path) -> None:
    for path, config in configurations(repository):
        assert config.max_batch_size >= 1
        assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
        preferred = list(config.dynamic_batching.preferred_batch_size)
        assert preferred == sorted(set(preferred))
        assert all(1 <= size <= config.max_batch_size for size in preferred)
        (group,) = config.instance_group
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        plan = path.parent.name == "configs"
        assert (kind, group.count) == ("KIND_GPU" if plan else "KIND_AUTO", 1)
        assert config.optimization.cuda.graphs == plan  # a setting of TensorRT's backend alone
        (warmup,) = config.model_warmup
        assert 1 <= warmup.batch_size <= config.max_batch_size
        assert sorted(warmup.inputs) == sorted(each.name for each in config.input)
        for each in config.input:
            given = warmup.inputs[each.name]
            assert (given.data_type, list(given.dims)) == (each.data_type, list(each.dims))
            assert given.zero_data


def test_served_models_answer_up_to_the_largest_batch(repository: Path) -> None:
    for path, config in configurations(repository):
        if path.name != "config.pbtxt":
            continue
        session = onnxruntime.InferenceSession(path.parent / "1/model.onnx")
        for batch in (1, config.max_batch_size):
            inputs = {
                each.name: initial_noise(0, range(batch), int(np.prod(each.dims))).reshape(batch, *each.dims)
                for each in config.input
            }
            answers = session.run([each.name for each in config.output], inputs)
            for answer, each in zip(answers, config.output, strict=True):
                assert answer.shape == (batch, *([] if each.HasField("reshape") else each.dims))


def test_schema_refuses_what_is_not_in_it(repository: Path) -> None:
    text = (repository / "decoder/config.pbtxt").read_text()
    for wrong in (text.replace("TYPE_FP32", "TYPE_FLOAT"), text.replace("max_batch_size", "maximum_batch_size")):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config_pb2.ModelConfig())
