"""Models of other families: mlx-lm's own, with the face that the engine asks of a model.

They answer for comparison, and as judges. Their numbers are mlx-lm's: what this package promises of the Phi family, it
does not of them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import config
from ..errors import OptionError
from . import decoder
from .cache import KVBits, KVCache, SequenceState

GROWTH = 256  # tokens by which mlx-lm's caches grow

# Names that families give the longest context, and how many experts a token goes through.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_EXPERTS_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "experts_per_token")
_UNKNOWN_CONTEXT, _UNKNOWN_EXPERTS, _UNKNOWN_HEADS = 1 << 20, 8, 128
_ALIVE = 3  # times the outputs of a layer's matrices: inputs, outputs and what is computed between


@dataclass(frozen=True)
class Config(config.Config):
    """What the engine asks of a model of another family; of the shared fields those that its config.json has, else 0.

    `cache_block`: bytes that the caches of all layers grow by with every `GROWTH` tokens, at most. `token_numbers`:
    numbers of a token that are alive in a layer, an upper estimate.
    """

    cache_block: int
    token_numbers: int

    @classmethod
    def of(cls, network: nn.Module, raw: Mapping[str, Any]) -> Config:
        """That of one of mlx-lm's models and its config.json. Nothing is computed: shapes alone are asked for."""
        inner = raw.get("text_config")
        given = {**raw, **(inner if isinstance(inner, Mapping) else {})}
        layers = _caches(network)
        logits = network(mx.zeros((1, GROWTH), dtype=mx.int32), cache=layers)
        known: dict[str, Any] = {field.name: 0 for field in fields(config.Config)}
        known |= {key: given[key] for key in known if isinstance(given.get(key), int)}
        context = _first(given, _CONTEXT_KEYS, _UNKNOWN_CONTEXT)
        known |= {
            "model_type": str(raw.get("model_type")),
            "vocab_size": logits.shape[-1],
            "max_position_embeddings": context,
            "original_max_position_embeddings": context,
            "num_hidden_layers": len(layers),
            "num_attention_heads": _first(given, ("num_attention_heads", "n_head", "n_heads"), _UNKNOWN_HEADS),
            "longrope": None,
            "sliding_window": None,
            "dtype": None,
            "quantization": raw["quantization"] if isinstance(raw.get("quantization"), Mapping) else None,
        }
        cache_block = sum(layer.nbytes for layer in layers)
        return cls(**known, cache_block=cache_block, token_numbers=_token_numbers(network, given))

    def cache_bytes(self, length: int) -> int:
        """Bytes of the caches of a sequence, an upper estimate: as if all of them grew, and none had a window."""
        return (-(-length // GROWTH) + 1) * self.cache_block

    def working_bytes(self, chunk: int, length: int, rows: int, itemsize: int, scored: bool) -> int:
        """Bytes beside weights and caches while `chunk` tokens are read behind `length`, an upper estimate."""
        inside = (chunk + rows) * self.token_numbers * itemsize
        attention = _ALIVE * self.num_attention_heads * min(chunk, length) * length * itemsize  # of unfused kernels
        growing = 2 * self.cache_bytes(length) // max(self.num_hidden_layers, 1)
        logits = _ALIVE * (chunk if scored else rows) * self.vocab_size * 4
        return inside + attention + growing + logits


class NetworkCache(KVCache):
    """The caches of all of a network's layers, as one: they are mlx-lm's, and of many kinds.

    What cannot be trimmed is recomputed from the sequence's ids with the next call.
    """

    is_last = True

    def __init__(self, network: nn.Module, sequence: SequenceState):
        super().__init__(sequence)
        self._network = network
        self.layers = _caches(network)
        self.broken = False  # whether the layers have read something else than the first `offset` ids

    @property
    def state(self) -> list[mx.array]:
        states = [layer.state for layer in self.layers if not layer.empty()]
        return [array for _, array in tree_flatten(states) if isinstance(array, mx.array)]

    @state.setter
    def state(self, state: list[mx.array]) -> None:
        assert not state  # the layers hold them

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def empty(self) -> bool:
        return self.offset == 0

    def trim(self, n: int) -> int:
        n = super().trim(n)
        if self.offset == 0:
            self.layers, self.broken = _caches(self._network), False
        elif n and not self.broken:
            if all(layer.is_trimmable() for layer in self.layers):
                for layer in self.layers:
                    layer.trim(n)
            else:
                self.broken = True
        return n

    def shrink(self) -> None:
        """mlx-lm's caches keep their slots."""

    def fork(self, sequence: SequenceState) -> NetworkCache:
        other = copy.copy(self)
        other.sequence, other.layers = sequence, copy.deepcopy(self.layers)
        return other

    def read(self, ids: mx.array) -> mx.array:
        """Read ids (1, L): logits (1, L, vocab_size)."""
        if self.broken:
            self.layers = _caches(self._network)
            for first in range(0, self.offset, self.sequence.recompute_chunk):
                last = min(first + self.sequence.recompute_chunk, self.offset)
                self._network(self.sequence.ids[:, first:last], cache=self.layers)
                mx.eval(self.state)
        self.sequence.long, self.broken = (False,), True  # until the network has read all
        self.sequence.read(ids, self.offset)
        logits: mx.array = self._network(ids, cache=self.layers)
        self.offset, self.broken = self.offset + ids.shape[1], False
        return logits


class Network(nn.Module):
    """One of mlx-lm's models in the place of a decoder. Its hidden states are the logits themselves."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.longrope = "auto"

    def __call__(self, ids: mx.array, cache: Sequence[NetworkCache] | None = None) -> mx.array:
        if cache is None:
            logits: mx.array = self.network(ids)
            return logits
        return cache[0].read(ids.astype(mx.int32))

    def together(
        self, ids: mx.array, lengths: Sequence[int], caches: Sequence[list[NetworkCache]], *, newest: bool = False
    ) -> mx.array:
        """Sequences with caches of their own, one after the other: as `Decoder.together`, for any caches.

        As in mlx-lm's own loop the last token of a prompt is read alone, so that the others need no logits.
        """
        parts = []
        for length, cache in zip(lengths, caches, strict=True):
            row, ids = ids[:, :length].astype(mx.int32), ids[:, length:]
            ends = cache[0].offset + length >= cache[0].sequence.expected
            if newest and ends and length > 1:
                self(row[:, :-1], cache)
                row = row[:, -1:]
            logits = self(row, cache)
            parts.append(logits[:, -1:] if newest else logits)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def is_long(self, total: int) -> bool:
        """LongRoPE's regime is the network's own business."""
        return False


class Model(decoder.Model):
    """A language model of another family, whose network is mlx-lm's."""

    of_family = False

    def __init__(self, network: nn.Module, raw: Mapping[str, Any]):
        nn.Module.__init__(self)
        self._config = Config.of(network, raw)
        self.model = Network(network)

    def logits(self, hidden: mx.array, places: Sequence[int] | None = None) -> mx.array:
        return hidden

    @property
    def dtype(self) -> mx.Dtype:
        numbers: Counter[mx.Dtype] = Counter()
        for _, array in tree_flatten(self.parameters()):
            if mx.issubdtype(array.dtype, mx.floating):
                numbers[array.dtype] += array.size
        return numbers.most_common(1)[0][0] if numbers else mx.float32

    @property
    def layers(self) -> list[Any]:
        layers: list[Any] = self.model.network.layers
        return layers

    def make_cache(
        self,
        prompt_length: int | Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
        bits: KVBits | None = None,
    ) -> list[KVCache]:
        """An empty cache of one row, as `decoder.Model.make_cache`. Raises OptionError for bits."""
        if bits is not None or left_padding is not None:
            given = "kv_bits" if bits is not None else "left_padding"
            raise OptionError(f"{given} is for the Phi family alone, and this model runs with mlx-lm; leave it out")
        lengths = [prompt_length] if isinstance(prompt_length, int) else prompt_length
        sequence = SequenceState(prompt_length=None if lengths is None else tuple(lengths))
        return [NetworkCache(self.model.network, sequence)]


def _caches(network: nn.Module) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(network)
    return caches


def _first(given: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    """The number with the first of these names that is there."""
    numbers = (given[name] for name in names if type(given.get(name)) is int and given[name] > 0)
    return next(numbers, default)


def _token_numbers(network: nn.Module, given: Mapping[str, Any]) -> int:
    """Numbers of a token that are alive in the widest layer, from the outputs of its matrices."""
    widths: Counter[str] = Counter()
    for path, module in network.named_modules():
        layer = next((part for part in path.split(".") if part.isdecimal()), None)
        weight = module.get("weight")
        if layer is None or not isinstance(weight, mx.array) or weight.ndim < 2:
            continue
        outputs = weight.shape[-2]
        widths[layer] += outputs * (_first(given, _EXPERTS_KEYS, _UNKNOWN_EXPERTS) if weight.ndim > 2 else 1)
    return _ALIVE * max(widths.values(), default=math.prod((64, 1024)))
