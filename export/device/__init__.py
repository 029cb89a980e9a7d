"""What a board gets, byte for byte: a bundle's ``device/`` holds this package, and no other code of this project.

Every file keeps to Python 3.8 and NumPy 1.x, which is what JetPack 5 has, and imports the standard library, NumPy and
its neighbours alone; TensorRT, ONNX Runtime, OpenVINO and onnx are imported where they are used.
"""
