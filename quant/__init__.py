"""A GGUF in fewer bits, and what that costs: recipes, the encoder, the writer, the measurements."""
