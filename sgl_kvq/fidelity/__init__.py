"""What a format loses on a model: a text, the loss, and a model that reads quantized K and V."""
