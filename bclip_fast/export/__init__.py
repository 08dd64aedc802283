"""Models for other software: ONNX, sentence-transformers, transformers, open_clip, and the hub."""
