"""A saved model for others: its Hugging Face folder with a card, ONNX graphs, the upload to the Hub."""
