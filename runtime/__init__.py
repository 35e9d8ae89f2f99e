"""The floor: the file format, ggml, the model, its state, and text.

from griffin_gguf.runtime import load

model = load("m.gguf")
state = model.new_state()
logits = model.forward(model.tokenizer.encode("Once upon a time"), state)
"""

from griffin_gguf.runtime.model import Model, load

__all__ = ["Model", "load"]
