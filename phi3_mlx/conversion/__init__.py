"""Any Phi-3 checkpoint to an MLX model directory: read tensor by tensor, packed, written whole or not at all."""
