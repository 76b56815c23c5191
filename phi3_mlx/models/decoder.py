"""What the members of the family share: decoder layers in a row, LongRoPE's rule, the logits.

LongRoPE's rule (`longrope="auto"`): a sequence is *short* while its total length, cache included, is at most
`original_max_position_embeddings`, and *long* after; all its keys belong to one regime. A call that changes the
regime recomputes the cache first, so every caller gets the reference's numbers, whatever its loop.

A member's file derives from `Attention` and `DecoderLayer` (`layer`), `Decoder` and `Model`, and says in its methods
what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from ..errors import OptionError
from .attention import fused_attention, make_mask
from .cache import KVBits, KVCache, QuantizedKVCache, SequenceState, take_back
from .dropout import Draws
from .end_to_end import EndToEnd
from .hooks import Segment, at, at_end, check_edits, enter_layer, segments_of, watched_pass, watchers_of
from .layer import DecoderLayer
from .linear import Embedding, Linear, dequantizing_pays
from .rope import Regime, Rope
from .slots import Unit, take_out, units_of
from .step import Steps
from .together import Addition, Together

QUEUED = 1 << 26  # bytes that layers may write before the GPU is waited for

LongRopeRule = Literal["auto", "short", "long"]


class Decoder(nn.Module):
    """Embedding, layers and final norm: ids (B, L) -> hidden states (B, L, hidden_size)."""

    layer_type: type[DecoderLayer]

    def __init__(self, config: Config):
        super().__init__()
        self._config = config
        self.longrope: LongRopeRule = "auto"
        self._rope = Rope(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [self.make_layer(index) for index in range(config.num_hidden_layers)]
        self.add_norm()
        self._steps = Steps(self._rope)

    def make_layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index` with random weights."""
        return self.layer_type(self._config, self._rope, index)

    def add_norm(self) -> None:
        """Make the module that is `final_norm`."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer, an RMSNorm or a LayerNorm."""
        return self.norm

    def last_norm(self, x: mx.array) -> mx.array:
        """`final_norm` of x."""
        return self.final_norm(x)

    def embedded(self, rows: mx.array) -> mx.array:
        """Rows of the embedding (..., hidden_size) -> the input of the first layer, of the same shape."""
        return rows

    def embed(self, ids: mx.array) -> mx.array:
        """ids (B, L) -> the input of the first layer (B, L, hidden_size)."""
        return self.embedded(self.embed_tokens(ids))

    def __call__(self, ids: mx.array, cache: list[KVCache] | None = None) -> mx.array:
        ids = ids.astype(mx.int32)  # the cache keeps this very array, so it is computed with what is read of it
        if cache is None:
            return self._read(ids, None, self.is_long(ids.shape[1]))
        offset = cache[0].offset
        long = self._enter(ids, cache)
        try:
            stepped = self._step(ids, [cache], [Unit([0], cache)], long) if ids.size == 1 else None
            return self._read(ids, cache, long) if stepped is None else stepped
        except BaseException:
            take_back(cache, offset)
            raise

    def together(
        self, ids: mx.array, lengths: Sequence[int], caches: Sequence[list[KVCache]], *, newest: bool = False
    ) -> mx.array:
        """Sequences with caches of their own in one pass: ids (1, sum(lengths)) -> hidden states of the same tokens.

        Each comes out as it would alone, and extends its cache, which has one row. Those of one token come first.
        `newest`: only those of each sequence's last token (1, sequences, hidden_size): less work for the last layer.
        """
        *cuts, _ = accumulate(lengths)
        undo: list[tuple[Sequence[KVCache], int]] = [(cache, cache[0].offset) for cache in caches]
        try:
            rows = mx.split(ids.astype(mx.int32), cuts, axis=1)
            longs = [self._enter(row, cache)[0] for row, cache in zip(rows, caches, strict=True)]
            singles = sum(length == 1 for length in lengths)
            watched = bool(watchers_of(self))
            if watched:  # each row is looked at by itself
                take_out(caches)
            units = units_of(caches[:singles], share=self._config.sparse_layers is None and not watched)
            undo = [*((unit.layers, unit.layers[0].offset) for unit in units), *undo]
            order = [row for unit in units for row in unit.rows]
            parts = [Addition(caches[row], 1, longs[row]) for row in order]
            parts += map(Addition, caches[singles:], lengths[singles:], longs[singles:])
            if order == sorted(order):
                return self._in_units(ids, parts, units, newest)
            hidden = self._in_units(_permuted(ids, order), parts, units, newest)
            return _permuted(hidden, [order.index(row) for row in range(singles)])
        except BaseException:
            for cache, offset in undo:
                take_back(cache, offset)
            raise

    def _in_units(self, ids: mx.array, parts: Sequence[Addition], units: list[Unit], newest: bool) -> mx.array:
        """`together` of sequences that have entered; those of one token stand in the order of their units."""
        caches = [part.cache for part in parts]
        if ids.size == len(parts):
            stepped = self._step(ids, caches, units, tuple(part.long for part in parts))
            if stepped is not None:
                return stepped
        watched = bool(watchers_of(self))
        joint = Together(parts, units, self._config.sliding_window, apart=watched)
        hidden = self._through(
            ids,
            lambda layer, x: layer.together(x, joint, newest and not watched and layer is self.layers[-1]),
            lambda i: any(cache[i].awaited for cache in caches),
            lambda: [segment for part in parts for segment in segments_of(part.cache, 1, part.length)],
        )
        return joint.newest(hidden) if newest and watched else hidden

    def _step(
        self, ids: mx.array, caches: Sequence[list[KVCache]], units: Sequence[Unit], long: tuple[bool, ...]
    ) -> mx.array | None:
        """Hidden states of one token for each cache, ids (1, caches); None where the plain path must take them."""
        if watchers_of(self) or self._dequantizes(ids.size, self.layers[0].input_layernorm.weight.dtype):
            return None  # slices of dequantized weights wait for each other, which a compiled layer would not keep
        step = self._steps.begin(self.layers, caches, units, long)
        if step is None:
            return None
        return self._through(ids[0], step.forward, lambda i: any(cache[i].awaited for cache in caches), list)[None]

    def _enter(self, ids: mx.array, cache: list[KVCache]) -> tuple[bool, ...]:
        """Note in the cache that `ids` (B, L) come next, and recompute it if a regime changes.

        Returns each row's regime.
        """
        offset, sequence = cache[0].offset, cache[0].sequence
        batch, length = ids.shape
        check_edits(self, cache)
        long = tuple(map(self.is_long, sequence.lengths_after(offset + length, batch)))
        if offset:
            self._recompute(cache, long)
        sequence.long = long
        sequence.read(ids, offset)
        return long

    def end_to_end(
        self, ids: mx.array, lengths: Sequence[int], *, checkpoint: bool = False, keys: mx.array | None = None
    ) -> mx.array:
        """Sequences of `lengths` end to end: ids (1, sum(lengths)) -> hidden states (1, sum(lengths), hidden_size).

        Each comes out as it would alone: its positions begin at 0, it sees only itself, and its own length says its
        LongRoPE regime. `checkpoint` (gradient checkpointing) keeps only each layer's input for the backward pass and
        recomputes the rest. `keys` (sum(lengths), 2) seed dropout for every token (`token_keys`); None: they are drawn
        from MLX's random state.
        """
        if watchers_of(self):
            raise OptionError("training steps cannot be traced; leave the trace before you train")
        joined = EndToEnd(lengths, [self.is_long(n) for n in lengths], self._config.sliding_window)
        draws = Draws(keys)

        def read(x: mx.array, index: int) -> mx.array:
            with draws.within(index):
                return self.layers[index].end_to_end(x, joined)

        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            forward = partial(read, index=index)
            x = nn.utils.checkpoint(layer, forward)(x) if checkpoint else forward(x)
        return self.last_norm(x)

    def is_long(self, total: int) -> bool:
        """The regime of a sequence of `total` tokens."""
        if self._config.longrope is None or self.longrope == "short":
            return False
        return self.longrope == "long" or total > self._config.original_max_position_embeddings

    def make_cache(self, sequence: SequenceState, bits: KVBits | None = None) -> list[KVCache]:
        window = self._config.sliding_window
        if bits is None:
            layers = [KVCache(sequence, window) for _ in self.layers]
        else:
            layers = [QuantizedKVCache(bits, sequence, window) for _ in self.layers]
        layers[-1].is_last = True
        return layers

    def _read(self, ids: mx.array, cache: list[KVCache] | None, long: Regime) -> mx.array:
        """All layers and the last norm, in a given regime: ids (B, L) -> hidden states (B, L, hidden_size)."""
        offset: int | mx.array = 0
        if cache is not None:
            padding = cache[0].sequence.padding_array
            offset = cache[0].offset if padding is None else cache[0].offset - padding
        mask = make_mask(ids.shape[1], self._config.sliding_window, cache[0] if cache else None)
        batch, length = ids.shape
        if cache is None:
            return self._through(
                ids,
                lambda layer, x: layer(x, mask, None, offset, long),
                None,
                lambda: [Segment(object(), batch, 0, length, length)],
            )
        layers = iter(cache)
        return self._through(
            ids,
            lambda layer, x: layer(x, mask, next(layers), offset, long),
            lambda i: cache[i].awaited,
            lambda: segments_of(cache, batch, length),
        )

    def _through(
        self,
        ids: mx.array,
        forward: Callable[[DecoderLayer, mx.array], mx.array],
        awaited: Callable[[int], bool] | None,
        segments: Callable[[], list[Segment]],
    ) -> mx.array:
        """Embedding, layers and last norm of ids (B, L).

        `awaited`: whether the output of layer i is needed at once; None where there is no cache. `segments`: whose
        tokens they are, for those who look on.
        """
        watchers = watchers_of(self)
        if not watchers:
            return self._layer_by_layer(ids, forward, awaited)
        with watched_pass(watchers, segments(), awaited is not None):
            return self._layer_by_layer(ids, forward, awaited)

    def _layer_by_layer(
        self,
        ids: mx.array,
        forward: Callable[[DecoderLayer, mx.array], mx.array],
        awaited: Callable[[int], bool] | None,
    ) -> mx.array:
        x = at("embed", self.embed(ids))
        dequantizes = self._dequantizes(ids.size, x.dtype)
        layer_bytes, queued = ids.size * self._config.numbers_in_work * x.dtype.size, 0
        for i, layer in enumerate(self.layers):
            enter_layer(i)
            x = forward(layer, x)
            queued += layer_bytes
            # MLX allocates ahead of what it computes: on the CPU every layer would be dequantized at once, and a GPU
            # frees nothing that is in its queue. Without a cache this may be training, whose graph is one.
            full = awaited is not None and queued > QUEUED and fused_attention()
            if (dequantizes or full) and (awaited is None or awaited(i)):
                mx.eval(x)
                queued = 0
        enter_layer(None)
        return at("final_norm", self.last_norm(at("final_in", x)))

    def _dequantizes(self, tokens: int, dtype: mx.Dtype) -> bool:
        """Whether some weight of a layer is dequantized for this many tokens."""
        config = self._config
        return config.quantization is not None and tokens >= dequantizing_pays(dtype.size, config.largest_linear)

    def _recompute(self, cache: list[KVCache], long: tuple[bool, ...]) -> None:
        """Recompute the rows of `cache` whose keys are no longer valid, from their ids.

        Rotating the old keys again would not do: values and deeper keys came from the old regime's hidden states.
        """
        sequence, offset = cache[0].sequence, cache[0].offset
        rows = [b for b, now in enumerate(long) if sequence.long is None or now != sequence.long[b]]
        if cache[0].lost:
            rows = list(range(len(long)))
        if not rows:
            return
        sequence.long = None  # until every row is written: an interrupted call starts over
        for layer in cache:
            layer.forget() if layer.lost else layer.narrow()
        for row in rows:
            padding = sequence.left_padding[row] if sequence.left_padding else 0
            state = SequenceState(prompt_length=(offset - padding,))
            state.stands_for = sequence.stands_for or (sequence, row)
            fresh = self.make_cache(state, cache[0].bits)
            for first in range(padding, offset, sequence.recompute_chunk):
                last = min(first + sequence.recompute_chunk, offset)
                self._read(sequence.ids[row : row + 1, first:last], fresh, long[row])
                mx.eval([layer.state for layer in fresh])
            if offset > padding:
                for old, new in zip(cache, fresh, strict=True):
                    old.write_row(row, new)


class Model(nn.Module):
    """A language model: `model(ids, cache=None)`, ids int32 (B, L) -> logits (B, L, vocab_size)."""

    decoder_type: type[Decoder]
    of_family = True  # False: a model of another family, which answers, and whose caches can do less

    def __init__(self, config: Config):
        super().__init__()
        self._config = config
        self.model = self.decoder_type(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=self.head_bias)

    def __call__(self, ids: mx.array, cache: list[KVCache] | None = None) -> mx.array:
        """Logits of every position. `cache`, from `make_cache()`, is extended by `ids` in place."""
        return self.logits(self.model(ids, cache))

    def logits(self, hidden: mx.array, places: Sequence[int] | None = None) -> mx.array:
        """(..., hidden_size) -> (..., vocab_size); call it on the positions you need.

        `places`: which tokens of the last pass these are, where they are not all, for those who look on.
        """
        return at_end(self.model, "logits", self.head(hidden), places)

    def head(self, hidden: mx.array) -> mx.array:
        """`logits` that nobody looks at."""
        if self._config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    @property
    def head_bias(self) -> bool:
        """Whether the layer of logits has a bias."""
        return False

    @property
    def config(self) -> Config:
        return self._config

    @property
    def dtype(self) -> mx.Dtype:
        """The type that it computes in."""
        dtype: mx.Dtype = self.layers[0].input_layernorm.weight.dtype
        return dtype

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    def make_cache(
        self,
        prompt_length: int | Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
        bits: KVBits | None = None,
    ) -> list[KVCache]:
        """An empty cache, one entry a layer.

        `prompt_length`: tokens the prompt will have in the end, if you know (one number, padding included, or each
        row's own): a prompt past the original length then starts in the long regime and nothing is read twice.
        `left_padding`: for a ragged batch, how many padding ids stand in front of each row; they are never seen.
        `bits`: pack keys and values. Raises OptionError if its group size does not divide the head's width.
        """
        if bits is not None and self._config.head_dim % bits.group_size:
            raise OptionError(
                f"kv_group_size {bits.group_size} does not divide head_dim {self._config.head_dim}; give 32"
            )
        if isinstance(prompt_length, int):
            prompt_length = [prompt_length - padding for padding in left_padding or (0,)]
        sequence = SequenceState(
            left_padding=None if left_padding is None else tuple(left_padding),
            prompt_length=None if prompt_length is None else tuple(prompt_length),
        )
        return self.model.make_cache(sequence, bits)


def _permuted(row: mx.array, order: Sequence[int]) -> mx.array:
    """The first tokens of (1, tokens, ...) in another order, the others as they are."""
    first = row[:, mx.array([*order])]
    return first if len(order) == row.shape[1] else mx.concatenate([first, row[:, len(order) :]], axis=1)
