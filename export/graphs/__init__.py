"""The ONNX graphs of a model: their nodes, their exact answers, and what lower precision costs them."""
