"""What a model has read of a row, and what of that a job brought."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..models.cache import KVBits, KVCache
from ..models.decoder import Model
from .identity import ModelState
from .prefill import cache_for, shared_length


class RowCache:
    """The cache of a row's model, or of its draft model: `layers`, one entry each, once the row has begun.

    `given`: the layers that the job brought, until a pause; then another run may have them. `brought`: their bytes at
    first. `reused`: how many tokens of the prompt the layers have read that the row begins with. `bits` pack new ones.
    `copied`: layers to begin with that a store of prefixes gave, and `state` the model's state then: what the row reads
    may be stored.
    """

    def __init__(self, model: Model, given: list[KVCache] | None, prompt: Sequence[int], bits: KVBits | None):
        self.model, self.given, self.bits = model, given, bits
        self.copied: list[KVCache] | None = None
        self.state: ModelState | None = None
        self.layers: list[KVCache] = []
        self.brought = sum(layer.nbytes for layer in given or ())
        self.reused = 0 if given is None else shared_length(given, prompt)

    def begin(self, length: int) -> None:
        """Take the layers copied, or those given, or make new ones, for a prompt that counts as `length` tokens."""
        copied, self.copied = self.copied, None
        self.layers = copied or cache_for(self.model, length, given=self.given, shared=self.reused, bits=self.bits)
        self.reused = self.read

    def pause(self, owned: bool) -> None:
        """Let go of keys and values. `owned`: no other run has taken over the layers that were given."""
        if owned and self.layers is self.given:  # the job would hold them still
            for layer in self.layers:
                layer.trim(layer.offset)
        self.layers, self.given, self.brought, self.reused = [], None, 0, 0

    @property
    def read(self) -> int:
        """Tokens in the layers."""
        return self.layers[0].offset if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ids_to_compute(self) -> list[mx.array]:
        """The token ids, perhaps not computed yet."""
        return self.layers[0].sequence.kept if self.layers else []

    @property
    def to_compute(self) -> list[mx.array]:
        """All that the layers keep, the token ids too, some of it perhaps not computed yet."""
        return [array for layer in self.layers for array in layer.kept] + self.ids_to_compute
