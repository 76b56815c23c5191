"""Any Phi-3 checkpoint to an MLX model directory: read tensor by tensor, packed, written whole or not at all."""

from __future__ import annotations

from .pipeline import Conversion as Conversion
from .pipeline import convert as convert
