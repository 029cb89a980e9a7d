"""Flags that trtexec takes, by version: those of NVIDIA/TensorRT's samples/common/sampleOptions.cpp that matter here.

A flag that is not known ends trtexec with an error. What 10 dropped of 8, and 11 of 10, is what NVIDIA's guides on
migrating trtexec list.
"""

_SINCE_8_5 = """
--onnx --saveEngine --loadEngine --minShapes --optShapes --maxShapes --shapes --noTF32 --useCudaGraph --noDataTransfers
--memPoolSize --timingCacheFile --profilingVerbosity --iterations --duration --warmUp --skipInference --loadInputs
"""
_WEAK_TYPING = "--fp16 --int8 --best --precisionConstraints --layerPrecisions --layerOutputTypes --calib"

_OF_8_5 = {*_SINCE_8_5.split(), *_WEAK_TYPING.split(), "--workspace", "--minTiming", "--batch", "--maxBatch"}
_OF_8_6 = _OF_8_5 | {"--builderOptimizationLevel", "--versionCompatible"}
_OF_10 = (_OF_8_6 - {"--workspace", "--minTiming", "--batch", "--maxBatch"}) | {"--stronglyTyped", "--bf16"}
_OF_11 = _OF_10 - {*_WEAK_TYPING.split(), "--bf16"}

FLAGS = {(8, 5): _OF_8_5, (8, 6): _OF_8_6, (10, 3): _OF_10, (10, 13): _OF_10, (10, 16): _OF_10, (11, 4): _OF_11}
"""Version → flags, for every TensorRT that a JetPack brings."""
