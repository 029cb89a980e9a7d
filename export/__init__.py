"""From the model folder to an edge device: ONNX graphs, the bundle that holds them, and a runtime without torch."""
