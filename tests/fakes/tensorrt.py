"""The Python surfaces of TensorRT 8.5 to 11.4, recorded, and small classes that have them and nothing else.

Members are those of NVIDIA's binding sources (``python/src/infer`` of the open-source releases 8.5 and 10.x) and API
reference (8.4, 10.x, 11.0, 11.4 and "Removed Python APIs and Replacements"), for the classes that are touched here. A
recorded class raises AttributeError for what its version lacks, whether it is read, called or set.

What they do is the least that lets build and runtime be followed: a "plan" is what the builder was told plus the
graph, an "engine" runs that graph by the ONNX reference evaluator on the memory it is given.
"""

import ctypes
import json
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

VERSIONS = ("8.5.2", "8.6.2", "10.3.0", "10.13.3", "10.16.1", "11.4.0")

# class → members of 8.5; then what each later version adds (+) and removes (-).
_BASE: dict[str, str] = {
    "BuilderFlag": "FP16 INT8 DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS "
    "ENABLE_TACTIC_HEURISTIC",
    "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH EXPLICIT_PRECISION",
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network "
    "platform_has_fast_fp16 platform_has_tf32 max_batch_size build_engine",
    "IBuilderConfig": "set_flag clear_flag get_flag flags profiling_verbosity add_optimization_profile "
    "create_timing_cache set_timing_cache get_timing_cache set_memory_pool_limit int8_calibrator max_workspace_size",
    "INetworkDefinition": "num_layers get_layer num_inputs get_input num_outputs get_output "
    "has_implicit_batch_dimension",
    "ILayer": "name type num_inputs num_outputs get_input get_output precision precision_is_set reset_precision "
    "set_output_type get_output_type",
    "LayerType": "ACTIVATION CONSTANT ELEMENTWISE GATHER IDENTITY MATRIX_MULTIPLY REDUCE SHUFFLE SLICE UNARY "
    "CONCATENATION FULLY_CONNECTED SHAPE QUANTIZE DEQUANTIZE",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype "
    "get_tensor_profile_shape num_optimization_profiles create_execution_context device_memory_size num_bindings "
    "get_binding_shape has_implicit_batch_dimension",
    "IExecutionContext": "set_input_shape get_tensor_shape set_tensor_address execute_async_v3 "
    "set_optimization_profile_async execute_async_v2 set_binding_shape get_binding_shape",
}
_CHANGES: dict[str, dict[str, str]] = {
    "8.6.2": {
        "BuilderFlag": "+VERSION_COMPATIBLE +EXCLUDE_LEAN_RUNTIME +FP8",
        "IBuilderConfig": "+builder_optimization_level +hardware_compatibility_level +max_aux_streams",
        "NetworkDefinitionCreationFlag": "-EXPLICIT_PRECISION",
        "LayerType": "+CAST",
    },
    "10.3.0": {
        "BuilderFlag": "+BF16 +STRIP_PLAN +REFIT_IDENTICAL +REFIT_INDIVIDUAL +STRICT_NANS -ENABLE_TACTIC_HEURISTIC",
        "NetworkDefinitionCreationFlag": "+STRONGLY_TYPED",
        "Builder": "-max_batch_size -build_engine",
        "IBuilderConfig": "+progress_monitor +runtime_platform -max_workspace_size",
        "INetworkDefinition": "+get_flag +flags -has_implicit_batch_dimension",
        "LayerType": "-FULLY_CONNECTED",
        "ICudaEngine": "+device_memory_size_v2 -num_bindings -get_binding_shape -has_implicit_batch_dimension",
        "IExecutionContext": "-execute_async_v2 -set_binding_shape -get_binding_shape",
    },
    "10.13.3": {
        "BuilderFlag": "+FP4 +EDITABLE_TIMING_CACHE +DISTRIBUTIVE_INDEPENDENCE",
        "NetworkDefinitionCreationFlag": "+PREFER_AOT_PYTHON_PLUGINS +PREFER_JIT_PYTHON_PLUGINS",
        "IBuilderConfig": "+tiling_optimization_level +l2_limit_for_tiling",
        "LayerType": "+SQUEEZE +UNSQUEEZE",
    },
    "10.16.1": {"IBuilderConfig": "+remote_auto_tuning_config"},
    "11.4.0": {
        "BuilderFlag": "-FP16 -INT8 -FP8 -BF16 -FP4 -OBEY_PRECISION_CONSTRAINTS -PREFER_PRECISION_CONSTRAINTS "
        "-DIRECT_IO -REJECT_EMPTY_ALGORITHMS",
        "NetworkDefinitionCreationFlag": "-EXPLICIT_BATCH",
        "Builder": "-platform_has_fast_fp16 -platform_has_tf32",
        "IBuilderConfig": "+build_route -int8_calibrator -remote_auto_tuning_config",
        "ILayer": "-precision -precision_is_set -reset_precision -set_output_type",
        "ICudaEngine": "-device_memory_size",
    },
}


def members(version: str) -> dict[str, set[str]]:
    """What each class has in a version."""
    found = {name: set(words.split()) for name, words in _BASE.items()}
    for each in VERSIONS[1 : VERSIONS.index(version) + 1]:
        for name, words in _CHANGES[each].items():
            for word in words.split():
                (found[name].add if word[0] == "+" else found[name].remove)(word[1:])
    return found


class Recorded:
    """Has the members its version has; beneath them is ``self._state``, free for all."""

    _members: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._members:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self)._members:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        super().__setattr__(name, value)


_OPERATORS = {
    "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY",
    "Sin": "UNARY",
    "Sqrt": "UNARY",
    "Add": "ELEMENTWISE",
    "Sub": "ELEMENTWISE",
    "Mul": "ELEMENTWISE",
    "Div": "ELEMENTWISE",
    "Sigmoid": "ACTIVATION",
    "Softmax": "SOFTMAX",
    "ReduceMean": "REDUCE",
    "Gather": "GATHER",
    "Cast": "CAST",
    "DequantizeLinear": "DEQUANTIZE",
}


def recorded_tensorrt(version: str) -> Any:
    """A module ``tensorrt`` of a version."""
    has = members(version)
    module: Any = ModuleType("tensorrt")
    module.__version__, module.deserialized = version, []

    def enumeration(name: str, kind: Callable[..., Any] = Enum) -> Any:
        return kind(name, {member: index for index, member in enumerate(sorted(has[name]))})

    module.BuilderFlag, module.LayerType = enumeration("BuilderFlag"), enumeration("LayerType")
    module.NetworkDefinitionCreationFlag = enumeration("NetworkDefinitionCreationFlag", IntEnum)
    module.TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    module.ProfilingVerbosity = Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED", "NONE"])
    module.float32, module.float16, module.int64 = "float32", "float16", "int64"
    module.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    class ILayer(Recorded):
        _members = frozenset(has["ILayer"])

        def __init__(self, node: onnx.NodeProto, dtypes: list[str], strong: bool):
            kind = _OPERATORS.get(node.op_type, "SHUFFLE")
            # 8.5 has no layer for casts: its parser makes identities of them.
            self._type = getattr(module.LayerType, kind if kind in has["LayerType"] else "IDENTITY")
            self._name, self._dtypes, self._strong, self._held = node.name, dtypes, strong, {}

        name = property(lambda self: self._name)
        type = property(lambda self: self._type)
        num_outputs = property(lambda self: len(self._dtypes))

        def get_output(self, index: int) -> Any:
            return SimpleNamespace(dtype=self._dtypes[index])

        def _hold(self, key: str, kind: str) -> None:
            assert not self._strong, "a strongly typed network takes no precisions"
            self._held[key] = kind

        precision = property(lambda self: self._held["precision"], lambda self, kind: self._hold("precision", kind))

        def set_output_type(self, index: int, kind: str) -> None:
            self._hold(f"output_{index}", kind)

    class INetworkDefinition(Recorded):
        _members = frozenset(has["INetworkDefinition"])

        def __init__(self, flags: int):
            self._flags, self._model, self._layers = flags, b"", []

        num_layers = property(lambda self: len(self._layers))

        def get_layer(self, index: int) -> Any:
            return self._layers[index]

    class IBuilderConfig(Recorded):
        _members = frozenset(has["IBuilderConfig"])

        def __init__(self) -> None:
            self._flags, self._profiles, self._cache, self._settings = {"TF32"}, [], None, {}

        def set_flag(self, flag: Enum) -> None:
            self._flags.add(flag.name)

        def clear_flag(self, flag: Enum) -> None:
            self._flags.discard(flag.name)

        def add_optimization_profile(self, profile: Any) -> None:
            self._profiles.append(profile.shapes)

        def create_timing_cache(self, content: bytes) -> Any:
            return SimpleNamespace(serialize=lambda: content + b"+1")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
            assert ignore_mismatch is False
            self._cache = cache

        def get_timing_cache(self) -> Any:
            return self._cache

        profiling_verbosity = property(None, lambda self, value: self._settings.update(verbosity=value.name))
        builder_optimization_level = property(None, lambda self, value: self._settings.update(level=value))

    class Builder(Recorded):
        _members = frozenset(has["Builder"])

        def __init__(self, logger: Any):
            self._logger = logger

        def create_network(self, flags: int) -> Any:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            profile: Any = SimpleNamespace(shapes={})
            profile.set_shape = lambda name, *sizes: profile.shapes.update({name: sizes})
            return profile

        def build_serialized_network(self, network: Any, config: Any) -> memoryview:
            told = {
                "version": version,
                "network_flags": network._flags,
                "flags": sorted(config._flags),
                "settings": config._settings,
                "profiles": config._profiles,
                "held": {layer._name: layer._held for layer in network._layers if layer._held},
                "model": network._model.hex(),
            }
            return memoryview(json.dumps(told).encode())

    class OnnxParser:
        def __init__(self, network: Any, logger: Any):
            self._network, self._logger, self.num_errors = network, logger, 0

        def parse(self, content: bytes) -> bool:
            try:
                model = onnx.load_from_string(content)
                model = onnx.shape_inference.infer_shapes(model)
            except Exception:
                self._logger.log(module.ILogger.ERROR, "MODEL_DESERIALIZE_FAILED:\nnot an ONNX model")
                return False
            kinds = {each.name: _dtype(each) for each in (*model.graph.value_info, *model.graph.output)}
            strong = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
            strongly = int(version.split(".")[0]) >= 11 or (
                strong is not None and bool(self._network._flags & 1 << int(strong))
            )
            self._network._model = content
            self._network._layers = [
                ILayer(node, [kinds.get(name, "float32") for name in node.output], strongly)
                for node in model.graph.node
            ]
            return True

    class IExecutionContext(Recorded):
        _members = frozenset(has["IExecutionContext"])

        def __init__(self, engine: Any):
            self._engine, self._shapes, self._addresses, self._profile = engine, {}, {}, None

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self._profile = index
            return True

        def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
            least, _, most = self._engine._told["profiles"][self._profile][name]
            self._shapes[name] = tuple(shape)
            return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            zeros = {key: np.zeros(shape, np.float32) for key, shape in self._shapes.items()}
            names = self._engine._evaluator.output_names
            return self._engine._evaluator.run(None, zeros)[names.index(name)].shape

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            module.on_stream(stream, self._run)
            return True

        def _run(self) -> None:
            inputs = {name: _memory(self._addresses[name], shape).copy() for name, shape in self._shapes.items()}
            evaluator = self._engine._evaluator
            for name, value in zip(evaluator.output_names, evaluator.run(None, inputs), strict=True):
                _memory(self._addresses[name], value.shape)[...] = value

    class ICudaEngine(Recorded):
        _members = frozenset(has["ICudaEngine"])

        def __init__(self, told: dict[str, Any]):
            self._told = told
            self._evaluator = ReferenceEvaluator(onnx.load_from_string(bytes.fromhex(told["model"])))

        num_optimization_profiles = property(lambda self: len(self._told["profiles"]))

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            return self._told["profiles"][index][name]

        def create_execution_context(self) -> Any:
            return IExecutionContext(self)

    class Runtime:
        def __init__(self, logger: Any):
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            module.deserialized.append(plan)
            told = json.loads(plan)
            return ICudaEngine(told) if told["version"] == version else None

    module.Builder, module.OnnxParser, module.Runtime = Builder, OnnxParser, Runtime
    return module


def _dtype(tensor: onnx.ValueInfoProto) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name


def _memory(address: int, shape: Sequence[int]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,)).reshape(shape)
