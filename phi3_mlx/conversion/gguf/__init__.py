"""GGUF files: their format, their tensors as a source of a conversion, their tokenizers."""
