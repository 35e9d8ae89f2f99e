"""RecurrentGemma inside llama.cpp: a patch for its source tree, and building its programs with it."""
