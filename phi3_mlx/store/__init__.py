"""A model directory: a name's directory, checked checkpoints, safetensors, quantized weights, atomic writes."""
