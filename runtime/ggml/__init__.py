"""ggml as llama-cpp-python ships it, by ctypes: declarations, devices, graphs."""
