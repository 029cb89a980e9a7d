"""A model as ONNX graphs, written node by node, in each precision, with exact answers to check them by."""
