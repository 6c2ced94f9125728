"""Exports a saved model: the Hugging Face folder with its card, ONNX graphs, the upload to the Hub."""
