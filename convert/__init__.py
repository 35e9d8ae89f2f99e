"""A Hugging Face RecurrentGemma checkpoint becomes GGUF files."""

from griffin_gguf.convert.pipeline import convert

__all__ = ["convert"]
